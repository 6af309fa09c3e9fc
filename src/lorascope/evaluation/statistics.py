"""Statistics over arrays of values per prompt or picture, or per training seed and prompt: intervals of means
and ratios, sign flips, Holm's adjustment, spreads and power.
"""

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

# Two-sided 5 % and 80 % power: 1.96 + 0.84 standard errors.
POWER_FACTOR = 2.8
POWER_FORMULA = "2.8 x sd / sqrt(n): 80 % power, two-sided 5 %, sd of the per-prompt differences, n prompts"
# With five prompts even a difference of one sign throughout has a sign-flip p of 2 / 2^5 = 0.06: no 95 %
# statement is possible.
MIN_PROMPTS = 6
# Plans stop here: nobody draws more prompts or trains more seeds to tell two arms apart.
MAX_PROMPTS = 10_000
MAX_SEEDS = 1000


@dataclasses.dataclass(frozen=True)
class VarianceComponents:
    """Standard deviations of values over training seeds and prompts: mean + seed + prompt + residual.

    `seed_std` is None with one seed. `prompt_std` then holds all that differs between prompts, and
    `residual_std` is 0.
    """

    seed_std: float | None
    prompt_std: float
    residual_std: float


def bootstrap_interval(
    values: ArrayLike, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Expanded percentile bootstrap interval of the mean of `values` [n] (Hesterberg 2015, section 5.3).

    The percentile interval is too narrow for few values; taking its quantiles further out, where Student's
    interval would lie, mends that: at 50 prompts it widens by 4 %, at 6 by more than a third. The draws
    depend on (seed, n, resamples) alone, so equal inputs give equal bounds. None for fewer than
    `MIN_PROMPTS`.
    """
    sample = np.asarray(values, np.float64)
    if not np.isfinite(sample).all():
        raise ValueError("values must be finite")
    if len(sample) < MIN_PROMPTS:
        return None
    if np.all(sample == sample[0]):
        return float(sample[0]), float(sample[0])
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 4096):
        part = means[start : start + 4096]
        part[:] = sample[generator.integers(0, len(sample), (len(part), len(sample)))].mean(axis=1)
    tail = expanded_tail(len(sample), level)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def expanded_tail(count: int, level: float) -> float:
    """The share to cut from each end of a bootstrap of `count` values, so that it is as wide as Student's
    interval.
    """
    quantile = stats.t.ppf((1 + level) / 2, count - 1) * math.sqrt(count / (count - 1))
    return float(stats.norm.sf(quantile))


def unpaired_interval(
    first: ArrayLike, second: ArrayLike, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Bootstrap interval of the mean of `first` [n] minus that of `second` [m], two samples without pairs.

    Each is resampled alone, and the width is stretched to that of Welch's interval. None where either has
    fewer than `MIN_PROMPTS` values. Raises ValueError where values are not finite.
    """
    samples = [np.asarray(values, np.float64) for values in (first, second)]
    if not all(np.isfinite(sample).all() for sample in samples):
        raise ValueError("values must be finite")
    if min(map(len, samples)) < MIN_PROMPTS:
        return None
    difference = float(samples[0].mean() - samples[1].mean())
    if all(np.all(sample == sample[0]) for sample in samples):
        return difference, difference
    generator = np.random.default_rng(seed)
    means = []
    for sample in samples:
        counts = generator.multinomial(len(sample), np.full(len(sample), 1 / len(sample)), resamples)
        means.append(counts @ (sample - sample.mean()) / len(sample))
    low, high = np.quantile(means[0] - means[1], [(1 - level) / 2, (1 + level) / 2])
    errors = [float(sample.var(ddof=1)) / len(sample) for sample in samples]
    spread = math.sqrt(sum(float(sample.var()) / len(sample) for sample in samples))
    # Welch and Satterthwaite.
    freedom = sum(errors) ** 2 / sum(
        error**2 / (len(sample) - 1) for error, sample in zip(errors, samples, strict=True)
    )
    quantile = float(stats.t.ppf((1 + level) / 2, freedom) / stats.norm.ppf((1 + level) / 2))
    reach = quantile * math.sqrt(sum(errors)) / spread
    return difference + float(low) * reach, difference + float(high) * reach


def ratio_interval(
    numerators: ArrayLike, denominators: ArrayLike, level: float = 0.95
) -> tuple[float, float] | None:
    """Fieller's interval of the mean of `numerators` [n] over that of their paired `denominators` [n].

    It holds each ratio r for which the mean of numerators - r x denominators could be 0 (Fieller 1954). None
    for fewer than `MIN_PROMPTS` pairs, and where the denominators' own mean could be 0: then no ratio can be
    ruled out. Raises ValueError where values are not finite.
    """
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if not (np.isfinite(above).all() and np.isfinite(below).all()):
        raise ValueError("values must be finite")
    count = len(above)
    if count < MIN_PROMPTS:
        return None
    factor = float(stats.t.ppf((1 + level) / 2, count - 1)) ** 2 / count
    (of_above, of_both), (_, of_below) = factor * np.cov(above, below)
    square = float(below.mean() ** 2 - of_below)
    if square <= 0:
        return None
    middle = float(above.mean() * below.mean() - of_both)
    rest = float(above.mean() ** 2 - of_above)
    # Rounding may leave a little below 0 where all ratios are alike.
    reach = math.sqrt(max(0.0, middle**2 - square * rest))
    return (middle - reach) / square, (middle + reach) / square


class Resamples:
    """Bootstrap samples of `count` prompts, drawn once, for many quantities over the same prompts.

    The draws are those of `bootstrap_interval`: functions of (seed, count, resamples).
    """

    def __init__(self, count: int, resamples: int = 10_000, seed: int = 0) -> None:
        self.count = count
        generator = np.random.default_rng(seed)
        # How often each sample holds every prompt, [resamples, count].
        self._times = np.empty((resamples, count), np.uint16)
        for start in range(0, resamples, 4096):
            part = self._times[start : start + 4096]
            drawn = generator.integers(0, count, part.shape) + count * np.arange(len(part))[:, None]
            part[:] = np.bincount(drawn.ravel(), minlength=part.size).reshape(part.shape)

    def means(self, values: ArrayLike) -> NDArray[np.float64]:
        """The mean of `values` [count] in every sample: [resamples]."""
        sample = np.asarray(values, np.float64)
        return np.asarray(self._times @ sample / self.count)

    def interval(self, drawn: NDArray[np.float64], level: float = 0.95) -> tuple[float, float] | None:
        """The expanded percentile interval of a statistic, given its value in every sample.

        None for fewer than `MIN_PROMPTS` prompts.
        """
        if self.count < MIN_PROMPTS:
            return None
        tail = expanded_tail(self.count, level)
        low, high = np.quantile(drawn, [tail, 1 - tail])
        return float(low), float(high)


def nested_interval(
    values: ArrayLike, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Bootstrap interval of the mean of `values` [num_training_seeds, num_prompts] over seeds and prompts.

    A third axis, of draws, is averaged first. For the difference of two arms give the paired differences,
    first minus second at equal seed and prompt. Seeds and prompts are resampled independently, the prompts
    alike in all seeds (Owen 2007), so the interval speaks of other seeds and other prompts. Its width is then
    stretched to Student's with Satterthwaite's degrees of freedom: left as it is, a bootstrap of 2 or 3
    seeds misses the mean in a third or a quarter of all cases where seeds differ. With 2 seeds it is wide,
    and still covers only some 90 %. With one seed it is `bootstrap_interval` over the prompts and says
    nothing of other seeds. None for fewer than `MIN_PROMPTS` prompts. Raises ValueError where `values` are
    empty, not finite or of another shape.
    """
    table = _table(values)
    num_seeds, num_prompts = table.shape
    if num_seeds == 1 or num_prompts < MIN_PROMPTS:
        return bootstrap_interval(table[0], resamples, level, seed)
    mean = float(table.mean())
    if np.all(table == table[0, 0]):
        return mean, mean
    generator = np.random.default_rng(seed)
    seed_counts = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), resamples)
    prompt_counts = generator.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), resamples)
    deviations = ((seed_counts @ (table - mean)) * prompt_counts).sum(axis=1) / table.size
    tail = expanded_tail(num_prompts, level)
    low, high = np.quantile(deviations, [tail, 1 - tail])
    reach = _students_reach(table, level) / (stats.norm.isf(tail) * _bootstrap_std(table))
    return mean + float(low) * reach, mean + float(high) * reach


def variance_components(values: ArrayLike) -> VarianceComponents:
    """How much `values` [num_training_seeds, num_prompts] differ between seeds, prompts, and beyond both.

    A third axis, of draws, is averaged first. Components are those of the two-way analysis of variance; one
    that would be negative is 0. Raises ValueError for fewer than 2 prompts and as `nested_interval` does.
    """
    table = _table(values)
    num_seeds, num_prompts = table.shape
    if num_prompts < 2:
        raise ValueError("1 prompt: its spread needs at least 2, draw more prompts")
    if num_seeds == 1:
        return VarianceComponents(None, float(table[0].std(ddof=1)), 0.0)
    seeds, prompts, residual = _mean_squares(table)
    return VarianceComponents(
        seed_std=math.sqrt(max(0.0, seeds - residual) / num_prompts),
        prompt_std=math.sqrt(max(0.0, prompts - residual) / num_seeds),
        residual_std=math.sqrt(residual),
    )


def _table(values: ArrayLike) -> NDArray[np.float64]:
    table = np.asarray(values, np.float64)
    if table.ndim not in (2, 3) or not table.size:
        raise ValueError(
            f"values of shape {table.shape}: expected seeds x prompts, or seeds x prompts x draws"
        )
    if not np.isfinite(table).all():
        raise ValueError("values must be finite")
    return np.asarray(table.mean(axis=2)) if table.ndim == 3 else table


def _effects(
    table: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """What each seed [s, 1] and prompt [1, p] adds to the mean, and what is left of each value [s, p]."""
    of_seeds = table.mean(axis=1, keepdims=True) - table.mean()
    of_prompts = table.mean(axis=0, keepdims=True) - table.mean()
    return of_seeds, of_prompts, table - table.mean() - of_seeds - of_prompts


def _mean_squares(table: NDArray[np.float64]) -> tuple[float, float, float]:
    """The mean squares of seeds, prompts and residual, for at least 2 of each."""
    num_seeds, num_prompts = table.shape
    of_seeds, of_prompts, rest = (float(np.square(part).sum()) for part in _effects(table))
    return (
        of_seeds * num_prompts / (num_seeds - 1),
        of_prompts * num_seeds / (num_prompts - 1),
        rest / ((num_seeds - 1) * (num_prompts - 1)),
    )


def _bootstrap_std(table: NDArray[np.float64]) -> float:
    """The standard deviation of means under independent resampling of rows and columns, in closed form."""
    num_seeds, num_prompts = table.shape
    of_seeds, of_prompts, rest = (float(np.square(part).sum()) for part in _effects(table))
    return math.sqrt(of_seeds / num_seeds**2 + of_prompts / num_prompts**2 + rest / table.size**2)


def _students_reach(table: NDArray[np.float64], level: float) -> float:
    """Half the width of Student's interval of the mean, its degrees of freedom Satterthwaite's."""
    num_seeds, num_prompts = table.shape
    seeds, prompts, residual = _mean_squares(table)
    # Prompts alone, and what seeds add; where they add nothing their few degrees of freedom don't count.
    variance, uncertainty = prompts, prompts**2 / (num_prompts - 1)
    if seeds > residual:
        variance += seeds - residual
        uncertainty += seeds**2 / (num_seeds - 1)
        uncertainty += residual**2 / ((num_seeds - 1) * (num_prompts - 1))
    if variance == 0:
        return 0.0
    quantile = stats.t.ppf((1 + level) / 2, variance**2 / uncertainty)
    return float(quantile) * math.sqrt(variance / table.size)


def smallest_detectable_effect(
    std: float, num_prompts: int, seed_std: float = 0.0, num_seeds: int = 1, residual_std: float = 0.0
) -> float:
    """The difference that would be seen with 80 % power at two-sided 5 %: 2.8 x std / sqrt(num_prompts).

    `std` is that of the per-prompt differences. Where training seeds count, `seed_std` is that between them
    and `residual_std` what prompts and seeds don't explain (`variance_components` gives all three): the
    standard error is then sqrt(seed_std^2 / num_seeds + std^2 / num_prompts + residual_std^2 / (num_seeds x
    num_prompts)), and the factor grows for few seeds as Student's quantiles do. Infinite for one seed with
    `seed_std` above 0: it says nothing of others.
    """
    effects = _detectable_effects(std, np.array([num_prompts]), seed_std, np.array([num_seeds]), residual_std)
    return float(effects[0])


def prompts_needed(
    effect: float, std: float, seed_std: float = 0.0, num_seeds: int = 1, residual_std: float = 0.0
) -> int | None:
    """The fewest prompts, at least `MIN_PROMPTS`, with which a difference of `effect` would be seen.

    The spreads are those of `smallest_detectable_effect`. None where no number up to `MAX_PROMPTS` would
    do, as when the seeds alone differ by too much. Raises ValueError for an `effect` not above 0.
    """
    numbers = np.arange(MIN_PROMPTS, MAX_PROMPTS + 1)
    found = _detectable_effects(std, numbers, seed_std, np.full_like(numbers, num_seeds), residual_std)
    return _first_within(numbers, found, effect)


def seeds_needed(
    effect: float, std: float, num_prompts: int, seed_std: float, residual_std: float = 0.0
) -> int | None:
    """The fewest training seeds with which a difference of `effect` would be seen in `num_prompts` prompts.

    The spreads are those of `smallest_detectable_effect`. None where no number up to `MAX_SEEDS` would do,
    as when the prompts are too few. Raises ValueError for an `effect` not above 0.
    """
    numbers = np.arange(1, MAX_SEEDS + 1)
    found = _detectable_effects(std, np.full_like(numbers, num_prompts), seed_std, numbers, residual_std)
    return _first_within(numbers, found, effect)


def _detectable_effects(
    std: float,
    num_prompts: NDArray[np.int64],
    seed_std: float,
    num_seeds: NDArray[np.int64],
    residual_std: float,
) -> NDArray[np.float64]:
    of_seeds = seed_std / np.sqrt(num_seeds)
    of_rest = residual_std / np.sqrt(num_seeds * num_prompts)
    error = np.hypot(np.hypot(std / np.sqrt(num_prompts), of_rest), of_seeds)
    if seed_std == 0:
        return np.asarray(POWER_FACTOR * error)
    # Satterthwaite, with the spread between prompts taken as known, as everywhere in this formula.
    freedom = np.maximum(num_seeds - 1, 1) * (error / of_seeds) ** 4
    students = stats.t.ppf(0.975, freedom) + stats.t.ppf(0.8, freedom)
    normal = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    return np.where(num_seeds > 1, POWER_FACTOR * students / normal * error, np.inf)


def _first_within(numbers: NDArray[np.int64], found: NDArray[np.float64], effect: float) -> int | None:
    if not effect > 0:
        raise ValueError(f"a difference of {effect}: no number decides it, it must be above 0")
    within = np.flatnonzero(found <= effect * (1 + 1e-12))
    return int(numbers[within[0]]) if len(within) else None


def sign_flip_p(differences: ArrayLike, resamples: int = 10_000) -> float:
    """Two-sided p-value of the mean under random signs of the per-prompt differences; exact where 2^n <=
    resamples.
    """
    values = np.asarray(differences, np.float64)
    if len(values) < 2 or not values.any():
        return 1.0

    def mean(sample: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        return np.asarray(sample.mean(axis=axis))

    test = stats.permutation_test(
        (values,),
        mean,
        permutation_type="samples",
        n_resamples=resamples,
        batch=4096,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down adjustment (Holm 1979): the running maximum of (m - i) p_(i), at most 1, in the given
    order.
    """
    p = np.asarray(p_values, np.float64)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise ValueError("p-values must be a list of numbers from 0 to 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted
