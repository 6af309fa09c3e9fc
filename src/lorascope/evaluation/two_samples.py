"""How far two samples stand apart: AUC of values, squared MMD of features, permutation p-values."""

import itertools
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from lorascope.evaluation.statistics import sign_flip_p

Kernel = Literal["polynomial", "gaussian"]
Groups = tuple[ArrayLike, ArrayLike]

# Relabelings that are compared at once: with a thousand values their largest array takes 8 MB.
_BATCH = 1024


def auc(positive: ArrayLike, negative: ArrayLike) -> float:
    """The chance that a value of `positive` [n] is above one of `negative` [m], ties counted half: 0 to 1.

    0.5 where the two cannot be told apart; the area under the ROC curve. Infinite values take part in the
    order. Raises ValueError where a sample is empty or has NaN.
    """
    ranks, num_positive = _ranks(positive, negative)
    num_negative = len(ranks) - num_positive
    wins = ranks[:num_positive].sum() - num_positive * (num_positive + 1) / 2
    return float(wins / (num_positive * num_negative))


def auc_p(
    positive: ArrayLike,
    negative: ArrayLike,
    groups: Groups | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p-value of `auc(positive, negative)` when labels are exchanged at random.

    `groups` names, for both samples, the group of each value, such as the picture that several losses belong
    to: whole groups are exchanged, as many as were positive stay so. Exact where all relabelings are at most
    `resamples`; otherwise drawn from `seed`, the observed one counted in. Raises ValueError where a sample is
    empty or has NaN, or where a group has values on both sides.
    """
    ranks, num_positive = _ranks(positive, negative)
    num_values = len(ranks)
    labels, is_exact = _relabelings(num_positive, num_values - num_positive, groups, resamples, seed)
    observed = auc(positive, negative)
    above = below = total = 0
    for is_positive in labels:
        counts = is_positive.sum(axis=1)
        wins = is_positive @ ranks - counts * (counts + 1) / 2
        # Ranks are halves and sums of them exact: equal arrangements give equal numbers.
        areas = wins / (counts * (num_values - counts))
        above += int((areas >= observed).sum())
        below += int((areas <= observed).sum())
        total += len(areas)
    return min(1.0, 2 * min(_share(above, total, is_exact), _share(below, total, is_exact)))


def paired_auc_p(positive: ArrayLike, negative: ArrayLike, resamples: int = 10_000) -> float:
    """Two-sided p-value of `auc(positive, negative)` when the two values of a pair [n, n] change places.

    With common ranks the AUC of such an exchange is 0.5 plus a sum of signed rank differences, so this is
    their sign-flip test: exact where 2^n <= resamples. Raises ValueError where the samples differ in length,
    are empty or have NaN.
    """
    ranks, count = _ranks(positive, negative)
    if len(ranks) != 2 * count:
        raise ValueError(f"{count} and {len(ranks) - count} values do not make pairs")
    return sign_flip_p(ranks[:count] - ranks[count:], resamples)


def squared_mmd(first: ArrayLike, second: ArrayLike, kernel: Kernel = "polynomial") -> float:
    """Unbiased squared maximum mean discrepancy of features [n, d] and [m, d] (Gretton 2012, equation 3).

    `polynomial`: (x.y / d + 1)^3, the kernel of KID (Binkowski 2018). `gaussian`: exp(-|x - y|^2 / (2 s^2)),
    s the median distance of all rows together. 0 in the mean for samples of one distribution, so it can be
    negative. Raises ValueError for fewer than 2 rows, different widths, features that are not finite, and
    for `gaussian` where half of all rows or more are alike.
    """
    return _estimate(*_kernel_matrix(first, second, kernel))


def mmd_p(
    first: ArrayLike,
    second: ArrayLike,
    kernel: Kernel = "polynomial",
    groups: Groups | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> float:
    """One-sided p-value of `squared_mmd(first, second, kernel)` when rows change sides at random.

    `groups`, `resamples` and `seed` are those of `auc_p`; where groups leave a side with one row, that
    relabeling is left out. The Gaussian kernel keeps its width, which is that of all rows. Raises ValueError
    as `squared_mmd` and `auc_p` do.
    """
    matrix, num_first = _kernel_matrix(first, second, kernel)
    observed = _estimate(matrix, num_first)
    labels, is_exact = _relabelings(num_first, len(matrix) - num_first, groups, resamples, seed)
    # Two orders of adding up the same numbers differ by roundings of their size.
    slack = 1e-9 * float(np.abs(matrix).mean())
    above = total = 0
    for is_first in labels:
        sizes = is_first.sum(axis=1)
        can_count = (sizes > 1) & (sizes < len(matrix) - 1)
        values = _estimates(matrix, is_first[can_count])
        above += int((values >= observed - slack).sum())
        total += len(values)
    return _share(above, total, is_exact)


def _ranks(positive: ArrayLike, negative: ArrayLike) -> tuple[NDArray[np.float64], int]:
    """Common ranks from 1, ties their mean, of the positive values and then the negative ones."""
    samples = np.asarray(positive, np.float64).ravel(), np.asarray(negative, np.float64).ravel()
    values = np.concatenate(samples)
    if not all(len(sample) for sample in samples) or np.isnan(values).any():
        raise ValueError("both samples need at least one value, and none may be NaN")
    return np.asarray(stats.rankdata(values), np.float64), len(samples[0])


def _kernel_matrix(first: ArrayLike, second: ArrayLike, kernel: Kernel) -> tuple[NDArray[np.float64], int]:
    """The kernel of all rows [n + m, n + m], its diagonal 0 and the mean of the rest taken off, and n.

    A constant in the kernel cancels in the discrepancy; without it less is lost to rounding.
    """
    x, y = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features of shapes {x.shape} and {y.shape}: both need 2 rows or more of one width")
    rows = np.concatenate([x, y])
    if not np.isfinite(rows).all():
        raise ValueError("features must be finite")
    matrix = _polynomial(rows) if kernel == "polynomial" else _gaussian(rows)
    apart = ~np.eye(len(rows), dtype=bool)
    return np.where(apart, matrix - matrix[apart].mean(), 0.0), len(x)


def _polynomial(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return (rows @ rows.T / rows.shape[1] + 1) ** 3


def _gaussian(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = rows - rows.mean(axis=0)
    products = centred @ centred.T
    squares = np.diag(products)
    distances = np.maximum(squares[:, None] + squares - 2 * products, 0.0)
    width = float(np.median(np.sqrt(distances[np.triu_indices(len(rows), 1)])))
    # What rounding leaves of a distance of 0 is no width.
    if width**2 <= 1e-12 * squares.mean():
        raise ValueError("half of the rows or more are alike: no width for a Gaussian kernel")
    return np.asarray(np.exp(-distances / (2 * width**2)))


def _estimate(matrix: NDArray[np.float64], num_first: int) -> float:
    is_first = np.arange(len(matrix)) < num_first
    return float(_estimates(matrix, is_first[None])[0])


def _estimates(matrix: NDArray[np.float64], is_first: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The discrepancy of each way [r, n + m] to take rows as the first sample."""
    labels = is_first.astype(np.float64)
    num_first = labels.sum(axis=1)
    num_second = len(matrix) - num_first
    within_first = ((labels @ matrix) * labels).sum(axis=1)
    across = labels @ matrix.sum(axis=1) - within_first
    within_second = matrix.sum() - within_first - 2 * across
    return np.asarray(
        within_first / (num_first * (num_first - 1))
        + within_second / (num_second * (num_second - 1))
        - 2 * across / (num_first * num_second)
    )


def _relabelings(
    num_first: int, num_second: int, groups: Groups | None, resamples: int, seed: int
) -> tuple[Iterator[NDArray[np.bool_]], bool]:
    """Which values [r, n + m] are of the first sample, in batches, and whether these are all the ways."""
    if groups is None:
        members = np.arange(num_first + num_second)
        num_first_groups = num_first
    else:
        first, second = (np.asarray(names).ravel().tolist() for names in groups)
        if (len(first), len(second)) != (num_first, num_second):
            raise ValueError(f"{len(first)} and {len(second)} groups for {num_first} and {num_second} values")
        if shared := set(first) & set(second):
            raise ValueError(f"group {min(shared, key=str)!r} has values in both samples")
        positions = {name: position for position, name in enumerate(dict.fromkeys([*first, *second]))}
        members = np.array([positions[name] for name in [*first, *second]])
        num_first_groups = len(set(first))
    num_groups = int(members.max()) + 1
    is_exact = math.comb(num_groups, num_first_groups) <= resamples
    chosen = (
        _combinations(num_groups, num_first_groups)
        if is_exact
        else _random_choices(num_groups, num_first_groups, resamples, seed)
    )
    return (batch[:, members] for batch in chosen), is_exact


def _combinations(count: int, size: int) -> Iterator[NDArray[np.bool_]]:
    ways = itertools.combinations(range(count), size)
    while batch := list(itertools.islice(ways, _BATCH)):
        chosen = np.zeros((len(batch), count), bool)
        np.put_along_axis(chosen, np.array(batch), True, axis=1)
        yield chosen


def _random_choices(count: int, size: int, resamples: int, seed: int) -> Iterator[NDArray[np.bool_]]:
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, _BATCH):
        rows = np.tile(np.arange(count) < size, (min(_BATCH, resamples - start), 1))
        yield generator.permuted(rows, axis=1)


def _share(hits: int, total: int, is_exact: bool) -> float:
    """A p-value: the share of all relabelings, or of those drawn with the observed one counted in."""
    return hits / total if is_exact else (hits + 1) / (total + 1)
