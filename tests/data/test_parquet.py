"""Parquet files: columns, captions, and files that are damaged or change while they are read."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorascope.data.sources import open_source
from lorascope.errors import DataError
from samples import (
    captions,
    encode,
    pixels,
    plain,
    prepare,
    section,
    write,
)


def test_parquet_file(tmp_path: Path) -> None:
    rows = plain(20)
    dataset = prepare(write(tmp_path / "train-0.parquet", rows))
    assert len(dataset.train) == 18
    assert len(dataset.heldout) == 2
    for example in (*dataset.train, *dataset.heldout):
        file, index = example.id.split("#")
        assert file == "train-0.parquet"
        image, caption = rows[int(index)]
        assert example.caption == caption
        assert example.digest == hashlib.sha256(image).hexdigest()
        loaded = dataset.load_pixels(example)
        assert loaded.dtype == np.uint8
        np.testing.assert_array_equal(loaded, pixels(int(caption.split()[1])))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_plain_bytes_and_other_column_names(tmp_path: Path, kind: Any, text: Any) -> None:
    rows = plain(4)
    table = pa.table(
        {
            "jpg": pa.array([image for image, _ in rows], kind),
            "prompt": pa.array([caption for _, caption in rows]).cast(text),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    dataset = prepare(tmp_path / "a.parquet", image_column="jpg", caption_column="prompt")
    assert captions((*dataset.train, *dataset.heldout)) == {f"picture {seed}" for seed in range(4)}


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", plain(3))
    content = path.read_bytes()
    path.write_bytes(content[:200])
    with pytest.raises(
        DataError, match=r"a.parquet: cannot be read as Parquet \(.*\): download or export it again"
    ):
        prepare(path)
    path.write_bytes(content[:4] + b"\xff" * 60 + content[64:])
    with pytest.raises(DataError, match=r"a.parquet: row group 0 cannot be read \(.*\): download or export"):
        prepare(path)


def test_column_of_another_type(tmp_path: Path) -> None:
    rows = plain(3)
    path = write(
        tmp_path / "a.parquet", rows, number=pa.array([1, 2, 3]), many=pa.array([["a"], ["b"], ["c"]])
    )
    with pytest.raises(
        DataError, match=r"column 'number' holds int64, needs image bytes: set data.image_column"
    ):
        prepare(path, image_column="number")
    with pytest.raises(DataError, match=r"column 'many' holds list<.*>, needs text: set data.caption_column"):
        prepare(path, caption_column="many")


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    images = pa.array([image for image, _ in plain(3)], pa.binary())
    texts = pa.array(["a", "b", "c"])
    for names, twice in ((["image", "text", "text"], "text"), (["image", "text", "image"], "image")):
        table = pa.Table.from_arrays([images, texts, images if twice == "image" else texts], names)
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(
            DataError, match=rf"a.parquet: 2 columns are called '{twice}': rename all but one"
        ):
            prepare(tmp_path / "a.parquet")
    others = pa.Table.from_arrays([images, texts, texts, texts], ["image", "text", "id", "id"])
    pq.write_table(others, tmp_path / "a.parquet")
    assert len(prepare(tmp_path / "a.parquet").train) == 2
    struct = pa.StructArray.from_arrays([images, images], ["bytes", "bytes"])
    pq.write_table(pa.table({"image": struct, "text": texts}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'image' holds struct<.*>, needs image bytes"):
        prepare(tmp_path / "a.parquet")


def test_one_long_caption_for_many_rows_is_refused_at_once(tmp_path: Path) -> None:
    """300 rows share a text of 1 MB, which stands in the file once: neither 300 MB nor minutes are spent."""
    images = pa.array([encode(pixels(seed)) for seed in range(300)], pa.binary())
    texts = [*["b" * 2**20] * 298, "fine", None]
    for kind in (pa.string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"image": images, "text": pa.array(texts, kind)}), tmp_path / "a.parquet")
        before = pa.total_allocated_bytes()
        rows = []
        for row in open_source(section(tmp_path / "a.parquet")).rows():
            rows.append(row)
            assert pa.total_allocated_bytes() - before < 16 * 2**20
        assert rows[0].problem == "the caption has 1048576 bytes, more than the limit of 65536 characters"
        assert [row.caption for row in rows if row.problem is None] == ["fine", None]


def test_a_parquet_file_that_goes_away_or_changes_after_it_was_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", plain(6), row_group_size=2)
    source = open_source(section(path))
    write(path, plain(6), row_group_size=3)
    for read in (lambda: list(source.rows()), lambda: source.read("a.parquet#3")):
        with pytest.raises(
            DataError,
            match=r"a.parquet: row group \d is not what it was: the file changed after it was listed: run",
        ):
            read()
    path.unlink()
    with pytest.raises(
        DataError, match=r"a.parquet: cannot be read any more \(No such file or directory\): put it back$"
    ):
        list(source.rows())
    with pytest.raises(
        DataError, match=r"a.parquet: cannot be read as Parquet \(.*No such file or directory\)"
    ):
        source.read("a.parquet#3")
