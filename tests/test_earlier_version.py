"""Run folders of the version before wings (0.1.0, kept in `tests/run_of_0_1_0`) go on and are reported."""

import shutil
from pathlib import Path

import pytest

from lorascope.diagnosis.record import read_diagnosis
from lorascope.store import read_json
from lorascope.study import Study

KEPT = Path(__file__).parent / "run_of_0_1_0"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of base, pictures, scorer and both run folders; paths in the study file are relative to it."""
    shutil.copytree(KEPT, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


def test_a_finished_run_of_the_version_before_is_reported(world: Path) -> None:
    report = Study.open(Path("finished"), cache_dir=world / "cache").report()
    assert report.html_path.stat().st_size > 10_000


def test_a_finished_run_of_the_version_before_is_diagnosed_without_training_again(world: Path) -> None:
    study = Study.open(Path("finished"), cache_dir=world / "cache")
    before = {path: path.read_bytes() for path in Path("finished/adapters").rglob("*.safetensors")}
    with study.working("test"):
        study.diagnose()
    record = read_diagnosis(study.run_dir)
    assert record.arms and all(found.signals.finished.value == 1 for found in record.arms.values())
    assert {path: path.read_bytes() for path in Path("finished/adapters").rglob("*.safetensors")} == before


def test_an_interrupted_run_of_the_version_before_goes_on_from_its_checkpoint(world: Path) -> None:
    Study.open(Path("unfinished"), cache_dir=world / "cache").run()
    assert "going on from step 6" in Path("unfinished/lorascope.log").read_text(encoding="utf-8")
    assert read_json(Path("unfinished/adapters/r4/training.json"))["failed"] is None
    assert Path("unfinished/report.html").exists()
