"""Strength of the update or rank: an arm that fails at full strength, beside one of its rank at a lower gain.

At one learning rate and alpha = 2 x rank a higher rank has the larger gain, lr x alpha / rank x sqrt(rank):
the two go together. They come apart where a study has the higher rank at the gain of the lower one too.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lorascope.arms import Arm
from lorascope.evaluation.front import Estimate, Front, FrontPoint
from lorascope.evaluation.sentences import amount, count, percent_text
from lorascope.evaluation.statistics import nested_interval

Finding = Literal["strength", "strength and rank", "rank", "open"]
_SAME = 0.01  # gains that differ by less are one


@dataclass(frozen=True)
class GainContrast:
    """What tells strength from rank: arms that fail, arms of their rank at a lower gain, and arms of another
    rank that have that gain. Each are one setting, which varies in its training seed alone.
    """

    failing: tuple[str, ...]
    matched: tuple[str, ...]
    reference: tuple[str, ...]
    finding: Finding
    sentence: str


def contrast_gains(front: Front, arms: Iterable[Arm], resamples: int = 10_000) -> GainContrast | None:
    """The contrast of the setting that fails most at full strength, after the last epoch.

    A setting fails where it is shown to score less than the reference, or than its own rank at the lower
    gain, over the same prompts and training seeds. None where nothing does, or no setting has the gain of
    another rank.
    """
    settings: dict[str, list[Arm]] = {}
    for arm in arms:
        settings.setdefault(arm.but_seed, []).append(arm)
    drawn = [_Setting(front, group) for group in settings.values()]
    found = [
        contrast
        for failing, matched, reference in _triples([setting for setting in drawn if setting.points])
        if (contrast := _contrast(failing, matched, reference, resamples)) is not None
    ]
    return min(found, key=lambda item: item[0])[1] if found else None


class _Setting:
    """Arms that differ in their training seed alone, with their points at strength 1."""

    def __init__(self, front: Front, arms: Sequence[Arm]) -> None:
        self.arms = sorted(arms, key=lambda arm: arm.seed)
        at_full = {item.arm: item for item in front.points if (item.epoch, item.strength) == ("last", 1.0)}
        found = [at_full[arm.name] for arm in self.arms if arm.name in at_full]
        self.points: list[FrontPoint] = found if len(found) == len(self.arms) else []
        self.pooled = next(
            (
                setting.retention
                for setting in front.settings
                if (setting.epoch, setting.strength) == ("last", 1.0) and set(setting.arms) == set(self.names)
            ),
            None,
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(arm.name for arm in self.arms)

    @property
    def title(self) -> str:
        """Its arm's name, of several without the seed."""
        first = self.arms[0]
        return first.name if len(self.arms) == 1 else re.sub(rf"-s{first.seed}$", "", first.name)

    @property
    def retention(self) -> Estimate:
        return self.pooled or self.points[0].retention

    @property
    def seeds(self) -> list[int]:
        return [arm.seed for arm in self.arms]


def _triples(settings: Sequence[_Setting]) -> Iterator[tuple[_Setting, _Setting, _Setting]]:
    """Settings that may fail, with one of the same rank at a lower gain, and another rank's at that gain."""
    for failing in settings:
        for matched in settings:
            for reference in settings:
                ours, lower, other = (item.arms[0] for item in (failing, matched, reference))
                if (
                    ours.rank == lower.rank != other.rank
                    and lower.gain < (1 - _SAME) * ours.gain
                    and abs(other.gain / lower.gain - 1) < _SAME
                    and failing.seeds == matched.seeds == reference.seeds
                ):
                    yield failing, matched, reference


@dataclass(frozen=True)
class _Difference:
    """CLIP points over the same prompts and training seeds, with the 95 % interval."""

    value: float
    low: float
    high: float
    num_prompts: int


def _difference(first: _Setting, second: _Setting, resamples: int) -> _Difference | None:
    """None where there are too few prompts for an interval."""
    tables = [
        [
            {(item.category, item.prompt_index): item.difference for item in point.per_prompt}
            for point in setting.points
        ]
        for setting in (first, second)
    ]
    shared = [
        prompt
        for prompt in tables[0][0]
        if all(run.get(prompt) is not None for runs in tables for run in runs)
    ]
    if not shared:
        return None
    ours, theirs = (np.array([[run[prompt] for prompt in shared] for run in runs], float) for runs in tables)
    interval = nested_interval(ours - theirs, resamples)
    return None if interval is None else _Difference(float((ours - theirs).mean()), *interval, len(shared))


def _contrast(
    failing: _Setting, matched: _Setting, reference: _Setting, resamples: int
) -> tuple[float, GainContrast] | None:
    """How much the failing setting keeps, and the contrast; None where it is not shown to fail."""
    kept = failing.retention.value
    by_gain = _difference(matched, failing, resamples)
    by_both = _difference(reference, failing, resamples)
    by_rank = _difference(reference, matched, resamples)
    if kept is None or by_gain is None or by_both is None or by_rank is None:
        return None
    finding: Finding
    if by_gain.low > 0:
        finding = "strength and rank" if by_rank.low > 0 else "strength"
    elif by_both.low <= 0:
        return None
    else:
        finding = "rank" if by_rank.low > 0 else "open"
    sentence = _say(failing, matched, reference, finding, by_gain)
    return kept, GainContrast(failing.names, matched.names, reference.names, finding, sentence)


def _say(
    failing: _Setting, matched: _Setting, reference: _Setting, finding: Finding, by_gain: _Difference
) -> str:
    runs = len(failing.arms)
    s = "" if runs > 1 else "s"
    lr, lower = failing.arms[0].lr, matched.arms[0].lr
    how = f"lr {lower:g} in place of {lr:g}" if lr != lower else "another alpha"
    basis = f"{by_gain.num_prompts} prompts, {count(runs, 'training run')} each"
    told = (
        f"At strength 1 {failing.title} keep{s} {percent_text(failing.retention)} of the prompts; "
        f"{matched.title}, of the same rank but with the gain of {reference.title} ({how}), keep{s} "
        f"{percent_text(matched.retention)}, "
    )
    shown = f"95 % interval {by_gain.low:+.1f} to {by_gain.high:+.1f}; {basis}"
    if finding in ("strength", "strength and rank"):
        told += f"{amount(by_gain.value)} CLIP points more ({shown}). "
    else:
        told += f"not shown to be more ({by_gain.value:+.1f} CLIP points, {shown}). "
    also = f"{reference.title} keep{s} {percent_text(reference.retention)}"
    told += {
        "strength": "So it is the strength of the update that fails, not the rank",
        "strength and rank": f"So the strength of the update is one cause; {also}, so that rank is another",
        "rank": f"{also}: the strength of the update does not explain it",
        "open": f"{also}: whether strength or rank is the cause cannot be told",
    }[finding]
    if runs == 1 and finding != "open":
        return f"{told}, in these training runs; other training seeds may differ."
    return f"{told}."
