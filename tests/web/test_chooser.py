"""The file chooser: what it lists, how it counts, and where it ends."""

from pathlib import Path

import pytest

from lorascope.errors import DataError
from lorascope.web import chooser
from lorascope.web.chooser import count_pictures, list_folder
from lorascope.web.workspace import MissingError, OutsideError, Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "work", [])


def test_folders_are_listed_with_their_pictures(workspace: Workspace, tmp_path: Path) -> None:
    art = workspace.folder / "art"
    (art / "10_cat").mkdir(parents=True)
    (art / ".hidden").mkdir()
    (art / "empty").mkdir()
    for name in ("a.png", "10_cat/b.JPG", "10_cat/c.txt", ".hidden/d.png", ".e.png"):
        (art / name).touch()
    (tmp_path / "out").mkdir()
    (art / "link").symlink_to(tmp_path / "out")
    listing = list_folder(workspace, "art")
    assert [(place.name, place.address, place.num_pictures) for place in listing.places] == [
        ("10_cat", "art/10_cat", 1),
        ("empty", "art/empty", 0),
    ]
    assert (listing.here.num_pictures, listing.here.is_all) == (2, True)
    assert listing.trail == [("work", "."), ("art", "art")]


def test_counting_ends_in_time(tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / f"{index}.png").touch()
    assert count_pictures(tmp_path, 5) == (5, False)
    assert count_pictures(tmp_path, 20) == (20, True)


def test_many_folders_are_not_all_listed(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chooser, "_MAX_FOLDERS", 2)
    for name in "abc":
        (workspace.folder / name).mkdir()
    listing = list_folder(workspace, ".")
    assert ([place.name for place in listing.places], listing.num_more) == (["a", "b"], 1)


def test_the_chooser_stays_within_what_is_allowed(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("..", "/", "/etc", "\\\\host\\share", "//host/share", ".lorascope-web"):
        (workspace.folder / ".lorascope-web").mkdir(exist_ok=True)
        with pytest.raises(OutsideError):
            list_folder(workspace, path)
    (workspace.folder / "file").touch()
    with pytest.raises(MissingError):
        list_folder(workspace, "file")

    def deny(path: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", deny)
    with pytest.raises(DataError, match="Permission denied"):
        list_folder(workspace, ".")
