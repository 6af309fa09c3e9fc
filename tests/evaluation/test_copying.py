"""The ratio of distances against a comparison pixel by pixel, SciPy's k-d tree and planted copies."""

import math
from unittest import mock

import numpy as np
import pytest
from scipy.spatial import KDTree

from lorascope.evaluation import copying
from lorascope.evaluation.copying import copy_ratio


def random_pictures(count: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def pixel_by_pixel(drawn: np.ndarray, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances, indices of the nearest, and ratios, in plain loops."""
    found = []
    for drawing in drawn:
        squares = [np.square(drawing.astype(float) - other.astype(float)).sum() for other in pictures]
        first, second = np.argsort(squares, kind="stable")[:2]
        found.append((math.sqrt(squares[first] / drawing.size), first, squares[first] / squares[second]))
    distances, nearest, ratios = (np.array(column) for column in zip(*found, strict=True))
    return distances, nearest, np.sqrt(ratios)


@pytest.mark.parametrize("block", [1, 1000, 4_000_000])
def test_equal_to_a_comparison_pixel_by_pixel(block: int) -> None:
    drawn, pictures = random_pictures(20, seed=1), random_pictures(50, seed=2)
    drawn[3] = pictures[7]
    drawn[4] = np.clip(pictures[9].astype(int) + 2, 0, 255)
    with mock.patch.object(copying, "_BLOCK_VALUES", block):
        ours = copy_ratio(drawn, pictures)
        scaled = copy_ratio(drawn / 255, pictures / 255)
        mixed = copy_ratio((drawn / 255).astype(np.float64), pictures)
    distances, nearest, ratios = pixel_by_pixel(drawn, pictures)
    np.testing.assert_allclose(ours.distances, distances / 255, rtol=1e-15)
    np.testing.assert_array_equal(ours.nearest, nearest)
    np.testing.assert_allclose(ours.ratios, ratios, rtol=1e-15)
    assert ours.share == 2 / 20
    float_distances, _, float_ratios = pixel_by_pixel(drawn / 255, pictures / 255)
    for floats in (scaled, mixed):
        np.testing.assert_array_equal(floats.distances, float_distances)
        np.testing.assert_array_equal(floats.nearest, nearest)
        np.testing.assert_allclose(floats.ratios, float_ratios, rtol=1e-15)


def test_distances_match_scipys_tree() -> None:
    drawn, pictures = random_pictures(10, 6, 3) / 255, random_pictures(30, 6, 4) / 255
    both, indices = KDTree(pictures.reshape(30, -1)).query(drawn.reshape(10, -1), k=2)
    ours = copy_ratio(drawn, pictures)
    np.testing.assert_allclose(ours.distances, both[:, 0] / math.sqrt(6 * 6 * 3))
    np.testing.assert_allclose(ours.ratios, both[:, 0] / both[:, 1])
    np.testing.assert_array_equal(ours.nearest, indices[:, 0])


def test_ratio_by_hand() -> None:
    """Grey values of single pixels on a line."""
    pictures = np.array([0, 100, 200], np.uint8).reshape(3, 1, 1, 1)
    drawn = np.array([10, 50, 100, 25], np.uint8).reshape(4, 1, 1, 1)
    found = copy_ratio(drawn, pictures)
    assert found.distances == pytest.approx([10 / 255, 50 / 255, 0, 25 / 255])
    assert found.nearest.tolist() == [0, 0, 1, 0]  # of two equally near ones the first
    assert found.ratios == pytest.approx([10 / 90, 1, 0, 25 / 75])
    assert found.share == 0.5  # a third itself is not below a third


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_near_copies_of_bright_floats_are_told_apart(dtype: type) -> None:
    """Differences of 1e-7 vanish in a product of large sums; they are looked at again one by one."""
    pictures = np.ones((5, 16, 16, 3), dtype)
    for index in range(5):
        pictures[index, 0, 0, 0] -= (index + 1) * dtype(2e-7)
    drawn = np.ones((1, 16, 16, 3), dtype)
    found = copy_ratio(drawn, pictures)
    distances, nearest, ratios = pixel_by_pixel(drawn, pictures)
    np.testing.assert_array_equal(found.distances, distances)
    assert found.nearest.tolist() == nearest.tolist() == [0]
    np.testing.assert_allclose(found.ratios, ratios, rtol=1e-14)


def test_two_equal_training_pictures_do_not_hide_an_exact_copy() -> None:
    pictures = random_pictures(6, seed=5)
    pictures[4] = pictures[1]
    found = copy_ratio(pictures[[1, 2]], pictures)
    assert found.ratios.tolist() == [0, 0]
    assert found.nearest.tolist() == [1, 2]
    assert found.share == 1


def test_copying_says_what_it_needs() -> None:
    pictures = random_pictures(3)
    with pytest.raises(ValueError, match="give 2 pictures or more"):
        copy_ratio(pictures, pictures[:1])
    for wrong in (pictures[:, :4], pictures[0], pictures[:0]):
        with pytest.raises(ValueError, match="of one size"):
            copy_ratio(wrong, pictures)
    with pytest.raises(ValueError, match="drawings of type int64: expected uint8"):
        copy_ratio(pictures.astype(np.int64), pictures)
    with pytest.raises(ValueError, match="finite"):
        copy_ratio(pictures * math.nan, pictures)
