"""A row as a source lists it, and the columns that hold its picture and its caption."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lorascope.data.captions import caption_in
from lorascope.data.pictures import RefusedError
from lorascope.errors import DataError
from lorascope.sections import DataSection

SPLITS = ("train", "test", "validation")
IMAGE_NAMES = ("image", "img", "picture", "photo", "image_bytes", "jpg", "jpeg", "png", "webp")
CAPTION_NAMES = ("text", "caption", "prompt", "txt", "description")

Stamp = tuple[int, int]
"""Size in bytes and time of change in nanoseconds of a file: as long as neither changes, its bytes are taken
to be the same.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A row as the source lists it.

    `stamp` is that of the file that holds the picture. `caption` is as found, text or not. `repeats` is that
    of the row's `10_name` folder. `problem` says why the row cannot be used, `treatments` what was done to
    get its caption.
    """

    id: str
    split: str
    stamp: Stamp | None
    caption: object
    repeats: int = 1
    problem: str | None = None
    treatments: tuple[str, ...] = ()

    def with_problem(self, problem: str) -> "Row":
        """The row, which cannot be used for this reason."""
        return replace(self, caption=None, problem=problem)

    def with_caption(self, content: bytes, file: str, *, is_json: bool = False) -> "Row":
        """The row with the text of its caption file, at most one byte more than `MAX_CAPTION_BYTES` of it."""
        try:
            caption, left_out = caption_in(content, whole=is_json)
        except RefusedError as error:
            return self.with_problem(f"{file}: {error}")
        return replace(self, caption=caption, treatments=(*self.treatments, *left_out))


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file."""
    return status.st_size, status.st_mtime_ns


def find_column(
    key: str,
    wanted: str,
    common: Iterable[str],
    fitting: Sequence[str],
    where: str,
    present: Sequence[str] | None = None,
) -> str:
    """The column to read: the one that is set, or where that is the default and absent, the one with a common
    name.
    """
    if wanted in fitting:
        return wanted
    if wanted == DataSection.model_fields[key].default:
        found = [name for name in common if name in fitting]
        if len(found) == 1:
            return found[0]
        if found:
            raise DataError(f"{where}: {', '.join(found)} may each be meant: set data.{key}")
    raise DataError(
        f"{where}: no column {wanted!r}; columns present: {', '.join(map(repr, present or fitting))}: "
        f"set data.{key}"
    )
