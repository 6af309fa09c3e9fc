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
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lorascope.base.hub import fetch_snapshot
from lorascope.config import DataSection
from lorascope.data.captions import MAX_CAPTION_BYTES, caption_in, decode_text
from lorascope.data.pictures import MAX_FILE_BYTES, SUFFIXES, RefusedError
from lorascope.data.tars import Member, read_samples
from lorascope.errors import DataError, first_line

SPLITS = ("train", "test", "validation")
MAX_METADATA_BYTES = 2**30

_POCKET_DIR = Path(__file__).parents[1] / "pocket" / "cartoon"
_IMAGE_NAMES = ("image", "img", "picture", "photo", "image_bytes", "jpg", "jpeg", "png", "webp")
_CAPTION_NAMES = ("text", "caption", "prompt", "txt", "description")
_HUB_PATTERNS = (
    *("*.parquet", "*.tar", "*.txt", "*.caption", "*metadata.jsonl", "*metadata.csv"),
    *(f"*{suffix}" for suffix in sorted(SUFFIXES)),
)
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
    of the row's `10_name` folder. `problem` says why the row cannot be used, `treatments` what was done to get
    its caption, and `notes` what its owner may not expect.
    """

    id: str
    split: str
    stamp: Stamp | None
    caption: object
    repeats: int = 1
    problem: str | None = None
    treatments: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class ParquetSource:
    """Rows of Parquet files with a picture column (bytes, or a struct with bytes) and a caption column."""

    def __init__(self, name: str, files: Mapping[str, Path], section: DataSection) -> None:
        self.name = name
        self.origin = "\n".join(str(path.resolve()) for path in files.values())
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

    def _open(self, file: str) -> Any:
        try:
            return pq.ParquetFile(self._files[file])
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{self._files[file]}: cannot be read as Parquet ({first_line(error)}): download or "
                "export it again"
            ) from error

    def _find_columns(self, file: str, schema: Any) -> tuple[str, str]:
        names = []
        for key, common, fits, needed in (
            ("image_column", _IMAGE_NAMES, _holds_images, "image bytes"),
            ("caption_column", _CAPTION_NAMES, _holds_text, "text"),
        ):
            wanted = getattr(self._section, key)
            fitting = [name for name in schema.names if fits(schema.field(name).type)]
            name = (
                wanted
                if wanted in schema.names
                else _find_column(key, wanted, common, fitting, str(self._files[file]), schema.names)
            )
            if name not in fitting:
                raise DataError(
                    f"{self._files[file]}: column {name!r} holds {schema.field(name).type}, needs "
                    f"{needed}: set data.{key}"
                )
            names.append(name)
        return names[0], names[1]

    def _read_group(self, file: str, group: int, column: str) -> Any:
        where = f"{self._files[file]}: row group {group}"
        first_rows = self._first_rows[file]
        with self._open(file) as parquet:
            try:
                table = parquet.read_row_group(group, columns=[column])
            except (OSError, pa.ArrowException) as error:
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
                captions = self._read_group(file, group, self._columns[file][1])
                for index in range(len(captions)):
                    row_id = f"{file}#{first_row + index}"
                    try:
                        yield Row(row_id, split, stamp, captions[index].as_py())
                    except UnicodeDecodeError:
                        yield Row(row_id, split, stamp, None, problem="the caption is not UTF-8")

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

    A metadata file speaks for its folder and what is below, and where there is one, no captions are read
    beside the pictures. Otherwise `1.txt` or, where that is missing, `1.caption` holds the caption of
    `1.png`. Pictures of a folder `10_name` are seen 10 times; where it holds no caption file at all, its name
    is their caption.
    """

    def __init__(self, name: str, folder: Path, section: DataSection) -> None:
        self.name = name
        self.origin = str(folder.resolve())
        self._folder = folder
        self._section = section

    @functools.cached_property
    def _listed(self) -> list[tuple[Row, str | None]]:
        """Rows without the captions that stand in files of their own, and the names of those files."""
        try:
            stamps = dict(sorted(_walk(self._folder)))
        except OSError as error:
            raise DataError(
                f"{error.filename}: cannot be read ({error.strerror}): put it back, or correct its "
                "permissions"
            ) from error
        pictures = [name for name in stamps if posixpath.splitext(name)[1].lower() in SUFFIXES]
        metadata = [name for name in stamps if posixpath.basename(name) in ("metadata.jsonl", "metadata.csv")]
        if not pictures:
            raise DataError(
                f"data.source = {self.name!r}: no Parquet or tar files in it or its data folder, and no "
                "pictures"
                f" ({', '.join(sorted(SUFFIXES))}): give a folder with any of these"
            )
        if metadata:
            return [(row, None) for row in self._metadata_rows(stamps, pictures, metadata)]
        captions = {picture: _caption_file(picture, stamps) for picture in pictures}
        captioned = {
            _repeat_folder(posixpath.dirname(picture)) for picture, caption in captions.items() if caption
        }
        rows = []
        for picture, caption_name in captions.items():
            row = self._picture_row(picture, stamps)
            repeat_folder = _repeat_folder(posixpath.dirname(picture))
            if caption_name is None and repeat_folder and repeat_folder not in captioned:
                text = posixpath.basename(repeat_folder).partition("_")[2]
                row = self._picture_row(picture, stamps, text, "captioned by the name of its folder")
            rows.append((row, caption_name))
        if not any(caption_name or row.treatments for row, caption_name in rows):
            raise DataError(
                f"data.source = {self.name!r}: {len(pictures)} pictures and no captions: add "
                "metadata.jsonl or metadata.csv with file_name"
                " and text, or a .txt file beside each picture (`lorascope caption` writes them)"
            )
        return rows

    def _picture_row(
        self,
        picture: str,
        stamps: Mapping[str, Stamp | None],
        caption: object = None,
        *treatments: str,
    ) -> Row:
        if not _is_unicode(picture):
            return Row(_shown(picture), "train", None, None, problem="the file name is not UTF-8")
        stamp = stamps.get(picture)
        problem = None if stamp else "the picture is not there"
        if stamp and stamp[0] > MAX_FILE_BYTES:
            problem = f"the image file has {stamp[0]} bytes, more than the limit of {MAX_FILE_BYTES}"
        split, repeats = _split_of_picture(picture), _repeats_of(picture)
        return Row(picture, split, stamp, caption, repeats, problem, treatments)

    def _metadata_rows(
        self, stamps: Mapping[str, Stamp | None], pictures: Sequence[str], metadata: Sequence[str]
    ) -> Iterator[Row]:
        """A row for each line of the metadata files, then for each picture that none of them names."""
        named: set[str] = set()
        for name in metadata:
            path = self._folder / name
            records = list(_read_metadata(path))
            columns = list(dict.fromkeys(str(key) for _, record in records for key in record))
            if records and (
                "file_name" not in columns
                or not {self._section.caption_column, *_CAPTION_NAMES} & set(columns)
            ):
                line, record = records[0]
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
            for line, record in records:
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
                    yield Row(row_id, "train", None, None, problem=f"{picture} was named before")
                else:
                    named.add(picture)
                    yield self._picture_row(picture, stamps, record.get(column))
        yield from (self._picture_row(picture, stamps) for picture in pictures if picture not in named)

    @property
    def num_rows(self) -> int:
        """Rows in all."""
        return len(self._listed)

    def rows(self) -> Iterator[Row]:
        """All rows in the order of their names; caption files are read as they come."""
        for row, caption_name in self._listed:
            if caption_name is None or row.problem:
                yield row
                continue
            try:
                with (self._folder / caption_name).open("rb") as file:
                    yield _with_caption(
                        row, file.read(MAX_CAPTION_BYTES + 1), posixpath.basename(caption_name)
                    )
            except OSError as error:
                yield _with_problem(
                    row, f"{posixpath.basename(caption_name)} cannot be read ({error.strerror})"
                )

    def position(self, row_id: str) -> tuple[Any, ...]:
        """Where the row stands in the source, to be sorted by."""
        return (row_id,)

    def read(self, row_id: str) -> bytes:
        """The bytes of one picture file, from any thread; raise `RefusedError` if it cannot be read."""
        try:
            with (self._folder / row_id).open("rb") as file:
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
        self._files = dict(files)
        self._section = section

    @functools.cached_property
    def _listed(self) -> list[tuple[Row, str, Member | None]]:
        """Rows without captions, the tar file of each and the file in it that holds its caption."""
        return [entry for file in self._files for entry in self._list_file(file)]

    def _list_file(self, file: str) -> Iterator[tuple[Row, str, Member | None]]:
        path = self._files[file]
        try:
            stamp = stamp_of(os.stat(path))
            with path.open("rb") as archive:
                for key, members in read_samples(archive, stamp[0]):
                    row, caption = self._sample(file, stamp, key, members)
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
                with self._files[file].open("rb") as archive:
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

    Raises `DataError` if there is nothing of that name or it holds no rows of any known kind, `HubError` if
    the hub does not give it.
    """
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
    """The innermost part of a path that is called such as `10_name`, with the folders above it.

    The number has at most 3 digits: `2023_holiday` is a year.
    """
    parts = folder.split("/")
    for depth in range(len(parts), 0, -1):
        if re.fullmatch(r"0*[1-9]\d{0,2}_.*\w.*", parts[depth - 1]):
            return "/".join(parts[:depth])
    return None


def _repeats_of(picture: str) -> int:
    folder = _repeat_folder(posixpath.dirname(picture))
    return int(posixpath.basename(folder).partition("_")[0]) if folder else 1


def _holds_images(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(member.name == "bytes" and _holds_images(member.type) for member in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


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


def _walk(folder: Path, below: str = "") -> Iterator[tuple[str, Stamp | None]]:
    """Names of all files below `folder`, relative to it, with their stamps; a link that leads nowhere has
    none.

    Hidden files and folders are left out, and links to folders are not followed.
    """
    with os.scandir(folder / below) as entries:
        for entry in entries:
            name = f"{below}{entry.name}"
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(folder, f"{name}/")
            elif entry.is_file():
                yield name, stamp_of(entry.stat())
            elif entry.is_symlink() and not entry.is_dir():
                yield name, None


def _caption_file(picture: str, names: Mapping[str, Stamp | None]) -> str | None:
    stem = posixpath.splitext(picture)[0]
    return next((name for ending in (".txt", ".caption") if names.get(name := stem + ending)), None)


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
    """A file name as text that can be written as UTF-8."""
    return name if _is_unicode(name) else os.fsencode(name).decode(errors="backslashreplace")


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


def _read_metadata(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and record of each line."""
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
            for record in reader:
                yield reader.line_num, record
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
        yield line, record
