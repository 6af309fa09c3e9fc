"""Intervals and p-values against SciPy and numbers worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lorascope.evaluation.statistics import (
    bootstrap_interval,
    expanded_tail,
    holm,
    sign_flip_p,
    smallest_detectable_effect,
)
from synthetic_scores import draws


@pytest.mark.parametrize("method", ["percentile", "BCa"])
@pytest.mark.parametrize(
    "sample", [draws(20), draws(0, 25, seed=1), np.random.default_rng(2).exponential(2, 40)]
)
def test_interval_matches_scipy(sample: np.ndarray, method: str) -> None:
    level = 1 - 2 * expanded_tail(len(sample), 0.95)
    options = {
        "method": method,
        "n_resamples": 20_000,
        "confidence_level": level,
        "rng": np.random.default_rng(5),
    }
    theirs = stats.bootstrap((sample,), np.mean, **options).confidence_interval
    ours = bootstrap_interval(sample, 20_000)
    error = sample.std(ddof=1) / math.sqrt(len(sample))
    np.testing.assert_allclose(
        ours, theirs, atol=(0.07 if method == "percentile" else 0.5) * error
    )  # BCa shifts for skewness


@pytest.mark.parametrize("count", [6, 12, 50])
def test_interval_of_normal_values_is_as_wide_as_students(count: int) -> None:
    sample = stats.norm.ppf((np.arange(count) + 0.5) / count)
    low, high = bootstrap_interval(sample, 40_000) or (math.nan, math.nan)
    students = stats.t.interval(0.95, count - 1, scale=stats.sem(sample))
    assert high - low == pytest.approx(students[1] - students[0], rel=0.04)


def test_interval_of_few_or_constant_values() -> None:
    assert bootstrap_interval([1.0] * 5) is None
    assert bootstrap_interval([]) is None
    assert bootstrap_interval([1.5] * 6) == (1.5, 1.5)
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval([1.0] * 6 + [math.nan])


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    intervals = [bootstrap_interval(generator.normal(1, 3, 50), 500) for _ in range(400)]
    assert 0.91 <= np.mean([low <= 1 <= high for low, high in intervals]) <= 0.975


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=6, max_size=20), st.floats(-10, 10))
def test_interval_grows_with_its_level_and_moves_with_the_values(values: list[float], shift: float) -> None:
    low, high = bootstrap_interval(values, 200)
    wide_low, wide_high = bootstrap_interval(values, 200, level=0.99)
    assert min(values) - 1e-9 <= wide_low <= low <= high <= wide_high <= max(values) + 1e-9
    np.testing.assert_allclose(
        bootstrap_interval(np.array(values) + shift, 200), (low + shift, high + shift), atol=1e-6
    )


def test_smallest_detectable_effect_is_the_normal_theory_s() -> None:
    exact = (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * 3.2 / math.sqrt(25)
    assert smallest_detectable_effect(3.2, 25) == pytest.approx(1.792)
    assert smallest_detectable_effect(3.2, 25) == pytest.approx(exact, rel=1e-3)


def test_sign_flip_p_by_hand_and_against_wilcoxon() -> None:
    # All 2^4 sign patterns of 1..4: |mean| reaches the observed sum 10 only for + + + + and - - - -.
    assert sign_flip_p([1, 2, 3, 4]) == pytest.approx(2 / 16)
    assert sign_flip_p([1, 2, 3, -4]) == pytest.approx(14 / 16)  # all but the two sums of 0, 1 + 4 = 2 + 3
    assert sign_flip_p([1.0] * 6) == pytest.approx(2 / 2**6)
    assert sign_flip_p([0.0] * 9) == 1.0
    assert sign_flip_p([3.0]) == 1.0
    values = draws(1.2, 40)
    assert sign_flip_p(values) == sign_flip_p(values)
    assert sign_flip_p(values) == pytest.approx(stats.wilcoxon(values).pvalue, abs=0.02)


def test_holm_by_hand() -> None:
    # sorted .01 .02 .03 .04 -> x4 x3 x2 x1 = .04 .06 .06 .04 -> running maximum .04 .06 .06 .06
    np.testing.assert_allclose(holm([0.02, 0.01, 0.04, 0.03]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1.0, 1.0])
    np.testing.assert_allclose(holm([0.03]), [0.03])
    assert holm([]).shape == (0,)
    for wrong in ([0.1, math.nan], [1.2], [[0.1]]):
        with pytest.raises(ValueError, match="p-values"):
            holm(wrong)
