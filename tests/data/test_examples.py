"""Rows to examples: captions and pictures that are used, treated or refused, and their sizes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lorascope.console import log
from lorascope.data.dataset import load_dataset, prepare_data
from lorascope.errors import DataError
from samples import (
    SIDE,
    captions,
    count_words,
    encode,
    pixels,
    plain,
    prepare,
    section,
    write,
    write_pictures,
)

# Captions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (None, "no caption"),
        ("", "the caption is empty"),
        (" \n\u3000\u00a0", "the caption is empty"),
    ],
)
def test_captions_that_cannot_be_used(tmp_path: Path, caption: str | None, reason: str) -> None:
    path = write(tmp_path / "a.parquet", [*plain(3), (encode(pixels(99)), caption)])
    assert prepare(path).summary["refused"] == [{"id": "a.parquet#3", "reason": reason}]


def test_long_captions_are_kept_and_said_to_be_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    rows = [*plain(3), (encode(pixels(98)), "one two three four"), (encode(pixels(99)), "one two three")]
    path = write(tmp_path / "a.parquet", rows)
    assert prepare_data(section(path), count_words, max_tokens=6).summary["treated"] == []
    assert caplog.text == ""
    dataset = prepare_data(section(path), count_words, max_tokens=4)
    assert {"one two three four", "one two three"} <= captions((*dataset.train, *dataset.heldout))
    assert dataset.summary["refused"] == []
    assert dataset.summary["treated"] == [
        {
            "id": f"a.parquet#{row}",
            "treatment": "the caption is cut at 4 tokens, all that the text encoder takes",
        }
        for row in (3, 4)
    ]
    assert dataset.summary["caption_tokens"]["max"] == 6
    assert (
        "captions longer than 4 tokens, which are cut there: 2, the longest, of 6, that of a.parquet#3"
        in caplog.text
    )


def test_a_caption_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    rows = plain(3)
    texts = pa.array([b"one", b"two", b"caf\xe9"], pa.binary()).view(pa.string())
    table = pa.table({"image": [{"bytes": image} for image, _ in rows], "text": texts})
    pq.write_table(table, tmp_path / "a.parquet")
    assert prepare(tmp_path / "a.parquet").summary["refused"] == [
        {"id": "a.parquet#2", "reason": "the caption is not UTF-8"}
    ]


def test_captions_in_any_script_are_kept(tmp_path: Path) -> None:
    texts = [
        "кошка на окне",
        "窓辺の猫",
        "قطة على النافذة",
        "बिल्ली",
        "고양이",
        "γάτα",
        "chat 🐈‍⬛",
        "  e\u0301t\u00e9  ",
    ]
    path = write(tmp_path / "a.parquet", [(encode(pixels(seed)), text) for seed, text in enumerate(texts)])
    dataset = prepare(path)
    assert captions((*dataset.train, *dataset.heldout)) == {*texts[:-1], "été"}
    assert dataset.summary["refused"] == []


def test_control_characters_are_taken_out_of_captions(tmp_path: Path) -> None:
    rows = [
        (encode(pixels(8)), "a\0 c\x1ba\x7ft\x85,\n\ton\r\na mat"),
        (encode(pixels(9)), "\0\x01"),
        *plain(3),
    ]
    dataset = prepare(write(tmp_path / "a.parquet", rows))
    assert "a cat,\n\ton\r\na mat" in captions((*dataset.train, *dataset.heldout))
    assert dataset.summary["treated"] == [
        {"id": "a.parquet#0", "treatment": "control characters taken out of the caption"}
    ]
    assert dataset.summary["refused"] == [{"id": "a.parquet#1", "reason": "the caption is empty"}]


def test_prefix_and_trigger_word_count_as_tokens_and_are_recorded(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", plain(3))
    summary = prepare_data(
        section(path, caption_prefix="drawing of ", trigger_word="sks"), count_words
    ).summary
    assert summary["caption_tokens"] == {"min": 7, "median": 7, "max": 7}
    assert (summary["caption_prefix"], summary["trigger_word"]) == ("drawing of ", "sks")
    assert {row["caption"] for row in summary["train"] + summary["heldout"]} == {
        f"sks, drawing of picture {seed}" for seed in range(3)
    }


@pytest.mark.parametrize("key", ["caption_prefix", "trigger_word"])
def test_special_tokens_before_every_caption_are_an_error(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "a.parquet", plain(3))
    with pytest.raises(
        DataError, match=rf"^data.{key} = 'a <\|endoftext\|>' holds <\|endoftext\|>, which CLIP takes"
    ):
        prepare(path, **{key: "a <|endoftext|>"})


def test_an_unreadable_picture_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, ["1.png", "2.png", "3.png"])
    for path in list(tmp_path.glob("*.png")):
        path.with_suffix(".txt").write_text(path.stem)
    open_file = Path.open

    def fail(path: Path, *arguments: Any) -> Any:
        if path.name == "2.png":
            raise PermissionError(13, "Permission denied")
        return open_file(path, *arguments)

    monkeypatch.setattr(Path, "open", fail)
    assert prepare(tmp_path).summary["refused"] == [
        {"id": "2.png", "reason": "the image file cannot be read (Permission denied)"}
    ]


def test_a_damaged_picture_among_twelve_is_refused_by_name(tmp_path: Path) -> None:
    """One flipped bit in the compressed pixels of a PNG: what follows of them would be black."""
    for seed, (image, caption) in enumerate(plain(12)):
        damaged = bytearray(image)
        damaged[50] ^= 8 * (seed == 7)
        (tmp_path / f"{seed}.png").write_bytes(damaged)
        (tmp_path / f"{seed}.txt").write_text(caption)
    dataset = prepare(tmp_path)
    assert [entry["id"] for entry in dataset.summary["refused"]] == ["7.png"]
    assert dataset.summary["refused"][0]["reason"].startswith("unreadable image: broken PNG file")
    assert len(dataset.train) + len(dataset.heldout) == 11


def test_names_with_line_ends_and_escapes_are_told_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    write_pictures(tmp_path, ["1.png", "2.png", "a\nb.png", "c\x1b[2J.png"])
    for name in ("1.txt", "2.txt"):
        (tmp_path / name).write_text("fine")
    prepare(tmp_path)
    assert r"refused 2: no caption: a\nb.png, c\x1b[2J.png" in caplog.text
    with pytest.raises(
        DataError, match=r"\(a\\nb.png: no caption; c\\x1b\[2J.png: no caption\): correct them"
    ):
        prepare(tmp_path, max_refused_share=0.1)


# Sizes ------------------------------------------------------------------------------------------------------


def test_small_pictures_are_enlarged_with_a_note(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [(encode(Image.new("RGB", (12, 8), (1, 2, 3))), "small"), *plain(3)])
    dataset = prepare(path)
    [small] = [example for example in (*dataset.train, *dataset.heldout) if example.caption == "small"]
    assert (dataset.load_pixels(small) == np.full((SIDE, SIDE, 3), (1, 2, 3))).all()
    assert dataset.summary["treated"] == [{"id": "a.parquet#0", "treatment": "enlarged from 8 to 16 px"}]


def test_buckets(tmp_path: Path) -> None:
    sizes = [(64, 64), (80, 48), (48, 80), (96, 20), (40, 40), (300, 200), (64, 66), (90, 50)]
    images = [Image.fromarray(pixels(seed, 64)).resize(size) for seed, size in enumerate(sizes)]
    path = write(
        tmp_path / "a.parquet", [(encode(image), str(number)) for number, image in enumerate(images)]
    )
    dataset = prepare(path, resolution_px=64, buckets=True, bucket_step_px=16)
    found = {int(example.caption): example for example in (*dataset.train, *dataset.heldout)}
    assert {number: (example.width_px, example.height_px) for number, example in found.items()} == {
        0: (64, 64),
        1: (80, 48),
        2: (48, 80),
        3: (80, 48),
        4: (64, 64),
        5: (80, 48),
        6: (64, 64),
        7: (80, 48),
    }
    for example in found.values():
        assert dataset.load_pixels(example).shape == (example.height_px, example.width_px, 3)
    np.testing.assert_array_equal(dataset.load_pixels(found[1]), np.asarray(images[1]))
    assert [(entry["id"][-1], entry["treatment"]) for entry in dataset.summary["treated"]] == [
        ("3", "enlarged from 96 x 20 to 80 x 48 px"),
        ("4", "enlarged from 40 x 40 to 64 x 64 px"),
    ]
    buckets = dataset.summary["buckets"]
    assert [(bucket["width_px"], bucket["height_px"]) for bucket in buckets] == [(48, 80), (64, 64), (80, 48)]
    assert sum(bucket["num_train"] for bucket in buckets) == len(dataset.train)
    assert (
        load_dataset(section(path, resolution_px=64, buckets=True), json.loads(json.dumps(dataset.summary)))
        == dataset
    )


def test_no_bucket_fits(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match="data.bucket_step_px = 64: no bucket fits into data.resolution_px = 16: lower the step",
    ):
        prepare(write(tmp_path / "a.parquet", plain(3)), buckets=True)
