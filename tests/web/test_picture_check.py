"""The check of a set runs as the command that it is, and what it finds is kept."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorascope.errors import ConfigError, DataError
from lorascope.web import picture_check
from lorascope.web.picture_check import command, last_check, run_check
from lorascope.web.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "work")


def test_refusals_and_duplicates_are_found_and_kept(workspace: Workspace) -> None:
    folder = workspace.folder / "art"
    folder.mkdir()
    for index in range(20):
        blocks = np.random.default_rng(index).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((40, 40), Image.Resampling.NEAREST).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("red, a cat")
    (folder / "0b.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "0b.txt").write_text("red, a cat")
    (folder / "77.png").write_text("<html>")
    (folder / "77.txt").write_text("a page")
    Image.new("RGB", (40, 40)).save(folder / "88.png")
    assert last_check(workspace, folder) is None
    arguments = command(folder, 32, buckets=False)
    check = run_check(workspace, folder, arguments)
    assert check.found["would_start"], check.found["problem"]
    assert check.notes["0b.png"][0][0] == "duplicate"
    assert "the same picture as 0.png" in check.notes["0b.png"][0][1]
    assert check.notes["77.png"] == [("refused", check.notes["77.png"][0][1])]
    assert "no caption" in check.notes["88.png"][0][1]
    assert last_check(workspace, folder) == check


def test_what_the_command_says_is_passed_on(workspace: Workspace) -> None:
    with pytest.raises(DataError, match="no pictures"):
        run_check(workspace, workspace.folder, command(workspace.folder, 64, buckets=True))


def test_two_checks_of_one_set_do_not_run_at_once(workspace: Workspace) -> None:
    picture_check._under_way.add(workspace.folder)
    try:
        with pytest.raises(ConfigError, match="already"):
            run_check(workspace, workspace.folder, [])
    finally:
        picture_check._under_way.clear()
