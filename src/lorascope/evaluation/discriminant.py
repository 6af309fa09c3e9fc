"""Where pictures stand between the base's drawings and real pictures of the style: a linear discriminant."""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lorascope.evaluation.two_samples import auc

# Two rows of each kind to fit a half and two to check it: one row alone has no spread.
MIN_ROWS = 4
# Below this AUC, positions say more about chance than about style.
MIN_AUC = 0.8
DEFAULT_SHRINKAGE = 0.2


@dataclasses.dataclass(frozen=True)
class StyleAxis:
    """Two directions in feature space, each fitted on one half of the pictures and scaled on the other.

    `directions` [2, d] and `offsets` [2] make positions; `base` [n] and `style` [m] are the positions of the
    rows the axis was made from, each by the direction that has not seen it: their means on either half are 0
    and 1. `unseen_by` [n] says which direction that is for each row of the base, 0 or 1. `auc` is how well
    these positions tell the two kinds apart, the mean of both directions, 0.5 where they do not. Where a
    direction does not put the style's mean above the base's on the half it has not seen there is no scale:
    positions are NaN then, and `auc` is about 0.5 or below.
    """

    directions: NDArray[np.float64]
    offsets: NDArray[np.float64]
    base: NDArray[np.float64]
    style: NDArray[np.float64]
    unseen_by: NDArray[np.int64]
    auc: float

    def positions(self, features: ArrayLike, base_rows: ArrayLike | None = None) -> NDArray[np.float64]:
        """Positions [k] of further features [k, d]: 0 like the base's drawings, 1 like the style.

        A direction pushes the rows it was fitted on too far from the other kind, and pictures that resemble
        them with them. So for pictures that have a counterpart among the base's drawings, of the same
        prompt and initial noise, give its row in `base_rows` [k]: the position is then by the direction that
        has not seen the counterpart, and comparable with `base[base_rows]`. Without it the mean over both
        directions. Raises ValueError for another width or number of rows.
        """
        rows = np.asarray(features, np.float64)
        width = self.directions.shape[1]
        if rows.ndim != 2 or rows.shape[1] != width:
            raise ValueError(f"features of shape {rows.shape}: this axis takes rows of width {width}")
        by_direction = rows @ self.directions.T - self.offsets
        if base_rows is None:
            return np.asarray(by_direction.mean(axis=1))
        counterparts = np.asarray(base_rows)
        if counterparts.shape != (len(rows),):
            raise ValueError(f"counterparts of shape {counterparts.shape} for {len(rows)} rows")
        return np.asarray(by_direction[np.arange(len(rows)), self.unseen_by[counterparts]])


def fit_style_axis(
    base: ArrayLike, style: ArrayLike, shrinkage: float = DEFAULT_SHRINKAGE, seed: int = 0
) -> StyleAxis:
    """The axis from the base's drawings, features [n, d], to real pictures of the style, [m, d].

    Both kinds are halved at random, by (seed, n, m) alone; `discriminant_direction` is fitted on one half of
    each and tried on the other, then the other way round. Offset and scale come from the half that was not
    fitted: with more features than pictures the fitted half is always far apart. d may be far larger than
    n and m. Raises ValueError for fewer than 4 rows of a kind, with the remedy, and as
    `discriminant_direction` does.
    """
    kinds = np.asarray(base, np.float64), np.asarray(style, np.float64)
    _check(*kinds)
    for rows, name, remedy in zip(
        kinds, ("base", "style"), ("draw more prompts", "hold more pictures out"), strict=True
    ):
        if len(rows) < MIN_ROWS:
            raise ValueError(
                f"{len(rows)} {name} pictures: a style axis needs at least {MIN_ROWS} of each kind, "
                f"half to fit and half to check; {remedy}"
            )
    generator = np.random.default_rng(seed)
    in_first_half = [generator.permutation(len(rows)) < len(rows) // 2 for rows in kinds]
    directions, offsets, areas = [], [], []
    held_out = [np.empty(len(rows)) for rows in kinds]
    for half in (True, False):
        fitted = [rows[side == half] for rows, side in zip(kinds, in_first_half, strict=True)]
        direction = discriminant_direction(fitted[0], fitted[1], shrinkage)
        tried = [rows[side != half] @ direction for rows, side in zip(kinds, in_first_half, strict=True)]
        start, end = (values.mean() for values in tried)
        scale = 1 / (end - start) if end > start else np.nan
        directions.append(direction * scale)
        offsets.append(start * scale)
        areas.append(auc(tried[1], tried[0]))
        for positions, side, values in zip(held_out, in_first_half, tried, strict=True):
            positions[side != half] = (values - start) * scale
    return StyleAxis(
        directions=np.array(directions),
        offsets=np.array(offsets),
        base=held_out[0],
        style=held_out[1],
        unseen_by=in_first_half[0].astype(np.int64),  # the first direction was fitted on the first half
        auc=float(np.mean(areas)),
    )


def discriminant_direction(
    base: ArrayLike, style: ArrayLike, shrinkage: float = DEFAULT_SHRINKAGE
) -> NDArray[np.float64]:
    """Fisher's direction [d] from features [n, d] to [m, d]: the inverse shrunk covariance times the
    difference of means.

    The pooled covariance S becomes (1 - shrinkage) S + shrinkage * mean(diag S) I, a fixed step of the kind
    Ledoit and Wolf (2004) estimate. With more features than rows the inverse is taken among the rows
    (Woodbury), which is exact and solves n + m unknowns instead of d. Raises ValueError for fewer than
    3 rows together, none of a kind, different widths, features that are not finite or do not vary, and
    `shrinkage` not above 0 or above 1.
    """
    kinds = np.asarray(base, np.float64), np.asarray(style, np.float64)
    _check(*kinds)
    if not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage {shrinkage}: must be above 0 and at most 1")
    means = [rows.mean(axis=0) for rows in kinds]
    centred = np.concatenate([rows - mean for rows, mean in zip(kinds, means, strict=True)])
    num_rows, width = centred.shape
    freedom = num_rows - 2
    diagonal = np.square(centred).sum() / (freedom * width)
    # Rounding of the means leaves some 1e-32 of the features' size where nothing varies.
    if diagonal <= 1e-28 * np.square(np.concatenate(kinds)).mean():
        raise ValueError("the features of each kind are all alike: no spread to measure a difference by")
    # The shrunk covariance is kept * centred.T @ centred + added * I.
    kept, added = (1 - shrinkage) / freedom, shrinkage * diagonal
    difference = means[1] - means[0]
    if width <= num_rows:
        covariance = kept * centred.T @ centred + added * np.eye(width)
        return np.asarray(np.linalg.solve(covariance, difference))
    among_rows = kept * centred @ centred.T + added * np.eye(num_rows)
    explained = centred.T @ np.linalg.solve(among_rows, kept * (centred @ difference))
    return np.asarray((difference - explained) / added)


def _check(base: NDArray[np.float64], style: NDArray[np.float64]) -> None:
    if base.ndim != 2 or style.ndim != 2 or base.shape[1] != style.shape[1]:
        raise ValueError(f"features of shapes {base.shape} and {style.shape}: both need rows of one width")
    if not min(len(base), len(style)) or len(base) + len(style) < 3:
        raise ValueError(
            f"{len(base)} and {len(style)} rows: a direction needs one of each kind and 3 together"
        )
    if not (np.isfinite(base).all() and np.isfinite(style).all()):
        raise ValueError("features must be finite")
