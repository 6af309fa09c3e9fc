"""The causes by name, and what causes, signals and points are called in sentences."""

from collections.abc import Mapping
from typing import Literal, get_args

from lorascope.diagnosis.signals import PointSignals, Signal

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


def tell(signal: Signal) -> str:
    """A signal with its value and, in brackets, its interval; a share of the base's in percent."""
    if signal.value is None:
        return f"{signal.name}: not measured"
    if signal.unit == "of the base's":
        return tell_share(signal)
    interval = (
        ""
        if signal.low is None or signal.high is None
        else f" (95 % interval {signal.low:.2g} to {signal.high:.2g})"
    )
    return f"{signal.name} {signal.value:.2g}{interval}"


def tell_share(signal: Signal) -> str:
    """A signal that is a share, in percent, with its interval in brackets."""
    interval = (
        ""
        if signal.low is None or signal.high is None
        else f" (95 % interval {100 * signal.low:.0f} to {100 * signal.high:.0f})"
    )
    return f"{signal.name} {100 * (signal.value or 0.0):.0f} %{interval}"


def why_missing(signal: Signal) -> str:
    """Why there is no value, after `was`."""
    note = signal.note or "not measured"
    return note if note.startswith("not measured") else f"not measured: {note}"


def point_name(point: PointSignals) -> str:
    """A point at the start of a sentence: its strength, and its epoch unless it is the last."""
    epoch = "" if point.epoch == "last" else ", best epoch"
    return f"Strength {point.strength:g}{epoch}"


def capital(sentence: str) -> str:
    """The sentence with a capital letter in front."""
    return sentence[:1].upper() + sentence[1:]
