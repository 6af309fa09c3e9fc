"""What is said of the machine and its software, against what the system's own tools say."""

import datetime
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from lorascope.machine import facts as machine_facts
from lorascope.machine.facts import (
    device_facts,
    device_name,
    driver_version,
    now,
    package_version,
    software_versions,
    source_commit,
)

CPU = torch.device("cpu")


def test_facts_of_the_cpu() -> None:
    facts = device_facts(CPU)
    assert facts["name"] == device_name(CPU) != ""
    assert facts["threads"] == torch.get_num_threads()
    assert facts["memory_bytes"] == psutil.virtual_memory().total


def test_versions_leave_out_what_is_not_installed() -> None:
    versions = software_versions(["torch", "no-such-package"])
    assert versions == {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": package_version("torch"),
    }
    assert package_version("no-such-package") is None


def test_the_commit_is_that_of_the_checkout() -> None:
    root = Path(__file__).parents[2]
    result = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    is_checkout = (root / ".git").exists()
    assert source_commit() == (result.stdout.strip() or None if is_checkout else None)


def test_the_time_is_of_utc() -> None:
    seconds = (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(now())).total_seconds()
    assert 0 <= seconds < 60


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build",
    ],
)
def test_the_drivers_version_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = tmp_path / "version"
    path.write_text(text + "\nGCC version:  gcc version 12.3.0\n")
    monkeypatch.setattr(machine_facts, "_NVIDIA_DRIVER", path)
    assert driver_version() == "550.54.15"


def test_without_a_driver_its_version_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_facts, "_NVIDIA_DRIVER", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_version() == "unknown"
