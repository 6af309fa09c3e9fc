"""Runs that several tests of the report look at."""

import shutil
from pathlib import Path

import pytest

from lorascope.run_folder import RunDir
from synthetic_run import make_run


@pytest.fixture(scope="session")
def two_arm_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run of r16 and r64, to be read alone."""
    return make_run(tmp_path_factory.mktemp("runs") / "two", num_prompts=8, sample_seeds=(0, 1), num_steps=80)


@pytest.fixture
def copied(two_arm_run: RunDir, tmp_path: Path) -> RunDir:
    """A copy of the two-arm run to change."""
    shutil.copytree(two_arm_run.path, tmp_path / "two")
    return RunDir(tmp_path / "two")
