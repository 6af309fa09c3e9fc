"""Rows in Parquet files with a digest."""

from pathlib import Path

import pyarrow as pa
import pytest

from lorascope.errors import StorageError
from lorascope.evaluation.row_files import read_rows, write_rows

SCHEMA = pa.schema([pa.field("name", pa.string()), pa.field("value", pa.float64())])
ROWS = [{"name": "a", "value": 1.0}, {"name": "b", "value": None}]


def no_fault(facts: object) -> None:
    return None


def test_rows_and_facts_come_back(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_rows(path, SCHEMA, ROWS, {"of": "ü"})
    rows, facts = read_rows(path, SCHEMA, ("value",), "score this run", no_fault)
    assert rows == ROWS and facts["of"] == "ü"


def test_what_is_wrong_is_one_line_with_the_stage_that_writes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    with pytest.raises(StorageError, match=r"rows.parquet: not there: score this run first"):
        read_rows(path, SCHEMA, (), "score this run", no_fault)
    write_rows(path, SCHEMA, ROWS, {})
    with pytest.raises(StorageError, match=r"damaged \(a row without value\): delete it and score this run"):
        read_rows(path, SCHEMA, (), "score this run", no_fault)
    with pytest.raises(StorageError, match=r"columns are name, value, must be name: score this run again"):
        read_rows(path, pa.schema([SCHEMA.field("name")]), (), "score this run", no_fault)
    with pytest.raises(StorageError, match=r"damaged \(odd\): delete it"):
        read_rows(path, SCHEMA, ("value",), "score this run", lambda facts: "odd")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StorageError, match=r"not a readable score file"):
        read_rows(path, SCHEMA, (), "score this run", no_fault)
