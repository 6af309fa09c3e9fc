"""Rows of Parquet files: which columns hold pictures and captions, read by row groups."""

import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lorascope.data.captions import MAX_CAPTION_BYTES
from lorascope.data.pictures import RefusedError
from lorascope.data.rows import CAPTION_NAMES, IMAGE_NAMES, Row, find_column, stamp_of
from lorascope.data.shards import missing_shards, split_of_file
from lorascope.errors import DataError, first_line
from lorascope.sections import DataSection
from lorascope.store import require_regular

_PARQUET_ERRORS = (OSError, ValueError, pa.ArrowException)  # of damaged text, UnicodeDecodeError
_ROW_GROUP_CACHE_BYTES = 256 * 2**20


class ParquetSource:
    """Rows of Parquet files with a picture column (bytes, or a struct with bytes) and a caption column."""

    def __init__(self, name: str, files: Mapping[str, Path], section: DataSection) -> None:
        self.name = name
        self.origin = "\n".join(str(path.resolve()) for path in files.values())
        self.remarks = missing_shards(files)
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
            ("image_column", IMAGE_NAMES, _holds_images, "image bytes"),
            ("caption_column", CAPTION_NAMES, _holds_text, "text"),
        ):
            wanted = getattr(self._section, key)
            fitting = [field.name for field in schema if fits(field.type)]
            name = (
                wanted
                if wanted in schema.names
                else find_column(key, wanted, common, fitting, str(self._files[file]), schema.names)
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
                split, stamp = split_of_file(file), stamp_of(os.stat(self._files[file]))
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
                        yield row.with_problem(str(error))

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


def _holds_images(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return [_holds_images(member.type) for member in kind if member.name == "bytes"] == [True]
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
