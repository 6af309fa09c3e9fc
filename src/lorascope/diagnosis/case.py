"""An arm's signals beside the thresholds, in the terms of the decision and of the remedy."""

from collections.abc import Sequence
from typing import Literal

from lorascope.diagnosis.signals import ArmSignals, PointSignals, Signal
from lorascope.diagnosis.thresholds import Thresholds


class Case:
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
        """Whether a point has style: its interval above 0 and its value beyond the base's own variation.

        That there is none takes an interval that lies within that variation: what an interval leaves open is
        not shown to be absent.
        """
        style, null = point.style, point.style.control or 0.0
        if style.value is None:
            return "not measured"
        if style.low is not None and style.low > 0 and style.value > null:
            return "gained"
        if style.high is None:
            return "open"
        is_none = style.high <= null if null > 0 else style.value <= 0
        return "none" if is_none else "open"

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
    def chosen(self) -> PointSignals | None:
        """The point that the study's rule uses the arm at."""
        if self.signals.chosen is None:
            return None
        epoch, strength = self.signals.chosen
        return self.signals.at(strength, epoch)

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


def is_above(signal: Signal, other: Signal) -> bool:
    """Whether the interval of one lies wholly above that of the other."""
    return signal.low is not None and other.high is not None and signal.low > other.high
