"""Which files make up a source of several: those of a folder, of a pattern such as `{000..099}`, and which of
a numbered set are missing.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from lorascope.data.names import is_unicode, shown
from lorascope.data.rows import SPLITS
from lorascope.errors import DataError

_MAX_SHARDS = 100_000


def files_in(folder: Path, pattern: str) -> dict[str, Path]:
    """Files of the folder that match, or else of its data folder, by name."""
    for place in (folder, folder / "data"):
        if files := sorted(path for path in place.glob(pattern) if not path.name.startswith(".")):
            if odd := next((path.name for path in files if not is_unicode(path.name)), None):
                raise DataError(f"{folder}: the file name {shown(odd)} is not UTF-8: rename the file")
            return {path.name: path for path in files}
    return {}


def expand_shards(pattern: str) -> dict[str, Path]:
    """The tar files of a pattern with parts such as `{000..099}` or `{a,b}`, by name; all must be there."""
    names = [""]
    for part in re.split(r"(\{[^{}]*\})", pattern):
        choices = [part]
        if numbers := re.fullmatch(r"\{(\d{1,12})\.\.(\d{1,12})\}", part):
            first, last = int(numbers[1]), int(numbers[2])
            if last - first >= _MAX_SHARDS:
                raise DataError(
                    f"data.source = {pattern!r}: {part} stands for more than {_MAX_SHARDS} files: "
                    "correct the range"
                )
            choices = [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
        elif part.startswith("{"):
            choices = part[1:-1].split(",")
        if len(names) * len(choices) > _MAX_SHARDS:
            raise DataError(
                f"data.source = {pattern!r}: stands for more than {_MAX_SHARDS} files: give fewer"
            )
        names = [name + choice for name in names for choice in choices]
    if not names:
        raise DataError(f"data.source = {pattern!r}: a range in it is empty: give the lower number first")
    if missing := [name for name in names if not Path(name).is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"data.source = {pattern!r}: {missing[0]} is not there{more}: correct the range, or "
            "download what is missing"
        )
    root = Path(os.path.commonpath([Path(name).parent for name in names]))
    return {Path(name).relative_to(root).as_posix(): Path(name) for name in names}


def missing_shards(names: Iterable[str]) -> list[str]:
    """A remark on each set of files such as `train-00000-of-00002.parquet` of which some are not there."""
    found: dict[tuple[str, str, str], set[int]] = {}
    for name in names:
        if parts := re.fullmatch(r"(.*-)(\d{1,9})-of-(\d{1,9})(\.\w+)", name):
            found.setdefault((parts[1], parts[3], parts[4]), set()).add(int(parts[2]))
    return [
        f"{num_missing} of the {int(total)} files {start}*-of-{total}{ending} "
        f"{'are not there: their' if num_missing > 1 else 'is not there: its'} rows are left out"
        for (start, total, ending), numbers in found.items()
        if (num_missing := int(total) - len(numbers)) > 0
    ]


def split_of_file(name: str) -> str:
    """The split that a file's name starts with; `train` where it starts with none."""
    found = re.match(rf"({'|'.join(SPLITS)})(?![a-zA-Z])", name)
    return found[1] if found else "train"
