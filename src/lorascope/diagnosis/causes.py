"""Why an arm wins or fails: the decision from its signals, in an order that can be read, with a remedy.

What an intervention shows (a lower strength, the base's unconditional prediction, the best epoch) counts more
than what only goes along with a fault. Scaled intruders and cut ranks are evidence and decide nothing: no
threshold is learnt for them. A signal that was not measured decides nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lorascope.diagnosis.case import Case, is_above
from lorascope.diagnosis.remedies import Remedy, find_reference, find_remedy
from lorascope.diagnosis.signals import ArmSignals, Signal
from lorascope.diagnosis.thresholds import Thresholds
from lorascope.diagnosis.words import (
    CAUSES,
    WORDS,
    Cause,
    capital,
    point_name,
    tell,
    tell_share,
    why_missing,
)
from lorascope.evaluation.statistics import prompts_needed

Confidence = Literal["high", "medium", "low"]
DEFAULT_THRESHOLDS = Thresholds()
# Above this the guidance is nearly the base's: of an arm that hardly moved.
_UNCHANGED_COSINE = 0.9
_FAULTS = tuple(cause for cause in CAUSES if cause not in ("healthy", "cannot_tell"))


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
    alone = [decide(signals, thresholds) for signals in arms]
    known = [(found.cause, found.signals) for found in alone]
    return {signals.arm.name: decide(signals, thresholds, find_reference(signals, known)) for signals in arms}


def decide(
    signals: ArmSignals, thresholds: Thresholds = DEFAULT_THRESHOLDS, reference: ArmSignals | None = None
) -> Diagnosis:
    """Why one arm is as it is: the first of these that holds; faults further down are contributing.

    `reference` is an arm of a smaller gain that keeps more, whose gain the remedy takes.
    """
    case = Case(signals, thresholds)
    order = (
        _numerical(case),  # numbers that are not finite say nothing of what was learned
        _file_fault(case),  # what was measured through a wrong file says nothing of training
        _collapsed(case),  # the loss itself is above the base's
        _not_learned(case),  # no style at any strength, and the prompts are not lost
        _healthy(case),  # style, prompts kept, nothing broken
        _overfit(case),  # by losses, which show it whether or not the prompts are shown to be lost
        _undecided(case),  # it is open whether the prompts are kept, or whether there is style
        # From here on the prompts are shown to be lost: by what?
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
        evidence_for=tuple(map(capital, (*first.evidence_for, *also))),
        evidence_against=tuple(map(capital, first.evidence_against)),
        remedy=find_remedy(case, first.cause, contributing, reference, first.prompts),
    )


def _numerical(case: Case) -> _Finding | None:
    signals = case.signals
    wrong = _answered_no(
        signals.finished, signals.finite_training, signals.finite_losses, signals.finite_pictures
    )
    black = signals.black
    if black.value is not None and black.value - (black.control or 0.0) > case.thresholds.black.value:
        wrong.append(f"{tell_share(black)}, of the base's {100 * (black.control or 0.0):.0f} %.")
    return _Finding("numerical", "high", tuple(wrong)) if wrong else None


def _file_fault(case: Case) -> _Finding | None:
    wrong = _answered_no(case.signals.merge_ok, case.signals.file_ok)
    return _Finding("file_fault", "high", tuple(wrong)) if wrong else None


def _answered_no(*signals: Signal) -> list[str]:
    """A sentence for each of these yes or no signals that is no."""
    return [
        f"No: {signal.name}{f' ({signal.note})' if signal.note else ''}."
        for signal in signals
        if signal.value == 0
    ]


def _collapsed(case: Case) -> _Finding | None:
    heldout, gap = case.signals.heldout, case.signals.train_gap
    if heldout.low is None or heldout.value is None or heldout.low <= 0:
        return None
    if gap.value is not None and gap.low is not None and gap.low > 0 and heldout.value < gap.value:
        return None  # on the training pictures it is below the base's: that is overfitting
    by_intruders, _ = _of_intruders(case)
    return _Finding("diverged", "high", (f"{tell(heldout)}: it is worse than no adapter.", *by_intruders))


def _not_learned(case: Case) -> _Finding | None:
    points = (case.full, *case.signals.lower)
    if (
        case.style_at(case.full) != "none"
        or any(case.style_at(point) == "gained" for point in points)
        or case.prompts == "lost"  # that much did change: what follows says by what
    ):
        return None
    signals = case.signals
    said = [f"{tell(case.full.style)}; the base's own drawings vary by {case.full.style.control or 0.0:.2f}."]
    against, agreeing = [], case.prompts == "kept"
    if agreeing:
        said.append(f"{tell(case.full.retention)}: the prompts did not change either.")
    if signals.guidance_cosine.value is not None and signals.guidance_cosine.value >= _UNCHANGED_COSINE:
        agreeing = True
        said.append(f"{tell(signals.guidance_cosine)}: guidance is still the base's.")
    if signals.heldout.high is not None:
        if signals.heldout.high >= 0:
            agreeing = True
            said.append(f"{tell(signals.heldout)}: not shown to be below the base's.")
        else:
            against.append(f"{tell(signals.heldout)}: below the base's, as it is in faulty arms too.")
    return _Finding("not_learned", "high" if agreeing else "medium", tuple(said), tuple(against))


def _healthy(case: Case) -> _Finding | None:
    full = case.full
    if case.prompts != "kept" or case.style_at(full) != "gained" or case.is_broken(full):
        return None
    said = [f"{tell(full.style)}.", f"{tell(full.retention)}."]
    if full.discrepancy.value is None or full.discrepancy.control is None:
        return _Finding(
            "healthy", "medium", tuple(said), ("The distance to real pictures was not measured.",)
        )
    said.append(f"{tell(full.discrepancy)}: not above the base's, {full.discrepancy.control:.3g}.")
    return _Finding("healthy", "high", tuple(said))


def _undecided(case: Case) -> _Finding | None:
    """Nothing can be told while it is open whether the prompts are kept, or whether there is style."""
    full, state = case.full, case.prompts
    if state == "lost":
        return None
    if state == "not measured":
        return _open(f"Prompt fidelity was {why_missing(full.retention)}.")
    if state == "open":
        distance = abs((full.retention.value or 0.0) - case.least_kept)
        return _open(
            f"{tell(full.retention)}: whether at least {100 * case.least_kept:.0f} % are kept is open.",
            full.retention,
            distance,
        )
    match case.style_at(full):
        case "not measured":
            return _open(f"The prompts are kept, but style was {why_missing(full.style)}.")
        case "gained":
            return _open(
                f"Two measures of style disagree: {tell(full.style)}, but {tell(full.discrepancy)}, above "
                f"the base's {full.discrepancy.control or 0.0:.3g}. Look at the pictures."
            )
        case "open":
            distance = abs((full.style.value or 0.0) - (full.style.control or 0.0))
            return _open(f"{tell(full.style)}: whether there is any is open.", full.style, distance)
    return _open(
        f"{tell(full.style)}: none at strength 1, but a lower strength gains some. Look at the pictures."
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


def _overfit(case: Case) -> _Finding | None:
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
        *([f"{tell(rise)}."] if rises else []),
        *([f"{tell(chance)}, p {p.value:.2g}."] if is_memorised else []),
        *([f"{tell_share(copies)}."] if has_copies else []),
    ]
    if not witnesses:
        return None
    against = [] if rises or rise.value is None else [f"{tell(rise)}: the held-out loss did not rise."]
    if gap.low is None:
        confidence: Confidence = "low"
    else:
        clears = gap.low >= thresholds.train_gap.value and (rise.low is not None and rise.low > 0)
        confidence = "high" if clears else "medium"
    said = [f"{tell(gap)}.", *witnesses]
    best = case.signals.at(1.0, "best")
    if best is not None and best.retention.value is not None and case.full.retention.value is not None:
        if is_above(best.retention, case.full.retention):
            said.append(f"The adapter of the best epoch keeps more: {tell(best.retention)}.")
        elif best.retention.value <= case.full.retention.value:
            against.append(f"The adapter of the best epoch keeps no more: {tell(best.retention)}.")
            confidence = "medium" if confidence == "high" else confidence
    return _Finding("overfit", confidence, tuple(said), tuple(against))


def _drifted(case: Case) -> _Finding | None:
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
    beside = [f"{tell(ratio)}: below {limit:g}."] if is_low else []
    against = [f"{tell(ratio)}: not shown to be below {limit:g}."] if ratio.value is not None else []
    against = [] if is_low else against
    # Of the prompts that were drawn both ways, which may be some of all.
    lost = 1 - (case.full.retention.value or 0.0) if back.control is None else back.control
    if case.prompts == "lost" and lost > 0 and back.value is not None and back.low is not None:
        needed = thresholds.recovered.value * lost
        if back.low > 0 and back.value >= needed:
            swapped = case.signals.base_unconditional
            clears = back.low >= needed or (swapped.low is not None and swapped.low >= case.least_kept)
            said = (
                f"{tell(back)}, {100 * back.value / lost:.0f} % of what was lost.",
                *beside,
            )
            confidence: Confidence = "high" if clears and not against else "medium"
            return _Finding("unconditional_drift", confidence, said, tuple(against))
        if back.high is not None and back.high < needed:
            return None  # the intervention speaks against it, whatever the ratio says
    if not is_low:
        return None
    if back.value is None:
        missing = f"What the base's unconditional prediction brings back was {why_missing(back)}."
        return _Finding("unconditional_drift", "medium", tuple(beside), (missing,))
    return _Finding("unconditional_drift", "medium", tuple(beside), (f"{tell(back)}: that is open.",))


def _diverged(case: Case) -> _Finding | None:
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
    said = [f"{tell(getattr(case.signals, key))}." for key in signs]
    against = []
    if is_lost:
        said.append("No lower strength that was drawn brings the prompts back with style.")
    elif recovery is not None:
        against.append(f"{point_name(recovery)} may bring the prompts back: {tell(recovery.retention)}.")
    if case.is_broken(case.full):
        said.append(f"{tell(case.full.discrepancy)}: above the base's, {case.full.discrepancy.control:.3g}.")
    elif case.full.discrepancy.value is not None:
        against.append(f"{tell(case.full.discrepancy)}: not above the base's.")
    by_intruders, not_by_them = _of_intruders(case)
    said, against = [*said, *by_intruders], [*against, *not_by_them]
    cosine = case.signals.guidance_cosine
    clears = cosine.high is not None and cosine.high <= case.thresholds.guidance_cosine.value
    confidence: Confidence = "high" if is_lost and clears and len(signs) == 2 else "medium"
    return _Finding("diverged", confidence, tuple(said), tuple(against))


def _too_strong(case: Case) -> _Finding | None:
    """The prompts are lost at strength 1, and a lower strength brings them back while style stays."""
    recovery = case.recovery
    if case.prompts != "lost" or recovery is None:
        return None
    is_shown = case.prompts_at(recovery) == "kept"
    said = (
        f"{point_name(recovery)} brings the prompts back: {tell(recovery.retention)}; "
        f"{tell(recovery.style)}.",
        f"At strength 1: {tell(case.full.retention)}.",
    )
    against = [] if is_shown else ["That it keeps enough there is its estimate, not its whole interval."]
    signs = [key for key, is_sign in case.signs_of_divergence().items() if is_sign]
    against += [f"{tell(getattr(case.signals, key))}, as in a diverged arm." for key in signs]
    against += [f"{sentence[:-1]}, as in a diverged arm." for sentence in _of_intruders(case)[0]]
    return _Finding("too_strong", "high" if is_shown and not signs else "medium", said, tuple(against))


def _of_intruders(case: Case) -> tuple[list[str], list[str]]:
    """What scaling intruder directions down says for and against divergence by them."""
    back = case.signals.intruder_recovery
    if back.low is None or back.high is None:
        return [], []
    if back.low > 0:
        return [f"{tell(back)}."], []
    return [], [f"{tell(back)}: not shown to be above 0."]


def _not_identified(case: Case) -> _Finding:
    """The prompts are lost, and nothing that was measured says by what."""
    full, signals = case.full, case.signals
    said = [f"{tell(full.retention)}: prompts are lost, and nothing that was measured says by what."]
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
