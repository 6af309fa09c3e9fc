"""Duplicates, and the invariants of the split."""

import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lorascope.console import log
from lorascope.data.pictures import examine_picture
from lorascope.data.split import describe_duplicates
from lorascope.errors import DataError
from samples import (
    Row,
    captions,
    drawing,
    encode,
    near_duplicates,
    pixels,
    plain,
    prepare,
    write,
)

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


def test_buckets_and_repeats_leave_the_split_alone(tmp_path: Path, family_rows: list[Row]) -> None:
    path = write(tmp_path / "a.parquet", family_rows)
    one, two = prepare(path), prepare(path, buckets=True, bucket_step_px=8, repeats=3)
    for split in ("train", "heldout"):
        assert [example.digest for example in getattr(one, split)] == [
            example.digest for example in getattr(two, split)
        ]
