"""Lines of `metadata.jsonl` and `metadata.csv`, which name pictures and say their captions."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorascope.data.captions import decode_text
from lorascope.data.names import is_unicode
from lorascope.data.pictures import RefusedError
from lorascope.data.rows import CAPTION_NAMES, Row, find_column
from lorascope.errors import DataError
from lorascope.store import read_regular, write_text

MAX_METADATA_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a metadata file: its number from 1, the picture it names and the caption, both as found.

    `more` are fields beyond the columns; `caption_is_last`: the caption stands in the last column.
    """

    number: int
    file_name: object
    caption: object
    more: Sequence[str]
    caption_is_last: bool

    def with_more_fields(self, row: Row, file: str) -> Row:
        """The line's row, with what stands in fields beyond the columns of `file`.

        They come from commas in a caption without quotes. Where the caption is last they are read as its own,
        elsewhere they are a problem.
        """
        if not any(self.more):
            return row
        if row.problem or not self.caption_is_last or not isinstance(row.caption, str):
            fields = f"{len(self.more)} field{'s' if len(self.more) > 1 else ''}"
            before = f"{row.problem}; " if row.problem else ""
            return row.with_problem(
                f"{before}line {self.number} of {file} has {fields} more than columns: "
                "put captions with commas into quotes"
            )
        caption = ",".join((row.caption, *self.more))
        return replace(row, caption=caption, treatments=("commas without quotes taken as the caption's own",))


def read_metadata(path: Path, caption_column: str) -> list[Line]:
    """The lines of a metadata file, with captions from that column or, where the default is not there, from
    the one with a common name.

    Raises `DataError` if the file cannot be read, is too large, holds a line that is none of its kind, or has
    no columns for the picture's name and the caption.
    """
    records = list(_read_lines(path))
    if not records:
        return []
    columns = list(dict.fromkeys(str(key) for _, record, _ in records for key in record))
    if "file_name" not in columns or not {caption_column, *CAPTION_NAMES} & set(columns):
        number, record, _ = records[0]
        found = ", ".join(map(repr, record)) or "none"
        raise DataError(f"{path}: needs columns file_name and {caption_column}; line {number} has {found}")
    column = find_column("caption_column", caption_column, CAPTION_NAMES, columns, str(path))
    return [
        Line(number, record.get("file_name"), record.get(column), more, [column] == list(record)[-1:])
        for number, record, more in records
    ]


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any], list[str]]]:
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


class MetadataFile:
    """A `metadata.jsonl` whose captions are changed; lines that are not changed keep their bytes.

    Raises `DataError` where it is there and cannot be read, or has a line that names no picture.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[str] = []
        self._records: dict[str, tuple[int, dict[str, Any]]] = {}
        self._column = "text"
        self._changed = False
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            text = decode_text(read_regular(self._path, DataError, MAX_METADATA_BYTES))
        except RefusedError as error:
            raise DataError(f"{self._path}: {error}") from error
        self._lines = text.removesuffix("\n").split("\n") if text else []
        for index, line in enumerate(self._lines):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{self._path}: line {index + 1}: not JSON ({error}): correct the line"
                ) from error
            if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
                raise DataError(f"{self._path}: line {index + 1}: no object with file_name: correct the line")
            self._records.setdefault(Path(record["file_name"]).as_posix(), (index, record))
        # A new column of another name would be the one that is read, for all lines.
        self._column = "caption" if "caption" in self.columns and "text" not in self.columns else "text"

    @property
    def columns(self) -> set[str]:
        """The keys of all lines."""
        return {key for _, record in self._records.values() for key in record}

    def caption(self, name: str) -> str:
        """The caption of a picture; empty where it has none that is text."""
        _, record, column = self._find(name)
        text = record.get(column)
        return text if isinstance(text, str) else ""

    def _find(self, name: str) -> tuple[int, dict[str, Any], str]:
        """Line, record and caption column of a picture, a line past the end if there is none yet."""
        index, record = self._records.get(name, (len(self._lines), {"file_name": name}))
        return index, record, next((key for key in ("text", "caption") if key in record), self._column)

    def put(self, name: str, caption: str) -> None:
        """Set a picture's caption; `save` writes it."""
        index, record, column = self._find(name)
        record = {**record, column: caption}
        line = json.dumps(record, ensure_ascii=False)
        self._lines[index : index + 1] = [line if line.isascii() or is_unicode(line) else json.dumps(record)]
        self._records[name] = index, record
        self._changed = True

    def save(self) -> None:
        """Write the file, where anything was changed."""
        if self._changed:
            write_text(self._path, "\n".join(self._lines) + "\n")
        self._changed = False
