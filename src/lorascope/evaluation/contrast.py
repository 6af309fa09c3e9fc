"""Strength of the update or rank: an arm that loses the prompts, beside one of its rank at a lower gain.

At one learning rate and alpha = 2 x rank a higher rank has the larger gain, lr x alpha / rank x sqrt(rank):
the two go together. They come apart where a study has the higher rank at the gain of the lower one too.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lorascope.arms import Arm
from lorascope.evaluation.front import Front, PromptKey, Values
from lorascope.evaluation.sentences import amount, count
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
    """The contrast of the setting that keeps least of the prompts, after the last epoch.

    Scores are means over all strengths at which the three were drawn: an arm that diverged loses the prompts
    at lower strengths too, and at full strength every arm may. A setting fails where it is shown to score
    less than the reference, or than its own rank at the lower gain, over the same prompts and training seeds.
    None where nothing does, or no setting has the gain of another rank.
    """
    if front.base is None or front.floor is None or front.fidelity_reason is not None:
        return None
    settings: dict[str, list[Arm]] = {}
    for arm in arms:
        settings.setdefault(arm.but_seed, []).append(arm)
    whole = front.base - front.floor
    found = [
        contrast
        for triple in _triples([_Setting(front, group) for group in settings.values()])
        if (contrast := _contrast(*triple, whole, resamples)) is not None
    ]
    return min(found, key=lambda item: item[0])[1] if found else None


class _Setting:
    """Arms that differ in their training seed alone, with their CLIP scores minus the base's."""

    def __init__(self, front: Front, arms: Sequence[Arm]) -> None:
        self.arms = sorted(arms, key=lambda arm: arm.seed)
        # For every arm, by strength and prompt.
        self.scores: list[dict[float, dict[PromptKey, float]]] = [
            {
                point.strength: {
                    (item.category, item.prompt_index): item.difference
                    for item in point.per_prompt
                    if item.difference is not None
                }
                for point in front.of(arm.name)
                if point.epoch == "last"
            }
            for arm in self.arms
        ]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(arm.name for arm in self.arms)

    @property
    def title(self) -> str:
        """Its arm's name, of several without the seed."""
        first = self.arms[0]
        return first.name if len(self.arms) == 1 else re.sub(rf"-s{first.seed}$", "", first.name)

    @property
    def seeds(self) -> list[int]:
        return [arm.seed for arm in self.arms]

    def table(self, strengths: Sequence[float], prompts: Sequence[PromptKey]) -> Values:
        """Scores [arms, prompts], means over strengths."""
        return np.array(
            [[[run[strength][prompt] for strength in strengths] for prompt in prompts] for run in self.scores]
        ).mean(axis=2)


def _triples(settings: Sequence[_Setting]) -> Iterator[tuple[_Setting, _Setting, _Setting]]:
    """Settings that may fail, with one of the same rank at a lower gain, and another rank's at that gain."""
    for failing in settings:
        for matched in settings:
            for reference in settings:
                ours, lower, other = (item.arms[0] for item in (failing, matched, reference))
                if (
                    ours.rank == lower.rank != other.rank
                    and _company(ours) == _company(lower) == _company(other)
                    and lower.gain < (1 - _SAME) * ours.gain
                    and abs(other.gain / lower.gain - 1) < _SAME
                    and failing.seeds == matched.seeds == reference.seeds
                ):
                    yield failing, matched, reference


def _company(arm: Arm) -> tuple[Any, ...]:
    """What arms must share for rank and gain to be all that tells them apart."""
    return arm.manner, arm.batch_size, arm.epochs


@dataclass(frozen=True)
class _Mean:
    """A mean over prompts and training seeds, with its 95 % interval."""

    value: float
    low: float
    high: float

    def as_percent(self, whole: float) -> str:
        """CLIP points minus the base's as what is kept of `whole`, the base's points above the floor."""
        value, low, high = (100 * (1 + points / whole) for points in (self.value, self.low, self.high))
        return f"{value:.0f} % (95 % interval {low:.0f} to {high:.0f} %)"


def _mean(table: Values, resamples: int) -> _Mean | None:
    """None for too few prompts."""
    interval = nested_interval(table, resamples)
    return None if interval is None else _Mean(float(table.mean()), *interval)


def _contrast(
    failing: _Setting, matched: _Setting, reference: _Setting, whole: float, resamples: int
) -> tuple[float, GainContrast] | None:
    """What the failing setting keeps, and the contrast; None where it is not shown to fail."""
    runs = [run for setting in (failing, matched, reference) for run in setting.scores]
    strengths = sorted(set.intersection(*(set(run) for run in runs)))
    if not strengths:
        return None
    prompts = sorted(set.intersection(*(set(run[strength]) for run in runs for strength in strengths)))
    if not prompts:
        return None
    lost, saved, other = (item.table(strengths, prompts) for item in (failing, matched, reference))
    tables = (lost, saved, other, saved - lost, other - lost, other - saved)
    means = [mean for table in tables if (mean := _mean(table, resamples)) is not None]
    if len(means) < len(tables):
        return None
    by_gain, by_both, by_rank = means[3:]
    finding: Finding
    if by_gain.low > 0:
        finding = "strength and rank" if by_rank.low > 0 else "strength"
    elif by_both.low <= 0:
        return None
    else:
        finding = "rank" if by_rank.low > 0 else "open"
    where = f"At strength {strengths[0]:g}"
    if len(strengths) > 1:
        where = f"On average over strengths {strengths[0]:g} to {strengths[-1]:g}"
    basis = f"{len(prompts)} prompts, {count(len(failing.arms), 'training run')} each"
    kept = [mean.as_percent(whole) for mean in means[:3]]
    sentence = f"{where}, {_say((failing, matched, reference), kept, finding, by_gain, basis)}"
    return means[0].value, GainContrast(failing.names, matched.names, reference.names, finding, sentence)


def _say(
    triple: tuple[_Setting, _Setting, _Setting],
    kept: Sequence[str],
    finding: Finding,
    by_gain: _Mean,
    basis: str,
) -> str:
    failing, matched, reference = triple
    is_single = len(failing.arms) == 1
    keep = "keeps" if is_single else "keep"
    lr, lower = failing.arms[0].lr, matched.arms[0].lr
    how = f"lr {lower:g} in place of {lr:g}" if lr != lower else "another alpha"
    told = (
        f"{failing.title} {keep} {kept[0]} of the base's prompt fidelity; {matched.title}, of the same rank "
        f"but with the gain of {reference.title} ({how}), {keep} {kept[1]}, "
    )
    shown = f"95 % interval {by_gain.low:+.1f} to {by_gain.high:+.1f}; {basis}"
    if finding in ("strength", "strength and rank"):
        told += f"{amount(by_gain.value)} CLIP points more ({shown}). "
    else:
        told += f"not shown to be more ({by_gain.value:+.1f} CLIP points, {shown}). "
    also = f"{reference.title} {keep} {kept[2]}"
    told += {
        "strength": "So it is the strength of the update that fails, not the rank",
        "strength and rank": f"So the strength of the update is one cause; {also}, so that rank is another",
        "rank": f"{also}: the strength of the update does not explain it",
        "open": f"{also}: whether strength or rank is the cause cannot be told",
    }[finding]
    if is_single and finding != "open":
        return f"{told}, in these training runs; other training seeds may differ."
    return f"{told}."
