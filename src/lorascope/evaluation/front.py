"""The front of prompt against style: what each arm keeps and gains at every strength, with intervals.

Retention is the share of the base's prompt fidelity that is left: (mean CLIP - floor) / (base's mean CLIP -
floor), where the floor is what the base's pictures score with other prompts. Style is how far the mean
position lies above the base's. Both compare the same prompts from the same initial noise.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lorascope.evaluation.discriminant import MIN_AUC
from lorascope.evaluation.scores import BASE
from lorascope.evaluation.statistics import (
    MIN_PROMPTS,
    Resamples,
    VarianceComponents,
    nested_interval,
    smallest_detectable_effect,
    variance_components,
)
from lorascope.evaluation.sweep_rows import (
    Discrepancy,
    Epoch,
    Point,
    Sweep,
    SweepRow,
    name_of,
    prompt_means,
)

Place = tuple[str, int, int]  # category, prompt index, sampling seed
PromptKey = tuple[str, int]
Values = NDArray[np.float64]
NO_BASE = "the base has no pictures of these prompts"
NO_STYLE = "no style was measured of these pictures"


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % interval. What is undefined is None, and `reason` says why.

    `spread` is that of the values per prompt, and per training seed where there are several;
    `smallest_detectable` is `POWER_FORMULA` of it.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    spread: VarianceComponents | None = None
    smallest_detectable: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class PromptValue:
    """One prompt of a point, averaged over sampling seeds: CLIP score and style position minus the base's.

    `whole` is what the base's CLIP score lies above the floor. None where that was not measured.
    """

    category: str
    prompt_index: int
    prompt: str
    difference: float | None
    style: float | None
    whole: float | None = None


@dataclass(frozen=True)
class FrontPoint:
    """An arm at one epoch and strength. `style` and `difference` (CLIP points) are minus the base's.

    `clip` is its mean CLIP score. Intervals are paired bootstraps over prompts: base, point and floor are
    resampled together.
    """

    point: Point
    rank: int
    alpha: float | None
    lr: float | None
    training_seed: int | None
    clip: float
    retention: Estimate
    style: Estimate
    difference: Estimate
    num_prompts: int
    num_seeds: int
    discrepancy: Discrepancy | None
    per_prompt: tuple[PromptValue, ...]

    @property
    def arm(self) -> str:
        """The arm's name."""
        return self.point.arm

    @property
    def epoch(self) -> Epoch:
        """Which adapter of the arm draws."""
        return self.point.epoch

    @property
    def strength(self) -> float:
        """The factor on the adapter."""
        return self.point.strength


@dataclass(frozen=True)
class SettingPoint:
    """Arms that differ in their training seed alone, at one epoch and strength.

    Intervals are over training seeds and prompts, so they speak of other training runs of the setting.
    """

    arms: tuple[str, ...]
    training_seeds: tuple[int | None, ...]
    rank: int
    epoch: Epoch
    strength: float
    retention: Estimate
    style: Estimate
    difference: Estimate
    num_prompts: int
    num_seeds: int


@dataclass(frozen=True)
class Front:
    """Every point at the study's guidance, and the settings that were trained with several seeds.

    `base` and `floor` are the base's mean CLIP score and that of its pictures with other prompts.
    `style_null` is the style by which the base's own drawings vary: half the 95 % interval of the difference
    between two means over other sampling seeds of the same prompts, or, with one seed, of its mean over other
    prompts. A point that differs by less may show no more than another drawing of the base would.
    `style_reason` says why no style was measured, `fidelity_reason` why there is no retention; None where
    nothing stands against them.
    """

    points: tuple[FrontPoint, ...]
    settings: tuple[SettingPoint, ...]
    guidance: float | None
    base: float | None
    floor: float | None
    style_null: float | None
    base_discrepancy: Discrepancy | None
    style_reason: str | None
    fidelity_reason: str | None

    def of(self, arm: str) -> tuple[FrontPoint, ...]:
        """The points of an arm, in their order."""
        return tuple(point for point in self.points if point.arm == arm)

    def full_strength(self, arm: str) -> FrontPoint | None:
        """An arm's adapter of the last epoch at strength 1; None where it was not drawn."""
        return next((item for item in self.of(arm) if (item.epoch, item.strength) == ("last", 1)), None)

    def gains_style(self, point: FrontPoint) -> bool:
        """Whether a point's style interval lies above 0, and its style above the base's own variation."""
        style = point.style
        if style.value is None or style.low is None:
            return False
        return style.low > 0 and style.value > (self.style_null or 0.0)


@dataclass(frozen=True)
class _Columns:
    """Values per prompt, averaged over sampling seeds; the base's and the floor's None where they lack."""

    point: FrontPoint
    prompts: tuple[PromptKey, ...]
    clip: Values
    base: Values | None
    floor: Values | None
    styled: tuple[PromptKey, ...]
    style: Values


def trace_front(sweep: Sweep, settings: Mapping[str, str] | None = None, resamples: int = 10_000) -> Front:
    """The front of a sweep at the study's guidance, with each arm's own unconditional branch and weights.

    `settings` says for every arm what it shares with the arms that differ from it in their training seed
    alone, any text; without it arms of one rank, alpha and lr share a setting.
    """
    tracer = _Tracer(sweep, resamples)
    columns = [tracer.measure(point) for point in tracer.rows if tracer.is_own(point)]
    groups: dict[Any, list[_Columns]] = {}
    for item in columns:
        point = item.point
        setting = settings[point.arm] if settings else (point.rank, point.alpha, point.lr)
        groups.setdefault((setting, point.epoch, point.strength), []).append(item)
    return Front(
        points=tuple(item.point for item in columns),
        settings=tuple(tracer.pool(group) for group in groups.values() if len(group) > 1),
        guidance=tracer.guidance,
        base=_mean(prompt_means(list(tracer.base.values()), "clip_score").values()),
        floor=_mean(prompt_means(list(tracer.floor.values()), "clip_score").values()),
        style_null=None if tracer.style_reason else _style_null(list(tracer.base.values())),
        base_discrepancy=sweep.discrepancies.get(name_of(tracer.base_point)),
        style_reason=tracer.style_reason,
        fidelity_reason=tracer.fidelity_reason,
    )


def outer_points(points: Sequence[FrontPoint]) -> tuple[FrontPoint, ...]:
    """The points than which no other keeps at least as much and gains at least as much, and more of one."""
    known = [
        (item, item.retention.value, item.style.value)
        for item in points
        if item.retention.value is not None and item.style.value is not None
    ]
    return tuple(
        item
        for item, kept, style in known
        if not any(
            other_kept >= kept and other_style >= style and (other_kept > kept or other_style > style)
            for _, other_kept, other_style in known
        )
    )


def style_difference(first: FrontPoint, second: FrontPoint, resamples: int = 10_000) -> Estimate:
    """Style of one point minus that of another, over the prompts of both, with its paired interval."""
    theirs = {(item.category, item.prompt_index): item.style for item in second.per_prompt}
    pairs = [(item.style, theirs.get((item.category, item.prompt_index))) for item in first.per_prompt]
    values = np.array([ours - other for ours, other in pairs if ours is not None and other is not None])
    if not len(values):
        return Estimate(reason=NO_STYLE)
    draws = None if len(values) < MIN_PROMPTS else _resamples(len(values), resamples)
    return _mean_estimate(values, draws)


@functools.lru_cache(maxsize=2)
def _resamples(count: int, resamples: int) -> Resamples:
    """The same bootstrap samples for the many differences between points of one sweep."""
    return Resamples(count, resamples)


class _Tracer:
    """The rows of a sweep by point, what they are compared with, and why some numbers are undefined."""

    def __init__(self, sweep: Sweep, resamples: int) -> None:
        self.sweep = sweep
        self.resamples = resamples
        self.draws: dict[int, Resamples] = {}
        self.rows: dict[Point, dict[Place, SweepRow]] = {}
        for row in sweep.rows:
            if row.kind == "point":
                self.rows.setdefault(row.point, {})[row.place] = row
        self.guidance = self._guidance()
        self.base_point = Point(BASE, "last", 0.0, self.guidance or 0.0)
        self.base = self.rows.get(self.base_point, {})
        self.floor = {row.place: row for row in sweep.shuffled}
        self.style_reason = self._style_reason()
        self.fidelity_reason = self._fidelity_reason()

    def is_own(self, point: Point) -> bool:
        """Whether a point is an arm's at the study's guidance, as it was trained."""
        return point.arm != BASE and point.guidance == self.guidance and not point.is_intervention

    def measure(self, point: Point) -> _Columns:
        """A point with its values per prompt, over the prompts and seeds that base and floor have too."""
        rows = self.rows[point]
        places = [
            place for place in rows if all(place in found for found in (self.base, self.floor) if found)
        ]
        ours = [rows[place] for place in places]
        clip, own_style = prompt_means(ours, "clip_score"), prompt_means(ours, "style")
        base_rows = [self.base[place] for place in places] if self.base else []
        base_clip, base_style = prompt_means(base_rows, "clip_score"), prompt_means(base_rows, "style")
        floor_rows = [self.floor[place] for place in places] if self.floor else []
        floor_clip = prompt_means(floor_rows, "clip_score")
        prompts = tuple(clip)
        styled = () if self.style_reason else tuple(prompt for prompt in own_style if prompt in base_style)
        values = _column(clip, prompts)
        base = _column(base_clip, prompts) if base_rows else None
        floor = _column(floor_clip, prompts) if floor_rows else None
        style = _column(own_style, styled) - _column(base_style, styled)
        first = next(iter(rows.values()))
        texts = {(row.category, row.prompt_index): row.prompt for row in ours}
        differences = dict(zip(prompts, values - base, strict=True)) if base is not None else {}
        styles = dict(zip(styled, style, strict=True))
        wholes: dict[PromptKey, float] = {}
        if base is not None and floor is not None:
            wholes = dict(zip(prompts, base - floor, strict=True))
        found = FrontPoint(
            point=point,
            rank=first.rank,
            alpha=first.alpha,
            lr=first.lr,
            training_seed=first.training_seed,
            clip=float(np.mean([row.clip_score for row in rows.values()])),
            retention=self._retention(values, base, floor),
            style=self._mean_estimate(style, self.style_reason or NO_STYLE),
            difference=self._mean_estimate(values - base if base is not None else np.empty(0), NO_BASE),
            num_prompts=len(prompts),
            num_seeds=len({row.seed for row in ours}),
            discrepancy=self.sweep.discrepancies.get(name_of(point)),
            per_prompt=tuple(
                PromptValue(
                    *key, texts[key], *(_number(column.get(key)) for column in (differences, styles, wholes))
                )
                for key in prompts
            ),
        )
        return _Columns(found, prompts, values, base, floor, styled, style)

    def pool(self, group: Sequence[_Columns]) -> SettingPoint:
        """Points of arms that differ in their training seed alone, over the prompts that all of them have."""
        first = group[0]
        prompts = [prompt for prompt in first.prompts if all(prompt in item.prompts for item in group)]
        styled = [prompt for prompt in first.styled if all(prompt in item.styled for item in group)]
        clip = np.stack([_take(item.clip, item.prompts, prompts) for item in group])
        style = np.stack([_take(item.style, item.styled, styled) for item in group])
        base = None if first.base is None else _take(first.base, first.prompts, prompts)
        floor = None if first.floor is None else _take(first.floor, first.prompts, prompts)
        retention = Estimate(reason=self.fidelity_reason or NO_BASE)
        if self.fidelity_reason is None and base is not None and floor is not None and prompts:
            ratio = float((clip.mean() - floor.mean()) / (base.mean() - floor.mean()))
            # To first order: a ratio has no nested bootstrap of its own, and all seeds share the base.
            retention = self._nested_estimate(_linear(ratio, clip - floor, base - floor), NO_BASE)
        return SettingPoint(
            arms=tuple(item.point.arm for item in group),
            training_seeds=tuple(item.point.training_seed for item in group),
            rank=first.point.rank,
            epoch=first.point.epoch,
            strength=first.point.strength,
            retention=retention,
            style=self._nested_estimate(style, self.style_reason or NO_STYLE),
            difference=self._nested_estimate(clip - base if base is not None else np.empty((1, 0)), NO_BASE),
            num_prompts=len(prompts),
            num_seeds=min(item.point.num_seeds for item in group),
        )

    def _guidance(self) -> float | None:
        """The study's guidance scale: that of the floor, else the one with the most pictures."""
        if self.sweep.shuffled:
            return self.sweep.shuffled[0].guidance
        counts: dict[float, int] = {}
        for point, rows in self.rows.items():
            counts[point.guidance] = counts.get(point.guidance, 0) + len(rows)
        return max(counts, key=lambda scale: counts[scale]) if counts else None

    def _style_reason(self) -> str | None:
        style = self.sweep.style
        if style.reason is not None:
            return style.reason
        if style.auc is not None and style.auc < MIN_AUC:
            return f"not separable here: AUC {style.auc:.2f}, must be at least {MIN_AUC:g}"
        if not self.base:
            return NO_BASE
        return None if prompt_means(list(self.base.values()), "style") else NO_STYLE

    def _fidelity_reason(self) -> str | None:
        """Why no retention can be told: without a base above its floor there is nothing to keep."""
        if not self.base:
            return NO_BASE
        places = [place for place in self.base if place in self.floor]
        if not places:
            return "the base's pictures were not scored against other prompts, of which it takes two"
        base = prompt_means([self.base[place] for place in places], "clip_score")
        floor = prompt_means([self.floor[place] for place in places], "clip_score")
        gap = self._mean_estimate(np.array([base[prompt] - floor[prompt] for prompt in base]), NO_BASE)
        lowest = gap.value if gap.low is None else gap.low
        if lowest is not None and lowest > 0:
            return None
        return (
            "the base's pictures were not shown to fit their own prompts better than others: they score "
            f"{_mean(base.values()):.1f}, with other prompts {_mean(floor.values()):.1f}"
        )

    def _draws(self, count: int) -> Resamples | None:
        """The bootstrap samples of so many prompts, drawn once; None for too few."""
        if count < MIN_PROMPTS:
            return None
        if count not in self.draws:
            self.draws[count] = Resamples(count, self.resamples)
        return self.draws[count]

    def _mean_estimate(self, values: Values, missing: str) -> Estimate:
        """The mean of values per prompt; `missing` is the reason where there are none."""
        if not len(values):
            return Estimate(reason=missing)
        return _mean_estimate(values, self._draws(len(values)))

    def _retention(self, clip: Values, base: Values | None, floor: Values | None) -> Estimate:
        """The ratio of two means over the same prompts, both taken from the same bootstrap samples."""
        if self.fidelity_reason is not None or base is None or floor is None or not len(clip):
            return Estimate(reason=self.fidelity_reason or NO_BASE)
        kept, whole = clip - floor, base - floor
        value = float(kept.mean() / whole.mean())
        draws = self._draws(len(clip))
        interval = None if draws is None else draws.interval(draws.means(kept) / draws.means(whole))
        return _estimate(value, interval, _linear(value, kept[None], whole))

    def _nested_estimate(self, table: Values, missing: str) -> Estimate:
        """The mean of values per training seed and prompt, with an interval over both."""
        if not table.size:
            return Estimate(reason=missing)
        return _estimate(float(table.mean()), nested_interval(table, self.resamples), table)


def _mean_estimate(values: Values, draws: Resamples | None) -> Estimate:
    interval = None if draws is None else draws.interval(draws.means(values))
    return _estimate(float(values.mean()), interval, values[None])


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)


def _style_null(rows: Sequence[SweepRow]) -> float | None:
    """How far the base's mean style would move by other drawings: `Front.style_null`."""
    means = prompt_means(rows, "style")
    if len(means) < MIN_PROMPTS:
        return None
    per_prompt: dict[PromptKey, list[float]] = {prompt: [] for prompt in means}
    for row in rows:
        if (key := (row.category, row.prompt_index)) in per_prompt and row.style is not None:
            per_prompt[key].append(row.style)
    count = len(per_prompt)
    num_seeds = min(len(values) for values in per_prompt.values())
    if num_seeds < 2:
        error = float(np.std(list(means.values()), ddof=1)) / math.sqrt(count)
        freedom = count - 1
    else:
        variance = float(np.mean([np.var(values, ddof=1) for values in per_prompt.values()]))
        error = math.sqrt(2 * variance / (num_seeds * count))
        freedom = sum(len(values) - 1 for values in per_prompt.values())
    return float(stats.t.ppf(0.975, freedom)) * error


def _column(means: Mapping[PromptKey, float], prompts: Iterable[PromptKey]) -> Values:
    return np.array([means[prompt] for prompt in prompts], np.float64)


def _linear(ratio: float, kept: Values, whole: Values) -> Values:
    """A ratio of means as a mean: what each seed and prompt adds to it, to first order; [seeds, prompts]."""
    return np.asarray(ratio + (kept - ratio * whole) / whole.mean())


def _estimate(value: float, interval: tuple[float, float] | None, table: Values) -> Estimate:
    """An estimate whose values per training seed and prompt are a table."""
    num_seeds, num_prompts = table.shape
    if num_prompts < 2:
        return Estimate(value, reason=_too_few(num_prompts))
    spread = variance_components(table)
    smallest = smallest_detectable_effect(
        spread.prompt_std, num_prompts, spread.seed_std or 0.0, num_seeds, spread.residual_std
    )
    if interval is None:
        return Estimate(value, None, None, spread, smallest, _too_few(num_prompts))
    return Estimate(value, *interval, spread, smallest)


def _too_few(num_prompts: int) -> str:
    prompts = "1 prompt" if num_prompts == 1 else f"{num_prompts} prompts"
    return f"{prompts}: an interval takes at least {MIN_PROMPTS}"


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _take(values: Values, prompts: Sequence[PromptKey], wanted: Sequence[PromptKey]) -> Values:
    position = {prompt: n for n, prompt in enumerate(prompts)}
    return values[[position[prompt] for prompt in wanted]]
