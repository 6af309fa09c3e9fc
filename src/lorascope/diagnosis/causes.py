"""Why an arm wins or fails: the decision from its signals, in an order that can be read, with a remedy.

What an intervention shows (a lower strength, the base's unconditional prediction, the best epoch) counts more
than what only goes along with a fault. A signal that was not measured decides nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lorascope.diagnosis.signals import ArmSignals, PointSignals, Signal
from lorascope.diagnosis.thresholds import Thresholds
from lorascope.evaluation.statistics import prompts_needed
from lorascope.evaluation.sweep_rows import Epoch

Cause = Literal[
    "healthy",
    "numerical",
    "file_fault",
    "not_learned",
    "diverged",
    "too_strong",
    "unconditional_drift",
    "overfit",
    "cannot_tell",
]
Confidence = Literal["high", "medium", "low"]
CAUSES: tuple[Cause, ...] = get_args(Cause)
# What the causes are called in sentences.
WORDS: Mapping[Cause, str] = {
    "healthy": "healthy",
    "numerical": "numbers that are not finite, or black pictures",
    "file_fault": "a fault in the file",
    "not_learned": "the style was not learned",
    "diverged": "training diverged",
    "too_strong": "too strong at strength 1",
    "unconditional_drift": "the unconditional prediction drifted",
    "overfit": "overfit to the training pictures",
    "cannot_tell": "cannot be told from what was measured",
}
DEFAULT_THRESHOLDS = Thresholds()
# An arm without one to follow is given a quarter of its learning rate: on the pocket base arms with a quarter
# of a diverged arm's gain (lr x alpha / rank x sqrt(rank)) kept style and prompts at a lower strength.
_BLIND_LR_FACTOR = 0.25
_FASTER_LR_FACTOR = 3.0
_CAPTION_DROPOUT = 0.1
# Above this the guidance is nearly the base's: of an arm that hardly moved.
_UNCHANGED_COSINE = 0.9


@dataclass(frozen=True)
class Change:
    """One thing to change in the next study: `arms.lr` and `arms.epochs` of this arm, or a key of the study.

    `value` is None for what a study file cannot do, such as more pictures; `reason` is a sentence.
    """

    key: str
    value: float | int | str | None
    reason: str


@dataclass(frozen=True)
class Remedy:
    """What to do. `strength` and `epoch` say how to use the arm now; None where no way is known.

    `prompts` is the least number of prompts that would decide what is open, None where that is not known.
    """

    strength: float | None = None
    epoch: Epoch | None = None
    reason: str = ""
    changes: tuple[Change, ...] = ()
    prompts: int | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Why an arm is as it is: the first cause that holds, others that hold too, and what speaks for and
    against it, in sentences.
    """

    cause: Cause
    contributing: tuple[Cause, ...]
    confidence: Confidence
    signals: ArmSignals
    evidence_for: tuple[str, ...]
    evidence_against: tuple[str, ...]
    remedy: Remedy

    def as_line(self) -> str:
        """Cause, confidence and how to use the arm now, in a line."""
        also = f"; also {', '.join(WORDS[cause] for cause in self.contributing)}" if self.contributing else ""
        remedy, use = self.remedy, ""
        if remedy.strength is not None:
            epoch = ", epoch of the lowest held-out loss" if remedy.epoch == "best" else ""
            use = f"; use it at strength {remedy.strength:g}{epoch}"
        return f"{WORDS[self.cause]} (confidence {self.confidence}){also}{use}"


@dataclass(frozen=True)
class _Finding:
    """A cause that holds, and why."""

    cause: Cause
    confidence: Confidence
    evidence_for: tuple[str, ...]
    evidence_against: tuple[str, ...] = ()
    prompts: int | None = None


def decide_all(
    arms: Sequence[ArmSignals], thresholds: Thresholds = DEFAULT_THRESHOLDS
) -> dict[str, Diagnosis]:
    """The diagnosis of every arm of a study by name; arms that keep more show others which gain holds."""
    first = {signals.arm.name: decide(signals, thresholds) for signals in arms}
    return {
        signals.arm.name: decide(signals, thresholds, _reference(signals, list(first.values())))
        for signals in arms
    }


def decide(
    signals: ArmSignals, thresholds: Thresholds = DEFAULT_THRESHOLDS, reference: ArmSignals | None = None
) -> Diagnosis:
    """Why one arm is as it is: the first of these that holds; faults further down are contributing.

    `reference` is an arm of a smaller gain that keeps more, whose gain the remedy takes.
    """
    case = _Case(signals, thresholds)
    order = (
        _numerical(case),  # numbers that are not finite say nothing of what was learned
        _file_fault(case),  # what was measured through a wrong file says nothing of training
        _collapsed(case),  # the loss itself is above the base's
        _not_learned(case),  # no style at any strength, and the prompts are not lost
        _healthy(case),  # style, prompts kept, nothing broken
        _undecided(case),  # it is open whether the prompts are kept, or whether there is style
        # From here on the prompts are shown to be lost: by what?
        _overfit(case),
        _drifted(case),
        _diverged(case),
        _too_strong(case),
        _not_identified(case),
    )
    held = [finding for finding in order if finding is not None]
    first, others = held[0], [finding for finding in held[1:] if finding.cause in _FAULTS]
    contributing = tuple(dict.fromkeys(finding.cause for finding in others if finding.cause != first.cause))
    also = tuple(
        f"Also {WORDS[finding.cause]}: {finding.evidence_for[0]}"
        for finding in others
        if finding.cause != first.cause
    )
    return Diagnosis(
        cause=first.cause,
        contributing=contributing,
        confidence=first.confidence,
        signals=signals,
        evidence_for=tuple(map(_capital, (*first.evidence_for, *also))),
        evidence_against=tuple(map(_capital, first.evidence_against)),
        remedy=_remedy(case, first, contributing, reference),
    )


_FAULTS = tuple(cause for cause in CAUSES if cause not in ("healthy", "cannot_tell"))


class _Case:
    """An arm's signals beside the thresholds, in the terms of the decision."""

    def __init__(self, signals: ArmSignals, thresholds: Thresholds) -> None:
        self.signals = signals
        self.thresholds = thresholds
        self.full = signals.full
        self.least_kept = 1 - thresholds.prompt_loss.value - 1e-9

    @property
    def prompts(self) -> Literal["kept", "lost", "open", "not measured"]:
        """What strength 1 does to the prompts: decided only where the whole interval is on one side."""
        return self.prompts_at(self.full)

    def prompts_at(self, point: PointSignals) -> Literal["kept", "lost", "open", "not measured"]:
        """The same of any point."""
        kept = point.retention
        if kept.value is None:
            return "not measured"
        if kept.low is not None and kept.low >= self.least_kept:
            return "kept"
        return "lost" if kept.high is not None and kept.high < self.least_kept else "open"

    def style_at(self, point: PointSignals) -> Literal["gained", "none", "open", "not measured"]:
        """Whether a point has style: its interval above 0 and its value beyond the base's own variation."""
        style, null = point.style, point.style.control or 0.0
        if style.value is None:
            return "not measured"
        if style.low is not None and style.low > 0 and style.value > null:
            return "gained"
        return "none" if style.low is not None and style.value <= max(null, 0.0) else "open"

    def is_broken(self, point: PointSignals) -> bool:
        """Whether the pictures lie farther from the style's than the base's do."""
        found = point.discrepancy
        return found.value is not None and found.control is not None and found.value > found.control

    def is_usable(self, point: PointSignals) -> bool:
        """Whether the estimate keeps the prompts and the style is shown."""
        kept = point.retention.value
        return (
            kept is not None
            and kept >= self.least_kept
            and self.style_at(point) == "gained"
            and not self.is_broken(point)
        )

    def most_style(self, points: Sequence[PointSignals]) -> PointSignals | None:
        """Of the usable points the one with the most style; those shown to keep the prompts come first."""
        usable = [point for point in points if self.is_usable(point)]
        return max(
            usable,
            key=lambda point: (self.prompts_at(point) == "kept", point.style.value or 0.0),
            default=None,
        )

    @property
    def recovery(self) -> PointSignals | None:
        """The lower strength that brings the prompts back with style."""
        return self.most_style(self.signals.lower)

    @property
    def is_beyond_recovery(self) -> bool:
        """Whether lower strengths were measured, and none of them brings the prompts back with style."""
        measured = [
            point for point in self.signals.lower if point.retention.is_measured and point.style.is_measured
        ]
        return bool(measured) and self.recovery is None

    def signs_of_divergence(self) -> dict[str, bool]:
        """Whether intruders and guidance are those of a diverged arm; without what was not measured."""
        thresholds, found = self.thresholds, {}
        if (share := self.signals.intruder_share).value is not None:
            found["intruder_share"] = share.value >= thresholds.intruder_share.value
        if (cosine := self.signals.guidance_cosine).value is not None:
            found["guidance_cosine"] = cosine.value <= thresholds.guidance_cosine.value
        return found


def _numerical(case: _Case) -> _Finding | None:
    signals = case.signals
    wrong = [
        f"No: {signal.name}{f' ({signal.note})' if signal.note else ''}."
        for signal in (
            signals.finished,
            signals.finite_training,
            signals.finite_losses,
            signals.finite_pictures,
        )
        if signal.value == 0
    ]
    black = signals.black
    if black.value is not None and black.value - (black.control or 0.0) > case.thresholds.black.value:
        wrong.append(f"{_share(black)}, of the base's {100 * (black.control or 0.0):.0f} %.")
    return _Finding("numerical", "high", tuple(wrong)) if wrong else None


def _file_fault(case: _Case) -> _Finding | None:
    wrong = [
        f"No: {signal.name}{f' ({signal.note})' if signal.note else ''}."
        for signal in (case.signals.merge_ok, case.signals.file_ok)
        if signal.value == 0
    ]
    return _Finding("file_fault", "high", tuple(wrong)) if wrong else None


def _collapsed(case: _Case) -> _Finding | None:
    heldout, gap = case.signals.heldout, case.signals.train_gap
    if heldout.low is None or heldout.value is None or heldout.low <= 0:
        return None
    if gap.value is not None and gap.low is not None and gap.low > 0 and heldout.value < gap.value:
        return None  # on the training pictures it is below the base's: that is overfitting
    return _Finding("diverged", "high", (f"{_said(heldout)}: it is worse than no adapter.",))


def _not_learned(case: _Case) -> _Finding | None:
    points = (case.full, *case.signals.lower)
    if (
        case.style_at(case.full) != "none"
        or any(case.style_at(point) == "gained" for point in points)
        or case.prompts == "lost"  # that much did change: what follows says by what
    ):
        return None
    signals = case.signals
    said = [
        f"{_said(case.full.style)}; the base's own drawings vary by {case.full.style.control or 0.0:.2f}."
    ]
    against, agreeing = [], case.prompts == "kept"
    if agreeing:
        said.append(f"{_said(case.full.retention)}: the prompts did not change either.")
    if signals.guidance_cosine.value is not None and signals.guidance_cosine.value >= _UNCHANGED_COSINE:
        agreeing = True
        said.append(f"{_said(signals.guidance_cosine)}: guidance is still the base's.")
    if signals.heldout.high is not None:
        if signals.heldout.high >= 0:
            agreeing = True
            said.append(f"{_said(signals.heldout)}: not shown to be below the base's.")
        else:
            against.append(f"{_said(signals.heldout)}: below the base's, as it is in faulty arms too.")
    return _Finding("not_learned", "high" if agreeing else "medium", tuple(said), tuple(against))


def _healthy(case: _Case) -> _Finding | None:
    full = case.full
    if case.prompts != "kept" or case.style_at(full) != "gained" or case.is_broken(full):
        return None
    said = [f"{_said(full.style)}.", f"{_said(full.retention)}."]
    if full.discrepancy.value is None or full.discrepancy.control is None:
        return _Finding(
            "healthy", "medium", tuple(said), ("The distance to real pictures was not measured.",)
        )
    said.append(f"{_said(full.discrepancy)}: not above the base's, {full.discrepancy.control:.3g}.")
    return _Finding("healthy", "high", tuple(said))


def _undecided(case: _Case) -> _Finding | None:
    """Nothing can be told while it is open whether the prompts are kept, or whether there is style."""
    full, state = case.full, case.prompts
    if state == "lost":
        return None
    if state == "not measured":
        return _open(f"Prompt fidelity was {_why(full.retention)}.")
    if state == "open":
        distance = abs((full.retention.value or 0.0) - case.least_kept)
        return _open(
            f"{_said(full.retention)}: whether at least {100 * case.least_kept:.0f} % are kept is open.",
            full.retention,
            distance,
        )
    match case.style_at(full):
        case "not measured":
            return _open(f"The prompts are kept, but style was {_why(full.style)}.")
        case "gained":
            return _open(
                f"Two measures of style disagree: {_said(full.style)}, but {_said(full.discrepancy)}, above "
                f"the base's {full.discrepancy.control or 0.0:.3g}. Look at the pictures."
            )
        case "open":
            distance = abs((full.style.value or 0.0) - (full.style.control or 0.0))
            return _open(f"{_said(full.style)}: whether there is any is open.", full.style, distance)
    return _open(
        f"{_said(full.style)}: none at strength 1, but a lower strength gains some. Look at the pictures."
    )


def _open(sentence: str, signal: Signal | None = None, distance: float = 0.0) -> _Finding:
    """Cannot tell; with the number of prompts that would, where the spread of a signal gives it."""
    needed = None
    if signal is not None and signal.std and distance > 0 and signal.count:
        needed = prompts_needed(distance, signal.std)
    if signal is None or needed is None or needed <= signal.count:
        return _Finding("cannot_tell", "low", (sentence,))
    seeds = math.ceil(needed / signal.count)
    more = (
        f"About {needed:,} prompts instead of {signal.count} would decide it; where there are no more, "
        f"{seeds} sampling seeds of each come near."
    )
    return _Finding("cannot_tell", "low", (sentence, more), prompts=needed)


def _overfit(case: _Case) -> _Finding | None:
    """A gap between training and held-out pictures, and a witness that it does harm."""
    signals, thresholds = case.signals, case.thresholds
    gap, rise, chance, p = signals.train_gap, signals.rise, signals.member_auc, signals.member_p
    if gap.value is None or gap.value < thresholds.train_gap.value or (gap.low is not None and gap.low <= 0):
        return None
    rises = rise.value is not None and rise.value > 0 and (rise.low is None or rise.low > 0)
    is_memorised = (
        chance.value is not None
        and p.value is not None
        and chance.value >= thresholds.member_auc.value
        and p.value <= thresholds.member_p.value
    )
    copies = signals.copying_excess
    has_copies = (
        copies.value is not None
        and copies.value >= thresholds.copying_excess.value
        and copies.low is not None
        and copies.low > 0
    )
    witnesses = [
        *([f"{_said(rise)}."] if rises else []),
        *([f"{_said(chance)}, p {p.value:.2g}."] if is_memorised else []),
        *([f"{_share(copies)}."] if has_copies else []),
    ]
    if not witnesses:
        return None
    against = [] if rises or rise.value is None else [f"{_said(rise)}: the held-out loss did not rise."]
    if gap.low is None:
        confidence: Confidence = "low"
    else:
        clears = gap.low >= thresholds.train_gap.value and (rise.low is not None and rise.low > 0)
        confidence = "high" if clears else "medium"
    said = [f"{_said(gap)}.", *witnesses]
    best = case.signals.at(1.0, "best")
    if best is not None and best.retention.value is not None and case.full.retention.value is not None:
        if _is_above(best.retention, case.full.retention):
            said.append(f"The adapter of the best epoch keeps more: {_said(best.retention)}.")
        elif best.retention.value <= case.full.retention.value:
            against.append(f"The adapter of the best epoch keeps no more: {_said(best.retention)}.")
            confidence = "medium" if confidence == "high" else confidence
    return _Finding("overfit", confidence, tuple(said), tuple(against))


def _drifted(case: _Case) -> _Finding | None:
    """The base's unconditional prediction brings the prompts back, or the arm gained nothing without
    captions.
    """
    thresholds, back, ratio = (
        case.thresholds,
        case.signals.unconditional_recovery,
        case.signals.gain_ratio,
    )
    limit = thresholds.gain_ratio.value
    is_low = ratio.value is not None and ratio.high is not None and ratio.high < limit
    beside = [f"{_said(ratio)}: below {limit:g}."] if is_low else []
    against = [f"{_said(ratio)}: not shown to be below {limit:g}."] if ratio.value is not None else []
    against = [] if is_low else against
    kept = case.full.retention.value
    if case.prompts == "lost" and kept is not None and back.value is not None and back.low is not None:
        needed = thresholds.recovered.value * (1 - kept)
        if back.low > 0 and back.value >= needed:
            swapped = case.signals.base_unconditional
            clears = back.low >= needed or (swapped.low is not None and swapped.low >= case.least_kept)
            said = (f"{_said(back)}, {100 * back.value / (1 - kept):.0f} % of what was lost.", *beside)
            confidence: Confidence = "high" if clears and not against else "medium"
            return _Finding("unconditional_drift", confidence, said, tuple(against))
        if back.high is not None and back.high < needed:
            return None  # the intervention speaks against it, whatever the ratio says
    if not is_low:
        return None
    if back.value is None:
        missing = f"What the base's unconditional prediction brings back was {_why(back)}."
        return _Finding("unconditional_drift", "medium", tuple(beside), (missing,))
    return _Finding("unconditional_drift", "medium", tuple(beside), (f"{_said(back)}: that is open.",))


def _diverged(case: _Case) -> _Finding | None:
    """Weights and guidance went elsewhere, and no lower strength is shown to bring the prompts back."""
    signs = case.signs_of_divergence()
    recovery = case.recovery
    if not signs or not all(signs.values()):
        return None
    if case.prompts == "lost" and recovery is not None and case.prompts_at(recovery) == "kept":
        return None  # an arm that is only too strong: a lower strength shows it
    is_lost = case.prompts == "lost" and case.is_beyond_recovery
    if len(signs) < 2 and not is_lost:
        return None
    said = [f"{_said(getattr(case.signals, key))}." for key in signs]
    against = []
    if is_lost:
        said.append("No lower strength that was drawn brings the prompts back with style.")
    elif recovery is not None:
        against.append(f"{_at(recovery)} may bring the prompts back: {_said(recovery.retention)}.")
    if case.is_broken(case.full):
        said.append(f"{_said(case.full.discrepancy)}: above the base's, {case.full.discrepancy.control:.3g}.")
    elif case.full.discrepancy.value is not None:
        against.append(f"{_said(case.full.discrepancy)}: not above the base's.")
    cosine = case.signals.guidance_cosine
    clears = cosine.high is not None and cosine.high <= case.thresholds.guidance_cosine.value
    confidence: Confidence = "high" if is_lost and clears and len(signs) == 2 else "medium"
    return _Finding("diverged", confidence, tuple(said), tuple(against))


def _too_strong(case: _Case) -> _Finding | None:
    """The prompts are lost at strength 1, and a lower strength brings them back while style stays."""
    recovery = case.recovery
    if case.prompts != "lost" or recovery is None:
        return None
    is_shown = case.prompts_at(recovery) == "kept"
    said = (
        f"{_at(recovery)} brings the prompts back: {_said(recovery.retention)}; {_said(recovery.style)}.",
        f"At strength 1: {_said(case.full.retention)}.",
    )
    against = [] if is_shown else ["That it keeps enough there is its estimate, not its whole interval."]
    signs = [key for key, is_sign in case.signs_of_divergence().items() if is_sign]
    against += [f"{_said(getattr(case.signals, key))}, as in a diverged arm." for key in signs]
    return _Finding("too_strong", "high" if is_shown and not signs else "medium", said, tuple(against))


def _not_identified(case: _Case) -> _Finding:
    """The prompts are lost, and nothing that was measured says by what."""
    full, signals = case.full, case.signals
    said = [f"{_said(full.retention)}: prompts are lost, and nothing that was measured says by what."]
    if case.is_beyond_recovery:
        said.append("No lower strength that was drawn brings the prompts back with style.")
    missing = [
        signal.name
        for signal in (
            full.style,
            signals.unconditional_recovery,
            signals.train_gap,
            signals.gain_ratio,
            signals.guidance_cosine,
            signals.intruder_share,
        )
        if not signal.is_measured
    ]
    if not signals.lower:
        missing.append("lower strengths")
    if missing:
        said.append(f"Not measured: {'; '.join(missing)}.")
    return _Finding("cannot_tell", "low", tuple(said))


def _remedy(
    case: _Case, finding: _Finding, contributing: Sequence[Cause], reference: ArmSignals | None
) -> Remedy:
    """How to use the arm now, and what to change in the next study."""
    changes: list[Change] = []
    # That a lower strength helps goes for other faults too: their own change comes first, by itself.
    others = [cause for cause in contributing if cause != "too_strong"]
    for cause in (finding.cause, *others):
        for change in _changes(case, cause, reference):
            if change.key not in [other.key for other in changes]:
                changes.append(change)
    if finding.cause in ("numerical", "file_fault"):
        return Remedy(reason="What this arm draws is not what training should give.", changes=tuple(changes))
    if finding.cause == "healthy":
        reason = "Style at a price in prompts that is within the limit."
        return Remedy(1.0, "last", reason, tuple(changes))
    best = case.most_style(case.signals.points)
    if best is None:
        reason = "No strength that was drawn has style and keeps the prompts."
        return Remedy(None, None, reason, tuple(changes), finding.prompts)
    reason = f"{_at(best)}: {_said(best.retention)}; {_said(best.style)}."
    return Remedy(best.strength, best.epoch, reason, tuple(changes), finding.prompts)


def _changes(case: _Case, cause: Cause, reference: ArmSignals | None) -> list[Change]:
    """What a cause asks to change in the next study."""
    signals = case.signals
    arm = signals.arm
    match cause:
        case "numerical":
            return [
                Change("arms.lr", _rounded(arm.lr / 2), "Half the learning rate: steps grew beyond numbers."),
                Change("train.max_grad_norm", 1.0, "Clipping bounds a step whose gradient explodes."),
                Change("train.precision", "fp32", "Half precision overflows first."),
            ]
        case "diverged":
            return [_lower_lr(signals, reference)]
        case "too_strong":
            if reference is not None:
                return [_lower_lr(signals, reference)]
            recovery = case.recovery
            strength = 0.5 if recovery is None else recovery.strength
            why = (
                f"The learning rate times {strength:g} gives about the update that keeps the prompts at "
                f"strength {strength:g}. Keep the old one beside it: a higher rate at a lower strength can "
                "give more style."
            )
            return [Change("arms.lr", _rounded(arm.lr * strength), why)]
        case "not_learned":
            return _more_training(signals)
        case "overfit":
            return _less_memory(signals)
        case "unconditional_drift":
            return [_caption_dropout(signals.caption_dropout)]
    return []


def _lower_lr(signals: ArmSignals, reference: ArmSignals | None) -> Change:
    lr = signals.arm.lr
    if reference is None:
        why = "No arm of this study shows which gain holds: a quarter of the learning rate."
        return Change("arms.lr", _rounded(lr * _BLIND_LR_FACTOR), why)
    why = (
        f"The gain lr x alpha / rank x sqrt(rank) is then that of {reference.arm.name}, which keeps more: "
        f"{reference.arm.gain:.2g} instead of {signals.arm.gain:.2g}."
    )
    return Change("arms.lr", _rounded(lr * reference.arm.gain / signals.arm.gain), why)


def _more_training(signals: ArmSignals) -> list[Change]:
    arm = signals.arm
    if signals.best_epoch is not None and signals.best_epoch >= arm.epochs:
        why = "The held-out loss was still falling in the last epoch."
        return [Change("arms.epochs", 2 * arm.epochs, why)]
    why = "Style is within what the base's own drawings vary by: a larger update."
    return [Change("arms.lr", _rounded(arm.lr * _FASTER_LR_FACTOR), why)]


def _less_memory(signals: ArmSignals) -> list[Change]:
    arm, best = signals.arm, signals.best_epoch
    changes = []
    if best is not None and 1 <= best < arm.epochs:
        why = f"The held-out loss was lowest after epoch {best} of {arm.epochs}."
        changes.append(Change("arms.epochs", best, why))
    elif arm.epochs > 1:
        changes.append(Change("arms.epochs", arm.epochs // 2, "Fewer passes over the same pictures."))
    seen = "" if signals.num_train is None else f" {signals.num_train} were trained on."
    changes.append(Change("data.source", None, f"More pictures, or more various ones.{seen}"))
    if not signals.caption_dropout:
        why = "A caption that is at times missing is a worse key to one picture."
        changes.append(Change("train.caption_dropout", _CAPTION_DROPOUT, why))
    return changes


def _caption_dropout(now: float | None) -> Change:
    if not now:
        why = "Without empty captions in training nothing holds the unconditional prediction."
        return Change("train.caption_dropout", _CAPTION_DROPOUT, why)
    why = (
        f"Empty captions, {now:g} of all, train the unconditional prediction itself: none of them. Look at "
        "the pictures whose captions are empty."
    )
    return Change("train.caption_dropout", 0.0, why)


def _reference(signals: ArmSignals, diagnoses: Sequence[Diagnosis]) -> ArmSignals | None:
    """An arm of a smaller gain that keeps clearly more: a healthy one of the largest gain, else the one that
    keeps the most.
    """
    better = [
        other
        for other in diagnoses
        if other.cause in ("healthy", "too_strong", "cannot_tell")
        and other.signals.arm.gain < 0.95 * signals.arm.gain
        and other.signals.full.style.low is not None
        and other.signals.full.style.low > 0
        and _is_above(other.signals.full.retention, signals.full.retention)
    ]
    best = max(
        better,
        key=lambda other: (
            other.cause == "healthy",
            other.signals.arm.gain if other.cause == "healthy" else other.signals.full.retention.value or 0.0,
        ),
        default=None,
    )
    return None if best is None else best.signals


def _is_above(signal: Signal, other: Signal) -> bool:
    """Whether the interval of one lies wholly above that of the other."""
    return signal.low is not None and other.high is not None and signal.low > other.high


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


def _why(signal: Signal) -> str:
    """Why there is no value, after `was`."""
    note = signal.note or "not measured"
    return note if note.startswith("not measured") else f"not measured: {note}"


def _at(point: PointSignals) -> str:
    epoch = "" if point.epoch == "last" else ", best epoch"
    return f"Strength {point.strength:g}{epoch}"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _said(signal: Signal) -> str:
    """A signal with its value and, in brackets, its interval."""
    if signal.value is None:
        return f"{signal.name}: not measured"
    if signal.unit == "of the base's":
        return _share(signal)
    interval = (
        ""
        if signal.low is None or signal.high is None
        else f" (95 % interval {signal.low:.2g} to {signal.high:.2g})"
    )
    return f"{signal.name} {signal.value:.2g}{interval}"


def _share(signal: Signal) -> str:
    interval = (
        ""
        if signal.low is None or signal.high is None
        else f" (95 % interval {100 * signal.low:.0f} to {100 * signal.high:.0f})"
    )
    return f"{signal.name} {100 * (signal.value or 0.0):.0f} %{interval}"
