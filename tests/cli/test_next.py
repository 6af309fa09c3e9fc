"""`lorascope next`: a study file on stdout, and one line where there is nothing to go by."""

from pathlib import Path

import pytest

from lorascope.cli.app import main
from lorascope.config import load_study
from lorascope.diagnosis.causes import decide_all
from lorascope.diagnosis.record import write_diagnosis
from lorascope.errors import EXIT_DONE, EXIT_INPUT, EXIT_RUN_FAILED
from lorascope.run_folder import RunDir
from studies import study
from synthetic_signals import default_arm, healthy_arm


def test_the_study_is_printed_and_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path)
    run.study_toml.write_text(study("sample.prompts='gone.txt'", preset="pocket").to_toml())
    write_diagnosis(run, decide_all([healthy_arm(), default_arm()]))
    assert main(["next", str(tmp_path)]) == EXIT_DONE
    captured = capsys.readouterr()
    (tmp_path / "next.toml").write_text(captured.out)
    assert load_study(tmp_path / "next.toml", environment={}).name == "pocket-next"
    assert captured.err == ""


def test_a_folder_without_a_study_or_a_diagnosis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["next", str(tmp_path)]) == EXIT_INPUT
    assert "no study.toml here: name a run folder" in capsys.readouterr().err
    RunDir(tmp_path).study_toml.write_text(study(preset="pocket").to_toml())
    assert main(["next", str(tmp_path)]) == EXIT_RUN_FAILED
    assert "run `lorascope diagnose" in capsys.readouterr().err
