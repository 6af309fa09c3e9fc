"""A file chooser by the server: folders that may be looked into, and how many pictures are in each."""

import os
import posixpath
from dataclasses import dataclass
from pathlib import Path

from lorascope.data.names import is_unicode, shown
from lorascope.data.pictures import SUFFIXES
from lorascope.errors import DataError
from lorascope.web.workspace import MissingError, OutsideError, Workspace

_MAX_FOLDERS = 500
_LOOKS = 40_000  # entries in all: a home folder shows in well under a second
_LOOKS_EACH = (200, 5_000)


@dataclass(frozen=True)
class Place:
    """A folder to choose: its name, its path as pages name it, and its pictures at any depth, as far as they
    were counted.
    """

    name: str
    address: str
    num_pictures: int
    is_all: bool


@dataclass(frozen=True)
class Listing:
    """What a folder holds. `trail` leads to it from an allowed folder; `num_more` folders are not listed."""

    trail: list[tuple[str, str]]
    here: Place
    places: list[Place]
    num_more: int


def list_folder(workspace: Workspace, text: str) -> Listing:
    """The folder that a browser named, with the folders in it.

    Raises as `Workspace.resolve`, `MissingError` for what is no folder, and `DataError` for one that the
    system does not let be read.
    """
    folder = workspace.resolve(text)
    if not folder.is_dir():
        raise MissingError(f"{shown(text)}: is no folder: name the folder that it is in")
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                (entry.name for entry in entries if entry.name[0] != "." and _is_folder(entry)),
                key=str.casefold,
            )
    except OSError as error:
        raise DataError(
            f"{shown(text)}: cannot be read ({error.strerror}): correct its permissions"
        ) from error
    names = [name for name in names if is_unicode(name)]
    listed = names[:_MAX_FOLDERS]
    each = min(_LOOKS_EACH[1], max(_LOOKS_EACH[0], _LOOKS // max(1, len(listed))))
    places = [_place(workspace, folder / name, each) for name in listed]
    return Listing(
        _trail(workspace, folder), _place(workspace, folder, each), places, len(names) - len(listed)
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _place(workspace: Workspace, folder: Path, looks: int) -> Place:
    count, is_all = count_pictures(folder, looks)
    return Place(folder.name or str(folder), workspace.shown_path(folder), count, is_all)


def count_pictures(folder: Path, looks: int) -> tuple[int, bool]:
    """Pictures at any depth by their endings, looking at so many entries at most, and whether that was all.

    What is nearest is counted first; links to folders are not followed.
    """
    pending, count = [folder], 0
    while pending:
        deeper: list[Path] = []
        for place in pending:
            try:
                with os.scandir(place) as entries:
                    for entry in entries:
                        looks -= 1
                        if looks < 0:
                            return count, False
                        if entry.name.startswith("."):
                            continue
                        if _is_folder(entry):
                            deeper.append(place / entry.name)
                        else:
                            count += posixpath.splitext(entry.name)[1].lower() in SUFFIXES
            except OSError:
                continue
        pending = deeper
    return count, True


def _trail(workspace: Workspace, folder: Path) -> list[tuple[str, str]]:
    """Name and address of each folder from the outermost that may be looked into to this one."""
    above = [folder, *folder.parents]
    trail = []
    for path in above:
        try:
            workspace.resolve(str(path))
        except OutsideError:
            break
        trail.append((path.name or str(path), workspace.shown_path(path)))
    return trail[::-1]
