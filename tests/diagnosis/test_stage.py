"""The diagnose stage on a finished tiny study: what is measured, and of runs that lack something."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import make_study
from lorascope.arms import Arm
from lorascope.diagnosis import finished as finished_module
from lorascope.diagnosis.edits import edit_adapters
from lorascope.diagnosis.finished import epochs_of
from lorascope.diagnosis.nearest import read_nearest
from lorascope.diagnosis.record import read_diagnosis
from lorascope.errors import StorageError
from lorascope.evaluation.sweep_rows import name_of, read_sweep
from lorascope.run_folder import RunDir
from lorascope.store import read_json


def undiagnosed(finished: Path, folder: Path) -> Path:
    """A copy of the run as it is before it is diagnosed."""
    run = RunDir(Path(shutil.copytree(finished, folder)))
    shutil.rmtree(run.sweep_dir)
    run.sweep_parquet.unlink()
    run.copying_json.unlink()
    shutil.rmtree(run.copying_dir, ignore_errors=True)
    run.diagnosis_json.unlink()
    manifest = read_json(run.manifest_json)
    del manifest["stages"]["diagnose"]
    run.manifest_json.write_text(json.dumps(manifest))
    return run.path


def test_every_arm_is_drawn_at_every_strength_and_placed(finished: Path) -> None:
    sweep = read_sweep(RunDir(finished))
    names = {name_of(point) for point in sweep.points}
    assert "base/last-s0.00-g7.5" in names
    for arm in ("r4", "r8"):
        assert {f"{arm}/last-s{strength}-g7.5" for strength in ("0.50", "1.00")} <= names
        assert f"{arm}/last-s1.00-g7.5-base" in names and f"{arm}/last-s1.00-g1" in names
        assert f"{arm}/last-s1.00-g7.5-scaled-intruders" in names
    assert "r8/last-s1.00-g7.5-cut-to-r4" in names and not any(
        "r4/" in name and "cut" in name for name in names
    )
    assert len(sweep.shuffled) == 4
    origin = sweep.of(sweep.points[0])
    if sweep.style.reason is None:
        assert np.isfinite([row.style for row in origin]).all()
    else:
        assert all(row.style is None for row in sweep.rows)


def test_every_signal_is_measured_or_says_why_not(finished: Path) -> None:
    record = read_diagnosis(RunDir(finished))
    assert set(record.arms) == {"r4", "r8"}
    for found in record.arms.values():
        signals = found.signals.by_key()
        measured = {key for key, signal in signals.items() if signal.is_measured}
        assert {
            "finished",
            "finite_training",
            "finite_losses",
            "finite_pictures",
            "merge_ok",
            "file_ok",
            "heldout",
            "train_gap",
            "member_auc",
            "guidance_cosine",
            "intruder_share",
            "norm_ratio",
            "black",
        } <= measured
        assert all(signal.note for key, signal in signals.items() if key not in measured)
        assert found.evidence_for


def test_a_run_is_diagnosed_later_as_it_would_have_been(
    study_file: Path, finished: Path, tmp_path: Path
) -> None:
    run = RunDir(undiagnosed(finished, tmp_path / "run"))
    study = make_study(study_file, run.path)
    with study.working("test"):
        study.diagnose()
    for path in (run.sweep_parquet, run.copying_json, run.diagnosis_json):
        assert path.read_bytes() == (finished / path.name).read_bytes()


def test_adapters_are_edited_only_for_pictures_that_are_missing(
    study_file: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(Path(shutil.copytree(finished, tmp_path / "run")))
    (run.sweep_dir / "r8" / "last-s1.00-g7.5-cut-to-r4" / "abstract-001-0.png").unlink()
    manifest = read_json(run.manifest_json)
    del manifest["stages"]["diagnose"]
    run.manifest_json.write_text(json.dumps(manifest))
    edited: list[str] = []

    def edit(*values: Any) -> Any:
        edited.append(values[-1])
        return edit_adapters(*values)

    monkeypatch.setattr(finished_module, "edit_adapters", edit)
    study = make_study(study_file, run.path)
    with study.working("test"):
        study.diagnose()
    assert edited == ["cut to r4"]
    for path in (run.sweep_parquet, run.diagnosis_json):
        assert path.read_bytes() == (finished / path.name).read_bytes()


@pytest.mark.parametrize("lost", ["diagnosis.json", "sweep.parquet"])
def test_what_was_lost_of_a_finished_diagnosis_is_made_again(
    lost: str, study_file: Path, finished: Path, tmp_path: Path
) -> None:
    run = RunDir(Path(shutil.copytree(finished, tmp_path / "run")))
    (run.path / lost).unlink()
    study = make_study(study_file, run.path)
    with study.working("test"):
        study.diagnose()
    assert (run.path / lost).read_bytes() == (finished / lost).read_bytes()


def test_the_nearest_pictures_are_those_of_the_data(finished: Path) -> None:
    run = RunDir(finished)
    found, data = read_nearest(run), run.data()
    assert found is not None and set(found) == {"r4", "r8"}
    ids = [{example["id"] for example in data[kind]} for kind in ("train", "heldout")]
    for nearest in found.values():
        assert nearest.num_drawings == len(nearest.pairs) == 2
        for pair in nearest.pairs:
            assert pair.training.id in ids[0] and pair.heldout.id in ids[1]
            paths = (pair.drawing, pair.training.picture, pair.heldout.picture)
            assert all((run.path / path).is_file() for path in paths)


def test_a_model_for_style_takes_the_scorers_place_there(
    study_file: Path, scorer_folder: Path, finished: Path, tmp_path: Path
) -> None:
    """With the scorer's own folder: the same style, by features of a file of their own."""
    run = RunDir(undiagnosed(finished, tmp_path / "run"))
    study = make_study(study_file, run.path, f"score.style_model={scorer_folder}")
    run.study_toml.write_text(study.config.to_toml())
    with study.working("test"):
        study.diagnose()
    found, before = read_sweep(run), read_sweep(RunDir(finished))
    assert found.style.model == str(scorer_folder) and before.style.model is None
    assert run.style_features_safetensors.exists()
    assert found.rows == before.rows and found.discrepancies == before.discrepancies
    assert found.style.auc == before.style.auc and found.style.controls == before.style.controls


def test_a_failed_arm_is_numerical_and_the_others_are_diagnosed(
    study_file: Path, finished: Path, tmp_path: Path
) -> None:
    run = RunDir(undiagnosed(finished, tmp_path / "run"))
    training = run.adapters_dir / "r8" / "training.json"
    training.write_text(json.dumps({**read_json(training), "failed": "its loss was nan at step 7"}))
    study = make_study(study_file, run.path)
    with study.working("test"):
        study.diagnose()
    found = read_diagnosis(run).arms
    assert found["r8"].cause == "numerical" and "its loss was nan at step 7" in " ".join(
        found["r8"].evidence_for
    )
    assert found["r4"].signals.heldout.is_measured and not found["r8"].signals.heldout.is_measured


def test_a_changed_adapter_is_not_diagnosed(study_file: Path, finished: Path, tmp_path: Path) -> None:
    run = RunDir(undiagnosed(finished, tmp_path / "run"))
    weights = run.adapters_dir / "r4" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    study = make_study(study_file, run.path)
    with study.working("test"), pytest.raises(StorageError, match="was changed or cut after training"):
        study.diagnose()


def test_the_best_epoch_is_looked_at_where_it_is_not_the_last(tmp_path: Path) -> None:
    run, arm = RunDir(tmp_path), Arm(name="r4", rank=4, alpha=8, lr=1e-3, seed=0, epochs=3)
    folder = run.adapters_dir / "r4"
    folder.mkdir(parents=True)
    for epoch, wanted, expected in (
        (2, ("last", "best"), ("last", "best")),
        (2, ("best",), ("best",)),
        (3, ("last", "best"), ("last",)),
        (3, ("best",), ("last",)),
        (None, ("best",), ("last",)),
    ):
        best = epoch and {"epoch": epoch, "heldout_loss": 0.1}
        (folder / "training.json").write_text(json.dumps({"failed": None, "best": best}))
        assert epochs_of(run, arm, wanted) == expected  # type: ignore[arg-type]
