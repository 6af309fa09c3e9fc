"""The diagnose stage: what arms draw at several strengths, scored, with its place between base and style."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorascope.adapters.bank import AdapterBank, Target
from lorascope.adapters.files import load_adapter
from lorascope.base.loading import Base
from lorascope.evaluation.prompts import Prompt
from lorascope.evaluation.sampling import latent_shape_of
from lorascope.evaluation.scores import BASE
from lorascope.evaluation.scoring import draw_noise
from lorascope.evaluation.style import Style, measure_style, through_vae
from lorascope.evaluation.sweep import Part, draw_sweep, plan_sweep, score_sweep
from lorascope.evaluation.sweep_rows import (
    Epoch,
    Point,
    StyleFacts,
    Sweep,
    SweepRow,
    name_of,
    write_sweep,
)
from lorascope.schema import Arm, StudyConfig
from lorascope.store import RunDir

_NUM_CONTROLS = 16  # pictures of noise, and white ones


@dataclass(frozen=True)
class Material:
    """What is diagnosed, and with what. `real` are held-out pictures, uint8 [height, width, 3]."""

    config: StudyConfig
    run: RunDir
    base: Base
    targets: Sequence[Target]
    arms: Sequence[Arm]
    prompts: Sequence[Prompt]
    real: Sequence[NDArray[np.uint8]]

    @property
    def parts(self) -> list[Part]:
        """The sweep's plan."""
        config = self.config
        return plan_sweep(self.epochs, self.prompts, config.sample, config.diagnose)

    @property
    def epochs(self) -> dict[str, tuple[Epoch, ...]]:
        """The epochs whose adapters are drawn with: the best one only where it is not the last."""
        return {arm.name: epochs_of(self.run, arm, self.config.diagnose.epochs) for arm in self.arms}


def epochs_of(run: RunDir, arm: Arm, wanted: Sequence[Epoch]) -> tuple[Epoch, ...]:
    """Those of `wanted` that an arm has adapters of, each adapter once."""
    best = run.training(arm.name).get("best")
    has_best = isinstance(best, dict) and best.get("epoch") != arm.epochs
    last: tuple[Epoch, ...] = ("last",) if "last" in wanted or not has_best else ()
    return (*last, *(("best",) if "best" in wanted and has_best else ()))


def draw(material: Material, progress: Callable[[int], None] = lambda count: None) -> None:
    """Draw the sweep; pictures that are there stay."""
    places = [(arm, epoch) for arm in material.arms for epoch in material.epochs[arm.name]]
    bank = AdapterBank(material.base.components, material.targets, [arm for arm, _ in places])
    for index, (arm, epoch) in enumerate(places):
        folder = material.run.adapters_dir / arm.name
        bank.load(index, load_adapter(folder / "best" if epoch == "best" else folder))
    shape = latent_shape_of(material.base, material.config.data.resolution_px)
    by_name = {(arm.name, epoch): index for index, (arm, epoch) in enumerate(places)}
    bank.attach()
    try:
        draw_sweep(material.run, material.base, bank, by_name, material.parts, shape, progress)
    finally:
        bank.detach()


def score(material: Material, encoder: Any) -> Sweep:
    """Score the sweep and place its pictures between base and style; writes `sweep.parquet`.

    `encoder` is a `features.ClipEncoder`.
    """
    run, parts = material.run, material.parts
    encoder = encoder.cached(run.features_safetensors)
    rows, hidden = score_sweep(run, material.arms, parts, material.prompts, encoder)
    sweep = Sweep(rows, encoder.identity)

    def features_of(point: Point) -> NDArray[np.float32]:
        return np.stack([hidden[row.image] for row in sweep.of(point)])

    origin = parts[0].points[0]  # the base at the study's guidance
    style = measure_style(
        features_of(origin),
        _real_features(material, encoder, hidden),
        _controls(material, encoder, features_of, sweep.points, origin),
        [row.prompt for row in sweep.of(origin)],
    )
    controls = {name: control.position for name, control in style.controls.items()}
    facts = StyleFacts(
        auc=style.auc,
        layer=encoder.hidden_layer(),
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
    material: Material, encoder: Any, hidden: Mapping[str, NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Features of the held-out pictures as the base's VAE gives them back."""
    if not material.real:
        return np.empty((0, len(next(iter(hidden.values())))), np.float32)
    features: NDArray[np.float32] = encoder.encode_hidden(through_vae(material.base, material.real))
    return features


def _controls(
    material: Material,
    encoder: Any,
    features_of: Callable[[Point], NDArray[np.float32]],
    points: Sequence[Point],
    origin: Point,
) -> dict[str, NDArray[np.float32]]:
    """Features of what should not count as style."""
    side_px = material.config.data.resolution_px
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
