"""What to do about an arm: how to use it now, and what to change in the next study."""

from collections.abc import Sequence
from dataclasses import dataclass

from lorascope.diagnosis.case import Case, is_above
from lorascope.diagnosis.interventions import tell_lower_rank
from lorascope.diagnosis.signals import ArmSignals
from lorascope.diagnosis.words import Cause, point_name, tell
from lorascope.evaluation.sweep_rows import Epoch

# An arm without one to follow is given a quarter of its learning rate: on the pocket base arms with a quarter
# of a diverged arm's gain (lr x alpha / rank x sqrt(rank)) kept style and prompts at a lower strength.
_BLIND_LR_FACTOR = 0.25
_FASTER_LR_FACTOR = 3.0
_CAPTION_DROPOUT = 0.1


# What such arms draw says nothing of what training should give: they are used at no strength.
UNUSABLE: tuple[Cause, ...] = ("numerical", "file_fault")


@dataclass(frozen=True)
class Change:
    """One thing to change in the next study: `arms.lr`, `arms.epochs` and `arms.rank` of this arm, or a key
    of the study.

    `value` is None for what is left to the reader, such as more pictures; `reason` is a sentence.
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


def find_remedy(
    case: Case,
    cause: Cause,
    contributing: Sequence[Cause] = (),
    reference: ArmSignals | None = None,
    prompts: int | None = None,
) -> Remedy:
    """How to use the arm now, by the rule that the verdict goes by, and what to change in the next study.

    `reference` is an arm of a smaller gain that keeps more, whose gain the changes take; `prompts` is the
    least number that would decide what is open.
    """
    changes: list[Change] = []
    # That a lower strength helps goes for other faults too: their own change comes first, by itself.
    others = [other for other in contributing if other != "too_strong"]
    for fault in (cause, *others):
        for change in _changes(case, fault, reference):
            if change.key not in [earlier.key for earlier in changes]:
                changes.append(change)
    if cause in UNUSABLE:
        return Remedy(reason="What this arm draws is not what training should give.", changes=tuple(changes))
    if remark := tell_lower_rank(case.signals, case.thresholds.prompt_loss.value):
        changes.append(Change("arms.rank", None, remark))
    chosen = case.chosen
    if chosen is None:
        reason = "No strength that was drawn has style and keeps the prompts."
        return Remedy(None, None, reason, tuple(changes), prompts)
    if cause == "healthy" and chosen is case.full:
        reason = "Style at a price in prompts that is within the limit."
    else:
        reason = f"{point_name(chosen)}: {tell(chosen.retention)}; {tell(chosen.style)}."
    if case.is_broken(chosen):
        reason += f" But {tell(chosen.discrepancy)}, above the base's: look at the pictures."
    return Remedy(chosen.strength, chosen.epoch, reason, tuple(changes), prompts)


def find_reference(signals: ArmSignals, known: Sequence[tuple[Cause, ArmSignals]]) -> ArmSignals | None:
    """Of arms of its manner whose cause is known, one of a smaller gain that keeps clearly more: a healthy
    one of the largest gain, else the one that keeps the most.
    """
    better = [
        (cause, other)
        for cause, other in known
        if cause in ("healthy", "too_strong", "cannot_tell")
        and other.arm.manner == signals.arm.manner
        and other.arm.gain < 0.95 * signals.arm.gain
        and other.full.style.low is not None
        and other.full.style.low > 0
        and is_above(other.full.retention, signals.full.retention)
    ]
    healthy = [other for cause, other in better if cause == "healthy"]
    if healthy:
        return max(healthy, key=lambda other: other.arm.gain)
    return max(
        (other for _, other in better), key=lambda other: other.full.retention.value or 0.0, default=None
    )


def _changes(case: Case, cause: Cause, reference: ArmSignals | None) -> list[Change]:
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
            lower = case.chosen if case.chosen in signals.lower else case.recovery
            strength = 0.5 if lower is None else lower.strength
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


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")
