"""`metadata.jsonl` and `metadata.csv`: what their lines say, and lists that are wrong."""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorascope.data.examples import check_source
from lorascope.data.metadata import MAX_METADATA_BYTES
from lorascope.errors import DataError
from samples import (
    captions,
    count_words,
    encode,
    pixels,
    prepare,
    section,
    shard_of,
    write_pictures,
    write_shard,
)


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


def test_metadata_in_subfolders_names_pictures_beside_it(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train/1.png", "train/2.png", "test/1.png"])
    (tmp_path / "train/metadata.csv").write_text("file_name,text\n1.png,one\n2.png,two\n")
    (tmp_path / "test/metadata.csv").write_text("file_name,text\n1.png,three\n")
    dataset = prepare(tmp_path)
    assert (captions(dataset.train), captions(dataset.heldout)) == ({"one", "two"}, {"three"})


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


def test_a_line_of_metadata_without_a_caption_is_refused_and_the_rest_goes_on(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png", "3.png"])
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "1.png", "caption": "one"}\n{"file_name": "2.png"}\n{"file_name": "3.png", '
        '"caption": "3"}'
    )
    assert prepare(tmp_path).summary["refused"] == [{"id": "2.png", "reason": "no caption"}]


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


def test_metadata_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png"])
    (tmp_path / "metadata.csv").touch()
    os.truncate(tmp_path / "metadata.csv", MAX_METADATA_BYTES + 1)
    with pytest.raises(
        DataError,
        match=r"metadata.csv: 1073741825 bytes, more than the limit of 1073741824: split the folder",
    ):
        prepare(tmp_path)


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
