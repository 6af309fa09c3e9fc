"""Data: every source, check, treatment and refusal on real files, duplicates, and the split's invariants."""

import hashlib
import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from lorascope.console import log
from lorascope.data import dataset as data
from lorascope.data import parquet
from lorascope.data.dataset import Example, describe_duplicates, load_dataset, prepare_data
from lorascope.data.parquet import ParquetSource
from lorascope.data.pictures import examine_picture
from lorascope.errors import DataError
from samples import (
    SIDE,
    Row,
    captions,
    count_words,
    drawing,
    encode,
    near_duplicates,
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


# Duplicates -------------------------------------------------------------------------------------------------


def test_exact_duplicates_are_dropped(tmp_path: Path) -> None:
    image = Image.fromarray(pixels(0))
    same_pixels = encode(image, "WEBP", lossless=True)
    rows = [
        (encode(image), "zero"),
        *plain(4, 1),
        (encode(image), "zero"),
        (same_pixels, "another zero"),
        (encode(pixels(1)), "picture 1"),
    ]
    dataset = prepare(write(tmp_path / "a.parquet", rows))
    assert len(dataset.train) + len(dataset.heldout) == 5
    kept = min(encode(image), same_pixels, key=lambda content: hashlib.sha256(content).hexdigest())
    kept_id, others = (
        ("a.parquet#6", ["a.parquet#0", "a.parquet#5"])
        if kept == same_pixels
        else ("a.parquet#0", ["a.parquet#5", "a.parquet#6"])
    )
    notes = sorted(dataset.summary["duplicates"], key=lambda note: -len(note["ids"]))
    assert notes == [
        {
            "kind": "exact",
            "ids": [kept_id, *others],
            "action": f"kept {kept_id}, dropped the others; their captions differ",
        },
        {
            "kind": "exact",
            "ids": ["a.parquet#1", "a.parquet#7"],
            "action": "kept a.parquet#1, dropped the other",
        },
    ]


def test_duplicates_are_counted_and_the_largest_groups_named() -> None:
    notes = [
        {"kind": "near", "ids": [f"{name}{number}" for number in range(size)], "action": "kept"}
        for name, size in (("a", 2), ("b", 4), ("c", 3), ("d", 2))
    ]
    assert describe_duplicates(notes) == [
        "11 pictures in 4 groups of near duplicates, kept on one side of the split: b0, b1, b2 and 1 more; "
        "c0, c1, c2; and 2 more"
    ]
    assert describe_duplicates([]) == []


def test_near_duplicates_are_kept_on_one_side(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, log.name)
    contents = near_duplicates(drawing(0))
    rows = [(content, f"near {index}") for index, content in enumerate(contents)] + plain(12)
    dataset = prepare(write(tmp_path / "a.parquet", rows), heldout_share=0.3)
    assert len(dataset.train) + len(dataset.heldout) == len(rows)
    (note,) = dataset.summary["duplicates"]
    assert (note["kind"], note["action"]) == ("near", "kept on the same side of the split")
    assert set(note["ids"]) == {f"a.parquet#{index}" for index in range(4)}
    assert f"data     {describe_duplicates([note])[0]}" in caplog.messages
    assert {f"near {index}" for index in range(4)} <= captions(dataset.train) or captions(
        dataset.train
    ).isdisjoint({f"near {index}" for index in range(4)})


def test_different_small_drawings_on_white_are_not_near(tmp_path: Path) -> None:
    def dot(colour: str) -> bytes:
        image = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(image).ellipse((40, 40, 88, 88), colour)
        return encode(image)

    red, blue = (examine_picture(dot(name)) for name in ("red", "blue"))
    assert (red.hash ^ blue.hash).bit_count() <= 3
    dataset = prepare(write(tmp_path / "a.parquet", [(dot("red"), "red"), (dot("blue"), "blue"), *plain(4)]))
    assert dataset.summary["duplicates"] == []


def test_near_duplicate_bits(tmp_path: Path) -> None:
    image = drawing(5)
    other = image.copy()
    ImageDraw.Draw(other).line((20, 20, 20, 70), "black", 3)
    first, second = (examine_picture(encode(i)) for i in (image, other))
    bits = (first.hash ^ second.hash).bit_count()
    assert bits > 0
    path = write(tmp_path / "a.parquet", [(encode(image), "a"), (encode(other), "b"), *plain(4)])
    assert len(prepare(path, near_duplicate_bits=bits).summary["duplicates"]) == 1
    assert prepare(path, near_duplicate_bits=bits - 1).summary["duplicates"] == []


def test_a_heldout_duplicate_of_a_training_picture_is_dropped(tmp_path: Path) -> None:
    original, jpeg, half, _ = near_duplicates(drawing(3))
    write(tmp_path / "train.parquet", [(original, "original"), *plain(5)])
    write(tmp_path / "test.parquet", [(jpeg, "jpeg"), (half, "half"), (original, "copy"), *plain(3, 10)])
    dataset = prepare(tmp_path)
    assert captions(dataset.heldout) == {"picture 10", "picture 11", "picture 12"}
    assert "original" in captions(dataset.train)
    exact, near = dataset.summary["duplicates"]
    assert exact["ids"] == ["train.parquet#0", "test.parquet#2"]
    assert exact["action"] == "kept train.parquet#0, dropped the other; their captions differ"
    assert set(near["ids"]) == {"train.parquet#0", "test.parquet#0", "test.parquet#1"}
    assert near["action"].startswith("dropped from the held-out pictures: test.parquet#")
    assert describe_duplicates([exact, near]) == [
        "3 pictures in 1 group of near duplicates, kept on one side of the split, held-out pictures of 1 "
        f"group dropped: {', '.join(near['ids'])}",
        "2 pictures in 1 group of exact duplicates, one of each group kept, captions differ in 1 group: "
        "train.parquet#0, test.parquet#2",
    ]


@pytest.mark.parametrize(
    "copies", [plain(3), [(near, "near") for near in near_duplicates(drawing(1))[1:]], [(b"", "bad")]]
)
def test_no_heldout_pictures_left_of_a_declared_split(tmp_path: Path, copies: list[Row]) -> None:
    write(tmp_path / "train.parquet", [(near_duplicates(drawing(1))[0], "drawing"), *plain(3)])
    write(tmp_path / "test.parquet", copies)
    with pytest.raises(
        DataError,
        match=r"no pictures left to hold out: .* distinct pictures in 4 groups.*: give more pictures",
    ):
        prepare(tmp_path)


def test_no_training_pictures_left_of_a_declared_split(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [(b"", "bad")])
    write(tmp_path / "test.parquet", plain(3))
    with pytest.raises(DataError, match="no pictures left to train on: 3 distinct pictures"):
        prepare(tmp_path)


def test_no_heldout_pictures_left_of_one_group(tmp_path: Path) -> None:
    for rows in ([(content, "a") for content in near_duplicates(drawing(1))], plain(1)):
        with pytest.raises(DataError, match=r"no pictures left to hold out: .* in 1 groups"):
            prepare(write(tmp_path / "a.parquet", rows))


# The split --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family_rows() -> list[Row]:
    """Rows among which some are near duplicates of each other and some are the same."""
    rows = plain(24)
    for seed in range(4):
        rows += [(content, f"drawing {seed}") for content in near_duplicates(drawing(seed))]
    return [*rows, rows[0], (rows[1][0], "another caption")]


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_rows_changes_nothing(tmp_path: Path, family_rows: list[Row], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(family_rows))
    one = prepare(write(tmp_path / "a.parquet", family_rows), heldout_share=0.25)
    two = prepare(write(tmp_path / "b.parquet", [family_rows[index] for index in order]), heldout_share=0.25)
    for split in ("train", "heldout"):
        contents = [
            [(example.digest, example.caption) for example in getattr(dataset, split)]
            for dataset in (one, two)
        ]
        assert contents[0] == contents[1]
        assert [digest for digest, _ in contents[0]] == sorted(digest for digest, _ in contents[0])
    assert one.summary["fingerprint"] == two.summary["fingerprint"]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.5, 0.9])
def test_near_duplicates_never_straddle_the_split(
    tmp_path: Path, family_rows: list[Row], share: float
) -> None:
    dataset = prepare(write(tmp_path / "a.parquet", family_rows), heldout_share=share)
    train_ids = {example.id for example in dataset.train}
    heldout_ids = {example.id for example in dataset.heldout}
    near = [note for note in dataset.summary["duplicates"] if note["kind"] == "near"]
    assert len(near) == 4
    for note in near:
        assert set(note["ids"]) <= train_ids or set(note["ids"]) <= heldout_ids
    assert abs(len(heldout_ids) - share * (len(train_ids) + len(heldout_ids))) <= 4


def test_subsets_nest(tmp_path: Path, family_rows: list[Row]) -> None:
    path = write(tmp_path / "a.parquet", family_rows)
    everything = prepare(path, heldout_share=0.3)
    for count in (1, 2, 5, 10):
        part = prepare(path, heldout_share=0.3, num_train=count)
        assert (part.train, part.heldout) == (everything.train[:count], everything.heldout)
        part = prepare(path, heldout_share=0.3, num_heldout=count)
        assert (part.train, part.heldout) == (everything.train, everything.heldout[:count])
    assert prepare(path, heldout_share=0.3, num_train=10_000) == everything


def test_held_out_pictures_are_not_the_first_by_digest(tmp_path: Path) -> None:
    dataset = prepare(write(tmp_path / "a.parquet", plain(40)), heldout_share=0.25)
    digests = sorted(example.digest for example in (*dataset.train, *dataset.heldout))
    places = [digests.index(example.digest) for example in dataset.heldout]
    assert 10 < np.mean(places) < 30


def test_fingerprint_follows_captions_repeats_and_sizes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", plain(10))
    found = {
        prepare(path, **values).summary["fingerprint"]
        for values in (
            {},
            {"caption_prefix": "a "},
            {"trigger_word": "sks"},
            {"repeats": 2},
            {"resolution_px": 32},
        )
    }
    assert len(found) == 5


def test_fingerprint_follows_what_is_trained_on(tmp_path: Path) -> None:
    rows = plain(10)
    path = write(tmp_path / "a.parquet", rows)
    base = prepare(path).summary["fingerprint"]
    assert prepare(path).summary["fingerprint"] == base
    assert prepare(path, resolution_px=32).summary["fingerprint"] != base
    assert prepare(path, num_train=5).summary["fingerprint"] != base
    assert prepare(path, heldout_share=0.3).summary["fingerprint"] != base
    changed = write(tmp_path / "b.parquet", [(rows[0][0], "another caption"), *rows[1:]])
    assert prepare(changed).summary["fingerprint"] != base


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


def test_buckets_and_repeats_leave_the_split_alone(tmp_path: Path, family_rows: list[Row]) -> None:
    path = write(tmp_path / "a.parquet", family_rows)
    one, two = prepare(path), prepare(path, buckets=True, bucket_step_px=8, repeats=3)
    for split in ("train", "heldout"):
        assert [example.digest for example in getattr(one, split)] == [
            example.digest for example in getattr(two, split)
        ]


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
    monkeypatch.setattr(data, "examine_picture", None)
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
