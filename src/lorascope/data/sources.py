"""Where pictures and captions come from: Parquet, picture folders, WebDataset tar files, hub data sets; rows
of each.

A source lists its rows with their captions and reads the bytes of one picture when asked; pictures stay where
they are. Nothing is ever unpacked, and what cannot be used becomes a row with the reason.
"""

import csv
import functools
import io
import itertools
import json
import os
import posixpath
import re
import stat
import tarfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lorascope.base.hub import fetch_snapshot
from lorascope.data.captions import MAX_CAPTION_BYTES, caption_in, clean_caption, decode_text
from lorascope.data.pictures import MAX_FILE_BYTES, SUFFIXES, RefusedError
from lorascope.data.tars import Member, read_samples
from lorascope.errors import DataError, first_line
from lorascope.schema import DataSection
from lorascope.store import open_regular, require_regular

SPLITS = ("train", "test", "validation")
MAX_METADATA_BYTES = 2**30
MAX_REPEATS = 999

_POCKET_DIR = Path(__file__).parents[1] / "pocket" / "cartoon"
_IMAGE_NAMES = ("image", "img", "picture", "photo", "image_bytes", "jpg", "jpeg", "png", "webp")
_CAPTION_NAMES = ("text", "caption", "prompt", "txt", "description")
_HUB_PATTERNS = (
    *("*.parquet", "*.tar", "*.txt", "*.caption", "*metadata.jsonl", "*metadata.csv"),
    *(f"*{suffix}" for suffix in sorted(SUFFIXES)),
)
_UNREAD_SUFFIXES = frozenset(
    (
        *(".heic", ".heif", ".jxl", ".jp2", ".tga", ".exr", ".hdr", ".ico", ".svg", ".eps", ".pdf"),
        *(".psd", ".psb", ".xcf", ".kra", ".clip", ".ai"),
        *(".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
        *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"),
    )
)
_CAPTION_ENDINGS = (".txt", ".caption")
_NUMBERED = re.compile(r"([+-]?[0-9]+(?:[.,][0-9]+)?)_(.*\w.*)", re.DOTALL)
_NUMBERED_LAST = re.compile(r".*[^\W\d_].*_[1-9][0-9]{0,2}", re.DOTALL)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SHOWN_NAMES = 3
_SHOWN_PATH = 300
_FOLDER_LINK = "is a link to a folder, which is not followed"
_PARQUET_ERRORS = (OSError, ValueError, pa.ArrowException)  # of damaged text, UnicodeDecodeError
_ROW_GROUP_CACHE_BYTES = 256 * 2**20
_MAX_SHARDS = 100_000

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


class ParquetSource:
    """Rows of Parquet files with a picture column (bytes, or a struct with bytes) and a caption column."""

    def __init__(self, name: str, files: Mapping[str, Path], section: DataSection) -> None:
        self.name = name
        self.origin = "\n".join(str(path.resolve()) for path in files.values())
        self.remarks = _missing_shards(files)
        self._files = dict(files)
        self._section = section
        self._columns: dict[str, tuple[str, str]] = {}
        self._first_rows: dict[str, list[int]] = {}
        self._cache: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock = threading.Lock()
        for file in self._files:
            with self._open(file) as parquet:
                self._columns[file] = self._find_columns(file, parquet.schema_arrow)
                sizes = [
                    parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)
                ]
            self._first_rows[file] = [0, *itertools.accumulate(sizes)]
        self.num_rows = sum(first[-1] for first in self._first_rows.values())

    def _open(self, file: str, coded: str | None = None) -> Any:
        """The open file; of a column `coded` what is stored once for many rows is not copied for each."""
        try:
            require_regular(self._files[file], DataError)
            return pq.ParquetFile(self._files[file], read_dictionary=[coded] if coded else None)
        except _PARQUET_ERRORS as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise DataError(
                f"{self._files[file]}: cannot be read as Parquet ({reason}): download or export it again"
            ) from error

    def _find_columns(self, file: str, schema: Any) -> tuple[str, str]:
        names = []
        for key, common, fits, needed in (
            ("image_column", _IMAGE_NAMES, _holds_images, "image bytes"),
            ("caption_column", _CAPTION_NAMES, _holds_text, "text"),
        ):
            wanted = getattr(self._section, key)
            fitting = [field.name for field in schema if fits(field.type)]
            name = (
                wanted
                if wanted in schema.names
                else _find_column(key, wanted, common, fitting, str(self._files[file]), schema.names)
            )
            if schema.names.count(name) > 1:
                raise DataError(
                    f"{self._files[file]}: {schema.names.count(name)} columns are called {name!r}: "
                    "rename all but one"
                )
            if name not in fitting:
                raise DataError(
                    f"{self._files[file]}: column {name!r} holds {schema.field(name).type}, needs "
                    f"{needed}: set data.{key}"
                )
            names.append(name)
        return names[0], names[1]

    def _read_group(self, file: str, group: int, column: str, coded: bool = False) -> Any:
        where = f"{self._files[file]}: row group {group}"
        first_rows = self._first_rows[file]
        with self._open(file, column if coded else None) as parquet:
            try:
                table = parquet.read_row_group(group, columns=[column])
            except _PARQUET_ERRORS as error:
                raise DataError(
                    f"{where} cannot be read ({first_line(error)}): download or export the file again"
                ) from error
        if table.shape != (first_rows[group + 1] - first_rows[group], 1):
            raise DataError(
                f"{where} is not what it was: the file changed after it was listed: run the data stage again"
            )
        return table.column(0)

    def rows(self) -> Iterator[Row]:
        """All rows in the order of the files; reads the captions alone."""
        for file, first_rows in self._first_rows.items():
            try:
                split, stamp = _split_of_file(file), stamp_of(os.stat(self._files[file]))
            except OSError as error:
                raise DataError(
                    f"{self._files[file]}: cannot be read any more ({error.strerror}): put it back"
                ) from error
            for group, first_row in enumerate(first_rows[:-1]):
                captions = self._read_group(file, group, self._columns[file][1], coded=True)
                for index in range(len(captions)):
                    row = Row(f"{file}#{first_row + index}", split, stamp, None)
                    try:
                        yield replace(row, caption=_bounded_text(captions[index]))
                    except RefusedError as error:
                        yield _with_problem(row, str(error))

    def position(self, row_id: str) -> tuple[Any, ...]:
        """Where the row stands in the source, to be sorted by."""
        file, _, row = row_id.rpartition("#")
        return file, int(row)

    def read(self, row_id: str) -> bytes:
        """The image file's bytes of one row, from any thread; raise `RefusedError` if there are none.

        Row groups stay cached up to a fixed number of bytes, two at least: rows read at once may stand in
        neighbours.
        """
        file, _, row = row_id.rpartition("#")
        first_rows = self._first_rows.get(file, [0])
        if not row.isdigit() or int(row) >= first_rows[-1]:
            raise RefusedError(f"no such row in {self.name!r}")
        group = int(np.searchsorted(first_rows, int(row), side="right")) - 1
        with self._lock:
            if (file, group) not in self._cache:
                self._cache[file, group] = self._read_group(file, group, self._columns[file][0])
                while (
                    len(self._cache) > 2
                    and sum(column.nbytes for column in self._cache.values()) > _ROW_GROUP_CACHE_BYTES
                ):
                    self._cache.popitem(last=False)
            self._cache.move_to_end((file, group))
            value = self._cache[file, group][int(row) - first_rows[group]].as_py()
        content: bytes | None = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            raise RefusedError("no image bytes in this row")
        return content


class FolderSource:
    """Pictures in a folder, at any depth; captions from `metadata.jsonl`/`metadata.csv`, or a text file
    beside each.

    A metadata file speaks for its folder and what is below, and where there is one, no caption beside a
    picture counts. Otherwise `1.txt` or, where that is missing, `1.caption` holds the caption of `1.png`.
    What does not count is compared with what does, and said where it differs. Pictures of a folder `10_name`
    are seen 10 times; where it holds no caption file at all, its name is their caption.
    """

    def __init__(self, name: str, folder: Path, section: DataSection) -> None:
        self.name = name
        self.origin = str(folder.resolve())
        self.remarks: list[str] = []
        self._folder = folder
        self._section = section

    @functools.cached_property
    def _listed(self) -> list[tuple[Row, str, list[str]]]:
        """Rows without the captions that stand in files of their own; the list or else the caption file that
        counts, and the caption files that do not.
        """
        stamps = dict(sorted(_walk(self._folder)))
        if unread := _unread_files(stamps):
            self.remarks.append(unread)
        if links := [name for name, status in stamps.items() if status == _FOLDER_LINK]:
            self.remarks.append(
                f"links to folders are not followed: {name_some(links)}: move the folders here"
            )
        pictures = [name for name in stamps if posixpath.splitext(name)[1].lower() in SUFFIXES]
        metadata = [name for name in stamps if posixpath.basename(name) in ("metadata.jsonl", "metadata.csv")]
        if not pictures:
            remedy = f", {unread}" if unread else ": give a folder with any of these"
            raise DataError(
                f"data.source = {self.name!r}: no Parquet or tar files in it or its data folder, and no "
                f"pictures ({', '.join(sorted(SUFFIXES))}){remedy}"
            )
        self.remarks += _repeat_remarks(map(posixpath.dirname, pictures))
        if (own := self._folder.resolve().name) and _repeats_in(own) is not None:
            self.remarks.append(
                f"repeats are read from folders inside the source, not from its own name {_shown(own)}: "
                "give the folder above, or set data.repeats"
            )
        if metadata:
            named: dict[str, str] = {}
            listed = list(self._metadata_rows(stamps, pictures, metadata, named))
            return [
                (row, named.get(row.id, ""), _readable(_caption_files(row.id, stamps), stamps))
                for row in listed
            ]
        captions = {picture: _caption_files(picture, stamps) for picture in pictures}
        captioned = {
            _repeat_folder(posixpath.dirname(picture)) for picture, files in captions.items() if files
        }
        rows = []
        for picture, files in captions.items():
            row = self._picture_row(picture, stamps)
            repeat_folder = _repeat_folder(posixpath.dirname(picture))
            if not files and repeat_folder and repeat_folder not in captioned:
                text = posixpath.basename(repeat_folder).partition("_")[2]
                row = self._picture_row(picture, stamps, text, "captioned by the name of its folder")
            if files and not row.problem and isinstance(status := stamps[files[0]], str):
                row = _with_problem(row, f"{_shown(posixpath.basename(files[0]))} {status}")
            rows.append((row, files[0] if files else "", _readable(files[1:], stamps)))
        shared = Counter(counting for _, counting, _ in rows if counting)
        if several := [name for name, number in shared.items() if number > 1]:
            self.remarks.append(
                f"caption files that count for more than one picture of their name: {name_some(several)}: "
                "rename pictures that need captions of their own"
            )
        if not any(counting or row.treatments for row, counting, _ in rows):
            raise DataError(
                f"data.source = {self.name!r}: {len(pictures)} pictures and no captions: add "
                "metadata.jsonl or metadata.csv with file_name and text, or a .txt file beside each "
                "picture (`lorascope caption` writes them)"
            )
        return rows

    def _picture_row(
        self,
        picture: str,
        stamps: Mapping[str, Stamp | str],
        caption: object = None,
        *treatments: str,
    ) -> Row:
        if not _is_unicode(picture):
            return Row(_shown(picture), "train", None, None, problem="the file name is not UTF-8")
        status = stamps.get(picture, "is not there")
        stamp = None if isinstance(status, str) else status
        problem = None if stamp else f"the picture {status}"
        if stamp and (unseen := _repeats_problem(picture)):
            problem = unseen
        elif stamp and stamp[0] > MAX_FILE_BYTES:
            problem = f"the image file has {stamp[0]} bytes, more than the limit of {MAX_FILE_BYTES}"
        split, repeats = _split_of_picture(picture), _repeats_of(picture)
        return Row(picture, split, stamp, caption, repeats, problem, treatments)

    def _metadata_rows(
        self,
        stamps: Mapping[str, Stamp | str],
        pictures: Sequence[str],
        metadata: Sequence[str],
        named: dict[str, str],
    ) -> Iterator[Row]:
        """A row for each line of the metadata files, then for each picture that none of them names.

        `named` is filled with the pictures and the metadata file that names each.
        """
        for name in metadata:
            path = self._folder / name
            if isinstance(status := stamps[name], str):
                raise DataError(f"{path} {status}: put a file in its place, or take it away")
            records = list(_read_metadata(path))
            columns = list(dict.fromkeys(str(key) for _, record, _ in records for key in record))
            if records and (
                "file_name" not in columns
                or not {self._section.caption_column, *_CAPTION_NAMES} & set(columns)
            ):
                line, record, _ = records[0]
                found = ", ".join(map(repr, record)) or "none"
                raise DataError(
                    f"{path}: needs columns file_name and {self._section.caption_column}; line {line} "
                    f"has {found}"
                )
            column = (
                _find_column(
                    "caption_column", self._section.caption_column, _CAPTION_NAMES, columns, str(path)
                )
                if records
                else ""
            )
            for line, record, more in records:
                file_name = record.get("file_name")
                picture = posixpath.normpath(posixpath.join(posixpath.dirname(name), str(file_name)))
                row_id = f"{_shown(name)}#{line}"
                if (
                    not isinstance(file_name, str)
                    or not _is_unicode(file_name)
                    or "\0" in file_name
                    or not _is_inside(picture)
                ):
                    yield Row(
                        row_id,
                        "train",
                        None,
                        None,
                        problem=f"file_name = {file_name!r} does not name a file in this folder",
                    )
                elif picture in named:
                    yield Row(
                        row_id,
                        "train",
                        None,
                        None,
                        problem=f"{_shown(picture)} was named before, in {_shown(named[picture])}",
                    )
                else:
                    named[picture] = name
                    row = self._picture_row(picture, stamps, record.get(column))
                    yield _with_more_fields(row, more, column == list(record)[-1], f"line {line} of {name}")
        for picture in pictures:
            if picture not in named:
                row = self._picture_row(picture, stamps)
                yield row if row.problem else _with_problem(row, _unnamed(picture, metadata, stamps))

    @property
    def num_rows(self) -> int:
        """Rows in all."""
        return len(self._listed)

    def rows(self) -> Iterator[Row]:
        """All rows in the order of their names; caption files are read as they come."""
        for row, counting, others in self._listed:
            if counting and not row.problem and counting.endswith(_CAPTION_ENDINGS):
                name = _shown(posixpath.basename(counting))
                try:
                    row = _with_caption(row, self._read_caption_file(counting), name)
                except OSError as error:
                    row = _with_problem(row, f"{name} cannot be read ({error.strerror})")
            yield self._compared(row, counting, others) if others and not row.problem else row

    def _read_caption_file(self, name: str) -> bytes:
        with (self._folder / name).open("rb") as file:
            return file.read(MAX_CAPTION_BYTES + 1)

    def _compared(self, row: Row, counting: str, others: Sequence[str]) -> Row:
        """The row with what is to be said of caption files that do not count beside the one that does."""
        kind = posixpath.basename(counting)
        if counting.endswith(_CAPTION_ENDINGS):
            kind = f"its {posixpath.splitext(counting)[1]} file"
        try:
            caption = clean_caption(row.caption)[0]
        except RefusedError as error:
            endings = " and ".join(posixpath.splitext(name)[1] for name in others)
            return _with_problem(row, f"{error} in {kind}, and beside that its {endings} does not count")
        for name in others:
            try:
                other = clean_caption(caption_in(self._read_caption_file(name))[0])[0]
            except (OSError, RefusedError):
                continue  # what cannot be read does not count anyway
            if other != caption:
                treatment = f"{kind} counts, its {posixpath.splitext(name)[1]} file says otherwise"
                row = replace(row, treatments=(*row.treatments, treatment))
        return row

    def position(self, row_id: str) -> tuple[Any, ...]:
        """Where the row stands in the source, to be sorted by."""
        return (row_id,)

    def read(self, row_id: str) -> bytes:
        """The bytes of one picture file, from any thread; raise `RefusedError` if it cannot be read."""
        try:
            if (path := self._folder / row_id).exists() and not path.is_file():
                raise RefusedError("the image file is no file any more")
            with path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise RefusedError(f"the image file cannot be read ({error.strerror})") from error
        if len(content) > MAX_FILE_BYTES:
            raise RefusedError(f"the image file has more bytes than the limit of {MAX_FILE_BYTES}")
        return content


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
        self.remarks = _missing_shards(files)
        self._files = dict(files)
        self._section = section

    @functools.cached_property
    def _listed(self) -> list[tuple[Row, str, Member | None]]:
        """Rows without captions, the tar file of each and the file in it that holds its caption."""
        listed = [entry for file in self._files for entry in self._list_file(file)]
        self.remarks += _repeat_remarks(
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
                        row = _with_problem(
                            row,
                            f"{_shown(key)} was there before: the files of a sample must stand "
                            "together, once",
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
        split = _split_of_file(posixpath.basename(file))

        def refuse(problem: str, ending: str = "") -> tuple[Row, None]:
            return Row(
                f"{file}/{_shown(f'{key}.{ending}' if ending else key)}", split, None, None, problem=problem
            ), None

        where = f"{self._files[file]}: {key}"
        by_ending = {member.ending: member for member in members}
        if not _is_inside(posixpath.normpath(key)) or ".." in key.split("/"):
            return refuse("its name leads out of the archive")
        if not _is_unicode(key):
            return refuse("the file name is not UTF-8")
        if broken := next((member for member in members if member.problem), None):
            return refuse(str(broken.problem), broken.ending)
        if len(by_ending) < len(members):
            return refuse("two files of one name")
        if unseen := _repeats_problem(key):
            return refuse(unseen)
        wanted = self._section.image_column
        endings = [ending for ending in by_ending if f".{ending.rpartition('.')[2]}" in SUFFIXES]
        if wanted not in by_ending and not endings:
            return refuse(f"no picture: {', '.join(by_ending)}")
        image = by_ending[
            wanted if wanted in by_ending else _find_column("image_column", wanted, endings, endings, where)
        ]
        if image.size > MAX_FILE_BYTES:
            return refuse(
                f"the image file has {image.size} bytes, more than the limit of {MAX_FILE_BYTES}",
                image.ending,
            )
        wanted = self._section.caption_column
        texts = [ending for ending in by_ending if ending in _CAPTION_NAMES]
        ending = wanted
        if wanted not in by_ending:
            ending = _find_column("caption_column", wanted, _CAPTION_NAMES, texts, where) if texts else "json"
        row = Row(
            f"{file}/{key}.{image.ending}@{image.offset}+{image.size}", split, stamp, None, _repeats_of(key)
        )
        return row, by_ending.get(ending)

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
        found = _with_caption(row, content, f"its .{caption.ending} file", is_json=is_json)
        return self._take_from_json(found) if is_json and not found.problem else found

    def _take_from_json(self, row: Row) -> Row:
        try:
            record = json.loads(str(row.caption))
        except (ValueError, RecursionError):
            return _with_problem(row, "its .json file is not JSON")
        keys = [str(key) for key in record] if isinstance(record, dict) else []
        if not {self._section.caption_column, *_CAPTION_NAMES} & set(keys):
            return _with_problem(row, "no caption")
        column = _find_column("caption_column", self._section.caption_column, _CAPTION_NAMES, keys, row.id)
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


Source = ParquetSource | FolderSource | TarSource


def open_source(section: DataSection, revision: str | None = None) -> Source:
    """The source that `data.source` names; `revision` takes the place of `data.revision` for a hub data set.

    Raises `DataError` if there is nothing of that name, it cannot be read or holds no rows of any known kind,
    `HubError` if the hub does not give it.
    """
    try:
        return _choose_source(section, revision)
    except OSError as error:
        raise _unreadable(Path(section.source), error) from error


def _choose_source(section: DataSection, revision: str | None) -> Source:
    name, path = section.source, Path(section.source)
    if name == "pocket":
        path = _POCKET_DIR
        if not _files_in(path, "*.parquet"):
            raise DataError(
                "data.source = 'pocket': the pocket data set is missing from this installation: install "
                "lorascope again"
            )
    elif not path.exists():
        if path.suffix == ".tar" and "{" in name:
            return TarSource(name, _expand_shards(name), section)
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise DataError(
                f"data.source = {name!r}: no such file or folder, and no hub data set id such as "
                "owner/name: check the path"
            )
        path = fetch_snapshot(
            name,
            kind="dataset",
            revision=revision or section.revision,
            patterns=_HUB_PATTERNS,
            what=f"data.source = {name!r}",
        )
        name = f"{name}@{path.name}"
    if path.is_dir():
        if files := _files_in(path, "*.parquet"):
            return ParquetSource(name, files, section)
        has_pictures = any(child.suffix.lower() in SUFFIXES for child in path.iterdir())
        if not has_pictures and (files := _files_in(path, "*.tar")):
            return TarSource(name, files, section)
        return FolderSource(name, path, section)
    match path.suffix.lower():
        case ".parquet":
            return ParquetSource(name, {path.name: path}, section)
        case ".tar":
            return TarSource(name, {path.name: path}, section)
        case ".zip" | ".gz" | ".tgz" | ".zst" | ".7z" | ".rar":
            raise DataError(
                f"data.source = {name!r}: compressed: unpack it and give the folder, or the .tar file"
            )
    raise DataError(
        f"data.source = {name!r}: not a Parquet file (.parquet), a tar file (.tar) or a folder: give "
        "one of these"
    )


def count_repeats(section: DataSection) -> tuple[dict[int, int], list[str]]:
    """Pictures of a folder on this machine by the number of times that an epoch shows them, and the source's
    remarks, from names and lists alone; nothing of any other source, which is opened or fetched by a run.
    """
    source = open_source(section) if Path(section.source).is_dir() else None
    if not isinstance(source, FolderSource):
        return {}, []
    counts = Counter(section.repeats * row.repeats for row, _, _ in source._listed if not row.problem)
    return dict(sorted(counts.items())), source.remarks


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file."""
    return status.st_size, status.st_mtime_ns


def _files_in(folder: Path, pattern: str) -> dict[str, Path]:
    """Files of the folder that match, or else of its data folder, by name."""
    for place in (folder, folder / "data"):
        if files := sorted(path for path in place.glob(pattern) if not path.name.startswith(".")):
            if odd := next((path.name for path in files if not _is_unicode(path.name)), None):
                raise DataError(f"{folder}: the file name {_shown(odd)} is not UTF-8: rename the file")
            return {path.name: path for path in files}
    return {}


def _expand_shards(pattern: str) -> dict[str, Path]:
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


def _missing_shards(names: Iterable[str]) -> list[str]:
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


def _find_column(
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


def _split_of_file(name: str) -> str:
    """The split that a file's name starts with; `train` where it starts with none."""
    found = re.match(rf"({'|'.join(SPLITS)})(?![a-zA-Z])", name)
    return found[1] if found else "train"


def _split_of_picture(name: str) -> str:
    """The split that a picture's top folder is called after; `train` where it is called otherwise."""
    top, slash, _ = name.partition("/")
    return top if slash and top in SPLITS else "train"


@functools.lru_cache(maxsize=4096)
def _repeat_folder(folder: str) -> str | None:
    """The innermost part of a path that is called such as `10_name`, with the folders above it."""
    parts = folder.split("/")
    for depth in range(len(parts), 0, -1):
        if _repeats_in(parts[depth - 1]) is not None:
            return "/".join(parts[:depth])
    return None


def _repeats_in(name: str) -> int | None:
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


def _repeats_of(picture: str) -> int:
    folder = _repeat_folder(posixpath.dirname(picture))
    return (_repeats_in(posixpath.basename(folder)) or 0) if folder else 1


def _repeats_problem(picture: str) -> str | None:
    """Why a picture is not shown at all: kohya's scripts leave out what is to be repeated 0 times or less."""
    if _repeats_of(picture) > 0:
        return None
    folder = posixpath.basename(str(_repeat_folder(posixpath.dirname(picture))))
    return (
        f"the name of its folder {_shown(folder)} asks for no repeats: rename it with a number from 1 to "
        f"{MAX_REPEATS}, or take it away"
    )


def _repeat_remarks(folders: Iterable[str]) -> list[str]:
    """Remarks on numbers in the names of folders that are not read as repeats though they may be meant so."""
    remarks = []
    paths = set(folders)
    wrong = {
        part
        for path in paths
        for part in path.split("/")
        if _NUMBERED.fullmatch(part) and _repeats_in(part) is None
    }
    turned = {
        part
        for path in paths
        if _repeat_folder(path) is None
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


def _holds_images(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return [_holds_images(member.type) for member in kind if member.name == "bytes"] == [True]
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _bounded_text(scalar: Any) -> str | None:
    """The text of one row of a column; raise `RefusedError` where it is too long for a caption or no UTF-8.

    It is measured before it is made: a file may hold one long text for all its rows.
    """
    try:
        while pa.types.is_dictionary(scalar.type):
            scalar = scalar.value
    except pa.ArrowException as error:
        raise RefusedError(f"the caption cannot be read ({first_line(error)})") from error
    if not scalar.is_valid:
        return None
    if (content := scalar.as_buffer()).size > 4 * MAX_CAPTION_BYTES:  # no character of UTF-8 has more than 4
        raise RefusedError(
            f"the caption has {content.size} bytes, more than the limit of {MAX_CAPTION_BYTES} characters"
        )
    try:
        return content.to_pybytes().decode()
    except UnicodeDecodeError as error:
        raise RefusedError("the caption is not UTF-8") from error


def _holds_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    )


# Folders ----------------------------------------------------------------------------------------------------


def _walk(folder: Path) -> Iterator[tuple[str, Stamp | str]]:
    """Names of all files below `folder`, relative to it, with their stamps, or with what is wrong with them.

    Hidden files and folders are left out, and links to folders not followed. Raises `DataError` where a
    folder cannot be read.
    """
    pending = [""]
    while pending:
        below = pending.pop()
        try:
            with os.scandir(folder / below) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(f"{below}{entry.name}/")
                    else:
                        yield f"{below}{entry.name}", _status_of(entry)
        except OSError as error:
            raise _unreadable(folder / below, error) from error


def _status_of(entry: os.DirEntry[str]) -> Stamp | str:
    """The stamp of a file; what is wrong where it is none, since a pipe, say, may never end."""
    try:
        status = entry.stat()
    except OSError as error:
        return f"is a link that leads nowhere ({error.strerror})"
    if stat.S_ISREG(status.st_mode):
        return stamp_of(status)
    return _FOLDER_LINK if stat.S_ISDIR(status.st_mode) else "is a pipe, a socket or a device, not a file"


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{_shown(str(path))[:_SHOWN_PATH]}: cannot be read ({error.strerror}): put it back, or correct "
        "its permissions"
    )


def _unread_files(stamps: Mapping[str, Stamp | str]) -> str:
    """Words on pictures and films in formats that are not read, which show by their endings or by captions
    that stand beside them; empty where there are none.
    """
    parts = [(name, *posixpath.splitext(name)) for name in stamps]
    stems = {stem for _, stem, ending in parts if ending.lower() in SUFFIXES}
    unread = [
        _shown(name)
        for name, stem, ending in parts
        if ending.lower() in _UNREAD_SUFFIXES
        or (stem not in stems and ending not in _CAPTION_ENDINGS and _caption_files(name, stamps))
    ]
    if not unread:
        return ""
    files = f"{len(unread):,} files in formats" if len(unread) > 1 else "1 file in a format"
    return f"{files} not read here: {name_some(unread)}: convert what is to be used to PNG or JPEG"


def name_some(names: Sequence[str]) -> str:
    """The first few of the names, and how many more there are."""
    more = f" and {len(names) - _SHOWN_NAMES:,} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(map(_shown, names[:_SHOWN_NAMES])) + more


def _caption_files(picture: str, names: Mapping[str, Stamp | str]) -> list[str]:
    """The caption files beside a picture, the one that counts first."""
    stem = posixpath.splitext(picture)[0]
    return [name for ending in _CAPTION_ENDINGS if (name := stem + ending) in names]


def _readable(files: Iterable[str], stamps: Mapping[str, Stamp | str]) -> list[str]:
    return [name for name in files if not isinstance(stamps[name], str)]


def _is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8: JSON escapes and file names can hold half characters that
    cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(name: str) -> str:
    """A file name as text of one line that can be written as UTF-8."""
    text = name if _is_unicode(name) else os.fsencode(name).decode(errors="backslashreplace")
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _is_inside(name: str) -> bool:
    """Whether a normalised name stays within its folder."""
    return not name.startswith(("/", "../")) and name not in (".", "..")


def _with_caption(row: Row, content: bytes, file: str, *, is_json: bool = False) -> Row:
    """The row with the text of its caption file, at most one byte more than `MAX_CAPTION_BYTES` of it."""
    try:
        caption, left_out = caption_in(content, whole=is_json)
    except RefusedError as error:
        return _with_problem(row, f"{file}: {error}")
    return replace(row, caption=caption, treatments=(*row.treatments, *left_out))


def _with_problem(row: Row, problem: str) -> Row:
    return replace(row, caption=None, problem=problem)


def _with_more_fields(row: Row, more: Sequence[str], is_last: bool, where: str) -> Row:
    """The row of a line that has `more` fields than its list has columns: commas of a caption without quotes.

    They are read as that where the caption `is_last`, and a problem elsewhere.
    """
    if not any(more):
        return row
    if row.problem or not is_last or not isinstance(row.caption, str):
        found = f"{where} has {len(more)} field{'s' if len(more) > 1 else ''} more than columns"
        before = f"{row.problem}; " if row.problem else ""
        return _with_problem(row, f"{before}{found}: put captions with commas into quotes")
    caption = ",".join((row.caption, *more))
    return replace(row, caption=caption, treatments=("commas without quotes taken as the caption's own",))


def _unnamed(picture: str, metadata: Sequence[str], stamps: Mapping[str, Stamp | str]) -> str:
    """Why a picture that no list names has no caption."""
    beside = _caption_files(picture, stamps)
    unread = (
        f", and {_shown(posixpath.basename(beside[0]))} is not read where there is such a list"
        if beside
        else ""
    )
    return f"no caption: no line of {name_some(metadata)} names it{unread}"


def _read_metadata(path: Path) -> Iterator[tuple[int, dict[str, Any], list[str]]]:
    """Line number (from 1), record and fields beyond the columns, of each line."""
    try:
        if (num_bytes := path.stat().st_size) > MAX_METADATA_BYTES:
            raise DataError(
                f"{path}: {num_bytes} bytes, more than the limit of {MAX_METADATA_BYTES}: split the "
                "folder and its metadata"
            )
        text = decode_text(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}): put it back, or correct its permissions"
        ) from error
    except RefusedError as error:
        raise DataError(f"{path}: {error}") from error
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            names = Counter(reader.fieldnames or ())
            if twice := next((name for name in names if name and names[name] > 1), None):
                raise DataError(f"{path}: {names[twice]} columns are called {twice!r}: rename all but one")
            for record in reader:
                more: Any = record.pop(None, [])
                yield reader.line_num, record, more
        except csv.Error as error:
            raise DataError(
                f"{path}: line {reader.reader.line_num}: not CSV ({error}): correct the line"
            ) from error
        return
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {line}: not JSON ({error}): correct the line") from error
        if not isinstance(record, dict):
            raise DataError(
                f"{path}: line {line}: not a JSON object: give one object with file_name and text a line"
            )
        yield line, record, []
