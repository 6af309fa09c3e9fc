"""How often a picture is seen in an epoch, by its folder's name: pictures of `10_name` are seen 10 times, as
kohya's scripts read it.
"""

import functools
import posixpath
import re
from collections.abc import Iterable

from lorascope.data.names import name_some, shown

MAX_REPEATS = 999

_NUMBERED = re.compile(r"([+-]?[0-9]+(?:[.,][0-9]+)?)_(.*\w.*)", re.DOTALL)
_NUMBERED_LAST = re.compile(r".*[^\W\d_].*_[1-9][0-9]{0,2}", re.DOTALL)


@functools.lru_cache(maxsize=4096)
def repeat_folder(folder: str) -> str | None:
    """The innermost part of a path that is called such as `10_name`, with the folders above it."""
    parts = folder.split("/")
    for depth in range(len(parts), 0, -1):
        if repeats_in(parts[depth - 1]) is not None:
            return "/".join(parts[:depth])
    return None


def repeats_in(name: str) -> int | None:
    """The number of repeats that a folder's name begins with, 0 or less included.

    None where it begins with none, or with what can hardly be meant as one: a fraction, or more than
    `MAX_REPEATS`, such as a year.
    """
    found = _NUMBERED.fullmatch(name)
    number = re.fullmatch(r"([+-]?)0*([0-9]*)", found[1]) if found else None
    if number is None or len(number[2]) > len(str(MAX_REPEATS)):
        return -1 if number and number[1] == "-" else None
    repeats = int(f"{number[1]}{number[2] or 0}")
    return repeats if repeats <= MAX_REPEATS else None


def repeats_of(picture: str) -> int:
    """How often an epoch shows a picture at this path: 1 where no folder of it says a number."""
    folder = repeat_folder(posixpath.dirname(picture))
    return (repeats_in(posixpath.basename(folder)) or 0) if folder else 1


def repeats_problem(picture: str) -> str | None:
    """Why a picture is not shown at all: kohya's scripts leave out what is to be repeated 0 times or less."""
    if repeats_of(picture) > 0:
        return None
    folder = posixpath.basename(str(repeat_folder(posixpath.dirname(picture))))
    return (
        f"the name of its folder {shown(folder)} asks for no repeats: rename it with a number from 1 to "
        f"{MAX_REPEATS}, take it away, or turn data.folder_repeats off"
    )


def repeat_remarks(folders: Iterable[str]) -> list[str]:
    """Remarks on numbers in the names of folders that are not read as repeats though they may be meant so."""
    remarks = []
    paths = set(folders)
    wrong = {
        part
        for path in paths
        for part in path.split("/")
        if _NUMBERED.fullmatch(part) and repeats_in(part) is None
    }
    turned = {
        part
        for path in paths
        if repeat_folder(path) is None
        for part in path.split("/")
        if _NUMBERED_LAST.fullmatch(part) and part not in wrong
    }
    for found, words in (
        (
            wrong,
            f"begin with a number that is no number of repeats, which is whole and from 1 to {MAX_REPEATS}",
        ),
        (turned, "end with a number, which is not read as repeats"),
    ):
        if found:
            remarks.append(
                f"names of folders that {words}: {name_some(sorted(found))}: their pictures are seen as "
                "often as others; to see them 10 times, call a folder such as 10_name"
            )
    return remarks
