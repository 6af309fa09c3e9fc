"""CLIP similarity and the calibration rows; `test_features.py` scores whole runs."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lorascope.arms import Arm
from lorascope.errors import StorageError
from lorascope.evaluation.prompts import Prompt
from lorascope.evaluation.sampling import Job
from lorascope.evaluation.scoring import clip_score, derange, draw_noise, list_pictures
from lorascope.run_folder import RunDir


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


def test_pictures_are_listed_arm_by_arm_and_a_missing_one_is_named(tmp_path: Path) -> None:
    run, arm = RunDir(tmp_path), Arm(name="r4", rank=4, alpha=8, lr=1e-3, seed=2)
    jobs = [Job(Prompt("normal", n, f"prompt {n}"), seed) for seed in (0, 1) for n in (0, 1)]
    for name in ("base", "r4"):
        for job in jobs:
            run.image_path(name, job.file_name).parent.mkdir(parents=True, exist_ok=True)
            run.image_path(name, job.file_name).touch()
    found = list_pictures(run, [arm], jobs)
    assert [(item.arm, item.seed, item.prompt_index) for item in found] == [
        (name, seed, n) for name in ("base", "r4") for seed in (0, 1) for n in (0, 1)
    ]
    assert (found[0].rank, found[0].alpha, found[0].training_seed) == (0, None, None)
    assert (found[4].rank, found[4].alpha, found[4].training_seed) == (4, 8, 2)
    assert found[5].image == "images/r4/normal-001-0.png"
    run.image_path("r4", jobs[3].file_name).unlink()
    with pytest.raises(StorageError, match=r"normal-001-1.png: not there: run `lorascope sample"):
        list_pictures(run, [arm], jobs)
