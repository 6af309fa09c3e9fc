"""Near duplicates among very many pictures, from a 64-bit hash and a thumbnail of each."""

import numpy as np

THUMBNAIL_DISTANCE = 4.0
"""Near duplicates also differ by at most this much, of 255, in the mean over their thumbnails: the 64-bit
hashes alone take different small drawings on white for the same.
"""

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
