"""The pictures of a run: too many refusals, what the log and `data.json` say, loading and memory."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from lorascope.console import log
from lorascope.data import dataset as data
from lorascope.data import examples, parquet
from lorascope.data.dataset import load_dataset, prepare_data
from lorascope.data.examples import Example
from lorascope.data.parquet import ParquetSource
from lorascope.errors import DataError
from samples import (
    SIDE,
    count_words,
    encode,
    pixels,
    plain,
    prepare,
    section,
    write,
    write_pictures,
)


def test_too_many_refusals_stop_the_study(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [*plain(6), *[(b"", "bad")] * 4])
    assert len(prepare(path, max_refused_share=0.4).summary["refused"]) == 4
    with pytest.raises(DataError) as caught:
        prepare(path, max_refused_share=0.39)
    message = str(caught.value)
    assert "4 of 10 rows (40.0%) cannot be used and max_refused_share is 0.39" in message
    assert (
        "(a.parquet#6: the image file is empty; a.parquet#7: the image file is empty; a.parquet#8: the "
        "image file is empty)" in message
    )
    assert message.endswith("correct them, or raise data.max_refused_share")


def test_no_usable_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [(b"", "bad"), (encode(pixels(0)), None)])
    with pytest.raises(DataError, match=r"2 of 2 rows \(100.0%\) cannot be used and none is left"):
        prepare(path)


def test_refusals_and_treatments_are_logged_by_kind_with_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", log.name)
    rows = [*plain(3), *[(b"", "bad")] * 4, (encode(pixels(9)), None), (encode(pixels(8)), "a\acat")]
    prepare(write(tmp_path / "a.parquet", rows))
    # pytest may listen on both loggers, and then has every record twice
    assert list(dict.fromkeys(record.getMessage() for record in caplog.records)) == [
        "data     refused 4: the image file is empty: a.parquet#3, a.parquet#4, a.parquet#5 and 1 more",
        "data     refused 1: no caption: a.parquet#7",
        "data     treated 1: control characters taken out of the caption: a.parquet#8",
    ]
    monkeypatch.setattr(data, "_SHOWN_KINDS", 1)
    prepare(tmp_path / "a.parquet")
    assert "data     refused for 1 more reasons" in caplog.text


# The summary, loading and memory ----------------------------------------------------------------------------


def test_summary(tmp_path: Path) -> None:
    rows = [*plain(5), (b"", "bad"), (encode(Image.new("L", (SIDE, SIDE))), "one two three four")]
    path = write(tmp_path / "a.parquet", rows)
    done: list[tuple[int, int]] = []
    dataset = prepare_data(section(path), count_words, progress=lambda *progress: done.append(progress))
    summary = dataset.summary
    assert json.loads(json.dumps(summary)) == summary
    assert set(summary) == {
        *(
            "source",
            "resolution_px",
            "num_rows",
            "num_train",
            "num_heldout",
            "split",
            "remarks",
            "refused",
            "treated",
            "duplicates",
            "train",
        ),
        *("heldout", "caption_tokens", "fingerprint", "buckets", "caption_prefix", "trigger_word"),
    }
    assert summary["source"] == str(path)
    assert (summary["resolution_px"], summary["num_rows"], summary["num_train"], summary["num_heldout"]) == (
        SIDE,
        7,
        5,
        1,
    )
    assert summary["refused"] == [{"id": "a.parquet#5", "reason": "the image file is empty"}]
    assert summary["treated"] == [{"id": "a.parquet#6", "treatment": "grayscale converted to RGB"}]
    assert summary["caption_tokens"] == {"min": 4, "median": 4.0, "max": 6}
    assert summary["train"][0] == vars(dataset.train[0])
    assert summary["buckets"] == [{"width_px": SIDE, "height_px": SIDE, "num_train": 5, "num_heldout": 1}]
    assert done == [(count, 7) for count in range(1, 8)]


def test_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", plain(10))
    dataset = prepare(path)
    monkeypatch.setattr(examples, "examine_picture", None)
    again = load_dataset(section(path), json.loads(json.dumps(dataset.summary)))
    assert again == dataset
    for example in again.train:
        np.testing.assert_array_equal(again.load_pixels(example), dataset.load_pixels(example))


def test_load_dataset_of_another_study(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", plain(4))
    summary = prepare(path).summary
    for other in (section(path, resolution_px=32), section("pocket")):
        with pytest.raises(
            DataError,
            match=r"data.json was made from .* at 16 px, the study asks for .*: run the data stage again",
        ):
            load_dataset(other, summary)


@pytest.mark.parametrize(
    "change", [{"caption": "other"}, {"digest": "0" * 64}, {"repeats": 2}, {"width_px": 8}]
)
def test_a_summary_that_is_not_of_its_fingerprint_is_refused(
    change: dict[str, object], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.parquet", plain(4))
    summary = json.loads(json.dumps(prepare(path).summary))
    summary["train"][0]["of a later version"] = 1
    assert load_dataset(section(path), summary).summary == summary
    summary["train"][0] |= change
    with pytest.raises(DataError, match=r"^data.json: damaged \(its pictures and captions are not .* again$"):
        load_dataset(section(path), summary)


def test_pictures_that_changed_or_went_away(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", plain(4))
    summary = prepare(path).summary
    write(path, plain(4, 10))
    changed = load_dataset(section(path), summary)
    with pytest.raises(
        DataError,
        match=r"a.parquet#[0-3]: the picture changed after it was checked: run the data stage again",
    ):
        changed.load_pixels(changed.train[0])
    write(path, plain(1, 10))
    shorter = load_dataset(section(path), summary)
    with pytest.raises(
        DataError,
        match=r"a.parquet#\d: no such row in .*a.parquet': put it back, or run the data stage again",
    ):
        shorter.load_pixels(next(example for example in shorter.train if example.id != "a.parquet#0"))


def test_a_picture_file_that_went_away(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png"])
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,one\n2.png,two\n")
    dataset = prepare(tmp_path)
    (tmp_path / dataset.train[0].id).unlink()
    with pytest.raises(
        DataError, match=r"\.png: the image file cannot be read \(No such file or directory\): put it back"
    ):
        dataset.load_pixels(dataset.train[0])


@pytest.fixture
def grouped(tmp_path: Path) -> Path:
    """32 row groups of 8 incompressible pictures."""
    generator = np.random.default_rng(0)
    rows = [
        (encode(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)), f"noise {index}")
        for index in range(256)
    ]
    return write(tmp_path / "a.parquet", rows, row_group_size=8)


def test_memory_is_bounded_by_the_row_groups(grouped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_ROW_GROUP_CACHE_BYTES", grouped.stat().st_size // 16)
    before = pa.total_allocated_bytes()
    peak = 0

    def watch(*_: int) -> None:
        nonlocal peak
        peak = max(peak, pa.total_allocated_bytes() - before)

    dataset = prepare_data(section(grouped, near_duplicate_bits=0), count_words, progress=watch)
    for example in dataset.train:
        dataset.load_pixels(example)
        watch()
    assert 0 < peak < grouped.stat().st_size // 4  # of 32 row groups


def test_each_row_group_is_read_once_in_storage_order(grouped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = prepare(grouped)
    monkeypatch.setattr(parquet, "_ROW_GROUP_CACHE_BYTES", 0)
    read_group = ParquetSource._read_group
    groups: list[int] = []

    def watch(source: Any, file: str, group: int, column: str) -> Any:
        groups.append(group)
        assert column == "image"
        return read_group(source, file, group, column)

    monkeypatch.setattr(ParquetSource, "_read_group", watch)
    ordered = dataset.in_storage_order(dataset.train)
    for example in ordered:
        dataset.load_pixels(example)
    assert groups == sorted(set(groups))
    assert set(ordered) == set(dataset.train)


def test_pixels_can_be_loaded_from_several_threads(grouped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = prepare(grouped)
    monkeypatch.setattr(parquet, "_ROW_GROUP_CACHE_BYTES", 0)
    failures: list[Exception] = []

    def load(examples: Sequence[Example]) -> None:
        try:
            for example in examples:
                dataset.load_pixels(example)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=load, args=(dataset.train[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
