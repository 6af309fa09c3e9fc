"""What denoising losses at fixed noise say about an arm: figures with intervals over pictures.

All is paired over pictures: an arm's loss and the base's are of the same picture, noise and timestep. Losses
are means over timestep bands unless a band is named. `measure_tables` in `diagnosis.losses` makes the tables;
here is what they mean, in plain numbers, so that a report can have it without torch.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorascope.evaluation.statistics import (
    MIN_PROMPTS,
    bootstrap_interval,
    ratio_interval,
    unpaired_interval,
)
from lorascope.evaluation.two_samples import auc, auc_p

HELDOUT, TRAINING, DRAWINGS = "held-out pictures", "training pictures", "drawings of the base"
# The third quarter of the timesteps. Below it captions hardly matter and arms gain most, with and without;
# above it little of a picture is left to predict. An arm whose unconditional prediction drifted shows there.
_GUIDED_BAND = 2
# Of a loss in float32 this is rounding: two orders of computing the same model differ by it.
_ROUNDING = 1e-6
_Values = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A figure over pictures; `note` says why it, or its interval, was not measured."""

    value: float | None
    low: float | None = None  # of the 95 % interval over pictures
    high: float | None = None
    count: int = 0  # pictures it rests on
    note: str | None = None


@dataclass(frozen=True)
class SetLosses:
    """Losses of a set of pictures under the base, then each arm."""

    captioned: _Values  # float64 [1 + arms, pictures, bands]
    uncaptioned: _Values  # the same with the empty caption


@dataclass(frozen=True)
class Losses:
    """All that was measured at fixed noise."""

    names: tuple[str, ...]  # of the arms
    bands: tuple[str, ...]  # their timesteps, such as `0-250`
    train: SetLosses
    heldout: SetLosses
    drawings: SetLosses  # of the base's own drawings, with their prompts as captions
    # Of each model's guidance vector with the base's, float64 [1 + arms, drawings, bands] in [-1, 1]; NaN
    # where the base has none.
    cosines: _Values


@dataclass(frozen=True)
class LossFigures:
    """What losses say about one arm; `dataclasses.asdict` makes it JSON."""

    num_train: int  # pictures that were measured
    num_heldout: int
    num_drawings: int
    # Loss of the arm minus the base's: below 0 where it learned. Without captions, and by timestep band.
    heldout: Measured
    heldout_uncaptioned: Measured
    heldout_bands: Mapping[str, Measured]
    heldout_bands_uncaptioned: Mapping[str, Measured]
    # What the arm gained on held-out pictures without captions, as a share of its gain with them, in the
    # third quarter of the timesteps: lower where the unconditional prediction drifted.
    gain_ratio: Measured
    # How much more the arm gained on training pictures than on held-out ones: above 0 where it overfits.
    train_gap: Measured
    train_gap_uncaptioned: Measured
    # The chance that a training picture gained more than a held-out one: 0.5 in a sound arm, above it where
    # pictures are memorised; with the p-value of exchanging pictures at random.
    member_auc: Measured
    member_p: float | None
    # What a caption lowers the loss by (loss without minus loss with it), of the base and of the arm, and the
    # arm's as a share of the base's.
    base_advantage_drawings: Measured
    advantage_drawings: Measured
    advantage_kept_drawings: Measured
    base_advantage_heldout: Measured
    advantage_heldout: Measured
    advantage_kept_heldout: Measured
    # Cosine of the arm's guidance vector (prediction with caption minus without) with the base's, on the
    # base's drawings: 1 for the base itself, near 0 where guidance points anywhere.
    guidance_cosine: Measured


@np.errstate(invalid="ignore")  # of losses that are not finite, which is said
def loss_figures(losses: Losses, name: str) -> LossFigures:
    """The figures of the arm `name`."""
    model = 1 + losses.names.index(name)
    train, heldout, drawings = losses.train, losses.heldout, losses.drawings
    change = _changes(heldout.captioned, model)  # (pictures, bands)
    change_uncaptioned = _changes(heldout.uncaptioned, model)
    train_change = _changes(train.captioned, model).mean(axis=1)
    train_change_uncaptioned = _changes(train.uncaptioned, model).mean(axis=1)
    heldout_change, heldout_change_uncaptioned = change.mean(axis=1), change_uncaptioned.mean(axis=1)
    member_auc, member_p = _member_auc(train_change, heldout_change)
    return LossFigures(
        num_train=len(train_change),
        num_heldout=len(change),
        num_drawings=drawings.captioned.shape[1],
        heldout=_mean(heldout_change, HELDOUT),
        heldout_uncaptioned=_mean(heldout_change_uncaptioned, HELDOUT),
        heldout_bands=_by_band(losses.bands, change),
        heldout_bands_uncaptioned=_by_band(losses.bands, change_uncaptioned),
        gain_ratio=_ratio(
            -change_uncaptioned[:, _GUIDED_BAND],
            -change[:, _GUIDED_BAND],
            HELDOUT,
            f"no gain to compare: with captions the loss is not shown to be below the base's at timesteps "
            f"{losses.bands[_GUIDED_BAND]}",
        ),
        train_gap=_gap(train_change, heldout_change),
        train_gap_uncaptioned=_gap(train_change_uncaptioned, heldout_change_uncaptioned),
        member_auc=member_auc,
        member_p=member_p,
        base_advantage_drawings=_mean(_advantages(drawings, 0), DRAWINGS),
        advantage_drawings=_mean(_advantages(drawings, model), DRAWINGS),
        advantage_kept_drawings=_advantage_kept(drawings, model, DRAWINGS),
        base_advantage_heldout=_mean(_advantages(heldout, 0), HELDOUT),
        advantage_heldout=_mean(_advantages(heldout, model), HELDOUT),
        advantage_kept_heldout=_advantage_kept(heldout, model, HELDOUT),
        guidance_cosine=_cosine(losses.cosines[0], losses.cosines[model]),
    )


def _changes(losses: _Values, model: int) -> _Values:
    """Loss of a model minus the base's [pictures, bands]; what is rounding is 0."""
    change = losses[model] - losses[0]
    return np.where(np.abs(change) < _ROUNDING * np.abs(losses[0]), 0.0, change)


def _advantages(losses: SetLosses, model: int) -> _Values:
    """What captions lower the loss of each picture by [pictures]."""
    return np.asarray((losses.uncaptioned[model] - losses.captioned[model]).mean(axis=1))


def _counted(count: int, pictures: str) -> str:
    if count == 1:
        pictures = pictures.replace("pictures", "picture").replace("drawings", "drawing")
    return f"{count or 'no'} {pictures}"


def _missing(values: _Values, pictures: str) -> str | None:
    """Why nothing can be said of these values, one a picture."""
    if len(values) < 2:
        return f"{_counted(len(values), pictures)}: at least 2 are needed"
    return None if np.isfinite(values).all() else f"losses on {pictures} are not finite"


def _too_few(count: int, pictures: str) -> str:
    return f"{_counted(count, pictures)}: an interval needs at least {MIN_PROMPTS}"


def _mean(values: _Values, pictures: str) -> Measured:
    if reason := _missing(values, pictures):
        return Measured(None, count=len(values), note=reason)
    mean, interval = float(values.mean()), bootstrap_interval(values)
    if interval is None:
        return Measured(mean, count=len(values), note=_too_few(len(values), pictures))
    return Measured(mean, *interval, count=len(values))


def _by_band(bands: Iterable[str], change: _Values) -> dict[str, Measured]:
    return {band: _mean(change[:, column], HELDOUT) for column, band in enumerate(bands)}


def _gap(train: _Values, heldout: _Values) -> Measured:
    """Mean change on held-out pictures minus that on training pictures."""
    count = min(len(train), len(heldout))
    if reason := _missing(train, TRAINING) or _missing(heldout, HELDOUT):
        return Measured(None, count=count, note=reason)
    gap, interval = float(heldout.mean() - train.mean()), unpaired_interval(heldout, train)
    if interval is None:
        fewer = TRAINING if len(train) < len(heldout) else HELDOUT
        return Measured(gap, count=count, note=_too_few(count, fewer))
    return Measured(gap, *interval, count=count)


def _member_auc(train: _Values, heldout: _Values) -> tuple[Measured, float | None]:
    count = min(len(train), len(heldout))
    if reason := _missing(train, TRAINING) or _missing(heldout, HELDOUT):
        return Measured(None, count=count, note=reason), None
    return Measured(auc(-train, -heldout), count=count), auc_p(-train, -heldout)


def _ratio(numerators: _Values, denominators: _Values, pictures: str, no_ratio: str) -> Measured:
    """Ratio of two means; `no_ratio` says why there is none where the denominator is not shown to be above
    0.
    """
    count = len(numerators)
    if reason := _missing(numerators, pictures) or _missing(denominators, pictures):
        return Measured(None, count=count, note=reason)
    if count < MIN_PROMPTS:
        return Measured(None, count=count, note=f"{count} {pictures}: a ratio needs {MIN_PROMPTS}")
    interval = ratio_interval(numerators, denominators)
    if interval is None or denominators.mean() <= 0:
        return Measured(None, count=count, note=no_ratio)
    return Measured(float(numerators.mean() / denominators.mean()), *interval, count=count)


def _advantage_kept(losses: SetLosses, model: int, pictures: str) -> Measured:
    return _ratio(
        _advantages(losses, model),
        _advantages(losses, 0),
        pictures,
        f"captions are not shown to lower the base's loss on {pictures}",
    )


def _cosine(of_base: _Values, of_arm: _Values) -> Measured:
    """Mean over pictures of the mean over bands, where the base has a guidance vector."""
    is_known = ~np.isnan(of_base)
    has_any = is_known.any(axis=1)
    if len(of_base) and not has_any.any():
        return Measured(None, note="captions do not change the base's predictions on its drawings")
    sums = np.where(is_known, of_arm, 0.0).sum(axis=1)[has_any]
    return _mean(sums / is_known.sum(axis=1)[has_any], DRAWINGS)


@np.errstate(invalid="ignore")
def paired_rise(losses: Losses, last: str, best: str) -> Measured:
    """Held-out loss of the model `last` minus that of `best`, the same arm after its best epoch: above 0
    where it got worse since.
    """
    models = [1 + losses.names.index(name) for name in (last, best)]
    table = losses.heldout.captioned[[models[1], models[0]]]
    return _mean(_changes(table, 1).mean(axis=1), HELDOUT)


@dataclass(frozen=True)
class Rise:
    """Held-out loss of an arm after its last epoch beside the lowest it had, by the training's own probes."""

    best_epoch: int
    best_loss: float
    last_epoch: int
    last_loss: float
    rise: float  # last minus best, from 0


def rise_from_best(metrics: Iterable[Mapping[str, Any]], arm: str) -> Rise | None:
    """How far the held-out loss of an arm rose from its best epoch, from the records of `metrics.jsonl`.

    None where the arm has no probe of held-out pictures. It has no interval: `paired_rise` has one where the
    adapter of the best epoch was kept.
    """
    wanted = {"kind": "probe", "arm": arm, "split": "heldout", "band": "all", "conditional": True}
    losses = {
        record["epoch"]: float(record["loss"])
        for record in metrics
        if all(record.get(key) == value for key, value in wanted.items())
    }
    losses = {epoch: loss for epoch, loss in losses.items() if math.isfinite(loss)}
    if not losses:
        return None
    best, last = min(losses, key=lambda epoch: (losses[epoch], epoch)), max(losses)
    return Rise(best, losses[best], last, losses[last], losses[last] - losses[best])
