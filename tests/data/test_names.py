"""Names of files and texts that cannot be written as UTF-8."""

import json
import os
from pathlib import Path

import pytest

from lorascope.errors import DataError
from samples import (
    plain,
    prepare,
    shard_of,
    with_captions,
    write,
    write_pictures,
    write_shard,
)


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


def test_what_is_said_of_a_line_can_be_written_whatever_its_list_is_called(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    with_captions(tmp_path, ["1.png", "2.png"])
    write_pictures(tmp_path / odd, ["3.png"])
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,a\n2.png,b\n")
    (tmp_path / odd / "metadata.csv").write_text("file_name,text,by\n3.png,a dog, asleep,me\n")
    [refused] = prepare(tmp_path).summary["refused"]
    assert refused["reason"].startswith(
        r"the file name is not UTF-8; line 2 of caf\xe9/metadata.csv has 1 field"
    )
    json.dumps(refused, ensure_ascii=False).encode()
