"""The sweep over strengths of a finished training: drawn, scored, and placed between base and style."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorascope.diagnosis.finished import Finished
from lorascope.evaluation.sampling import latent_shape_of
from lorascope.evaluation.scores import BASE
from lorascope.evaluation.scoring import draw_noise
from lorascope.evaluation.style import Style, measure_style, through_vae
from lorascope.evaluation.sweep import Part, draw_sweep, is_drawn, score_sweep
from lorascope.evaluation.sweep_rows import Point, StyleFacts, Sweep, SweepRow, name_of, write_sweep

_NUM_CONTROLS = 16  # pictures of noise, and white ones


def draw(finished: Finished, progress: Callable[[int], None] = lambda count: None) -> None:
    """Draw the sweep; pictures that are there stay, and adapters are edited only for those that are not."""
    for _, group in itertools.groupby(finished.parts, key=lambda part: part.weights):
        parts = list(group)
        if all(is_drawn(finished.run, part) for part in parts):
            progress(sum(part.num_pictures for part in parts))
        else:
            _draw(finished, parts, progress)


def _draw(finished: Finished, parts: Sequence[Part], progress: Callable[[int], None]) -> None:
    """Draw parts of the same kind of weights. Their bank goes with this function's variables: the next one
    is made once there is room for it.
    """
    shape = latent_shape_of(finished.base, finished.config.data.resolution_px)
    with finished.attached_to(parts[0]) as (bank, places):
        draw_sweep(finished.run, finished.base, bank, places, parts, shape, progress)


def score(finished: Finished, encoder: Any, style_encoder: Any = None) -> Sweep:
    """Score the sweep and place its pictures between base and style; writes `sweep.parquet`.

    `encoder` is a `features.ClipEncoder`. Style is measured in hidden features of its image tower, or of
    `style_encoder`, a `features.StyleEncoder`, where there is one.
    """
    run, parts = finished.run, finished.parts
    encoder = encoder.cached(run.features_safetensors)
    rows, hidden = score_sweep(run, finished.arms, parts, finished.prompts, encoder)
    sweep = Sweep(rows, encoder.identity)
    eye = encoder
    if style_encoder is not None:
        eye = style_encoder.cached(run.style_features_safetensors)
        paths = [run.path / image for image in hidden]
        hidden = dict(zip(hidden, eye.encode_hidden(paths), strict=True))

    def features_of(point: Point) -> NDArray[np.float32]:
        return np.stack([hidden[row.image] for row in sweep.of(point)])

    origin = parts[0].points[0]  # the base at the study's guidance
    style = measure_style(
        features_of(origin),
        _real_features(finished, eye, hidden),
        _controls(finished, eye, features_of, sweep.points, origin),
        [row.prompt for row in sweep.of(origin)],
    )
    controls = {name: control.position for name, control in style.controls.items()}
    facts = StyleFacts(
        auc=style.auc,
        layer=eye.hidden_layer(),
        model=None if style_encoder is None else str(eye.identity["model"]),
        num_real=style.num_real,
        reason=style.reason,
        controls={name: value for name, value in controls.items() if value is not None},
    )
    measured = {point: style.mmd(features_of(point)) for point in sweep.points}
    sweep = replace(
        sweep,
        rows=_with_style(sweep, style, hidden, origin),
        style=facts,
        discrepancies={name_of(point): value for point, value in measured.items() if value is not None},
    )
    write_sweep(run, sweep)
    return sweep


def _real_features(
    finished: Finished, encoder: Any, hidden: Mapping[str, NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Features of the held-out pictures as the base's VAE gives them back."""
    if not finished.heldout_pictures:
        return np.empty((0, len(next(iter(hidden.values())))), np.float32)
    features: NDArray[np.float32] = encoder.encode_hidden(
        through_vae(finished.base, finished.heldout_pictures)
    )
    return features


def _controls(
    finished: Finished,
    encoder: Any,
    features_of: Callable[[Point], NDArray[np.float32]],
    points: Sequence[Point],
    origin: Point,
) -> dict[str, NDArray[np.float32]]:
    """Features of what should not count as style."""
    side_px = finished.config.data.resolution_px
    white = [np.full((side_px, side_px, 3), 255, np.uint8)] * _NUM_CONTROLS
    controls = {
        "noise": encoder.encode_hidden(draw_noise(_NUM_CONTROLS, side_px)),
        "white": encoder.encode_hidden(white),
    }
    for point in points:
        if point.arm == BASE and point != origin:
            controls[f"base at guidance {point.guidance:g}"] = features_of(point)
    return controls


def _with_style(
    sweep: Sweep, style: Style, hidden: Mapping[str, NDArray[np.float32]], origin: Point
) -> tuple[SweepRow, ...]:
    """The rows with their style, where the base drew the same prompt from the same noise."""
    counterparts = {row.place: n for n, row in enumerate(sweep.of(origin))}
    rows = [row for row in sweep.rows if row.kind == "point" and row.place in counterparts]
    positions = style.positions(
        np.stack([hidden[row.image] for row in rows]), [counterparts[row.place] for row in rows]
    )
    if positions is None:
        return sweep.rows
    by_image = {row.image: float(position) for row, position in zip(rows, positions, strict=True)}
    return tuple(
        replace(row, style=by_image.get(row.image)) if row.kind == "point" else row for row in sweep.rows
    )
