"""Sources: every kind on real files, columns, captions, splits and repeats."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorascope.data import pictures, sources
from lorascope.data.dataset import Example, check_source, load_dataset, prepare_data
from lorascope.data.pictures import RefusedError
from lorascope.data.sources import count_repeats, open_source
from lorascope.errors import DataError, HubError
from lorascope.schema import DataSection
from samples import (
    add_member,
    captions,
    count_words,
    encode,
    pixels,
    plain,
    prepare,
    section,
    shard_of,
    write,
    write_pictures,
    write_shard,
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


def test_pocket() -> None:
    dataset = prepare_data(DataSection(num_train=20, num_heldout=10), count_words)
    assert (dataset.summary["source"], len(dataset.train), len(dataset.heldout)) == ("pocket", 20, 10)
    assert dataset.load_pixels(dataset.train[0]).shape == (64, 64, 3)


def test_pocket_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_POCKET_DIR", tmp_path)
    with pytest.raises(DataError, match="missing from this installation: install lorascope again"):
        prepare("pocket")


def test_picture_folder_with_sidecars(tmp_path: Path) -> None:
    write_pictures(
        tmp_path, ["1.png", "cats/2.PNG", "cats/3.jpg", "4.png", "5.png", ".hidden/6.png", "._1.png"]
    )
    (tmp_path / "1.txt").write_text("\ufeffone", encoding="utf-8")
    (tmp_path / "1.caption").write_text("not this")
    (tmp_path / "cats/2.caption").write_text("two\n")
    (tmp_path / "cats/3.txt").write_text("three")
    (tmp_path / "4.txt").write_bytes(b"caf\xe9")
    dataset = prepare(tmp_path)
    examples = (*dataset.train, *dataset.heldout)
    assert {example.id: example.caption for example in examples} == {
        "1.png": "one",
        "cats/2.PNG": "two",
        "cats/3.jpg": "three",
    }
    assert dataset.summary["refused"] == [
        {"id": "4.png", "reason": "4.txt: not UTF-8 (unexpected end of data at byte 3): save it as UTF-8"},
        {"id": "5.png", "reason": "no caption"},
    ]
    assert [example.id for example in dataset.in_storage_order(examples)] == [
        "1.png",
        "cats/2.PNG",
        "cats/3.jpg",
    ]
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
        (f"metadata.{kind}#{lines[0]}", f"1.png was named before, in metadata.{kind}"),
        (f"metadata.{kind}#{lines[1]}", "file_name = '../outside.png' does not name a file in this folder"),
        (f"metadata.{kind}#{lines[2]}", "file_name = '/absolute.png' does not name a file in this folder"),
        (
            "3.png",
            f"no caption: no line of metadata.{kind} names it, and 3.txt is not read where there is "
            "such a list",
        ),
    ]


def test_captions_that_disagree_and_which_of_them_counts(tmp_path: Path) -> None:
    write_pictures(tmp_path / "beside", ["1.png", "2.png", "3.png", "4.png", "5.png"])
    write_pictures(tmp_path / "list", ["1.png", "2.png", "3.png", "4.png"])
    for number, (text, caption) in enumerate(
        [("a", "b"), ("a", " a\n"), ("c", b"\xff"), (",", "d")], start=1
    ):
        (tmp_path / f"beside/{number}.txt").write_text(text)
        (tmp_path / f"beside/{number}.caption").write_bytes(
            caption if isinstance(caption, bytes) else caption.encode()
        )
    (tmp_path / "beside/5.txt").write_text("e")
    (tmp_path / "beside/5.caption").symlink_to("nowhere")
    for name, text in (("1.txt", "another"), ("2.txt", "two"), ("2.caption", "else"), ("3.caption", "three")):
        (tmp_path / "list" / name).write_text(text)
    (tmp_path / "list/metadata.csv").write_text("file_name,text\n1.png,one\n2.png,two\n3.png,\n4.png,four\n")
    (tmp_path / "list/metadata.jsonl").write_text('{"file_name": "4.png", "text": "vier"}\n')
    summary = prepare(tmp_path / "beside").summary
    assert summary["treated"] == [
        {"id": "1.png", "treatment": "its .txt file counts, its .caption file says otherwise"}
    ]
    [refused] = summary["refused"]
    assert refused["id"] == "4.png" and refused["reason"] == (
        "the caption holds nothing but commas, spaces and invisible characters in its .txt file, and beside "
        "that its .caption does not count"
    )
    dataset = prepare(tmp_path / "list")
    assert captions((*dataset.train, *dataset.heldout)) == {"one", "two", "four"}
    assert dataset.summary["treated"] == [
        {"id": "1.png", "treatment": "metadata.csv counts, its .txt file says otherwise"},
        {"id": "2.png", "treatment": "metadata.csv counts, its .caption file says otherwise"},
    ]
    assert dataset.summary["refused"] == [
        {
            "id": "3.png",
            "reason": "the caption is empty in metadata.csv, and beside that its .caption does not count",
        },
        {"id": "metadata.jsonl#1", "reason": "4.png was named before, in metadata.csv"},
    ]


def test_pictures_that_share_a_caption_file_are_said(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.png", "a.jpg", "b.png", "c/a.png"])
    for name in ("a.txt", "b.txt", "c/a.txt"):
        (tmp_path / name).write_text(name)
    dataset = prepare(tmp_path)
    assert {example.id: example.caption for example in (*dataset.train, *dataset.heldout)} == {
        "a.png": "a.txt",
        "a.jpg": "a.txt",
        "b.png": "b.txt",
        "c/a.png": "c/a.txt",
    }
    assert dataset.summary["remarks"] == [
        "caption files that count for more than one picture of their name: a.txt: rename pictures that need "
        "captions of their own"
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
        (
            "metadata.jsonl",
            b'{"file_name": "1.png", "text": "a"}\n{oops\n',
            "metadata.jsonl: line 2: not JSON",
        ),
        ("metadata.jsonl", b"[1]\n", "metadata.jsonl: line 1: not a JSON object"),
        (
            "metadata.jsonl",
            b'{"name": "1.png", "text": "a"}\n',
            "needs columns file_name and text; line 1 has 'name', 'text'",
        ),
        (
            "metadata.csv",
            b"file_name,label\n1.png,a\n",
            "needs columns file_name and text; line 2 has 'file_name', 'label'",
        ),
        ("metadata.csv", b"file_name,text\n1.png,caf\xe9\n", "metadata.csv: not UTF-8"),
        ("metadata.csv", b"file_name,text\n1.png," + b"a" * 140_000 + b"\n", "metadata.csv: line 2: not CSV"),
    ],
)
def test_wrong_metadata_is_an_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_pictures(tmp_path, ["1.png"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(tmp_path)


def test_csv_captions_with_commas_and_no_quotes(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png", "3.png"])
    text = 'file_name,text\n1.png,a girl, solo, smile\n2.png,"two, quoted"\n3.png,three,,\n'
    (tmp_path / "metadata.csv").write_text(text)
    dataset = prepare(tmp_path)
    assert captions((*dataset.train, *dataset.heldout)) == {"a girl, solo, smile", "two, quoted", "three"}
    assert dataset.summary["treated"] == [
        {"id": "1.png", "treatment": "commas without quotes taken as the caption's own"}
    ]
    (tmp_path / "metadata.csv").write_text(
        "text,file_name,split\na dog,2.png,a\na cat, asleep,1.png,a\nc,3.png,a\n"
    )
    advice = "has 1 field more than columns: put captions with commas into quotes"
    assert prepare(tmp_path).summary["refused"][0] == {
        "id": " asleep",
        "reason": f"the picture is not there; line 3 of metadata.csv {advice}",
    }
    (tmp_path / "metadata.csv").write_text(
        "file_name,text,by\n1.png,a,me\n2.png,b,me\n3.png,a dog, asleep,me\n"
    )
    assert prepare(tmp_path).summary["refused"] == [
        {"id": "3.png", "reason": f"line 4 of metadata.csv {advice}"}
    ]


def test_csv_with_two_columns_of_one_name(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png"])
    (tmp_path / "metadata.csv").write_text("file_name,text,text\n1.png,a,b\n2.png,c,d\n")
    with pytest.raises(DataError, match=r"metadata.csv: 2 columns are called 'text': rename all but one"):
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
        file.write(
            '\n{"file_name": "good/8.png", "text": "eight"}\n{"file_name": "good/9.png", "text": "nine"}'
        )
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
        write(
            make_snapshot(hub_cache / commit, "owner/pictures", commit) / "train-0.parquet", plain(4, first)
        )
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
    with pytest.raises(
        DataError, match=r"rows.csv': not a Parquet file \(.parquet\), a tar file \(.tar\) or a folder"
    ):
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
    with pytest.raises(
        DataError, match=r"a.parquet: cannot be read as Parquet \(.*\): download or export it again"
    ):
        prepare(path)
    path.write_bytes(content[:4] + b"\xff" * 60 + content[64:])
    with pytest.raises(DataError, match=r"a.parquet: row group 0 cannot be read \(.*\): download or export"):
        prepare(path)


@pytest.mark.parametrize("key", ["image_column", "caption_column"])
def test_missing_column(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "a.parquet", plain(3))
    with pytest.raises(
        DataError, match=rf"no column 'nothing'; columns present: 'image', 'text': set data.{key}"
    ):
        prepare(path, **{key: "nothing"})


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


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"a.parquet': holds no rows: give a source with pictures and captions"
    ):
        prepare(write(tmp_path / "a.parquet", []))


# Columns ----------------------------------------------------------------------------------------------------


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
        DataError, match=r"no column 'text'; columns present: 'image', 'url': set data.caption_column"
    ):
        prepare(columns(tmp_path / "a.parquet", "image", "url"))


def test_a_line_of_metadata_without_a_caption_is_refused_and_the_rest_goes_on(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png", "3.png"])
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "1.png", "caption": "one"}\n{"file_name": "2.png"}\n{"file_name": "3.png", '
        '"caption": "3"}'
    )
    assert prepare(tmp_path).summary["refused"] == [{"id": "2.png", "reason": "no caption"}]


# Folders with repeats ---------------------------------------------------------------------------------------


def with_captions(folder: Path, names: Sequence[str]) -> None:
    write_pictures(folder, names)
    for name in names:
        (folder / name).with_suffix(".txt").write_text(name)


def test_repeat_folders(tmp_path: Path) -> None:
    names = [
        "10_cat/1.png",
        "10_cat/below/2.png",
        "3_dog/1.png",
        "007_bond/1.png",
        "+2_x/1.png",
        "999_most/1.png",
    ]
    with_captions(tmp_path, [*names, "plain/1.png"])
    dataset = prepare(tmp_path, repeats=2)
    found = {example.id: example.repeats for example in (*dataset.train, *dataset.heldout)}
    assert found == dict(zip([*names, "plain/1.png"], (20, 20, 6, 14, 4, 1998, 2), strict=True))
    assert [entry["repeats"] for entry in dataset.summary["train"]] == [
        example.repeats for example in dataset.train
    ]
    assert dataset.summary["remarks"] == []


def test_numbers_in_names_of_folders_that_are_no_repeats_are_said(tmp_path: Path) -> None:
    odd = ["2024_holiday", "1.5_style", "1000_many", f"{'9' * 200}_x"]
    with_captions(tmp_path, [f"{name}/1.png" for name in [*odd, "style_10", "part_007", "5_dog/part_2"]])
    dataset = prepare(tmp_path)
    examples = (*dataset.train, *dataset.heldout)
    assert {example.id: example.repeats for example in examples if example.repeats > 1} == {
        "5_dog/part_2/1.png": 5
    }
    assert len(examples) == 7
    rest = "their pictures are seen as often as others; to see them 10 times, call a folder such as 10_name"
    assert dataset.summary["remarks"] == [
        "names of folders that begin with a number that is no number of repeats, which is whole and "
        f"from 1 to 999: 1.5_style, 1000_many, 2024_holiday and 1 more: {rest}",
        f"names of folders that end with a number, which is not read as repeats: style_10: {rest}",
    ]


@pytest.mark.parametrize("name", ["0_none", "-3_none", "000_none", f"-{'9' * 100}_none"])
def test_pictures_that_are_to_be_seen_no_times_are_refused(tmp_path: Path, name: str) -> None:
    with_captions(tmp_path, ["1.png", "2.png", "10_cat/3.png", f"10_cat/{name}/4.png"])
    shard = [*shard_of(0), {"__key__": f"10_cat/{name}/4", "png": encode(pixels(9)), "txt": "four"}]
    tar = write_shard(tmp_path / "tar/a.tar", shard)
    for source, row_id in ((tmp_path, f"10_cat/{name}/4.png"), (tar, f"a.tar/10_cat/{name}/4")):
        assert prepare(source).summary["refused"] == [
            {
                "id": row_id,
                "reason": f"the name of its folder {name} asks for no repeats: rename it with a number "
                "from 1 to 999, or take it away",
            }
        ]


def test_a_repeat_folder_that_is_the_source_itself_is_said(tmp_path: Path) -> None:
    with_captions(tmp_path / "10_cat", ["1.png", "2.png"])
    dataset = prepare(tmp_path / "10_cat")
    assert {example.repeats for example in (*dataset.train, *dataset.heldout)} == {1}
    assert dataset.summary["remarks"] == [
        "repeats are read from folders inside the source, not from its own name 10_cat: give the "
        "folder above, or set data.repeats"
    ]


def test_repeats_of_a_folder_are_counted_without_reading_pictures(tmp_path: Path) -> None:
    with_captions(tmp_path / "a", ["1.png", "10_cat/2.png", "10_cat/3.png", "0_none/4.png", "2024_x/5.png"])
    for path in (tmp_path / "a").rglob("*.png"):
        path.write_bytes(b"not looked at")
    counts, [remark] = count_repeats(section(tmp_path / "a", repeats=2))
    assert counts == {2: 2, 20: 2}
    assert "1 to 999: 2024_x: their pictures" in remark
    tar = write_shard(tmp_path / "a.tar", shard_of(0))
    for other in (tar, "owner/name", "pocket"):
        assert count_repeats(section(other)) == ({}, [])


def test_the_name_of_a_repeat_folder_is_the_caption_where_it_has_no_caption_file(tmp_path: Path) -> None:
    write_pictures(
        tmp_path, ["10_sks cat/1.png", "10_sks cat/2.png", "5_dog/1.png", "5_dog/2.png", "others/1.png"]
    )
    (tmp_path / "5_dog/1.txt").write_text("a dog")
    summary = prepare(tmp_path).summary
    named = [
        {"id": f"10_sks cat/{number}.png", "treatment": "captioned by the name of its folder"}
        for number in (1, 2)
    ]
    assert summary["treated"] == named
    assert summary["refused"] == [
        {"id": name, "reason": "no caption"} for name in ("5_dog/2.png", "others/1.png")
    ]
    assert sorted(row["caption"] for split in ("train", "heldout") for row in summary[split])


def test_a_caption_file_counts_whichever_of_the_endings_it_has(tmp_path: Path) -> None:
    """bmaltais/kohya_ss #988 and #1370: `.txt` files were not read where the ending was not set, and training
    went on without captions.
    """
    write_pictures(tmp_path, ["10_girl/1.png", "10_girl/2.png", "10_girl/3.png"])
    (tmp_path / "10_girl/1.txt").write_text("one")
    (tmp_path / "10_girl/2.caption").write_text("two")
    dataset = prepare(tmp_path, max_refused_share=0.5)
    assert captions((*dataset.train, *dataset.heldout)) == {"one", "two"}
    assert dataset.summary["refused"] == [{"id": "10_girl/3.png", "reason": "no caption"}]
    with pytest.raises(DataError, match=r"1 of 3 rows \(33.3%\) cannot be used .*10_girl/3.png: no caption"):
        prepare(tmp_path, max_refused_share=0.1)


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


def test_lists_that_are_no_text_name_the_byte(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png"])
    for name in ("metadata.csv", "metadata.jsonl"):
        (tmp_path / name).write_bytes(b"file_name,text\n1.png,caf\xe9\n")
        with pytest.raises(DataError, match=rf"{name}: not UTF-8 \(.* at byte 24\): save it as UTF-8$"):
            prepare(tmp_path)
        (tmp_path / name).write_bytes("file_name,text\n".encode("utf-16-be"))
        with pytest.raises(
            DataError, match=rf"{name}: byte 0 is zero, as in UTF-16 without .*: save it as UTF-8$"
        ):
            prepare(tmp_path)
        (tmp_path / name).unlink()


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


def test_one_bad_picture_is_refused_and_the_rest_is_used(tmp_path: Path) -> None:
    """bmaltais/kohya_ss #1574: one picture that cannot be decoded ends the run while latents are cached."""
    with_captions(tmp_path, [f"{number}.png" for number in range(10)])
    content = encode(pixels(3, 64), "JPEG", quality=95)
    (tmp_path / "3.png").write_bytes(content[: len(content) // 2])
    dataset = prepare(tmp_path, max_refused_share=0.1)
    assert len(dataset.train) + len(dataset.heldout) == 9
    [refused] = dataset.summary["refused"]
    assert refused["id"] == "3.png" and refused["reason"].startswith("unreadable image")


# Bad files --------------------------------------------------------------------------------------------------


def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    with_captions(tmp_path, ["1.png", "2.png"])
    (tmp_path / "3.png").symlink_to(tmp_path / "absent.png")
    (tmp_path / "4.png").symlink_to("4.png")  # to itself
    (tmp_path / "1.txt").unlink()
    (tmp_path / "1.txt").symlink_to("1.txt")
    with_captions(tmp_path, ["5.png", "6.png"])
    summary = prepare(tmp_path).summary
    assert {entry["id"]: entry["reason"] for entry in summary["refused"]} == {
        "1.png": "1.txt is a link that leads nowhere (Too many levels of symbolic links)",
        "3.png": "the picture is a link that leads nowhere (No such file or directory)",
        "4.png": "the picture is a link that leads nowhere (Too many levels of symbolic links)",
    }


def test_links_to_folders_are_not_followed_and_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_captions(tmp_path, ["1.png", "2.png"])
    (tmp_path / "above").symlink_to(tmp_path)
    (tmp_path / "10_dogs").symlink_to(tmp_path / "elsewhere")
    with_captions(tmp_path / "elsewhere", ["3.png"])
    summary = prepare(tmp_path).summary
    [remark] = summary["remarks"]
    assert remark == "links to folders are not followed: 10_dogs, above: move the folders here"
    assert f"data     {remark}" in caplog.messages
    assert (summary["num_rows"], summary["refused"]) == (3, [])


def test_formats_that_are_not_read_are_mentioned(tmp_path: Path) -> None:
    with_captions(tmp_path, ["1.png", "2.png"])
    for name in ("a.heic", "b.PSD", "c.svg", "d.mp4", "e.odd", "e.txt", "f.odd", "1.npz"):
        (tmp_path / name).write_bytes(b"something")
    assert prepare(tmp_path).summary["remarks"] == [
        "5 files in formats not read here: a.heic, b.PSD, c.svg and 2 more: convert what is to be used to "
        "PNG or JPEG"
    ]
    only = tmp_path / "only"
    only.mkdir()
    (only / "a.heic").write_bytes(b"something")
    with pytest.raises(
        DataError, match=r"no pictures \(.*\), 1 file in a format not read here: a.heic: convert"
    ):
        prepare(only)


def test_a_thousand_folders_one_in_another(tmp_path: Path) -> None:
    with_captions(tmp_path, ["1.png", "2.png"])
    folders = [str(tmp_path) + "/d" * depth for depth in range(1, 1500)]
    for folder in folders:
        os.mkdir(folder)
    assert prepare(tmp_path).summary["num_rows"] == 2
    for folder in reversed(folders):  # pytest could not
        os.rmdir(folder)


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    with_captions(tmp_path, ["1.png", "2.png", "3.png", "4.png"])
    (tmp_path / "2.png").unlink()
    os.mkfifo(tmp_path / "2.png")
    (tmp_path / "3.txt").unlink()
    os.mkfifo(tmp_path / "3.txt")
    os.mkfifo(tmp_path / "notes")
    what = "is a pipe, a socket or a device, not a file"
    source = open_source(section(tmp_path))
    assert {row.id: row.problem for row in source.rows() if row.problem} == {
        "2.png": f"the picture {what}",
        "3.png": f"3.txt {what}",
    }
    (tmp_path / "1.png").unlink()
    os.mkfifo(tmp_path / "1.png")  # after it was listed
    with pytest.raises(RefusedError, match="the image file is no file any more"):
        source.read("1.png")
    for name in ("metadata.csv", "metadata.jsonl"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match=f"{name} {what}: put a file in its place"):
            prepare(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("name", ["a.parquet", "a.tar"])
def test_a_pipe_as_a_source_is_not_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match=rf"{name}: is a named pipe, where a file is needed"):
            prepare(source)


@contextmanager
def without_rights() -> Iterator[Path]:
    """An empty folder that all can reach, in which the rights of files hold for us: root, who has all, is
    made nobody.
    """
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        if user == 0:
            os.seteuid(65534)
        try:
            (inner := Path(folder) / "inner").mkdir()
            yield inner
        finally:
            os.seteuid(user)


def test_folders_and_files_that_may_not_be_read() -> None:
    with without_rights() as folder:
        with_captions(folder, ["1.png", "2.png", "3.png", "below/4.png"])
        (folder / "1.png").chmod(0)
        (folder / "2.txt").chmod(0)
        source = open_source(section(folder))
        assert [row.id for row in source.rows() if row.problem] == ["2.png"]
        with pytest.raises(RefusedError, match=r"the image file cannot be read \(Permission denied\)"):
            source.read("1.png")
        for name in ("below", "."):
            (folder / name).chmod(0)
            with pytest.raises(
                DataError, match=r"cannot be read \(Permission denied\): put it back, or correct"
            ):
                list(open_source(section(folder)).rows())
        with pytest.raises(DataError, match=r"below: cannot be read \(Permission denied\)"):
            open_source(section(folder / "below"))
        folder.chmod(0o777)
        (folder / "below").chmod(0o777)


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 2500, "/" + "a" * 5000 + "-{00..11}.tar"])
def test_a_path_that_is_too_long(name: str) -> None:
    with pytest.raises(DataError, match=r"a/?: cannot be read \(File name too long\)") as caught:
        prepare(name)
    assert len(str(caught.value)) < 500


def test_files_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    with_captions(tmp_path, ["1.png", "2.png", "3.png", "4.png"])
    os.truncate(tmp_path / "3.png", pictures.MAX_FILE_BYTES + 1)
    (tmp_path / "4.txt").write_text("a" * (sources.MAX_CAPTION_BYTES + 1))
    assert prepare(tmp_path).summary["refused"] == [
        {
            "id": "3.png",
            "reason": (
                f"the image file has {pictures.MAX_FILE_BYTES + 1} bytes, more than the limit of 536870912"
            ),
        },
        {"id": "4.png", "reason": "4.txt: more than 65536 bytes, too many for a caption"},
    ]


def test_a_file_that_grew_since_it_was_listed_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_captions(tmp_path, ["1.png", "2.png"])
    dataset = prepare(tmp_path)
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 20)
    with pytest.raises(DataError, match="the image file has more bytes than the limit of 20"):
        dataset.load_pixels(dataset.train[0])


def test_metadata_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png"])
    (tmp_path / "metadata.csv").touch()
    os.truncate(tmp_path / "metadata.csv", sources.MAX_METADATA_BYTES + 1)
    with pytest.raises(
        DataError,
        match=r"metadata.csv: 1073741825 bytes, more than the limit of 1073741824: split the folder",
    ):
        prepare(tmp_path)


@pytest.mark.parametrize("ending", [".zip", ".tar.gz", ".tgz"])
def test_compressed_archives_are_not_read(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a{ending}").write_bytes(b"")
    with pytest.raises(DataError, match="compressed: unpack it and give the folder"):
        prepare(tmp_path / f"a{ending}")


# Tar files --------------------------------------------------------------------------------------------------


def test_a_tar_file(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", shard_of(0, 6, json={"caption": "not this", "seed": 1}))
    dataset = prepare(path)
    examples = (*dataset.train, *dataset.heldout)
    assert captions(examples) == {f"picture {seed}" for seed in range(6)}
    for example in examples:
        assert re.fullmatch(r"a.tar/0000\d.png@\d+\+\d+", example.id)
        np.testing.assert_array_equal(dataset.load_pixels(example), pixels(int(example.caption.split()[1])))
    assert [example.caption for example in dataset.in_storage_order(examples)] == [
        f"picture {seed}" for seed in range(6)
    ]


def test_pixels_of_a_tar_file_are_found_without_reading_its_headers_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shard(tmp_path / "a.tar", shard_of(0))
    dataset = prepare(path)
    monkeypatch.setattr(sources, "read_samples", None)
    again = load_dataset(section(path), dataset.summary)
    for example in again.train:
        np.testing.assert_array_equal(again.load_pixels(example), dataset.load_pixels(example))
    assert again.in_storage_order(again.train) == dataset.in_storage_order(dataset.train)


def test_a_folder_of_tar_files_with_splits(tmp_path: Path) -> None:
    write_shard(tmp_path / "data/train-000.tar", shard_of(0))
    write_shard(tmp_path / "data/train-001.tar", shard_of(10))
    write_shard(tmp_path / "data/test-000.tar", shard_of(20, 2))
    dataset = prepare(tmp_path)
    assert (len(dataset.train), captions(dataset.heldout)) == (8, {"picture 20", "picture 21"})


def test_a_folder_of_pictures_with_a_tar_file_is_one_of_pictures(tmp_path: Path) -> None:
    with_captions(tmp_path, ["1.png", "2.png"])
    write_shard(tmp_path / "backup.tar", shard_of(0))
    assert prepare(tmp_path).summary["num_rows"] == 2


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
        prepare(f"{tmp_path}/1/shard-{{009..012}}.tar".replace("012", "012"))
    with pytest.raises(DataError, match="a range in it is empty: give the lower number first"):
        prepare(f"{tmp_path}/shard-{{5..3}}.tar")
    for pattern in ("{0..99999999999}", "{0..9999}-{0..9999}"):
        with pytest.raises(DataError, match="more than 100000 files"):
            prepare(f"{tmp_path}/shard-{pattern}.tar")


def test_captions_in_json(tmp_path: Path) -> None:
    samples = [
        {"__key__": f"{seed}", "jpg": encode(pixels(seed), "JPEG"), "json": {"caption": f"picture {seed}"}}
        for seed in range(4)
    ]
    samples += [
        {"__key__": "8", "jpg": b"a", "json": b"{oops"},
        {"__key__": "9", "jpg": b"a", "json": {"url": "x"}},
    ]
    dataset = prepare(write_shard(tmp_path / "a.tar", samples))
    assert captions((*dataset.train, *dataset.heldout)) == {f"picture {seed}" for seed in range(4)}
    assert [entry["reason"] for entry in dataset.summary["refused"]] == [
        "its .json file is not JSON",
        "no caption",
    ]


def test_endings_that_are_set_and_endings_that_may_each_be_meant(tmp_path: Path) -> None:
    samples = [
        {
            "__key__": f"{seed}",
            "left.png": encode(pixels(seed)),
            "right.png": encode(pixels(seed + 9)),
            "txt": "a",
            "prompt": f"{seed}",
        }
        for seed in range(4)
    ]
    path = write_shard(
        tmp_path / "a.tar", [{**sample, "prompt": str(sample["prompt"]).encode()} for sample in samples]
    )
    with pytest.raises(
        DataError, match=r"a.tar: 0: left.png, right.png may each be meant: set data.image_column"
    ):
        prepare(path)
    with pytest.raises(DataError, match=r"a.tar: 0: prompt, txt may each be meant: set data.caption_column"):
        prepare(path, image_column="right.png")
    dataset = prepare(path, image_column="right.png", caption_column="prompt")
    [example] = dataset.heldout
    np.testing.assert_array_equal(dataset.load_pixels(example), pixels(int(example.caption) + 9))


def test_incomplete_samples_are_refused(tmp_path: Path) -> None:
    samples = [
        *shard_of(0),
        {"__key__": "a", "txt": "no picture"},
        {"__key__": "b", "png": encode(pixels(50))},
    ]
    samples += [{"__key__": "c", "png": encode(pixels(51)), "txt": b"caf\xe9"}]
    path = write_shard(tmp_path / "a.tar", samples)
    assert [
        (entry["id"].partition("@")[0], entry["reason"]) for entry in prepare(path).summary["refused"]
    ] == [
        ("a.tar/a", "no picture: txt"),
        ("a.tar/b.png", "no caption"),
        ("a.tar/c.png", "its .txt file: not UTF-8 (unexpected end of data at byte 3): save it as UTF-8"),
    ]


def test_members_that_no_archive_of_pictures_should_hold(tmp_path: Path) -> None:
    picture = encode(pixels(60))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for seed in range(4):
            add_member(archive, f"{seed}.png", encode(pixels(seed)))
            add_member(archive, f"{seed}.txt", b"fine")
        add_member(archive, "folder.d", type=tarfile.DIRTYPE)
        add_member(archive, "no-ending", picture)
        add_member(archive, "__meta__/a.png", picture)
        for number, name in enumerate(
            ("../../up.png", "/etc/absolute.png", "a/../../b.png", "caf\udce9.png")
        ):
            add_member(archive, name, picture + bytes(number))
        add_member(archive, "symbolic.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add_member(archive, "hard.png", type=tarfile.LNKTYPE, linkname="0.png")
        for number, kind in enumerate((tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)):
            add_member(archive, f"device{number}.png", type=kind)
        add_member(archive, "twice.png", picture)
        add_member(archive, "twice.PNG", picture)
    refused = prepare(tmp_path / "a.tar").summary["refused"]
    assert [(entry["id"], entry["reason"]) for entry in refused] == [
        ("a.tar/../../up", "its name leads out of the archive"),
        ("a.tar//etc/absolute", "its name leads out of the archive"),
        ("a.tar/a/../../b", "its name leads out of the archive"),
        ("a.tar/caf\\xe9", "the file name is not UTF-8"),
        ("a.tar/symbolic.png", "a link, which is not followed"),
        ("a.tar/hard.png", "a link, which is not followed"),
        *((f"a.tar/device{number}.png", "a device, not a file") for number in range(3)),
        ("a.tar/twice", "two files of one name"),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "cache"}


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write_shard(
        tmp_path / "a.tar", [*shard_of(0), {"__key__": "00001", "png": encode(pixels(9)), "txt": "9"}]
    )
    [entry] = prepare(path).summary["refused"]
    assert entry["id"].startswith("a.tar/00001.png@")
    assert entry["reason"] == "00001 was there before: the files of a sample must stand together, once"


def test_a_member_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_shard(
        tmp_path / "a.tar", [*shard_of(0), {"__key__": "large", "png": b"a" * 3000, "txt": "large"}]
    )
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 2000)
    reason = "the image file has 3000 bytes, more than the limit of 2000"
    assert prepare(path).summary["refused"] == [{"id": "a.tar/large.png", "reason": reason}]


def test_a_tar_file_that_is_none(tmp_path: Path) -> None:
    for content in (b"", b"not a tar file" * 100):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(
            DataError,
            match=(
                r"a.tar: cannot be read as an uncompressed tar file \(.*\): unpack it, or download it "
                r"again"
            ),
        ):
            prepare(tmp_path / "a.tar")


def test_pictures_of_a_tar_file_that_went_away(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", shard_of(0))
    dataset = prepare(path)
    os.truncate(path, 100)
    with pytest.raises(DataError, match=r"a.tar ends before this picture does: put it back"):
        dataset.load_pixels(dataset.train[0])
    path.unlink()
    with pytest.raises(DataError, match=r"a.tar cannot be read \(No such file or directory\)"):
        dataset.load_pixels(dataset.train[0])
    with pytest.raises(DataError, match=r"no such row in .*a.tar'"):
        dataset.load_pixels(Example("elsewhere.tar/1.png@0+5", "a", "b", 1, 8, 8))


# Files that change while they are read, and damaged metadata ------------------------------------------------


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


def test_a_tar_file_that_goes_away_after_it_was_listed(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", shard_of(0))
    source = open_source(section(path))
    assert source.num_rows == 4
    path.unlink()
    with pytest.raises(
        DataError, match=r"a.tar: cannot be read any more \(No such file or directory\): put it back$"
    ):
        list(source.rows())


def test_metadata_and_folders_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, ["1.png"])
    (tmp_path / "metadata.jsonl").symlink_to("nowhere")
    with pytest.raises(
        DataError,
        match=r"metadata.jsonl is a link that leads nowhere \(No such file or directory\): "
        "put a file in its place",
    ):
        prepare(tmp_path)
    (tmp_path / "below").mkdir()
    scandir = os.scandir
    monkeypatch.setattr(
        os, "scandir", lambda path: scandir(path if path != tmp_path / "below/" else tmp_path / "gone")
    )
    with pytest.raises(
        DataError,
        match=r"below: cannot be read \(No such file or directory\): put it back, or correct its permissions",
    ):
        prepare(tmp_path)


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    write(tmp_path / "parquet" / "a.parquet", plain(4)).rename(tmp_path / "parquet" / f"{odd}.parquet")
    write_shard(tmp_path / "tar" / f"{odd}.tar", shard_of(0))
    for kind in ("parquet", "tar"):
        with pytest.raises(
            DataError, match=rf"{kind}: the file name caf\\xe9.{kind} is not UTF-8: rename the file"
        ):
            prepare(tmp_path / kind)
    with_captions(tmp_path / "folder", ["1.png", "2.png"])
    write_pictures(tmp_path / "folder" / odd, ["3.png"])
    (tmp_path / "folder" / "metadata.jsonl").write_text(
        '{"file_name": "1.png", "text": "a"}\n{"file_name": "2.png", "text": "b"}\n'
    )
    (tmp_path / "folder" / odd / "metadata.jsonl").write_text(
        '{"file_name": "3.png", "text": "a"}\n{"file_name": "/4.png", "text": "a"}\n'
    )
    assert [entry["id"] for entry in prepare(tmp_path / "folder").summary["refused"]] == [
        r"caf\xe9/3.png",
        r"caf\xe9/metadata.jsonl#2",
    ]


def test_nested_json_is_no_crash(tmp_path: Path) -> None:
    samples = [{"__key__": "a", "png": encode(pixels(9)), "json": b"[" * 60_000}, *shard_of(0)]
    path = write_shard(tmp_path / "a.tar", samples)
    assert [entry["reason"] for entry in prepare(path).summary["refused"]] == ["its .json file is not JSON"]
    write_pictures(tmp_path / "folder", ["1.png"])
    (tmp_path / "folder" / "metadata.jsonl").write_text("[" * 100_000)
    with pytest.raises(
        DataError, match=r"metadata.jsonl: line 1: not JSON \(maximum recursion depth exceeded"
    ):
        prepare(tmp_path / "folder")


LETTERS = st.text(
    st.sampled_from('ab1.png/\\",:{}[]\n\r\t\0\ufeff\ud800\u0301é日') | st.characters(), max_size=12
)
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | LETTERS | st.lists(LETTERS, max_size=2)
NAMES = (
    st.sampled_from(["1.png", "2.png", "./1.png", "a/../1.png", "../1.png", "/1.png", "", ".", "1.txt"])
    | LETTERS
)
RECORDS = st.fixed_dictionaries({"file_name": NAMES | VALUES, "text": VALUES}) | st.dictionaries(
    LETTERS, VALUES, max_size=3
)


def as_csv(rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(
        [["file_name", "text"], *([str(value).replace("\0", "") for value in row] for row in rows)]
    )
    return text.getvalue().encode(errors="surrogatepass")


CONTENTS = {
    "metadata.jsonl": st.lists(RECORDS.map(json.dumps), max_size=4).map(
        lambda lines: "\n".join(lines).encode()
    ),
    "metadata.csv": st.lists(st.tuples(NAMES | VALUES, VALUES), max_size=4).map(as_csv),
    "1.txt": LETTERS.map(lambda text: text.encode(errors="surrogatepass")),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_any_metadata_and_captions_are_used_refused_or_an_error_of_one_line(
    tmp_path: Path, name: str
) -> None:
    write_pictures(tmp_path, ["1.png", "2.png"])
    (tmp_path / "2.txt").write_text("fine")

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(CONTENTS[name] | st.binary(max_size=40))
    def check(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        try:
            checked = check_source(section(tmp_path), count_words)
        except DataError as error:
            message = str(error)
            assert len(message.splitlines()) == 1, message
            return
        used = [picture.example.id for picture in checked.pictures]
        refused = [entry["id"] for entry in checked.refused]
        assert (
            set(used) <= {"1.png", "2.png"}
            and len(set(used)) == len(used)
            and len(used) + len(refused) == checked.num_rows
        )
        assert {"1.png", "2.png"} <= {*used, *refused}
        assert all(picture.example.caption.strip() for picture in checked.pictures)
        json.dumps([checked.refused, checked.treated], ensure_ascii=False).encode()

    check()
