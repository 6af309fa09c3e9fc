"""AUC and MMD against SciPy, loops that follow the definitions, and numbers worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lorascope.evaluation.two_samples import Kernel, auc, auc_p, mmd_p, paired_auc_p, squared_mmd

KERNELS: tuple[Kernel, ...] = ("polynomial", "gaussian")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    st.lists(st.integers(-3, 3), min_size=1, max_size=12),
)
def test_auc_with_ties_is_mann_whitneys(positive: list[int], negative: list[int]) -> None:
    theirs = stats.mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative))
    assert auc(positive, negative) == pytest.approx(theirs)
    assert auc(positive, negative) == pytest.approx(1 - auc(negative, positive))


def test_auc_by_hand() -> None:
    assert auc([2, 3], [0, 1]) == 1
    assert auc([1], [1]) == 0.5
    assert auc([1, 3], [1, 2]) == (0.5 + 0 + 1 + 1) / 4
    assert auc([math.inf], [1, 2]) == 1
    for wrong in ([], [math.nan]):
        with pytest.raises(ValueError, match="at least one value"):
            auc(wrong, [1])


def test_p_of_auc_matches_scipy_exactly_and_by_draws() -> None:
    small, large = rng(1).normal(0.8, 1, 7), rng(2).normal(0, 1, 6)
    exact = stats.mannwhitneyu(small, large, method="exact").pvalue
    assert auc_p(small, large) == pytest.approx(exact)  # 13 over 6 is 1716 relabelings
    assert auc_p(large, small) == pytest.approx(exact)
    small, large = rng(3).normal(0.4, 1, 40), rng(4).normal(0, 1, 50)
    theirs = stats.mannwhitneyu(small, large, method="asymptotic").pvalue
    assert auc_p(small, large) == pytest.approx(theirs, abs=0.01)
    assert auc_p(small, large, seed=1) == auc_p(small, large, seed=1) != auc_p(small, large)
    assert auc_p([1.0, 1.0], [1.0, 1.0, 1.0]) == 1.0


def test_p_of_grouped_auc_goes_through_all_exchanges_of_groups() -> None:
    positive, negative = rng(5).normal(1, 1, 8), rng(6).normal(0, 1, 7)
    groups = (["a", "a", "a", "b", "b", "c", "c", "c"], ["d", "d", "e", "f", "f", "f", "g"])
    values, names = np.concatenate([positive, negative]), np.array([*groups[0], *groups[1]])
    areas = []
    for chosen in itertools.combinations("abcdefg", 3):
        is_positive = np.isin(names, chosen)
        areas.append(auc(values[is_positive], values[~is_positive]))
    above, below = (
        np.mean([area >= auc(positive, negative) for area in areas]),
        np.mean([area <= auc(positive, negative) for area in areas]),
    )
    assert auc_p(positive, negative, groups) == pytest.approx(min(1, 2 * min(above, below)))
    # Groups of one value are no groups.
    singles = (range(8), range(8, 15))
    assert auc_p(positive, negative, singles) == auc_p(positive, negative)
    with pytest.raises(ValueError, match="'b' has values in both samples"):
        auc_p([1, 2], [3], (["a", "b"], ["b"]))
    with pytest.raises(ValueError, match="1 and 1 groups for 2 and 1 values"):
        auc_p([1, 2], [3], (["a"], ["b"]))


def test_values_of_few_groups_do_not_count_as_many() -> None:
    """Ten copies of each of four values say no more than the four values."""
    positive, negative = np.repeat([3.0, 4.0], 10), np.repeat([1.0, 2.0], 10)
    groups = (np.repeat([0, 1], 10), np.repeat([2, 3], 10))
    assert auc_p(positive, negative) < 0.001
    assert auc_p(positive, negative, groups) == pytest.approx(2 / 6)


def test_p_of_paired_auc_goes_through_all_exchanges_within_pairs() -> None:
    positive, negative = rng(7).normal(0.7, 1, 8), rng(8).normal(0, 1, 8)
    distances = []
    for flips in itertools.product([False, True], repeat=8):
        swapped = np.where(flips, negative, positive), np.where(flips, positive, negative)
        distances.append(abs(auc(*swapped) - 0.5))
    expected = np.mean(np.array(distances) >= abs(auc(positive, negative) - 0.5) - 1e-12)
    assert paired_auc_p(positive, negative) == pytest.approx(expected)
    with pytest.raises(ValueError, match="2 and 1 values do not make pairs"):
        paired_auc_p([1, 2], [1])


def mmd_by_loops(first: np.ndarray, second: np.ndarray, kernel: Kernel) -> float:
    both = np.concatenate([first, second])
    width = np.median([math.dist(*pair) for pair in itertools.combinations(both, 2)])

    def k(x: np.ndarray, y: np.ndarray) -> float:
        if kernel == "polynomial":
            return float((x @ y / len(x) + 1) ** 3)
        return math.exp(-(math.dist(x, y) ** 2) / (2 * width**2))

    within_first = np.mean([k(x, y) for x, y in itertools.permutations(first, 2)])
    within_second = np.mean([k(x, y) for x, y in itertools.permutations(second, 2)])
    across = np.mean([k(x, y) for x in first for y in second])
    return float(within_first + within_second - 2 * across)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("sizes", "shift"), [((5, 7), 0.0), ((9, 4), 1.0), ((2, 2), 0.3)])
def test_mmd_matches_its_definition(kernel: Kernel, sizes: tuple[int, int], shift: float) -> None:
    first, second = rng(1).normal(shift, 1, (sizes[0], 3)), rng(2).normal(0, 1, (sizes[1], 3))
    assert squared_mmd(first, second, kernel) == pytest.approx(mmd_by_loops(first, second, kernel), rel=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_is_unbiased(kernel: Kernel) -> None:
    generator = rng(3)
    values = [
        squared_mmd(generator.normal(size=(6, 2)), generator.normal(size=(9, 2)), kernel) for _ in range(800)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values))
    assert min(values) < 0 < max(values)


@pytest.mark.parametrize("kernel", KERNELS)
def test_p_of_mmd_goes_through_all_relabelings(kernel: Kernel) -> None:
    first, second = rng(4).normal(0.8, 1, (4, 3)), rng(5).normal(0, 1, (5, 3))
    both = np.concatenate([first, second])
    values = []
    for chosen in itertools.combinations(range(9), 4):
        others = [row for row in range(9) if row not in chosen]
        values.append(mmd_by_loops(both[list(chosen)], both[others], kernel))
    expected = np.mean(np.array(values) >= mmd_by_loops(first, second, kernel) - 1e-12)
    assert mmd_p(first, second, kernel) == pytest.approx(expected)


def test_p_of_mmd_is_small_for_different_samples_and_even_for_equal_ones() -> None:
    generator = rng(6)
    assert mmd_p(generator.normal(0.5, 1, (30, 20)), generator.normal(0, 1, (40, 20))) == 1 / 1001
    p_values = [
        mmd_p(generator.normal(size=(10, 5)), generator.normal(size=(12, 5)), resamples=99)
        for _ in range(200)
    ]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    # Two groups a side: six relabelings, of which the observed one and its mirror are the farthest apart.
    groups = (np.repeat([0, 1], 5), np.repeat([2, 3], 5))
    assert mmd_p(generator.normal(5, 1, (10, 4)), generator.normal(0, 1, (10, 4)), groups=groups) == 2 / 6
    # A relabeling that leaves one row on a side has no discrepancy: groups of 1, 1 and 3 rows.
    rows = generator.normal(size=(5, 2))
    assert 0 < mmd_p(rows[:2], rows[2:], groups=([0, 1], [2, 2, 2])) <= 1


def test_mmd_refuses_what_it_cannot_compare() -> None:
    rows = rng().normal(size=(4, 3))
    for wrong in (rows[:1], rows[:, :2], rows[0]):
        with pytest.raises(ValueError, match="2 rows or more of one width"):
            squared_mmd(wrong, rows)
    with pytest.raises(ValueError, match="finite"):
        squared_mmd(rows * math.nan, rows)
    with pytest.raises(ValueError, match="alike"):
        squared_mmd(np.ones((5, 3)), np.ones((4, 3)), "gaussian")
    assert squared_mmd(np.ones((5, 3)), np.ones((4, 3))) == pytest.approx(0)
