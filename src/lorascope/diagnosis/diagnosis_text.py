"""Diagnoses in words for a terminal."""

from collections.abc import Iterator

from lorascope.diagnosis.causes import Diagnosis
from lorascope.diagnosis.interventions import tell_interventions
from lorascope.diagnosis.record import Keep, Record
from lorascope.diagnosis.remedies import Change


def record_as_text(record: Record) -> str:
    """What is kept, and of every arm the cause, what speaks for and against it, and what to do."""
    parts = [_kept(record.keep), *("\n".join(_lines(arm, found)) for arm, found in record.arms.items())]
    return "\n\n".join(parts)


def _kept(keep: Keep | None) -> str:
    if keep is None:
        return "Keep no arm."
    epoch = "last epoch" if keep.epoch == "last" else "epoch of the lowest held-out loss"
    return f"Keep {keep.arm} at strength {keep.strength:g}, {epoch}."


def _lines(arm: str, found: Diagnosis) -> Iterator[str]:
    yield f"{arm}: {found.as_line()}"
    for heading, sentences in (("for", found.evidence_for), ("against", found.evidence_against)):
        for sentence in sentences:
            yield f"  {heading:<8} {sentence}"
    for sentence in tell_interventions(found.signals):
        yield f"  {'tried':<8} {sentence}"
    for change in found.remedy.changes:
        yield f"  {'next':<8} {_change(change)}"
    if found.remedy.prompts is not None:
        yield f"  {'next':<8} At least {found.remedy.prompts} prompts would decide what is open."


def _change(change: Change) -> str:
    if change.value is None:
        return change.reason
    value = f"{change.value:g}" if isinstance(change.value, int | float) else change.value
    return f"{change.key} = {value}: {change.reason}"
