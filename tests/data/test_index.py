"""The index of pictures: unchanged files are not read again, changed ones are, and damage costs time only."""

import logging
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lorascope.data import examples, index
from lorascope.data.dataset import Dataset, prepare_data
from lorascope.data.index import PictureIndex
from lorascope.data.pictures import PictureFacts, RefusedError
from samples import count_words, drawing, encode, pixels, plain, section, write

STAMP = (10, 1_000)
FACTS = PictureFacts(
    "ab" * 32, b"p" * 32, 2**64 - 1, b"t" * 768, b"c" * 768, 640, 480, 600, 470, ("one", "two")
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten captioned pictures, last changed long ago, one of them damaged."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.png").write_bytes(encode(pixels(number)) if number else b"damaged")
        (folder / f"{number}.txt").write_text(f"picture {number}")
        os.utime(folder / f"{number}.png", (1e9, 1e9))
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the pictures that were looked at."""
    looked_at: list[str] = []
    look_at = examples._look_at

    def watch(source: Any, row_id: str) -> Any:
        looked_at.append(row_id)
        return look_at(source, row_id)

    monkeypatch.setattr(examples, "_look_at", watch)
    return looked_at


def check(source: Path, index_dir: Path, **values: Any) -> Dataset:
    return prepare_data(section(source, **values), count_words, index_dir=index_dir)


def test_unchanged_pictures_are_read_once(folder: Path, tmp_path: Path, read: list[str]) -> None:
    first = check(folder, tmp_path / "index")
    assert len(read) == 10
    assert check(folder, tmp_path / "index") == first
    other = check(folder, tmp_path / "index", resolution_px=32, caption_prefix="a ")
    assert len(read) == 10
    assert {entry["treatment"] for entry in other.summary["treated"]} == {"enlarged from 16 to 32 px"}
    assert other.summary["refused"] == first.summary["refused"] != []


def test_a_changed_picture_is_read_again_and_captions_are_always_fresh(
    folder: Path, tmp_path: Path, read: list[str]
) -> None:
    check(folder, tmp_path / "index")
    (folder / "3.png").write_bytes(encode(pixels(33)))
    (folder / "4.txt").write_text("another caption")
    read.clear()
    dataset = check(folder, tmp_path / "index")
    assert read == ["3.png"]
    assert "another caption" in {example.caption for example in (*dataset.train, *dataset.heldout)}
    for example in (*dataset.train, *dataset.heldout):
        dataset.load_pixels(example)


def test_same_size_but_another_time_is_another_picture(folder: Path, tmp_path: Path, read: list[str]) -> None:
    check(folder, tmp_path / "index")
    read.clear()
    os.utime(folder / "5.png", ns=(10**18, 10**18 + 1))
    check(folder, tmp_path / "index")
    assert read == ["5.png"]


def test_a_file_of_this_moment_is_not_kept(folder: Path, tmp_path: Path, read: list[str]) -> None:
    os.utime(folder / "5.png")
    check(folder, tmp_path / "index")
    read.clear()
    check(folder, tmp_path / "index")
    assert read == ["5.png"]


def test_parquet_reads_the_captions_alone(tmp_path: Path, read: list[str]) -> None:
    path = write(tmp_path / "a.parquet", plain(8), row_group_size=2)
    os.utime(path, (1e9, 1e9))
    first = check(path, tmp_path / "index")
    read.clear()
    assert check(path, tmp_path / "index") == first
    assert read == []


def test_what_cannot_be_read_now_is_tried_again(
    folder: Path, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = Path.open

    def fail(path: Path, *arguments: Any) -> Any:
        if path.name == "2.png":
            raise PermissionError(13, "Permission denied")
        return open_file(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        assert len(check(folder, tmp_path / "index").summary["refused"]) == 2
    read.clear()
    assert len(check(folder, tmp_path / "index").summary["refused"]) == 1
    assert read == ["2.png"]


def test_an_interrupted_check_goes_on(folder: Path, tmp_path: Path, read: list[str]) -> None:
    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_data(section(folder), count_words, progress=stop, index_dir=tmp_path / "index")
    read.clear()
    check(folder, tmp_path / "index")
    assert len(read) <= 6


def test_facts_and_refusals_come_back_as_they_were(tmp_path: Path) -> None:
    with PictureIndex(tmp_path, "here") as entries:
        entries.add("a", STAMP, FACTS)
        entries.add("b", STAMP, RefusedError("because"))
    with PictureIndex(tmp_path, "here") as entries:
        assert entries.find("a", STAMP) == FACTS
        assert str(entries.find("b", STAMP)) == "because"
        assert entries.find("a", (11, 1_000)) is None
        assert entries.find("c", STAMP) is None
        assert entries.num_found == 2
    with PictureIndex(tmp_path, "elsewhere") as entries:
        assert entries.find("a", STAMP) is None


def test_rows_that_are_gone_are_forgotten(tmp_path: Path) -> None:
    with PictureIndex(tmp_path, "here") as entries:
        for row_id in "abc":
            entries.add(row_id, STAMP, FACTS)
        entries.keep_only(["a", "b"])
        assert [entries.find(row_id, STAMP) is None for row_id in "abc"] == [False, False, True]


def test_a_damaged_entry_counts_as_absent(tmp_path: Path) -> None:
    with PictureIndex(tmp_path, "here") as entries:
        entries.add("a", STAMP, FACTS)
    with sqlite3.connect(entries.path) as database:
        database.execute("UPDATE pictures SET facts = zeroblob(length(facts))")
    database.close()
    with PictureIndex(tmp_path, "here") as entries:
        assert entries.find("a", STAMP) is None


def test_another_version_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PictureIndex(tmp_path, "here") as entries:
        entries.add("a", STAMP, FACTS)
    with monkeypatch.context() as patch:
        patch.setattr(index, "_VERSION", "another version")
        with PictureIndex(tmp_path, "here") as entries:
            assert entries.find("a", STAMP) is None


@pytest.mark.parametrize("part", ["start", "middle"])
def test_a_damaged_file_is_made_anew_with_a_line_in_the_log(
    tmp_path: Path, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    with PictureIndex(tmp_path, "here") as entries:
        for number in range(300):
            entries.add(f"row {number}", STAMP, FACTS)
    content = bytearray(entries.path.read_bytes())
    if part == "start":
        content[:100] = b"\xff" * 100
    else:
        content[4096:] = b"\xff" * (len(content) - 4096)
    entries.path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "lorascope"):
        with PictureIndex(tmp_path, "here") as entries:
            assert entries.find("row 1", STAMP) is None
            entries.add("row 1", STAMP, FACTS)
        with PictureIndex(tmp_path, "here") as entries:
            assert entries.find("row 1", STAMP) == FACTS
    assert "the index of pictures is damaged" in caplog.text and "made anew" in caplog.text


def test_a_cache_that_cannot_be_written_only_costs_time(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "lorascope"):
        dataset = check(folder, tmp_path / "file" / "index")
    assert len(dataset.train) + len(dataset.heldout) == 9
    assert "the index of pictures cannot be used" in caplog.text


def test_a_locked_index_only_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(index, "_WAIT_S", 0.05)
    with PictureIndex(tmp_path, "here") as entries:
        other = sqlite3.connect(entries.path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        with caplog.at_level(logging.WARNING, "lorascope"):
            entries.add("a", STAMP, FACTS)
            assert entries.find("a", STAMP) is None
        other.close()
    assert "database is locked" in caplog.text


def test_two_processes_at_once(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from lorascope.data.index import PictureIndex
from lorascope.data.pictures import PictureFacts
facts = PictureFacts("ab" * 32, b"p" * 32, 1, b"t" * 768, b"c" * 768, 640, 480, 640, 480, ())
with PictureIndex(Path({str(tmp_path)!r}), "here") as entries:
    for number in range(2000):
        entries.add(f"{{sys.argv[1]}} {{number}}", {STAMP}, facts)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(examples.__file__).parents[2])}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, name], env=environment, stderr=subprocess.PIPE)
        for name in "ab"
    ]
    for process in processes:
        assert process.communicate()[1] == b""
    with PictureIndex(tmp_path, "here") as entries:
        assert all(entries.find(f"{name} {number}", STAMP) for name in "ab" for number in (0, 999, 1999))


@pytest.mark.figures
def test_a_hundred_thousand_pictures_would_be_listed_again_in_seconds(folder: Path, tmp_path: Path) -> None:
    """kohya-ss/sd-scripts #19: 12 hours of preparing 100,000 pictures before each start.

    Here what is known of a picture is found at more than 2,000 a second; EXPERIMENTS.md has the figures of
    100,000.
    """
    with PictureIndex(tmp_path, "here") as entries:
        for number in range(2000):
            entries.add(str(number), STAMP, FACTS)
    started = time.perf_counter()
    with PictureIndex(tmp_path, "here") as entries:
        assert all(entries.find(str(number), STAMP) == FACTS for number in range(2000))
    assert time.perf_counter() - started < 1


def test_a_second_run_prepares_nothing_again(folder: Path, tmp_path: Path, read: list[str]) -> None:
    """bmaltais/kohya_ss #2277: the same pictures are prepared all over again in the second run, for their
    order had changed.
    """
    check(folder, tmp_path / "index")
    read.clear()
    for number in range(10):  # another order of the rows, another caption for each
        (folder / f"{number}.txt").write_text(f"caption {number}")
        (folder / f"{number}.png").rename(folder / f"x{9 - number}.png")
        (folder / f"x{9 - number}.png").rename(folder / f"{number}.png")
    (folder / "new.png").write_bytes(encode(drawing(1)))
    (folder / "new.txt").write_text("a new picture")
    check(folder, tmp_path / "index")
    assert read == ["new.png"]
