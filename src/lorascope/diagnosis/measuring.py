"""Every signal of a finished training: what its sweep, losses, weights, pictures and files say."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorascope.adapters.bank import Slice
from lorascope.console import Tally, track
from lorascope.data.pictures import open_picture
from lorascope.diagnosis.finished import Finished, Place
from lorascope.diagnosis.interventions import intervention_signals
from lorascope.diagnosis.layers import LayerFigures, summarise
from lorascope.diagnosis.loss_figures import LossFigures, Measured, loss_figures, paired_rise, rise_from_best
from lorascope.diagnosis.losses import count_probes, encode_drawings, measure_tables
from lorascope.diagnosis.nearest import Comparison, compare
from lorascope.diagnosis.read_back import read_back
from lorascope.diagnosis.signals import (
    ArmSignals,
    Fronts,
    Signal,
    copying_signals,
    file_signals,
    find_picture_faults,
    likeness_signal,
    loss_signals,
    make_signal,
    picture_signals,
    sweep_signals,
    training_signals,
    weight_signals,
)
from lorascope.diagnosis.weights import measure_adapters
from lorascope.evaluation.front import FrontPoint
from lorascope.evaluation.scoring import likeness
from lorascope.evaluation.sweep_rows import Point, Sweep, SweepRow
from lorascope.store import read_regular


def measure_arms(
    finished: Finished,
    sweep: Sweep,
    fronts: Fronts,
    chosen: Mapping[str, FrontPoint],
    compared: Mapping[str, Comparison],
    alike: Mapping[str, Signal],
) -> list[ArmSignals]:
    """The signals of every arm of the study; of an arm whose training failed, that it did.

    `fronts` are those of the sweep, `chosen` the points to use the arms at, `compared` and `alike` what
    `compare_arms` and `measure_likeness` give.

    Raises as reading the run folder does.
    """
    run, config = finished.run, finished.config
    names = [arm.name for arm in config.expand_arms()]
    metrics, merges = run.read_metrics(names), run.merges(names)
    losses, rises = measure_all_losses(finished, sweep)
    layers = measure_weights(finished)
    base_faults = find_picture_faults(_pixels(run.path / row.image) for row in sweep.of(sweep.points[0]))
    trained = {arm.name for arm in finished.arms}
    found = []
    for arm in config.expand_arms():
        name = arm.name
        signals = ArmSignals(arm, num_train=len(finished.train), caption_dropout=config.train.caption_dropout)
        fields: dict[str, Any] = training_signals(metrics, name, run.failure(name))
        if name in trained:
            best = rise_from_best(metrics, name)
            drawn = [_pixels(run.path / row.image) for row in at_full_strength(sweep, name)]
            fields |= {"best_epoch": best.best_epoch if best else None}
            fields |= sweep_signals(fronts, name)
            fields |= {"chosen": (chosen[name].epoch, chosen[name].strength) if name in chosen else None}
            fields |= intervention_signals(fronts, name)
            fields |= loss_signals(losses.get(name), rises.get(name) or best)
            fields |= {"layers": tuple(layers.get((name, "last"), ()))}
            fields |= weight_signals(summarise(layers[name, "last"]) if layers.get((name, "last")) else None)
            adapter = finished.adapters.get((name, "last"))
            fields |= file_signals(
                merges.get(name), *(read_back(run, config, arm, adapter) if adapter else (None, None))
            )
            fields |= copying_signals(compared[name].training, compared[name].heldout)
            fields |= {"likeness": alike[name]}
            is_finite = True if drawn else None
            fields |= picture_signals(find_picture_faults(drawn), base_faults, is_finite)
        found.append(replace(signals, **fields))
    return found


def measure_all_losses(
    finished: Finished, sweep: Sweep
) -> tuple[dict[str, LossFigures], dict[str, Measured]]:
    """The losses of every arm's last epoch, and the rise since its best one where that is another."""
    rows = sweep.of(sweep.points[0]) if sweep.points else ()
    prefix = finished.config.sample.prompt_prefix or ""
    paths = [finished.run.path / row.image for row in rows]
    captions = [prefix + row.prompt for row in rows]
    with finished.attached() as (bank, places):
        drawings = encode_drawings(finished.base, paths, captions, keep_text=not bank.adapts_text)
        slices = {_name(place): Slice(index) for place, index in places.items()}
        count = count_probes(len(slices), finished.train, finished.heldout, drawings)
        with track("losses", count, "pictures") as task:
            found = measure_tables(
                finished.base, bank, slices, finished.train, finished.heldout, drawings, task
            )
    arms = [arm.name for arm in finished.arms]
    figures = {
        name: loss_figures(found, _name(place))
        for name in arms
        for place in finished.places
        if place[0] == name and (place[1] == "last" or (name, "last") not in finished.places)
    }
    rises = {
        name: paired_rise(found, _name((name, "last")), _name((name, "best")))
        for name in arms
        if {(name, "last"), (name, "best")} <= set(finished.places)
    }
    return figures, rises


def measure_weights(finished: Finished, tally: Tally | None = None) -> dict[Place, list[LayerFigures]]:
    """The update of every adapter by layer, but of DoRA, whose magnitudes are no update added to a weight."""
    measured = {arm.name for arm in finished.arms if arm.kind != "dora"}
    by_name = {_name(place): place for place in finished.places if place[0] in measured}
    adapters = {name: finished.adapters[place] for name, place in by_name.items()}
    figures = measure_adapters(finished.base.components, adapters, tally=tally)
    return {by_name[name]: layers for name, layers in figures.items()}


def at_full_strength(sweep: Sweep, arm: str) -> tuple[SweepRow, ...]:
    """The pictures of an arm's last epoch at strength 1 under the study's guidance."""
    return sweep.of(Point(arm, "last", 1.0, sweep.points[0].guidance))


def compare_arms(finished: Finished, sweep: Sweep) -> dict[str, Comparison]:
    """How near the drawings of every trained arm at full strength come to training and held-out pictures."""
    kinds = finished.train_pictures, finished.heldout_pictures
    return {
        arm.name: compare(
            [_pixels(finished.run.path / row.image) for row in at_full_strength(sweep, arm.name)], *kinds
        )
        for arm in finished.arms
    }


def measure_likeness(finished: Finished, sweep: Sweep, encoder: Any) -> dict[str, Signal]:
    """How like every trained arm's drawings at full strength are to the training pictures, by `encoder`, a
    `features.ClipEncoder`.
    """
    encoder = encoder.cached(finished.run.features_safetensors)
    pictures = encoder.encode_images(list(finished.train_pictures))

    def measure(rows: Sequence[SweepRow]) -> NDArray[np.float64]:
        return likeness(encoder.encode_images([finished.run.path / row.image for row in rows]), pictures)

    of_base = measure(sweep.of(sweep.points[0]))
    rows = {arm.name: at_full_strength(sweep, arm.name) for arm in finished.arms}
    return {
        name: likeness_signal(measure(own), of_base) if own else make_signal("likeness", None)
        for name, own in rows.items()
    }


def _name(place: Place) -> str:
    return f"{place[0]}, {place[1]} epoch"


def _pixels(path: Path) -> NDArray[np.uint8]:
    return np.asarray(open_picture(read_regular(path)))
