"""Near duplicates among very many pictures: from a 64-bit hash and a thumbnail of each, and by a second look
those that were shifted, mirrored, made brighter or given a border.
"""

import math

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

THUMBNAIL_DISTANCE = 4.0
"""Near duplicates also differ by at most this much, of 255, in the mean over their thumbnails: the 64-bit
hashes alone take different small drawings on white for the same.
"""

BORDERED_CORRELATION = 0.99
"""From here on two pictures on plain ground are alike: drawings resemble each other far more than photographs
do.
"""
SHIFTED_CORRELATION = 0.93
"""From here on two other pictures, or parts of them, are alike."""
MOST_FOR_SECOND_LOOK = 20_000
"""Pictures; the second look compares all pairs, for that many in 45 s on one busy core."""

_SHIFTS = (-0.06, -0.03, 0.0, 0.03, 0.06)  # of the width and of the height
_COARSE_CORRELATION = 0.85
_LOWEST_CONTRAST = 4.0  # standard deviation, of 255
_SHAPE_TOLERANCE = 0.12  # in the logarithm
_BLOCK = 2048
_PAIRS = 512

_ROUNDING = 1e-3  # more than float32 means of bytes are off by


def near_groups(hashes: np.ndarray, thumbnails: np.ndarray, max_bits: int) -> np.ndarray:
    """Group numbers int64 [n]: two pictures are in one group if a chain of near pairs joins them.

    `hashes` is uint64 [n], `thumbnails` uint8 [n, 16 * 16 * 3] in the order row, column, channel. A pair is
    near if the hashes differ in at most `max_bits` bits and the thumbnails by at most `THUMBNAIL_DISTANCE`.

    The means of two such thumbnails, over all of them, over quarters or over blocks of 4 x 4, then differ by
    no more than that either. So pictures in the order of their means are compared with those that follow
    within the distance, first by hash, then by quarters, by blocks, and in full. What is in the same group
    already is not compared again.
    """
    if not (count := len(hashes)):
        return np.zeros(0, np.int64)
    means = thumbnails.mean(axis=1)
    order = np.argsort(means, kind="stable")
    means, hashes = means[order], hashes[order]
    blocks = thumbnails.reshape(-1, 4, 4, 4, 4, 3).mean(axis=(2, 4), dtype=np.float32)[order]
    quarters = blocks.reshape(-1, 2, 2, 2, 2, 3).mean(axis=(2, 4)).reshape(count, -1)
    blocks = blocks.reshape(count, -1)
    ends = np.searchsorted(means, means + THUMBNAIL_DISTANCE + _ROUNDING, side="right")
    groups = np.arange(count)
    members = {number: [number] for number in range(count)}
    for index, end in enumerate(ends):
        near = (
            index + 1 + np.flatnonzero(np.bitwise_count(hashes[index + 1 : end] ^ hashes[index]) <= max_bits)
        )
        near = near[groups[near] != groups[index]]
        for parts in (quarters, blocks):
            if len(near):
                near = near[np.abs(parts[near] - parts[index]).mean(axis=1) <= THUMBNAIL_DISTANCE + _ROUNDING]
        if len(near):
            differences = np.abs(thumbnails[order[near]].astype(np.int16) - thumbnails[order[index]])
            for other in np.unique(groups[near[differences.mean(axis=1) <= THUMBNAIL_DISTANCE]]).tolist():
                larger, smaller = sorted(
                    (int(groups[index]), other), key=lambda number: -len(members[number])
                )
                groups[members[smaller]] = larger
                members[larger] += members.pop(smaller)
    result = np.empty(count, np.int64)
    result[order] = groups
    return result


# The second look --------------------------------------------------------------------------------------------


def alike_pairs(contents: np.ndarray, shapes: np.ndarray, has_border: np.ndarray) -> np.ndarray:
    """Pairs int64 [p, 2] of pictures that are one picture shifted, mirrored, brighter or with a border.

    `contents` is uint8 [n, 16 * 16 * 3]: pictures without their borders, brought to squares, in the order
    row, column, channel. `shapes` is float64 [n], the width divided by the height of that part, and
    `has_border` bool [n].

    Compared is the correlation over all pixels and channels, which brightness and contrast leave alone, of a
    picture with others and with others mirrored. Two on plain ground stand in the same place without it: they
    are alike from `BORDERED_CORRELATION` on. Of others parts are compared too, by which a shift moved them:
    they are alike from `SHIFTED_CORRELATION` on. Those whose correlation in 8 x 8 cells is below
    `_COARSE_CORRELATION` are not compared any further. Pictures of nearly one colour are left out.
    """
    pictures = contents.reshape(-1, 16, 16, 3).astype(np.float32)
    coarse = _normalised(pictures.reshape(-1, 8, 2, 8, 2, 3).mean(axis=(2, 4)))
    coarse_mirrored = _normalised(pictures[:, :, ::-1].reshape(-1, 8, 2, 8, 2, 3).mean(axis=(2, 4)))
    coarse[pictures.std(axis=(1, 2)).mean(axis=1) < _LOWEST_CONTRAST] = 0
    found = [np.zeros((0, 2), np.int64)]
    for start in range(0, len(pictures), _BLOCK):
        block = slice(start, start + _BLOCK)
        for other in range(start, len(pictures), _BLOCK):
            others = slice(other, other + _BLOCK)
            score = np.maximum(coarse[block] @ coarse[others].T, coarse_mirrored[block] @ coarse[others].T)
            one, two = np.nonzero(score >= _COARSE_CORRELATION)
            pairs = np.stack([one + start, two + other], axis=1)
            pairs = pairs[pairs[:, 0] < pairs[:, 1]]
            pairs = pairs[np.abs(np.log(shapes[pairs[:, 0]] / shapes[pairs[:, 1]])) <= _SHAPE_TOLERANCE]
            both_bordered = has_border[pairs].all(axis=1)
            for shifted, chosen in ((False, pairs[both_bordered]), (True, pairs[~both_bordered])):
                for first in range(0, len(chosen), _PAIRS):
                    part = chosen[first : first + _PAIRS]
                    found.append(part[_are_alike(pictures, part, shifted)])
    return np.concatenate(found)


def join_groups(groups: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Group numbers int64 [n] after the groups of each pair [p, 2] have become one."""
    joined = groups[pairs]
    graph = coo_array((np.ones(len(pairs)), (joined[:, 0], joined[:, 1])), shape=(len(groups), len(groups)))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)[groups]


def _are_alike(pictures: np.ndarray, pairs: np.ndarray, shifted: bool) -> np.ndarray:
    """Which of the pairs are alike: bool [p]; `shifted`: by parts too."""
    used, places = np.unique(pairs, return_inverse=True)
    one, two = places.reshape(-1, 2).T
    alike = np.zeros(len(pairs), bool)
    for turned in (pictures[used], pictures[used][:, :, ::-1]):
        if not shifted:
            straight = np.einsum("pd,pd->p", _normalised(pictures[used])[one], _normalised(turned)[two])
            alike |= straight >= BORDERED_CORRELATION
            continue
        first, second = _windows(pictures[used])[one], _windows(turned)[two]  # [p, 25, 768]
        whole = first.shape[1] // 2
        for scores in (
            np.einsum("pkd,pd->pk", first, second[:, whole]),
            np.einsum("pd,pkd->pk", first[:, whole], second),
            np.einsum("pkd,pkd->pk", first, second[:, ::-1]),
        ):
            alike |= scores.max(axis=1) >= SHIFTED_CORRELATION
    return alike


def _windows(pictures: np.ndarray) -> np.ndarray:
    """The pictures, float32 [p, 16, 16, 3], without some of their edges, brought to 16 x 16 again and
    normalised: [p, 25, 768], the whole picture in the middle, and the window that lacks the opposite edges as
    far from the end as one is from the start.
    """
    parts = np.einsum("aij,bkl,pjlc->pabikc", _WINDOWS, _WINDOWS, pictures, optimize=True)
    return _normalised(parts.reshape(len(pictures), len(_SHIFTS) ** 2, 16, 16, 3))


def _window(shift: float) -> np.ndarray:
    """Linear interpolation float32 [16, 16] of what is left of 16 cells without a share of them, at the
    start if it is above 0, else at the end.
    """
    places = (np.arange(16) + 0.5) * (1 - abs(shift)) + max(shift, 0) * 16 - 0.5
    return np.maximum(0, 1 - np.abs(places.clip(0, 15)[:, None] - np.arange(16))).astype(np.float32)


def _normalised(pictures: np.ndarray) -> np.ndarray:
    """Pictures [..., rows, columns, 3] as [..., d], without the mean of each channel and of length 1."""
    deviations = pictures - pictures.mean(axis=(-3, -2), keepdims=True)
    flat = deviations.reshape(*pictures.shape[:-3], math.prod(pictures.shape[-3:]))
    return flat / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-6)


_WINDOWS = np.stack([_window(shift) for shift in _SHIFTS])
