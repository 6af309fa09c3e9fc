"""The style axis against a direct solve, Fisher's closed form, and samples whose separation is known."""

import math
import re

import numpy as np
import pytest
from scipy import stats

from lorascope.evaluation.discriminant import StyleAxis, discriminant_direction, fit_style_axis


def samples(
    num_base: int, num_style: int, width: int, shift: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Correlated features whose kinds differ by `shift` along one direction."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(width, width)) / math.sqrt(width) + np.eye(width)
    base = generator.normal(size=(num_base, width)) @ mixing + 3
    style = generator.normal(size=(num_style, width)) @ mixing + 3
    return base, style + shift * generator.normal(size=width)


def direct_solve(base: np.ndarray, style: np.ndarray, shrinkage: float) -> np.ndarray:
    freedom = len(base) + len(style) - 2
    scatter = [np.cov(rows, rowvar=False) * (len(rows) - 1) for rows in (base, style)]
    pooled = (scatter[0] + scatter[1]) / freedom
    width = len(pooled)
    shrunk = (1 - shrinkage) * pooled + shrinkage * np.trace(pooled) / width * np.eye(width)
    return np.linalg.solve(shrunk, style.mean(axis=0) - base.mean(axis=0))


@pytest.mark.parametrize("width", [1, 5, 38, 39, 60, 400])
@pytest.mark.parametrize("shrinkage", [0.05, 0.2, 1.0])
def test_direction_matches_a_direct_solve(width: int, shrinkage: float) -> None:
    base, style = samples(25, 14, max(width, 2), 0.5)
    base, style = base[:, :width], style[:, :width]
    if width == 1:
        shrunk = ((len(base) - 1) * base.var(ddof=1) + (len(style) - 1) * style.var(ddof=1)) / 37
        expected = (style.mean(axis=0) - base.mean(axis=0)) / shrunk
    else:
        expected = direct_solve(base, style, shrinkage)
    ours = discriminant_direction(base, style, shrinkage)
    np.testing.assert_allclose(ours, expected, rtol=1e-8, atol=1e-10 * np.abs(expected).max())


def test_direction_and_its_halves_by_hand() -> None:
    """One feature: the axis is the feature itself, from mean to mean."""
    base, style = np.array([[0.0], [2], [0], [2]]), np.array([[10.0], [12], [10], [12]])
    axis = fit_style_axis(base, style, seed=1)
    assert axis.auc == 1
    assert axis.base.mean() == pytest.approx(0)
    assert axis.style.mean() == pytest.approx(1)
    assert axis.positions([[1.0], [11.0], [6.0]]) == pytest.approx([0, 1, 0.5], abs=0.11)


@pytest.mark.parametrize("width", [3, 600])
def test_positions_are_held_out_and_further_rows_stand_where_they_were_made(width: int) -> None:
    base, style = samples(60, 40, width, 1.0)
    axis = fit_style_axis(base, style)
    assert axis.base.shape == (60,)
    assert axis.style.shape == (40,)
    assert axis.base.mean() == pytest.approx(0, abs=1e-9)
    assert axis.style.mean() == pytest.approx(1, abs=1e-9)
    # A row moved by part of the way from mean to mean moves by that part.
    way = style.mean(axis=0) - base.mean(axis=0)
    moved = axis.positions(base + 0.4 * way) - axis.positions(base)
    np.testing.assert_allclose(moved, 0.4 * (axis.directions @ way).mean())
    assert moved.mean() == pytest.approx(0.4, abs=0.1)
    assert axis.auc > 0.9


def test_the_halves_are_those_of_a_direct_solve() -> None:
    base, style = samples(12, 9, 30, 1.0)
    axis = fit_style_axis(base, style, shrinkage=0.3, seed=4)
    generator = np.random.default_rng(4)
    sides = [generator.permutation(12) < 6, generator.permutation(9) < 4]
    for row, half in enumerate((True, False)):
        direction = direct_solve(base[sides[0] == half], style[sides[1] == half], 0.3)
        start = (base[sides[0] != half] @ direction).mean()
        end = (style[sides[1] != half] @ direction).mean()
        np.testing.assert_allclose(axis.directions[row], direction / (end - start), rtol=1e-7)
        seen = base[sides[0] != half] @ direction
        np.testing.assert_allclose(axis.base[sides[0] != half], (seen - start) / (end - start), atol=1e-8)


def test_counterparts_of_the_base_s_drawings_are_read_by_the_direction_that_has_not_seen_them() -> None:
    base, style = samples(40, 30, 300, 1.0)
    axis = fit_style_axis(base, style)
    order = np.array([7, 3, 39, 0, 3])
    np.testing.assert_allclose(axis.positions(base[order], order), axis.base[order], atol=1e-9)
    # An arm that draws almost what the base draws stands at 0; by both directions it would stand below.
    arm = base + np.random.default_rng(1).normal(0, 1e-3, base.shape)
    assert axis.positions(arm, np.arange(40)).mean() == pytest.approx(0, abs=0.01)
    assert axis.positions(arm).mean() < -0.03
    with pytest.raises(ValueError, match="counterparts of shape"):
        axis.positions(arm, [1, 2])


def test_auc_reaches_the_theory_s_and_is_even_for_one_distribution() -> None:
    generator = np.random.default_rng(0)
    base, style = generator.normal(size=(4000, 3)), generator.normal((1, 0, 0), 1, (4000, 3))
    assert fit_style_axis(base, style).auc == pytest.approx(stats.norm.cdf(1 / math.sqrt(2)), abs=0.02)
    areas = [fit_style_axis(*samples(25, 25, 100, 0.0, seed)).auc for seed in range(60)]
    assert np.mean(areas) == pytest.approx(0.5, abs=3 * np.std(areas) / math.sqrt(60))


def test_without_a_difference_there_is_no_scale() -> None:
    found = [fit_style_axis(*samples(6, 6, 50, 0.0, seed)) for seed in range(20)]
    without = [axis for axis in found if np.isnan(axis.positions(np.zeros((1, 50)))).all()]
    assert without
    assert all(axis.auc < 0.8 for axis in without)
    assert all(np.isfinite(axis.positions(np.zeros((1, 50)))).all() for axis in found if axis.auc == 1)


def test_equal_input_gives_an_equal_axis_and_another_seed_another() -> None:
    base, style = samples(10, 10, 20, 1.0)
    first, again, other = (fit_style_axis(base, style, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.directions, again.directions)
    assert not np.array_equal(first.directions, other.directions)


def test_axis_says_what_it_needs() -> None:
    base, style = samples(8, 8, 5, 1.0)
    with pytest.raises(ValueError, match=re.escape("3 style pictures: a style axis needs at least 4")) as few:
        fit_style_axis(base, style[:3])
    assert "hold more pictures out" in str(few.value)
    with pytest.raises(ValueError, match="2 base pictures: .*draw more prompts"):
        fit_style_axis(base[:2], style)
    with pytest.raises(ValueError, match="rows of one width"):
        fit_style_axis(base, style[:, :4])
    with pytest.raises(ValueError, match="finite"):
        fit_style_axis(base * math.nan, style)
    with pytest.raises(ValueError, match="all alike"):
        fit_style_axis(np.full((9, 3), 0.1), np.full((7, 3), 0.7))
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match="shrinkage"):
            discriminant_direction(base, style, wrong)
    with pytest.raises(ValueError, match="one of each kind and 3 together"):
        discriminant_direction(base[:1], style[:1])
    axis: StyleAxis = fit_style_axis(base, style)
    with pytest.raises(ValueError, match="rows of width 5"):
        axis.positions(np.zeros((2, 6)))
