"""A whole examination: what it holds, what the command prints, and what is kept of it."""

import json
import re
from pathlib import Path

import pytest
import torch

from lorascope.cli.app import main
from lorascope.doctor import examination
from lorascope.doctor.examination import Subject, examine, recall_or_examine, versions
from lorascope.doctor.findings import Finding, kept_path
from lorascope.errors import EXIT_DONE, EXIT_INPUT, EXIT_RUN_FAILED
from lorascope.machine.threads import limited_threads
from lorascope.sections import BaseSection

CPU = torch.device("cpu")
CHECKS = [
    "attention sdpa",
    "attention flash",
    "attention efficient",
    "attention cudnn",
    "attention plain",
    "channels_last",
    "recorded step",
    "half-precision VAE",
    "stacked arms",
    "resume",
    "free memory",
    "GPUs of workers",
]


def test_the_command_prints_a_table_for_bug_reports(
    pipeline_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--base", str(pipeline_folder)]) == EXIT_DONE
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if re.match(r"  (attention|[a-zA-Z_-]+)", line)]
    assert [check for check in CHECKS if not any(check in line for line in lines)] == []
    for name in (
        "lorascope",
        "python",
        "torch",
        "diffusers",
        "transformers",
        "peft",
        "processor",
        "threads",
        "device",
    ):
        assert re.search(rf"^{name} +\S", printed, re.MULTILINE), name
    assert not re.search(r" $", printed, re.MULTILINE) and "\x1b" not in printed


def test_the_command_reads_run_folders_and_study_files_and_writes_json(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "study.toml"
    file.write_text(f'base.model = "{pipeline_folder}"\ndata.resolution_px = 32\ndata.source = "nowhere"\n')
    for place in (file, tmp_path):
        assert main(["doctor", "--base", str(place), "--quick", "--json", "--quiet"]) == EXIT_DONE
        printed = capsys.readouterr()
        assert printed.err == ""
        found = json.loads(printed.out)
        assert [finding["check"] for finding in found["findings"]] == CHECKS[:8]
        assert found["base"] == f"{pipeline_folder}, U-Net in fp32, latents 4x8x8"


def test_something_wrong_is_exit_code_3(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Finding("channels_last", "wrong", "gradients", 0.5, 1e-5)
    monkeypatch.setattr(examination, "check_channels_last", lambda base, shape: wrong)
    assert main(["doctor", "--base", str(pipeline_folder), "--quick"]) == EXIT_RUN_FAILED
    assert re.search(r"channels_last +wrong +0.5 +1e-05", capsys.readouterr().out)


def test_a_base_that_is_not_there_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--base", "./nowhere"]) == EXIT_INPUT
    assert "no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("CUDA error: misaligned address"), "wrong"),
        (torch.OutOfMemoryError("tried to allocate 3 GiB"), "not checked"),
    ],
)
def test_a_check_that_cannot_end_is_a_finding(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, status: str
) -> None:
    def fail(base: object, shape: object) -> Finding:
        raise error

    monkeypatch.setattr(examination, "check_channels_last", fail)
    found = examine(Subject(BaseSection(model=str(pipeline_folder)), CPU), quick=True)
    [finding] = [finding for finding in found.findings if finding.check == "channels_last"]
    assert finding.status == status and str(error) in finding.told


def test_on_a_cpu_the_checks_take_one_thread(pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def look(base: object, shape: object) -> Finding:
        taken.append(torch.get_num_threads())
        return Finding("channels_last", "ok", "")

    monkeypatch.setattr(examination, "check_channels_last", look)
    with limited_threads(2):
        found = examine(Subject(BaseSection(model=str(pipeline_folder)), CPU), quick=True)
        assert torch.get_num_threads() == 2
    assert taken == [1]
    assert found.versions["threads"] == "2; 1 during the checks"


def test_what_was_found_is_kept_for_these_versions_and_models(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject(BaseSection(model=str(pipeline_folder)), CPU)
    examined = examine(subject, quick=True)
    assert kept_path().exists()
    monkeypatch.setattr(examination, "load_base", None)  # nothing is examined again
    assert recall_or_examine(subject) == examined
    monkeypatch.setattr(examination, "versions", lambda device: {**versions(device), "driver": "550.54"})
    with pytest.raises(TypeError):
        recall_or_examine(subject)


def test_large_latents_are_halved_until_a_pass_is_short() -> None:
    assert examination._affordable((4, 64, 64), 8e11, 4, CPU) == (4, 16, 16)
    assert examination._affordable((4, 64, 64), 8e11, 4, torch.device("cuda", 0)) == (4, 64, 64)
    assert examination._affordable((4, 20, 12), 1e9, 3, CPU) == (4, 24, 16)
