"""Picture folders: captions beside pictures, links, pipes, rights, and files that are not read."""

import os
from pathlib import Path

import numpy as np
import pytest

from lorascope.data import folders
from lorascope.data.captions import MAX_CAPTION_BYTES
from lorascope.data.pictures import MAX_FILE_BYTES, RefusedError
from lorascope.data.sources import open_source
from lorascope.errors import DataError
from rights import without_rights
from samples import (
    captions,
    encode,
    pixels,
    prepare,
    section,
    with_captions,
    write_pictures,
)


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


def test_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match="no Parquet or tar files in it or its data folder, and no pictures"):
        prepare(tmp_path)


def test_folder_without_captions(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png"])
    with pytest.raises(DataError, match=r"2 pictures and no captions: add metadata.jsonl"):
        prepare(tmp_path)


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


def test_one_bad_picture_is_refused_and_the_rest_is_used(tmp_path: Path) -> None:
    """bmaltais/kohya_ss #1574: one picture that cannot be decoded ends the run while latents are cached."""
    with_captions(tmp_path, [f"{number}.png" for number in range(10)])
    content = encode(pixels(3, 64), "JPEG", quality=95)
    (tmp_path / "3.png").write_bytes(content[: len(content) // 2])
    dataset = prepare(tmp_path, max_refused_share=0.1)
    assert len(dataset.train) + len(dataset.heldout) == 9
    [refused] = dataset.summary["refused"]
    assert refused["id"] == "3.png" and refused["reason"].startswith("unreadable image")


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


def test_files_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    with_captions(tmp_path, ["1.png", "2.png", "3.png", "4.png"])
    os.truncate(tmp_path / "3.png", MAX_FILE_BYTES + 1)
    (tmp_path / "4.txt").write_text("a" * (MAX_CAPTION_BYTES + 1))
    assert prepare(tmp_path).summary["refused"] == [
        {
            "id": "3.png",
            "reason": (f"the image file has {MAX_FILE_BYTES + 1} bytes, more than the limit of 536870912"),
        },
        {"id": "4.png", "reason": "4.txt: more than 65536 bytes, too many for a caption"},
    ]


def test_a_file_that_grew_since_it_was_listed_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_captions(tmp_path, ["1.png", "2.png"])
    dataset = prepare(tmp_path)
    monkeypatch.setattr(folders, "MAX_FILE_BYTES", 20)
    with pytest.raises(DataError, match="the image file has more bytes than the limit of 20"):
        dataset.load_pixels(dataset.train[0])


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
