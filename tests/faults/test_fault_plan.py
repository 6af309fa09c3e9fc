"""The plan of planted faults: studies, arms, labels; scrambled pictures; the command without running it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.faults.__main__ import main
from benchmarks.faults.arms import (
    BY_NAME,
    FAULTS,
    FILE_ARM,
    FILE_DONOR,
    FULL_SEEDS,
    KINDS,
    QUICK_SEEDS,
    plan_studies,
)
from benchmarks.faults.scrambled import ScrambledStudy, scramble, with_scrambled

from conftest import train_only
from lorascope.config import load_study
from lorascope.data.encoding import Encoded
from lorascope.diagnosis.words import CAUSES
from lorascope.training.trainer import count_steps


def test_every_cause_that_training_can_have_is_planted_in_several_arms() -> None:
    assert len(BY_NAME) == len(FAULTS)
    planted = [fault.label for fault in FAULTS]
    assert set(planted) == set(CAUSES) - {"file_fault", "cannot_tell"}
    assert all(planted.count(cause) > 2 for cause in set(planted) - {"numerical"})
    for cause in ("healthy", "too_strong", "diverged", "overfit", "unconditional_drift"):
        assert len({fault.rank for fault in FAULTS if fault.label == cause}) > 1


def test_the_arm_whose_file_is_damaged_has_a_stranger_of_its_shape_in_every_plan() -> None:
    arm, donor = BY_NAME[FILE_ARM], BY_NAME[FILE_DONOR]
    assert (arm.rank, arm.alpha_per_rank, arm.kind) == (donor.rank, donor.alpha_per_rank, donor.kind)
    assert arm.label == "healthy" and arm.quick and donor.quick


def test_a_study_has_one_seed_for_training_and_for_its_pictures() -> None:
    studies = plan_studies(FULL_SEEDS)
    assert FULL_SEEDS >= 8 and len({planned.seed for planned in studies}) == FULL_SEEDS
    assert {planned.kind for planned in studies} == set(KINDS)
    assert len({planned.name for planned in studies}) == len(studies)
    for planned in studies:
        arms = planned.config.expand_arms()
        assert [arm.name for arm in arms] == [fault.name for fault in planned.faults]
        assert {arm.seed for arm in arms} == {planned.seed}
        drawings = planned.config.diagnose.seeds
        assert drawings[0] == planned.seed and len(drawings) == (
            4 if planned.kind in ("mild", "other") else 1
        )
        assert not {seed for seed in drawings[1:] if seed < FULL_SEEDS}
    healthy = [fault for fault in FAULTS if fault.label == "healthy"]
    assert len(healthy) * FULL_SEEDS // 2 >= 16  # are judged


def test_ten_steps_are_ten() -> None:
    main_study = plan_studies(1)[0].config
    [arm] = [arm for arm in main_study.expand_arms() if arm.name == "little-r16-10-steps"]
    assert main_study.data.num_train is not None
    assert arm.epochs * main_study.data.num_train // arm.batch_size == 10


def test_the_quick_plan_has_every_label_and_is_far_smaller() -> None:
    quick = plan_studies(QUICK_SEEDS, quick=True)
    assert {fault.label for planned in quick for fault in planned.faults} == {fault.label for fault in FAULTS}
    work = [sum(planned.num_forwards for planned in plan) for plan in (quick, plan_studies(FULL_SEEDS))]
    assert 20 * work[0] < work[1]
    assert work[0] * 0.02 / 2 < 600  # seconds on two cores by the command's own rough figure


def test_a_dry_run_prints_studies_arms_and_time_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "out"), "--quick", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "scrambled-s2: 1 arms, about" in printed and "drift-r16-lr5e-4" in printed
    assert "doubled-alpha" in printed and "3 training seeds: about" in printed
    assert not (tmp_path / "out").exists()


def test_one_seed_cannot_be_learnt_from_and_judged(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--out", "nowhere", "--seeds", "1"])
    assert "--seeds 1: must be at least 2" in capsys.readouterr().err


def test_scrambling_moves_pixels_and_keeps_every_one() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 24, 3), dtype=np.uint8)
    scrambled = scramble(picture)
    assert scrambled.shape == picture.shape and scrambled.dtype == np.uint8
    assert not np.array_equal(scrambled, picture)
    pixels, moved = (sorted(map(bytes, rows.reshape(-1, 3))) for rows in (picture, scrambled))
    assert moved == pixels
    assert np.array_equal(scrambled, scramble(picture))


def test_scrambled_pictures_are_learnt_under_the_empty_caption(pictures: Encoded) -> None:
    mixed = with_scrambled(pictures, [torch.zeros(1, 2, 4, 8, 8), torch.ones(1, 2, 4, 8, 8)])
    assert (len(mixed), mixed.num_entries, len(set(mixed.digests))) == (12, 12, 12)
    indices, kept = torch.tensor([0, 10, 11]), torch.zeros(3, dtype=torch.bool)
    states = mixed.text(indices, kept)
    assert mixed.text_states is not None
    assert torch.equal(states[1], mixed.text_states[0]) and torch.equal(states[2], mixed.text_states[0])
    assert not torch.equal(states[0], mixed.text_states[0])


def test_a_scrambled_study_trains_on_them_and_measures_sound_ones(study_file: Path, tmp_path: Path) -> None:
    config = load_study(study_file, overrides=["train.epochs=1", "workers=1"], environment={})
    study = ScrambledStudy(config, tmp_path / "run", cache_dir=study_file.parent / "cache")
    train_only(study)
    sound, heldout = study.encoded
    mixed = study.material
    assert len(mixed.train) == len(sound) + round(len(sound) / 2)
    assert mixed.heldout is heldout and all(sound.captions)
    steps = study.run_dir.training("r4", "steps")["steps"]
    assert steps == count_steps(config.train, len(mixed.train)) > count_steps(config.train, len(sound))
