"""What a diagnosis rests on: an arm's signals, each with its interval and control, or why it is missing.

Builders make signals of what other modules measured; nothing is measured here.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorascope.arms import Arm
from lorascope.diagnosis.layers import LayerFigures, Summary
from lorascope.diagnosis.loss_figures import LossFigures, Measured, Rise
from lorascope.evaluation.copying import COPY_THRESHOLD, Copying
from lorascope.evaluation.front import Estimate, Front, trace_front
from lorascope.evaluation.scores import BASE
from lorascope.evaluation.statistics import MIN_PROMPTS, bootstrap_interval
from lorascope.evaluation.sweep_rows import TRAINED, Discrepancy, Epoch, Sweep, SweepRow

NOT_MEASURED = "not measured"
YES_OR_NO = "yes (1) or no (0)"
# A picture counts as constant where no channel varies by more, and as saturated where so many values of it
# are 0 or 255; of 255 and a share.
_CONSTANT_RANGE = 2
_SATURATED_SHARE = 0.5


@dataclass(frozen=True)
class Signal:
    """One measured thing. `value` is None where it was not measured, and `note` says why.

    `low` and `high` are its 95 % interval, None where there is none; `control` is what it is held against,
    such as the base's own value; `count` the pictures or prompts it rests on, and `std` their spread.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    control: float | None = None
    unit: str = ""
    note: str | None = None
    count: int = 0
    std: float | None = None

    @property
    def is_measured(self) -> bool:
        """Whether there is a value."""
        return self.value is not None


# What each signal is called, and its unit.
_NAMES = {
    "finished": ("training ended without a fault", YES_OR_NO),
    "finite_training": ("training losses are finite", YES_OR_NO),
    "finite_losses": ("losses at fixed noise are finite", YES_OR_NO),
    "finite_pictures": ("pictures are finite", YES_OR_NO),
    "merge_ok": ("merged and unmerged pictures agree", YES_OR_NO),
    "file_ok": ("the exported file, read back, is the adapter", YES_OR_NO),
    "style": ("style gained over the base", "of the way to real pictures"),
    "retention": ("prompt fidelity kept", "of the base's"),
    "discrepancy": ("distance to real pictures", "squared MMD"),
    "base_unconditional": ("prompt fidelity with the base's unconditional prediction", "of the base's"),
    "unconditional_recovery": (
        "prompt fidelity that the base's unconditional prediction brings back",
        "of the base's",
    ),
    "intruder_recovery": ("prompt fidelity that scaled-down intruder directions bring back", "of the base's"),
    "cut_retention": ("prompt fidelity kept when cut to the study's lowest rank", "of the base's"),
    "cut_style": ("style when cut to the study's lowest rank", "of the way to real pictures"),
    "heldout": ("held-out loss minus the base's", "loss"),
    "rise": ("rise of the held-out loss since its best epoch", "loss"),
    "train_gap": ("gain on training pictures beyond that on held-out ones", "loss"),
    "member_auc": ("chance that a training picture gained more than a held-out one", "AUC"),
    "member_p": ("p-value of that chance", "p"),
    "gain_ratio": ("gain without captions over that with them, at timesteps of the third quarter", "ratio"),
    "advantage_kept": ("caption advantage kept on the base's drawings", "of the base's"),
    "guidance_cosine": ("agreement of guidance with the base's", "cosine"),
    "intruder_share": ("intruder directions among the leading ones", "share"),
    "norm_ratio": ("size of the update over the weights', median of layers", "ratio"),
    "copying_excess": ("copies of training pictures beyond those of held-out ones", "share of drawings"),
    "likeness": ("likeness of drawings to the training pictures", "cosine"),
    "black": ("black pictures", "share of drawings"),
    "constant": ("pictures of one colour", "share of drawings"),
    "saturated": ("saturated pictures", "share of drawings"),
}


def make_signal(key: str, value: float | None, note: str | None = None, **others: Any) -> Signal:
    """A signal by its key, such as `train_gap`. Without a value `note` says why; a value that is not finite
    is none.
    """
    name, unit = _NAMES[key]
    if value is not None and not math.isfinite(value):
        value, note = None, f"not finite: {value}"
    others = {name: number for name, number in others.items() if number is not None and math.isfinite(number)}
    if value is None:
        others.pop("low", None), others.pop("high", None)
        note = note or NOT_MEASURED
    return Signal(name, value, unit=unit, note=note, **others)


def _answer(key: str, is_so: bool | None, note: str | None = None) -> Signal:
    return make_signal(key, None if is_so is None else float(is_so), note)


@dataclass(frozen=True)
class PointSignals:
    """The pictures of an arm's adapter of one epoch at one strength."""

    epoch: Epoch
    strength: float
    retention: Signal = field(default=make_signal("retention", None))
    style: Signal = field(default=make_signal("style", None))
    discrepancy: Signal = field(default=make_signal("discrepancy", None))


@dataclass(frozen=True)
class GuidanceSignal:
    """What an arm keeps at strength 1 under another guidance scale, beside the base under that scale."""

    guidance: float
    retention: Signal


@dataclass(frozen=True)
class ArmSignals:
    """All that is known of one arm; what was not measured says why in its note.

    `chosen` is the epoch and strength that the study's rule uses the arm at, None where no point counts.
    `best_epoch` is the one with the lowest held-out loss, `num_train` the training pictures, `layers` the
    update of the last epoch by layer, empty where that was not measured.
    """

    arm: Arm
    best_epoch: int | None = None
    num_train: int | None = None
    caption_dropout: float | None = None
    points: tuple[PointSignals, ...] = ()
    chosen: tuple[Epoch, float] | None = None
    guidances: tuple[GuidanceSignal, ...] = ()
    layers: tuple[LayerFigures, ...] = ()
    finished: Signal = field(default=make_signal("finished", None))
    finite_training: Signal = field(default=make_signal("finite_training", None))
    finite_losses: Signal = field(default=make_signal("finite_losses", None))
    finite_pictures: Signal = field(default=make_signal("finite_pictures", None))
    merge_ok: Signal = field(default=make_signal("merge_ok", None))
    file_ok: Signal = field(default=make_signal("file_ok", None))
    base_unconditional: Signal = field(default=make_signal("base_unconditional", None))
    unconditional_recovery: Signal = field(default=make_signal("unconditional_recovery", None))
    intruder_recovery: Signal = field(default=make_signal("intruder_recovery", None))
    cut_retention: Signal = field(default=make_signal("cut_retention", None))
    cut_style: Signal = field(default=make_signal("cut_style", None))
    heldout: Signal = field(default=make_signal("heldout", None))
    rise: Signal = field(default=make_signal("rise", None))
    train_gap: Signal = field(default=make_signal("train_gap", None))
    member_auc: Signal = field(default=make_signal("member_auc", None))
    member_p: Signal = field(default=make_signal("member_p", None))
    gain_ratio: Signal = field(default=make_signal("gain_ratio", None))
    advantage_kept: Signal = field(default=make_signal("advantage_kept", None))
    guidance_cosine: Signal = field(default=make_signal("guidance_cosine", None))
    intruder_share: Signal = field(default=make_signal("intruder_share", None))
    norm_ratio: Signal = field(default=make_signal("norm_ratio", None))
    copying_excess: Signal = field(default=make_signal("copying_excess", None))
    likeness: Signal = field(default=make_signal("likeness", None))
    black: Signal = field(default=make_signal("black", None))
    constant: Signal = field(default=make_signal("constant", None))
    saturated: Signal = field(default=make_signal("saturated", None))

    @property
    def full(self) -> PointSignals:
        """The adapter of the last epoch at strength 1."""
        return self.at(1.0) or _undrawn(self.points)

    @property
    def lower(self) -> tuple[PointSignals, ...]:
        """The adapter of the last epoch at strengths below 1, the highest first."""
        found = [point for point in self.points if point.epoch == "last" and point.strength < 1]
        return tuple(sorted(found, key=lambda point: -point.strength))

    def at(self, strength: float, epoch: Epoch = "last") -> PointSignals | None:
        """The pictures of an epoch's adapter at a strength; None where they were not drawn."""
        return next((p for p in self.points if (p.epoch, p.strength) == (epoch, strength)), None)

    def by_key(self) -> dict[str, Signal]:
        """Every signal that an arm has once, by its key."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {key: value for key, value in found.items() if isinstance(value, Signal)}


def _undrawn(points: Sequence[PointSignals]) -> PointSignals:
    note = "strength 1 was not drawn" if points else NOT_MEASURED
    return PointSignals(
        "last", 1.0, *(make_signal(key, None, note) for key in ("retention", "style", "discrepancy"))
    )


@dataclass(frozen=True)
class Fronts:
    """The fronts of a sweep: of arms as trained, with the base's unconditional prediction, at other guidance
    scales, and of edited adapters, by their weights.
    """

    own: Front
    base_unconditional: Front | None
    guidances: Mapping[float, Front]
    edited: Mapping[str, Front] = field(default_factory=dict)


def trace_fronts(sweep: Sweep, resamples: int = 10_000, settings: Mapping[str, str] | None = None) -> Fronts:
    """The fronts of a sweep, each against the base's pictures that belong to it; `settings` is as for
    `trace_front`.

    At another guidance scale these are the base's at that scale; the floor stays that of the study's, since
    pictures fit other prompts no better at any scale.
    """
    own = trace_front(sweep, settings, resamples)
    if own.guidance is None:
        return Fronts(own, None, {})
    guidance = own.guidance
    origin = [row for row in sweep.rows if row.kind == "point" and row.arm == BASE]
    of_arms = [row for row in sweep.rows if row.kind == "point" and row.arm != BASE]

    def front(base: Iterable[SweepRow], rows: Iterable[SweepRow]) -> Front | None:
        arms = [replace(row, guidance=guidance, unconditional="own", weights=TRAINED) for row in rows]
        if not arms:
            return None
        drawn = [replace(row, guidance=guidance) for row in base]
        return trace_front(replace(sweep, rows=(*drawn, *arms, *sweep.shuffled)), resamples=resamples)

    swapped = front(
        (row for row in origin if row.guidance == guidance),
        (row for row in of_arms if row.guidance == guidance and row.unconditional == "base"),
    )
    edits = {
        weights: front(
            (row for row in origin if row.guidance == guidance),
            (row for row in of_arms if row.guidance == guidance and row.weights == weights),
        )
        for weights in dict.fromkeys(row.weights for row in of_arms if row.weights != TRAINED)
    }
    scales = sorted({row.guidance for row in of_arms} - {guidance})
    found = {
        scale: front(
            (row for row in origin if row.guidance == scale),
            (row for row in of_arms if row.guidance == scale and row.unconditional == "own"),
        )
        for scale in scales
    }
    return Fronts(own, swapped, _there(found), _there(edits))


def _there(fronts: Mapping[Any, Front | None]) -> dict[Any, Front]:
    return {key: front for key, front in fronts.items() if front is not None}


def sweep_signals(fronts: Fronts | None, arm: str) -> dict[str, Any]:
    """Style, retention and distance at each strength, and what other guidance changes, by the fields of
    `ArmSignals`.
    """
    if fronts is None:
        return {}
    own = fronts.own
    points = tuple(
        PointSignals(
            point.epoch,
            point.strength,
            of_estimate("retention", point.retention, point.num_prompts, 1.0),
            of_estimate("style", point.style, point.num_prompts, own.style_null),
            _of_discrepancy(point.discrepancy, own.base_discrepancy),
        )
        for point in own.of(arm)
    )
    guidances = tuple(
        GuidanceSignal(scale, of_estimate("retention", point.retention, point.num_prompts, 1.0))
        for scale, front in fronts.guidances.items()
        if (point := front.full_strength(arm)) is not None
    )
    return {"points": points, "guidances": guidances}


def of_estimate(key: str, estimate: Estimate, count: int, control: float | None) -> Signal:
    """A signal of a mean over so many prompts."""
    return make_signal(
        key,
        estimate.value,
        estimate.reason,
        low=estimate.low,
        high=estimate.high,
        control=control,
        count=count,
        std=estimate.spread.prompt_std if estimate.spread else None,
    )


def _of_discrepancy(found: Discrepancy | None, base: Discrepancy | None) -> Signal:
    value, control = (None if item is None else item.value for item in (found, base))
    return make_signal("discrepancy", value, control=control)


def _of_mean(key: str, values: NDArray[np.float64]) -> Signal:
    interval = bootstrap_interval(values)
    low, high = interval or (None, None)
    note = None if interval else f"{len(values)} of them: an interval takes at least {MIN_PROMPTS}"
    return make_signal(key, float(values.mean()), note, low=low, high=high, count=len(values))


def loss_signals(figures: LossFigures | None, rise: Measured | Rise | None = None) -> dict[str, Signal]:
    """Signals of the losses at fixed noise.

    `rise` has an interval where the adapter of the best epoch was measured too, and none from the probes of
    training.
    """
    found: dict[str, Signal] = {}
    if figures is not None:
        # Of two pictures or more there is a mean unless a loss is not finite.
        means = (figures.heldout, figures.heldout_uncaptioned, figures.train_gap)
        is_known = [item.value is not None for item in means if item.count > 1]
        found = {
            "finite_losses": _answer("finite_losses", all(is_known) if is_known else None),
            "heldout": _of_measured("heldout", figures.heldout, 0.0),
            "train_gap": _of_measured("train_gap", figures.train_gap, 0.0),
            "member_auc": _of_measured("member_auc", figures.member_auc, 0.5),
            "member_p": make_signal("member_p", figures.member_p, figures.member_auc.note),
            "gain_ratio": _of_measured("gain_ratio", figures.gain_ratio, 1.0),
            "advantage_kept": _of_measured("advantage_kept", figures.advantage_kept_drawings, 1.0),
            "guidance_cosine": _of_measured("guidance_cosine", figures.guidance_cosine, 1.0),
        }
    match rise:
        case Measured():
            found["rise"] = _of_measured("rise", rise, 0.0)
        case Rise():
            note = "by training's own probes, which give no interval"
            found["rise"] = make_signal("rise", rise.rise, note, control=0.0)
    return found


def _of_measured(key: str, found: Measured, control: float) -> Signal:
    return make_signal(
        key,
        found.value,
        found.note,
        low=found.low,
        high=found.high,
        control=control,
        count=found.count,
    )


def weight_signals(summary: Summary | None) -> dict[str, Signal]:
    """Signals of the update's weights; they have no interval, since all layers were looked at."""
    if summary is None:
        return {}
    count = summary.num_layers
    ratio = None if summary.norm_ratio is None else summary.norm_ratio.median
    note = "no adapted layer has a weight other than 0" if ratio is None else None
    return {
        "intruder_share": make_signal("intruder_share", summary.intruder_share, control=0.0, count=count),
        "norm_ratio": make_signal("norm_ratio", ratio, note, count=count),
    }


def training_signals(
    metrics: Iterable[Mapping[str, Any]], arm: str, failed: str | None = None
) -> dict[str, Signal]:
    """Whether an arm's training ended, and whether its losses stayed finite; `failed` is why it did not."""
    losses = [
        record["loss"] for record in metrics if record.get("kind") == "train" and record.get("arm") == arm
    ]
    is_finite = all(map(math.isfinite, losses)) if losses else None
    return {
        "finished": _answer("finished", failed is None, failed),
        "finite_training": _answer("finite_training", is_finite),
    }


def file_signals(
    merge: Mapping[str, Any] | None, is_read_back: bool | None = None, note: str | None = None
) -> dict[str, Signal]:
    """Whether the arm's files hold what was trained.

    `merge` is an arm's entry of `merge_check.json`; `is_read_back` says whether the exported file, read back,
    is the adapter, and `note` what was found.
    """
    found = {"file_ok": _answer("file_ok", is_read_back, note)}
    if merge is not None:
        said = f"relative error {merge['relative_error']:.2g}, at most {merge['tolerance']:g}"
        found["merge_ok"] = _answer("merge_ok", bool(merge["ok"]), said)
    return found


def copying_signals(training: Copying | None, heldout: Copying | None) -> dict[str, Signal]:
    """How many more drawings copy a training picture than a held-out one.

    Both compare the same drawings, with as many pictures of either kind: the ratio of nearest and second
    nearest distance falls with their number.
    """
    if training is None or heldout is None:
        return {}
    copied, chance = ((found.ratios < COPY_THRESHOLD).astype(np.float64) for found in (training, heldout))
    return {"copying_excess": replace(_of_mean("copying_excess", copied - chance), control=heldout.share)}


def likeness_signal(drawn: NDArray[np.float64], of_base: NDArray[np.float64]) -> Signal:
    """How like an arm's drawings are to the training pictures, beside the base's, [n] each."""
    return replace(_of_mean("likeness", drawn), control=float(of_base.mean()))


@dataclass(frozen=True)
class PictureFaults:
    """Shares of some pictures that are black throughout, of one colour, and mostly at 0 and 255."""

    count: int
    black: float
    constant: float
    saturated: float


def find_picture_faults(pictures: Iterable[NDArray[np.uint8]]) -> PictureFaults | None:
    """Shares of broken pictures among uint8 [height, width, 3]; None for no picture.

    Black ones are of one colour too.
    """
    faults = [
        (
            not picture.any(),
            bool((np.ptp(picture.reshape(-1, picture.shape[-1]), axis=0) <= _CONSTANT_RANGE).all()),
            float(((picture == 0) | (picture == 255)).mean()) > _SATURATED_SHARE,
        )
        for picture in pictures
    ]
    if not faults:
        return None
    black, constant, saturated = (float(np.mean(kind)) for kind in zip(*faults, strict=True))
    return PictureFaults(len(faults), black, constant, saturated)


def picture_signals(
    drawn: PictureFaults | None, base: PictureFaults | None, is_finite: bool | None = None
) -> dict[str, Signal]:
    """Signals of broken pictures, with the base's own shares as control."""
    found = {"finite_pictures": _answer("finite_pictures", is_finite)}
    for key in ("black", "constant", "saturated"):
        if drawn is not None:
            control = None if base is None else getattr(base, key)
            found[key] = make_signal(key, getattr(drawn, key), control=control, count=drawn.count)
    return found
