"""Rows of every kind of source: which columns are read, and what a caption file's text becomes."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorascope.data.rows import CAPTION_NAMES, find_column
from lorascope.errors import DataError
from samples import (
    captions,
    encode,
    pixels,
    plain,
    prepare,
    shard_of,
    with_captions,
    write,
    write_pictures,
    write_shard,
)


@pytest.mark.parametrize("key", ["image_column", "caption_column"])
def test_missing_column(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "a.parquet", plain(3))
    with pytest.raises(
        DataError, match=rf"no column 'nothing'; columns present: 'image', 'text': set data.{key}"
    ):
        prepare(path, **{key: "nothing"})


def columns(path: Path, *names: str) -> Path:
    """Four rows with these columns: names of pictures start with `i`."""
    images = [image for image, _ in plain(4)]
    table = {
        name: pa.array(images, pa.binary())
        if name[0] in "ij"
        else pa.array([f"{name} {seed}" for seed in range(4)])
        for name in names
    }
    pq.write_table(pa.table(table), path)
    return path


@pytest.mark.parametrize(
    ("names", "prefix"), [(("img", "caption"), "caption"), (("jpg", "prompt", "url"), "prompt")]
)
def test_columns_with_common_names_are_found(tmp_path: Path, names: tuple[str, ...], prefix: str) -> None:
    dataset = prepare(columns(tmp_path / "a.parquet", *names))
    assert captions((*dataset.train, *dataset.heldout)) == {f"{prefix} {seed}" for seed in range(4)}


def test_the_default_name_comes_before_the_common_ones(tmp_path: Path) -> None:
    dataset = prepare(columns(tmp_path / "a.parquet", "image", "img", "caption", "text", "prompt"))
    assert captions((*dataset.train, *dataset.heldout)) == {f"text {seed}" for seed in range(4)}


def test_columns_that_may_each_be_meant_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"a.parquet: caption, prompt may each be meant: set data.caption_column"
    ):
        prepare(columns(tmp_path / "a.parquet", "image", "caption", "prompt"))
    with pytest.raises(DataError, match=r"img, jpg may each be meant: set data.image_column"):
        prepare(columns(tmp_path / "a.parquet", "img", "jpg", "text"))
    with pytest.raises(
        DataError, match=r"^list: no column 'text'; columns present: 'url', 'id': set data.caption_column$"
    ):
        find_column("caption_column", "text", CAPTION_NAMES, ["url", "id"], "list")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_captions_as_windows_programs_save_them(tmp_path: Path, encoding: str) -> None:
    texts = ["ein Käse", "猫", "a cat"]
    names = ["1.png", "2.png", "3.png"]
    for kind in ("sidecars", "csv", "jsonl"):
        write_pictures(tmp_path / kind, names)
    for name, text in zip(names, texts, strict=True):
        (tmp_path / "sidecars" / name).with_suffix(".txt").write_bytes(f"{text}\r\n".encode(encoding))
    rows = "".join(f"{name},{text}\r\n" for name, text in zip(names, texts, strict=True))
    (tmp_path / "csv/metadata.csv").write_bytes(f"file_name,text\r\n{rows}".encode(encoding))
    lines = [
        json.dumps({"file_name": name, "text": text}, ensure_ascii=False)
        for name, text in zip(names, texts, strict=True)
    ]
    (tmp_path / "jsonl/metadata.jsonl").write_bytes("\r\n".join(lines).encode(encoding))
    samples = [
        {"__key__": str(seed), "png": encode(pixels(seed)), "txt": text.encode(encoding)}
        for seed, text in enumerate(texts)
    ]
    tar = write_shard(tmp_path / "a.tar", samples)
    for source in (tmp_path / "sidecars", tmp_path / "csv", tmp_path / "jsonl", tar):
        dataset = prepare(source)
        assert captions((*dataset.train, *dataset.heldout)) == set(texts)
        assert dataset.summary["treated"] == dataset.summary["refused"] == []


def test_one_line_of_a_sidecar_counts_and_that_is_said(tmp_path: Path) -> None:
    with_captions(tmp_path, ["1.png", "2.png", "3.png"])
    (tmp_path / "1.txt").write_text("\none\n\nand more\n")
    write_shard(
        tmp_path / "tar/a.tar", [*shard_of(0), {"__key__": "9", "png": encode(pixels(9)), "txt": "one\nmore"}]
    )
    for source, row_id in ((tmp_path, "1.png"), (tmp_path / "tar", "a.tar/9.png")):
        dataset = prepare(source)
        assert "one" in captions((*dataset.train, *dataset.heldout))
        [treated] = dataset.summary["treated"]
        assert treated["id"].startswith(row_id)
        assert treated["treatment"] == "only the first line of its caption file counts"
