"""How near drawn pictures are to training pictures: the ratio of nearest and second nearest distance."""

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

# Gu et al. (2023), "On Memorization in Diffusion Models", section 2: a drawing counts as a copy where its
# nearest training picture is less than a third as far away as the second nearest.
COPY_THRESHOLD = 1 / 3
# Pixel values of all pictures that are held as float64 at once: 32 MB.
_BLOCK_VALUES = 4_000_000


@dataclasses.dataclass(frozen=True)
class Copying:
    """The nearest pictures of each of n drawings.

    `distances` [n] to the nearest, the root mean square difference of pixel values, 0 to 1; `nearest` [n]
    its index, of equally near ones the first; `ratios` [n] of nearest and second nearest distance, 0 to 1;
    `share` of the drawings whose ratio is below a third.
    """

    distances: NDArray[np.float64]
    nearest: NDArray[np.int64]
    ratios: NDArray[np.float64]
    share: float


def copy_ratio(drawn: NDArray[np.generic], pictures: NDArray[np.generic]) -> Copying:
    """Compares drawings [n, h, w, c] with pictures [m, h, w, c], each uint8 or floats from 0 to 1.

    The share says something only beside the same share against pictures that were held out. Near duplicates
    among `pictures` hide a copy of either, whose ratio is near 1 then; only where both are equal to the
    drawing it is taken as 0. Same numbers as a comparison pixel by pixel in float64. Raises ValueError for
    other types, shapes that differ, values that are not finite, no drawing and fewer than 2 pictures.
    """
    for name, values in (("drawings", drawn), ("pictures", pictures)):
        if values.dtype != np.uint8 and not np.issubdtype(values.dtype, np.floating):
            raise ValueError(f"{name} of type {values.dtype}: expected uint8, or floats from 0 to 1")
    if drawn.ndim != 4 or pictures.ndim != 4 or drawn.shape[1:] != pictures.shape[1:] or not drawn.size:
        raise ValueError(
            f"drawings {drawn.shape} and pictures {pictures.shape}: expected number x height x width x "
            "channels, at least one drawing and all of one size"
        )
    if len(pictures) < 2:
        raise ValueError("1 picture: a ratio needs the second nearest too, give 2 pictures or more")
    is_scaled = drawn.dtype != np.uint8 or pictures.dtype != np.uint8
    rows, columns = (values.reshape(len(values), -1) for values in (drawn, pictures))
    squares, slack = _squared_distances(rows, columns, is_scaled)
    second = np.partition(squares, 1, axis=1)[:, 1]
    nearest = np.empty(len(rows), np.int64)
    pairs = np.empty((len(rows), 2))
    for index, (row, limit) in enumerate(zip(rows, second + 2 * slack, strict=True)):
        candidates = np.flatnonzero(squares[index] <= limit)
        exact = np.array([_square(row, columns[candidate], is_scaled) for candidate in candidates])
        order = np.argsort(exact, kind="stable")[:2]
        nearest[index], pairs[index] = candidates[order[0]], exact[order]
    distances = np.sqrt(pairs / rows.shape[1]) / (1 if is_scaled else 255)
    ratios = np.divide(distances[:, 0], distances[:, 1], out=np.zeros(len(rows)), where=distances[:, 1] > 0)
    return Copying(distances[:, 0], nearest, ratios, float((ratios < COPY_THRESHOLD).mean()))


def _scaled(values: NDArray[np.generic], is_scaled: bool) -> NDArray[np.float64]:
    """Values as float64: integers as they are, or everything from 0 to 1."""
    numbers = values.astype(np.float64)
    return numbers / 255 if is_scaled and values.dtype == np.uint8 else numbers


def _square(row: NDArray[np.generic], column: NDArray[np.generic], is_scaled: bool) -> float:
    return float(np.square(_scaled(row, is_scaled) - _scaled(column, is_scaled)).sum())


def _squared_distances(
    rows: NDArray[np.generic], columns: NDArray[np.generic], is_scaled: bool
) -> tuple[NDArray[np.float64], float]:
    """Squared distances [n, m] of all pairs by matrix products over blocks of pixels, and what rounding may
    have added or taken.

    Of integers up to 255 every sum is exact.
    """
    num_pixels = rows.shape[1]
    products = np.zeros((len(rows), len(columns)))
    row_squares, column_squares = np.zeros(len(rows)), np.zeros(len(columns))
    step = max(1, _BLOCK_VALUES // (len(rows) + len(columns)))
    for start in range(0, num_pixels, step):
        row_block = _scaled(rows[:, start : start + step], is_scaled)
        column_block = _scaled(columns[:, start : start + step], is_scaled)
        row_squares += np.square(row_block).sum(axis=1)
        column_squares += np.square(column_block).sum(axis=1)
        products += row_block @ column_block.T
    largest = float(row_squares.max() + column_squares.max())
    if not math.isfinite(largest):
        raise ValueError("pixel values must be finite")
    squares = row_squares[:, None] + column_squares - 2 * products
    return squares, (4 * num_pixels * np.finfo(np.float64).eps * largest if is_scaled else 0.0)
