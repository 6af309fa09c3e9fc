"""Sources of several files: which belong to one, their splits, and which are missing."""

from pathlib import Path

import pytest

from lorascope.data.shards import expand_shards
from lorascope.errors import DataError
from samples import (
    captions,
    plain,
    prepare,
    shard_of,
    write,
    write_shard,
)


@pytest.mark.parametrize("place", ["", "data"])
def test_folder_with_declared_splits(tmp_path: Path, place: str) -> None:
    write(tmp_path / place / "train-00000-of-00002.parquet", plain(4))
    write(tmp_path / place / "train-00001-of-00002.parquet", plain(4, 10))
    write(tmp_path / place / "test.parquet", plain(2, 20))
    write(tmp_path / place / "validation_1.parquet", plain(2, 30))
    dataset = prepare(tmp_path)
    assert captions(dataset.heldout) == {"picture 20", "picture 21", "picture 30", "picture 31"}
    assert len(dataset.train) == 8
    assert dataset.summary["split"] == "the source's own: test, validation"
    assert {example.id.split("#")[0] for example in dataset.heldout} == {
        "test.parquet",
        "validation_1.parquet",
    }


def test_only_a_test_split_is_drawn_from_like_any_other(tmp_path: Path) -> None:
    write(tmp_path / "test.parquet", plain(10))
    write(tmp_path / "testimony.parquet", plain(0))
    dataset = prepare(tmp_path)
    assert (len(dataset.train), len(dataset.heldout)) == (9, 1)
    assert dataset.summary["split"].startswith("0.1 of the pictures")


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_missing_shards_are_mentioned(tmp_path: Path, kind: str) -> None:
    for number in (0, 2):
        path = tmp_path / f"train-0000{number}-of-00003.{kind}"
        write(path, plain(4, 10 * number)) if kind == "parquet" else write_shard(path, shard_of(10 * number))
    summary = prepare(tmp_path).summary
    assert summary["num_rows"] == 8
    assert summary["remarks"] == [
        f"1 of the 3 files train-*-of-00003.{kind} is not there: its rows are left out"
    ]


def test_a_pattern_of_tar_files(tmp_path: Path) -> None:
    for number in range(9, 12):
        write_shard(tmp_path / f"{number % 2}" / f"shard-{number:03}.tar", shard_of(10 * number))
    assert prepare(f"{tmp_path}/1/shard-{{009..009}}.tar").summary["num_rows"] == 4
    dataset = prepare(f"{tmp_path}/{{1/shard-009,0/shard-010,1/shard-011}}.tar")
    assert {example.id.rpartition("/")[0] for example in (*dataset.train, *dataset.heldout)} == {
        *("1/shard-009.tar", "0/shard-010.tar", "1/shard-011.tar")
    }
    with pytest.raises(
        DataError, match=r"1/shard-010.tar is not there and 1 more: correct the range, or download"
    ):
        expand_shards(f"{tmp_path}/1/shard-{{009..012}}.tar")
    with pytest.raises(DataError, match="a range in it is empty: give the lower number first"):
        expand_shards(f"{tmp_path}/shard-{{5..3}}.tar")
    for pattern in ("{0..99999999999}", "{0..9999}-{0..9999}"):
        with pytest.raises(DataError, match="more than 100000 files"):
            expand_shards(f"{tmp_path}/shard-{pattern}.tar")
