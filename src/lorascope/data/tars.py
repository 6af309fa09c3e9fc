"""Samples of WebDataset tar files: found by the headers alone, read where they stand. Nothing is unpacked or
followed.
"""

import functools
import io
import itertools
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorascope.data.captions import MAX_CAPTION_BYTES
from lorascope.data.names import is_inside, is_unicode, shown
from lorascope.data.pictures import MAX_FILE_BYTES, SUFFIXES, RefusedError
from lorascope.data.repeats import repeat_remarks, repeats_of, repeats_problem
from lorascope.data.rows import CAPTION_NAMES, Row, Stamp, find_column, stamp_of
from lorascope.data.shards import missing_shards, split_of_file
from lorascope.errors import DataError, first_line
from lorascope.sections import DataSection
from lorascope.store import open_regular, require_regular

_MAX_HEADER_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar file: its ending, where its bytes stand, and why they cannot be used."""

    ending: str
    offset: int
    size: int  # bytes
    problem: str | None


class TarSource:
    """Samples of WebDataset tar files, uncompressed: files that share the name up to the first dot and follow
    each other.

    A picture is a file with a picture's ending, a caption one that ends in `.txt`, `.caption` and the like,
    or a key of a `.json` file. Nothing is unpacked: the headers are read once, and a row's id says where its
    picture's bytes stand.
    """

    def __init__(self, name: str, files: Mapping[str, Path], section: DataSection) -> None:
        self.name = name
        self.origin = "\n".join(str(path.resolve()) for path in files.values())
        self.remarks = missing_shards(files)
        self._files = dict(files)
        self._section = section

    @functools.cached_property
    def _listed(self) -> list[tuple[Row, str, Member | None]]:
        """Rows without captions, the tar file of each and the file in it that holds its caption."""
        listed = [entry for file in self._files for entry in self._list_file(file)]
        if self._section.folder_repeats:
            self.remarks += repeat_remarks(
                posixpath.dirname(row.id.removeprefix(f"{file}/")) for row, file, _ in listed
            )
        return listed

    def _list_file(self, file: str) -> Iterator[tuple[Row, str, Member | None]]:
        path = self._files[file]
        try:
            stamp = stamp_of(require_regular(path, DataError))
            with open_regular(path, DataError) as archive:
                keys = set()
                for key, members in read_samples(archive, stamp[0]):
                    row, caption = self._sample(file, stamp, key, members)
                    if key in keys and not row.problem:
                        row = row.with_problem(
                            f"{shown(key)} was there before: the files of a sample must stand together, once"
                        )
                    keys.add(key)
                    yield row, file, caption
        except (OSError, tarfile.TarError) as error:
            reason = first_line(error)
            raise DataError(
                f"{path}: cannot be read as an uncompressed tar file ({reason}): unpack it, or download "
                "it again"
            ) from error

    def _sample(
        self, file: str, stamp: Stamp, key: str, members: Sequence[Member]
    ) -> tuple[Row, Member | None]:
        """The row of one sample, and its caption's place."""
        split = split_of_file(posixpath.basename(file))
        by_ending = {member.ending: member for member in members}
        problem, ending = _problem_of(key, members)
        if not problem and self._section.folder_repeats:
            problem = repeats_problem(key) or ""
        image = None if problem else self._image_among(by_ending, f"{self._files[file]}: {key}")
        if not problem and image is None:
            problem = f"no picture: {', '.join(by_ending)}"
        elif image is not None and image.size > MAX_FILE_BYTES:
            problem = f"the image file has {image.size} bytes, more than the limit of {MAX_FILE_BYTES}"
            ending = image.ending
        if problem or image is None:
            name = shown(f"{key}.{ending}" if ending else key)
            return Row(f"{file}/{name}", split, None, None, problem=problem), None
        row_id = f"{file}/{key}.{image.ending}@{image.offset}+{image.size}"
        caption = self._caption_among(by_ending, f"{self._files[file]}: {key}")
        repeats = repeats_of(key) if self._section.folder_repeats else 1
        return Row(row_id, split, stamp, None, repeats), caption

    def _image_among(self, by_ending: Mapping[str, Member], where: str) -> Member | None:
        wanted = self._section.image_column
        if wanted in by_ending:
            return by_ending[wanted]
        endings = [ending for ending in by_ending if f".{ending.rpartition('.')[2]}" in SUFFIXES]
        return by_ending[find_column("image_column", wanted, endings, endings, where)] if endings else None

    def _caption_among(self, by_ending: Mapping[str, Member], where: str) -> Member | None:
        wanted = self._section.caption_column
        if wanted in by_ending:
            return by_ending[wanted]
        endings = [ending for ending in by_ending if ending in CAPTION_NAMES]
        if not endings:
            return by_ending.get("json")
        return by_ending[find_column("caption_column", wanted, CAPTION_NAMES, endings, where)]

    @property
    def num_rows(self) -> int:
        """Rows in all."""
        return len(self._listed)

    def rows(self) -> Iterator[Row]:
        """All rows in the order of the files; captions are read as they come."""
        for file, entries in itertools.groupby(self._listed, key=lambda entry: entry[1]):
            try:
                with open_regular(self._files[file], DataError) as archive:
                    for row, _, caption in entries:
                        yield (
                            row
                            if row.problem or caption is None
                            else self._read_caption(archive, row, caption)
                        )
            except OSError as error:
                raise DataError(
                    f"{self._files[file]}: cannot be read any more ({error.strerror}): put it back"
                ) from error

    def _read_caption(self, archive: io.BufferedReader, row: Row, caption: Member) -> Row:
        archive.seek(caption.offset)
        content = archive.read(min(caption.size, MAX_CAPTION_BYTES + 1))
        is_json = caption.ending == "json"
        found = row.with_caption(content, f"its .{caption.ending} file", is_json=is_json)
        return self._take_from_json(found) if is_json and not found.problem else found

    def _take_from_json(self, row: Row) -> Row:
        try:
            record = json.loads(str(row.caption))
        except (ValueError, RecursionError):
            return row.with_problem("its .json file is not JSON")
        keys = [str(key) for key in record] if isinstance(record, dict) else []
        if not {self._section.caption_column, *CAPTION_NAMES} & set(keys):
            return row.with_problem("no caption")
        column = find_column("caption_column", self._section.caption_column, CAPTION_NAMES, keys, row.id)
        return replace(row, caption=record[column])

    def position(self, row_id: str) -> tuple[Any, ...]:
        """Where the row stands in the source, to be sorted by."""
        file, offset, _ = self._place(row_id)
        return file, offset

    def _place(self, row_id: str) -> tuple[str, int, int]:
        """Tar file, offset and size in bytes; the file is empty if the id is none of this source."""
        found = re.fullmatch(r"(.*)@(\d+)\+(\d+)", row_id)
        file = next((file for file in self._files if row_id.startswith(f"{file}/")), "")
        return (file, int(found[2]), int(found[3])) if found else ("", 0, 0)

    def read(self, row_id: str) -> bytes:
        """The bytes of one picture, from any thread; raise `RefusedError` if they are not there."""
        file, offset, size = self._place(row_id)
        if not file or size > MAX_FILE_BYTES:
            raise RefusedError(f"no such row in {self.name!r}")
        try:
            with self._files[file].open("rb") as archive:
                archive.seek(offset)
                content = archive.read(size)
        except OSError as error:
            raise RefusedError(f"{file} cannot be read ({error.strerror})") from error
        if len(content) < size:
            raise RefusedError(f"{file} ends before this picture does")
        return content


def _problem_of(key: str, members: Sequence[Member]) -> tuple[str, str]:
    """Why a sample cannot be used, as its name and headers show, and the ending of the file at fault; both
    empty where nothing is.
    """
    if not is_inside(posixpath.normpath(key)) or ".." in key.split("/"):
        return "its name leads out of the archive", ""
    if not is_unicode(key):
        return "the file name is not UTF-8", ""
    if broken := next((member for member in members if member.problem), None):
        return str(broken.problem), broken.ending
    if len({member.ending for member in members}) < len(members):
        return "two files of one name", ""
    return "", ""


# Headers ----------------------------------------------------------------------------------------------------


def read_samples(file: io.BufferedReader, num_bytes: int) -> Iterator[tuple[str, list[Member]]]:
    """Key and members of each sample, as WebDataset's `base_plus_ext` and `group_by_keys` make them.

    The key is the name up to the first dot of its last part, and the ending, in lower case, what follows.
    Names without a dot and hidden ones belong to no sample. `num_bytes` is the tar file's size. Where a
    damaged header hides the rest, the last sample is `archive` with a member `damaged`. Raises
    `tarfile.ReadError` if `file` does not begin as a tar file does.
    """
    key, members = "", list[Member]()
    for name, offset, size, problem in _read_headers(file, num_bytes):
        found = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", name, re.DOTALL)
        if found is None or re.match(r"__[^/]*__(/|$)", name):
            continue
        if found[1] != key and members:
            yield key, members
            members = []
        key = found[1]
        members.append(Member(found[2].lower(), offset, size, problem))
    if members:
        yield key, members


class _HeaderFile:
    """A tar file of which only headers are read: a header that claims to be larger than any is refused before
    allocating.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self.seek, self.tell = file.seek, file.tell
        self._file = file

    def read(self, size: int) -> bytes:
        if size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return self._file.read(size)


def _read_headers(file: io.BufferedReader, num_bytes: int) -> Iterator[tuple[str, int, int, str | None]]:
    """Name, offset, size in bytes and problem of everything in a tar file but folders; reads no contents.

    Where a damaged header hides the rest, the last entry has the name `archive.damaged` and says so:
    `tarfile` would end there in silence.
    """
    try:
        archive = tarfile.TarFile(fileobj=_HeaderFile(file), errorlevel=2)  # type: ignore[arg-type]
    except (OSError, tarfile.TarError):
        raise
    except Exception as error:  # damaged headers make it raise errors of any type
        raise tarfile.ReadError(first_line(error)) from error
    with archive:
        last = 0
        while last <= num_bytes:  # of a file that the archive is too short for, its own entry says so
            try:
                member = archive.next()
            except OSError:
                raise
            except Exception:
                break
            if member is None or archive.offset <= last:  # back: for a size below 0, and so for ever
                break
            last = archive.offset
            archive.members = []  # type: ignore[attr-defined]  # it would keep them all
            problem = None
            if not member.isreg():
                problem = (
                    "a link, which is not followed"
                    if member.issym() or member.islnk()
                    else "a device, not a file"
                )
            elif member.sparse is not None:
                problem = "a sparse file: pack it again without --sparse"
            elif member.size < 0 or member.offset_data + member.size > num_bytes:
                problem = "the archive ends before this file does"
            if not member.isdir():
                yield member.name, member.offset_data, member.size, problem
        if last < num_bytes and file.seek(last) == last and any(file.read(tarfile.BLOCKSIZE)):
            yield (
                "archive.damaged",
                0,
                0,
                f"damaged at byte {last}: what follows cannot be read, download it again",
            )
