"""Sources: every kind on real files, columns, captions, splits and repeats."""

import csv
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorascope import sources
from lorascope.config import DataSection
from lorascope.data import load_dataset, prepare_data
from lorascope.errors import DataError, HubError
from samples import (
    captions,
    count_words,
    pixels,
    plain,
    prepare,
    section,
    write,
    write_pictures,
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
    assert {example.id.split("#")[0] for example in dataset.heldout} == {"test.parquet", "validation_1.parquet"}


def test_only_a_test_split_is_drawn_from_like_any_other(tmp_path: Path) -> None:
    write(tmp_path / "test.parquet", plain(10))
    write(tmp_path / "testimony.parquet", plain(0))
    dataset = prepare(tmp_path)
    assert (len(dataset.train), len(dataset.heldout)) == (9, 1)
    assert dataset.summary["split"].startswith("0.1 of the pictures")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_plain_bytes_and_other_column_names(tmp_path: Path, kind: Any, text: Any) -> None:
    rows = plain(4)
    table = pa.table({"jpg": pa.array([image for image, _ in rows], kind), "prompt": pa.array([caption for _, caption in rows]).cast(text)})
    pq.write_table(table, tmp_path / "a.parquet")
    dataset = prepare(tmp_path / "a.parquet", image_column="jpg", caption_column="prompt")
    assert captions((*dataset.train, *dataset.heldout)) == {f"picture {seed}" for seed in range(4)}


def test_pocket() -> None:
    dataset = prepare_data(DataSection(num_train=20, num_heldout=10), count_words)
    assert (dataset.summary["source"], len(dataset.train), len(dataset.heldout)) == ("pocket", 20, 10)
    assert dataset.load_pixels(dataset.train[0]).shape == (64, 64, 3)


def test_pocket_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_POCKET_DIR", tmp_path)
    with pytest.raises(DataError, match="missing from this installation: install lorascope again"):
        prepare("pocket")


def test_picture_folder_with_sidecars(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "cats/2.PNG", "cats/3.jpg", "4.png", "5.png", ".hidden/6.png", "._1.png"])
    (tmp_path / "1.txt").write_text("\ufeffone", encoding="utf-8")
    (tmp_path / "1.caption").write_text("not this")
    (tmp_path / "cats/2.caption").write_text("two\n")
    (tmp_path / "cats/3.txt").write_text("three")
    (tmp_path / "4.txt").write_bytes(b"caf\xe9")
    dataset = prepare(tmp_path)
    examples = (*dataset.train, *dataset.heldout)
    assert {example.id: example.caption for example in examples} == {"1.png": "one", "cats/2.PNG": "two", "cats/3.jpg": "three"}
    assert dataset.summary["refused"] == [
        {"id": "4.png", "reason": "4.txt cannot be read as UTF-8 text"},
        {"id": "5.png", "reason": "no caption"},
    ]
    assert [example.id for example in dataset.in_storage_order(examples)] == ["1.png", "cats/2.PNG", "cats/3.jpg"]
    two = next(example for example in examples if example.caption == "two")
    np.testing.assert_array_equal(dataset.load_pixels(two), pixels(1))


def test_picture_folder_with_splits(tmp_path: Path) -> None:
    names = ["train/1.png", "train/2.png", "test/3.png"]
    write_pictures(tmp_path, [*names, "test-4.png", "tests/5.png"])
    for path in list(tmp_path.rglob("*.png")):
        path.with_suffix(".txt").write_text(path.stem)
    dataset = prepare(tmp_path)
    assert captions(dataset.heldout) == {"3"}
    assert captions(dataset.train) == {"1", "2", "test-4", "5"}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_picture_folder_with_metadata(tmp_path: Path, kind: str, column: str) -> None:
    write_pictures(tmp_path, ["1.png", "cats/2.png", "3.png", "cats/4.png"])
    (tmp_path / "3.txt").write_text("not read where there is metadata")
    records: list[dict[str, Any]] = [
        {"file_name": "1.png", column: "one, or\nfirst"},
        {"file_name": "./cats/2.png", column: "two"},
        {"file_name": "cats/4.png", column: "four"},
        {"file_name": "missing.png", column: "five"},
        {"file_name": "1.png", column: "again"},
        {"file_name": "../outside.png", column: "six"},
        {"file_name": "/absolute.png", column: "seven"},
    ]
    path = tmp_path / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("\ufeff" + "\n\n".join(map(json.dumps, records)), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["file_name", column])
            writer.writeheader()
            writer.writerows(records)
    dataset = prepare(tmp_path, caption_column=column if column == "prompt" else "text")
    found = {example.id: example.caption for example in (*dataset.train, *dataset.heldout)}
    assert found == {"1.png": "one, or\nfirst", "cats/2.png": "two", "cats/4.png": "four"}
    lines = (9, 11, 13) if kind == "jsonl" else (7, 8, 9)
    assert [(entry["id"], entry["reason"]) for entry in dataset.summary["refused"]] == [
        ("missing.png", "the picture is not there"),
        (f"metadata.{kind}#{lines[0]}", "1.png was named before"),
        (f"metadata.{kind}#{lines[1]}", "file_name = '../outside.png' does not name a file in this folder"),
        (f"metadata.{kind}#{lines[2]}", "file_name = '/absolute.png' does not name a file in this folder"),
        ("3.png", "no caption"),
    ]


def test_metadata_in_subfolders_names_pictures_beside_it(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train/1.png", "train/2.png", "test/1.png"])
    (tmp_path / "train/metadata.csv").write_text("file_name,text\n1.png,one\n2.png,two\n")
    (tmp_path / "test/metadata.csv").write_text("file_name,text\n1.png,three\n")
    dataset = prepare(tmp_path)
    assert (captions(dataset.train), captions(dataset.heldout)) == ({"one", "two"}, {"three"})


def test_a_source_given_through_parent_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "pictures", ["1.png", "2.png"])
    (tmp_path / "pictures/metadata.csv").write_text("file_name,text\n1.png,one\n2.png,two\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(prepare("../elsewhere/../pictures").train) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b'{"file_name": "1.png", "text": "a"}\n{oops\n', "metadata.jsonl: line 2: not JSON"),
        ("metadata.jsonl", b"[1]\n", "metadata.jsonl: line 1: not a JSON object"),
        ("metadata.jsonl", b'{"name": "1.png", "text": "a"}\n', "needs columns file_name and text; line 1 has name, text"),
        ("metadata.csv", b"file_name,label\n1.png,a\n", "needs columns file_name and text; line 2 has file_name, label"),
        ("metadata.csv", b"file_name,text\n1.png,caf\xe9\n", "metadata.csv: not UTF-8"),
        ("metadata.csv", b"file_name,text\n1.png," + b"a" * 140_000 + b"\n", "metadata.csv: line 2: not CSV"),
    ],
)
def test_wrong_metadata_is_an_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_pictures(tmp_path, ["1.png"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(tmp_path)


def test_text_that_cannot_be_written_as_utf8_is_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png", "3.png"])
    os.rename(tmp_path / "3.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    lines = ['{"file_name": "1.png", "text": "half \\ud83d"}', '{"file_name": "2\\ud83d.png", "text": "two"}']
    lines += ['{"file_name": "2.png", "text": 7}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"4 of 4 rows .* cannot be used and none is left"):
        prepare(tmp_path)
    write_pictures(tmp_path / "good", ["8.png", "9.png"])
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "good/8.png", "text": "eight"}\n{"file_name": "good/9.png", "text": "nine"}')
    summary = prepare(tmp_path).summary
    assert {entry["id"]: entry["reason"] for entry in summary["refused"]} == {
        "1.png": "the caption holds half a character (a lone surrogate)",
        "metadata.jsonl#2": "file_name = '2\\ud83d.png' does not name a file in this folder",
        "2.png": "the caption is not text but int",
        "caf\\xe9.png": "the file name is not UTF-8",
    }
    json.dumps(summary, ensure_ascii=False).encode()


def make_snapshot(cache: Path, name: str, commit: str) -> Path:
    """A folder of the hub's local cache, as the client lays it out."""
    repository = cache / f"datasets--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    return repository / "snapshots" / commit


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's local cache; there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_data_set(hub_cache: Path) -> None:
    commit = "0123456789" * 4
    write(make_snapshot(hub_cache, "owner/pictures", commit) / "data" / "train-0.parquet", plain(4))
    dataset = prepare("owner/pictures")
    assert dataset.summary["source"] == f"owner/pictures@{commit}"
    assert load_dataset(section("owner/pictures"), dataset.summary) == dataset


def test_hub_data_set_at_a_revision(hub_cache: Path) -> None:
    for commit, first in (("a" * 40, 0), ("b" * 40, 10)):
        write(make_snapshot(hub_cache / commit, "owner/pictures", commit) / "train-0.parquet", plain(4, first))
    merged = hub_cache / "datasets--owner--pictures"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(hub_cache / commit / merged.name, merged, dirs_exist_ok=True)
    dataset = prepare("owner/pictures", revision="a" * 40)
    assert captions((*dataset.train, *dataset.heldout)) == {f"picture {seed}" for seed in range(4)}
    assert dataset.summary["source"] == f"owner/pictures@{'a' * 40}"


def test_hub_data_set_of_loose_pictures(hub_cache: Path) -> None:
    write_pictures(folder := make_snapshot(hub_cache, "owner/pictures", "c" * 40), ["1.png", "2.png"])
    (folder / "metadata.csv").write_text("file_name,text\n1.png,one\n2.png,two\n")
    assert prepare("owner/pictures").summary["num_rows"] == 2


def test_hub_data_set_that_is_not_there(hub_cache: Path) -> None:
    with pytest.raises(HubError, match="data.source = 'owner/pictures'") as caught:
        prepare("owner/pictures")
    assert "\n" not in str(caught.value)


def test_missing_path() -> None:
    with pytest.raises(DataError, match="'no/such/folder': no such file or folder, and no hub data set id"):
        prepare("no/such/folder")


def test_file_that_is_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("image,text\n")
    with pytest.raises(DataError, match=r"rows.csv': not a Parquet file \(.parquet\), a tar file \(.tar\) or a folder"):
        prepare(tmp_path / "rows.csv")


def test_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match="no Parquet or tar files in it or its data folder, and no pictures"):
        prepare(tmp_path)


def test_folder_without_captions(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png"])
    with pytest.raises(DataError, match=r"2 pictures and no captions: add metadata.jsonl"):
        prepare(tmp_path)


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", plain(3))
    content = path.read_bytes()
    path.write_bytes(content[:200])
    with pytest.raises(DataError, match=r"a.parquet: cannot be read as Parquet \(.*\): download or export it again"):
        prepare(path)
    path.write_bytes(content[:4] + b"\xff" * 60 + content[64:])
    with pytest.raises(DataError, match=r"a.parquet: row group 0 cannot be read \(.*\): download or export"):
        prepare(path)


@pytest.mark.parametrize("key", ["image_column", "caption_column"])
def test_missing_column(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "a.parquet", plain(3))
    with pytest.raises(DataError, match=rf"no column 'nothing'; columns present: image, text: set data.{key}"):
        prepare(path, **{key: "nothing"})


def test_column_of_another_type(tmp_path: Path) -> None:
    rows = plain(3)
    path = write(tmp_path / "a.parquet", rows, number=pa.array([1, 2, 3]), many=pa.array([["a"], ["b"], ["c"]]))
    with pytest.raises(DataError, match=r"column 'number' holds int64, needs image bytes: set data.image_column"):
        prepare(path, image_column="number")
    with pytest.raises(DataError, match=r"column 'many' holds list<.*>, needs text: set data.caption_column"):
        prepare(path, caption_column="many")


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.parquet': holds no rows: give a source with pictures and captions"):
        prepare(write(tmp_path / "a.parquet", []))
