"""Near duplicates: the quick search finds what comparing all pairs finds."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lorascope.data.duplicates import THUMBNAIL_DISTANCE, near_groups


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
