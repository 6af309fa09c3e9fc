"""CLIP similarity and the calibration rows; `test_features.py` scores whole runs."""

import math

import numpy as np
import pytest
from scipy import stats

from lorascope.evaluation.scoring import clip_score, derange, draw_noise


def test_clip_score_is_a_hundred_cosines() -> None:
    images = np.array([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    texts = np.array([[3.0, 4.0], [0.0, 5.0], [1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_allclose(clip_score(images, texts), [100, 0, 100 / math.sqrt(2), -100], atol=1e-12)
    assert clip_score(images.astype(np.float32), texts).dtype == np.float64
    assert clip_score(np.empty((0, 2)), np.empty((0, 2))).shape == (0,)


def test_clip_score_refuses_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match="one shape"):
        clip_score(np.ones((2, 3)), np.ones((1, 3)))


def test_derangement_stays_in_its_category_and_gives_no_prompt_itself() -> None:
    prompts = [("normal", f"n{i}") for i in range(5)] + [("abstract", f"a{i}") for i in range(4)]
    targets = derange(prompts)
    assert targets == [2, 3, 4, 0, 1, 7, 8, 5, 6]
    assert all(prompts[i][0] == prompts[j][0] for i, j in enumerate(targets))


def test_derangement_of_awkward_lists() -> None:
    assert derange([("normal", "a"), ("abstract", "b")]) == [1, 0]  # no other prompt within the category
    assert derange([("normal", "a"), ("normal", "b"), ("normal", "a"), ("normal", "b")]) == [
        1,
        2,
        3,
        0,
    ]  # half on would be itself
    assert derange([("normal", "a")]) is None
    assert derange([("normal", "a"), ("normal", "a")]) is None
    assert derange([]) is None


def test_noise_is_uniform_and_a_function_of_seed_and_position() -> None:
    few, many = draw_noise(2, 64), draw_noise(5, 64)
    assert many[0].shape == (64, 64, 3)
    assert many[0].dtype == np.uint8
    for first, second in zip(few, many, strict=False):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(many[0], many[1])
    counts = np.bincount(np.concatenate([picture.ravel() for picture in many]), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-3
