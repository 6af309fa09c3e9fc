"""Rows in a Parquet file, with facts beside them and a digest of both; equal rows give equal bytes."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorascope.errors import StorageError
from lorascope.store import atomic_path, digest_json, require_regular


def write_rows(
    path: Path, schema: pa.Schema, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]
) -> None:
    """Write rows of a schema, and facts (JSON) in the file's metadata."""
    sealed = json.dumps({**facts, "digest": _digest(rows, facts)}, sort_keys=True, ensure_ascii=False)
    table = pa.Table.from_pylist(list(rows), schema=schema.with_metadata({"lorascope": sealed}))
    with atomic_path(path) as partial:
        pq.write_table(
            table, partial, compression="zstd", version="2.6", row_group_size=1 << 20, data_page_version="1.0"
        )


def read_rows(
    path: Path,
    schema: pa.Schema,
    optional: Collection[str],
    stage: str,
    fault: Callable[[Mapping[str, Any]], str | None],
    later: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a file and its facts.

    Only columns named in `optional` may be null. `stage` says what writes the file, such as "score this run",
    and `fault` what is wrong with the facts. `later` gives the columns that files of earlier versions lack,
    and the value of their rows there. A file without a digest passes if it is whole. Raises `StorageError` if
    the file is missing, damaged to a bit or has other columns.
    """
    remedy = f"delete it and {stage} again"
    try:
        require_regular(path)
        with pq.ParquetFile(path) as file:
            table = file.read()
        facts = json.loads((table.schema.metadata or {})[b"lorascope"])
        rows = table.to_pylist()
    except FileNotFoundError as error:
        raise StorageError(f"{path}: not there: {stage} first") from error
    except (pa.ArrowException, OSError, KeyError, ValueError, RecursionError) as error:
        raise StorageError(f"{path}: not a readable score file: {remedy}") from error
    added = {name: value for name, value in later.items() if name not in table.schema.names}
    expected = [(field.name, field.type) for field in schema if field.name not in added]
    if [(field.name, field.type) for field in table.schema] != expected:
        raise StorageError(
            f"{path}: columns are {', '.join(table.schema.names)}, must be {', '.join(schema.names)}: "
            f"{stage} again"
        )
    if not isinstance(facts, dict):
        reason: str | None = "no facts"
    else:
        reason = fault(facts)
    if reason is None:
        empty = [key for row in rows for key, value in row.items() if value is None and key not in optional]
        reason = f"a row without {empty[0]}" if empty else None
    if reason is None and "digest" in facts and facts["digest"] != _digest(rows, facts):
        reason = "its content is not what was written, by its digest"
    if reason is not None:
        raise StorageError(f"{path}: damaged ({reason}): {remedy}")
    return [{**row, **added} for row in rows], facts


def _digest(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    return digest_json([list(rows), {key: value for key, value in facts.items() if key != "digest"}])
