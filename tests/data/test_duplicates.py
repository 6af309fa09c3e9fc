"""Near duplicates: the quick search finds what comparing all pairs finds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from lorascope.data.duplicates import THUMBNAIL_DISTANCE, alike_pairs, join_groups, near_groups
from samples import captions, drawing, encode, prepare, write


def as_sets(numbers: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(numbers == number).tolist()) for number in np.unique(numbers)}


def compare_all_pairs(hashes: np.ndarray, thumbnails: np.ndarray, max_bits: int) -> set[frozenset[int]]:
    groups = [{index} for index in range(len(hashes))]
    for one in range(len(hashes)):
        for other in range(one):
            distance = np.abs(thumbnails[one].astype(int) - thumbnails[other]).mean()
            if int(hashes[one] ^ hashes[other]).bit_count() <= max_bits and distance <= THUMBNAIL_DISTANCE:
                joined = [group for group in groups if one in group or other in group]
                groups = [group for group in groups if group not in joined] + [set().union(*joined)]
    return {frozenset(group) for group in groups}


def families(
    generator: np.random.Generator, count: int, num_parents: int, noise: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of few bits and thumbnails, each near one of few parents."""
    parents = generator.integers(0, 256, (num_parents, 768))
    thumbnails = parents[generator.integers(num_parents, size=count)] + generator.integers(
        -noise, noise + 1, (count, 768)
    )
    hashes = [
        sum(1 << int(bit) for bit in set(generator.integers(0, 64, generator.integers(4))))
        for _ in range(count)
    ]
    return np.array(hashes, np.uint64), thumbnails.clip(0, 255).astype(np.uint8)


@given(st.integers(0, 2**32), st.integers(0, 8), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_the_search_agrees_with_comparing_all_pairs(seed: int, max_bits: int, noise: int) -> None:
    hashes, thumbnails = families(np.random.default_rng(seed), 40, 6, noise)
    assert as_sets(near_groups(hashes, thumbnails, max_bits)) == compare_all_pairs(
        hashes, thumbnails, max_bits
    )


def test_chains_join_and_pictures_alone_stay_alone() -> None:
    thumbnails = np.full((5, 768), 100, np.uint8)
    thumbnails[1] += 4
    thumbnails[2] += 8
    thumbnails[3] += 13
    hashes = np.zeros(5, np.uint64)
    hashes[4] = 0b1111
    assert as_sets(near_groups(hashes, thumbnails, 3)) == {
        frozenset({0, 1, 2}),
        frozenset({3}),
        frozenset({4}),
    }
    assert as_sets(near_groups(hashes, thumbnails, 4)) == {frozenset({0, 1, 2, 4}), frozenset({3})}


def test_nothing_and_one() -> None:
    assert near_groups(np.zeros(0, np.uint64), np.zeros((0, 768), np.uint8), 3).tolist() == []
    assert near_groups(np.zeros(1, np.uint64), np.zeros((1, 768), np.uint8), 3).tolist() == [0]


# The second look --------------------------------------------------------------------------------------------


def scene(seed: int) -> Image.Image:
    """Clouds of colour without a border, as smooth as photographs: amplitudes fall with the frequency."""
    generator = np.random.default_rng(seed)
    places = np.fft.fftfreq(128)
    falling = 1 / np.maximum(np.hypot(*np.meshgrid(places, places)), 1 / 128) ** 1.7
    waves = np.fft.fft2(generator.standard_normal((3, 128, 128))) * falling
    values = np.fft.ifft2(waves).real + 2 * np.fft.ifft2(waves[:1]).real
    values = (values - values.min()) / np.ptp(values) * 200 + 20
    return Image.fromarray(values.transpose(1, 2, 0).astype(np.uint8))


def slid(image: Image.Image) -> Image.Image:
    """3 pixels to the right and 2 down, white where nothing is."""
    result = Image.new("RGB", image.size, "white")
    result.paste(image, (3, 2))
    return result


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "slid": slid,
    "cut": lambda image: image.crop((4, 3, 128, 128)),
    "other part": lambda image: image.crop((0, 0, 123, 128)),
    "brighter": lambda image: image.point(lambda value: min(255, value + 25)),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.7),
    "border": lambda image: ImageOps.expand(image, 12, "black"),
    "two borders": lambda image: ImageOps.expand(ImageOps.expand(image, 5, "black"), 20, "white"),
    "mirrored": ImageOps.mirror,
    "mirrored and cut": lambda image: ImageOps.mirror(image.crop((3, 0, 128, 128))),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [drawing, scene])
def test_changed_copies_are_found_and_others_are_not(
    tmp_path: Path, kind: Callable[[int], Image.Image], change: str
) -> None:
    images = [kind(seed) for seed in range(8)]
    rows = [(encode(image), f"{seed}") for seed, image in enumerate(images)]
    rows += [(encode(CHANGES[change](image)), f"changed {seed}") for seed, image in enumerate(images[:4])]
    dataset = prepare(write(tmp_path / "a.parquet", rows), heldout_share=0.3)
    notes = dataset.summary["duplicates"]
    assert {frozenset(note["ids"]) for note in notes} == {
        frozenset({f"a.parquet#{seed}", f"a.parquet#{seed + 8}"}) for seed in range(4)
    }
    for seed in range(4):
        assert len({str(seed), f"changed {seed}"} & captions(dataset.train)) in (0, 2)


def test_the_second_look_is_left_out_at_0_bits(tmp_path: Path) -> None:
    images = [scene(seed) for seed in range(4)]
    rows = [(encode(image), "a") for image in (*images, ImageOps.mirror(images[0]))]
    path = write(tmp_path / "a.parquet", rows)
    assert len(prepare(path).summary["duplicates"]) == 1
    assert prepare(path, near_duplicate_bits=0).summary["duplicates"] == []


def test_the_second_look_is_left_out_among_very_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lorascope.data.split.MOST_FOR_SECOND_LOOK", 4)
    images = [scene(seed) for seed in range(4)]
    path = write(
        tmp_path / "a.parquet", [(encode(image), "a") for image in (*images, ImageOps.mirror(images[0]))]
    )
    assert prepare(path).summary["duplicates"] == []
    assert "copies are looked for among 4 pictures at most, here are 5" in caplog.text


def test_one_shape_in_two_colours_and_plain_pictures_are_not_alike() -> None:
    shape = (np.add.outer(np.arange(16), np.arange(16)) % 5 == 0)[..., None]
    white = np.full(3, 255)
    pictures = [np.where(shape, colour, white) for colour in ([255, 0, 0], [0, 0, 255])]
    pictures += [np.full((16, 16, 3), level) for level in (100, 101)]
    contents = np.stack(pictures).astype(np.uint8).reshape(4, -1)
    assert alike_pairs(contents, np.ones(4), np.ones(4, bool)).tolist() == []
    assert alike_pairs(contents, np.ones(4), np.zeros(4, bool)).tolist() == []
    assert alike_pairs(contents[[0, 0]], np.array([1.0, 1.5]), np.ones(2, bool)).tolist() == []
    assert alike_pairs(contents[[0, 0]], np.ones(2), np.ones(2, bool)).tolist() == [[0, 1]]


def test_groups_of_pairs_become_one() -> None:
    numbers = join_groups(np.array([0, 1, 1, 3, 4]), np.array([[0, 2], [3, 4]]))
    assert as_sets(numbers) == {frozenset({0, 1, 2}), frozenset({3, 4})}
    assert as_sets(join_groups(np.arange(2), np.zeros((0, 2), np.int64))) == {frozenset({0}), frozenset({1})}
