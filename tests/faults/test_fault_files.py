"""Faults planted into the file of a trained arm: which check sees which."""

from pathlib import Path

import pytest
from benchmarks.faults.files import (
    FILE_FAULTS,
    FileFault,
    FileFinding,
    check_file_fault,
    read_findings,
    write_findings,
)

from conftest import make_study, train_only
from lorascope.diagnosis.thresholds import Thresholds
from lorascope.run_folder import RunDir
from lorascope.study import Study
from synthetic_signals import healthy_arm


@pytest.fixture(scope="module")
def trained(study_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A run with two arms of one shape; never write into it."""
    arms = 'arms=[{name="own",rank=4,lr=1e-2,alpha=8.0},{name="other",rank=4,lr=5e-2,alpha=8.0}]'
    study = make_study(study_file, tmp_path_factory.mktemp("trained") / "run", arms, "workers=1")
    train_only(study)
    return study


# What the line says where reading refuses the file, and where merging does; None where it does not.
SEEN: dict[FileFault, tuple[str | None, str | None]] = {
    "doubled-alpha": ("belongs to another arm", None),
    "other-arm": (None, None),
    "nan-layer": ("NaN or infinite", "NaN or infinite"),
    "zeroed-half": (None, None),
    "unmatched-half": ("do not match the targets", "another base model"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_every_fault_of_a_file_is_seen(fault: FileFault, trained: Study, tmp_path: Path) -> None:
    finding = check_file_fault(trained, fault, "own", "other", tmp_path / "faulty")
    trained.run_dir.require_unchanged("own")
    reading, merging = SEEN[fault]
    assert finding.digest_line is not None
    assert (finding.reading_line is None) == (reading is None)
    assert reading is None or reading in str(finding.reading_line)
    if merging is None:
        assert finding.merge is not None and not finding.merge["ok"]
    else:
        assert finding.merge is None and merging in str(finding.merge_line)
    found = finding.found(healthy_arm(), Thresholds())
    assert found == ("file_fault" if merging is None else "refused")
    assert not RunDir(tmp_path / "faulty").diagnosis_json.exists()


def test_findings_come_back_from_their_file(tmp_path: Path) -> None:
    merge = {"relative_error": 0.3, "tolerance": 1e-3, "mean_pixel_difference": 9.0, "ok": False}
    findings = [
        FileFinding("doubled-alpha", 3, "changed", "of another arm", merge, None),
        FileFinding("nan-layer", 3, "changed", "NaN", None, "NaN"),
    ]
    write_findings(tmp_path / "findings.json", findings)
    assert read_findings(tmp_path / "findings.json") == findings


def test_a_merge_within_the_tolerance_leaves_an_arm_as_it_is() -> None:
    merge = {"relative_error": 1e-6, "tolerance": 1e-3, "mean_pixel_difference": 0.0, "ok": True}
    finding = FileFinding("other-arm", 0, None, None, merge, None)
    assert finding.found(healthy_arm(), Thresholds()) == "healthy"
