"""How much of the style pictures show: positions on an axis in hidden features, and the MMD as a witness.

Real pictures can be told from their own reconstructions by the base's VAE. So they pass through it before
they are compared with what the base draws: what is left is the style.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from lorascope.base.autoencoder import Autoencoder
from lorascope.base.loading import Base
from lorascope.evaluation.discriminant import MIN_AUC, MIN_ROWS, StyleAxis, fit_style_axis
from lorascope.evaluation.sweep_rows import Discrepancy
from lorascope.evaluation.two_samples import mmd_p, squared_mmd

_NUM_HALVINGS = 200


@dataclasses.dataclass(frozen=True)
class Control:
    """Pictures that have no style: their mean position and their discrepancy, None where there is none."""

    position: float | None
    mmd: Discrepancy | None


@dataclasses.dataclass(frozen=True)
class Style:
    """What can be said of pictures' style, from `num_base` drawings of the base and `num_real` real pictures.

    `auc`: how well the axis tells the two kinds apart where it has not seen them, None where it could not be
    fitted. `reason`: why there are no positions, None where there are. `controls`: by name. `base_std`:
    standard deviation of the base's own positions, whose mean is 0 by the way the axis is made. `base_mmd`:
    the base's drawings against the real pictures. `null_mmd`: 95 % of what halves of the real pictures give
    against each other, from low to high; they are half as many pictures, so it is wider than of all. None
    stands for what could not be measured.
    """

    num_base: int
    num_real: int
    auc: float | None
    reason: str | None
    controls: Mapping[str, Control]
    base_std: float | None
    base_mmd: Discrepancy | None
    null_mmd: tuple[float, float] | None
    _axis: StyleAxis | None
    _real: NDArray[np.float64]

    def positions(
        self, features: ArrayLike, base_rows: ArrayLike | None = None
    ) -> NDArray[np.float64] | None:
        """Positions [k] of pictures' features [k, d], 0 like the base and 1 like the style; None without a
        measure.

        `base_rows` [k]: the row of each picture's counterpart among the base's drawings, of the same prompt
        and initial noise (`StyleAxis.positions`); the base's own rows are their own counterparts.
        """
        return None if self._axis is None else self._axis.positions(features, base_rows)

    def mmd(self, features: ArrayLike, prompts: Sequence[str] | None = None) -> Discrepancy | None:
        """How far pictures' features [k, d] stand from the real ones; None where either are fewer than 4.

        `prompts` [k] keeps drawings of one prompt together when sides are exchanged. A witness beside the
        position: it turns up again where pictures break, which a direction alone does not show.
        """
        return _discrepancy(np.asarray(features, np.float64), self._real, prompts)

    def facts(self) -> dict[str, Any]:
        """All but the axis, as JSON holds it."""
        return {
            "num_base": self.num_base,
            "num_real": self.num_real,
            "auc": self.auc,
            "reason": self.reason,
            "controls": {name: dataclasses.asdict(control) for name, control in self.controls.items()},
            "base_std": self.base_std,
            "base_mmd": self.base_mmd and dataclasses.asdict(self.base_mmd),
            "null_mmd": self.null_mmd and list(self.null_mmd),
        }


def measure_style(
    base_features: ArrayLike,
    real_features: ArrayLike,
    controls: Mapping[str, ArrayLike] | None = None,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
) -> Style:
    """The measure of style between the base's drawings, features [n, d], and real pictures of it, [m, d].

    Features are those of `encode_hidden`, the real pictures' after `through_vae`. `controls`: features, at
    least one row, of pictures without the style, such as noise, white ones or the base at guidance 1. Their
    positions should be about 0; where they are not, only `mmd` tells broken pictures from styled ones.
    `prompts` [n]: those of the base's drawings. Halves are drawn from `seed`. Too few pictures, features that
    are all alike, and an AUC below 0.8 give a `reason` in place of positions. Raises ValueError for features
    of different widths.
    """
    base, real = np.asarray(base_features, np.float64), np.asarray(real_features, np.float64)
    if base.ndim != 2 or real.ndim != 2 or base.shape[1] != real.shape[1]:
        raise ValueError(f"features of shapes {base.shape} and {real.shape}: both need rows of one width")
    axis, auc, reason = _fit(base, real, seed)
    measured = {}
    for name, features in (controls or {}).items():
        rows = np.asarray(features, np.float64)
        position = float(axis.positions(rows).mean()) if axis else None
        measured[name] = Control(position, _discrepancy(rows, real, None))
    return Style(
        num_base=len(base),
        num_real=len(real),
        auc=auc,
        reason=reason,
        controls=measured,
        base_std=float(axis.base.std(ddof=1)) if axis else None,
        base_mmd=_discrepancy(base, real, prompts),
        null_mmd=_null_mmd(real, seed),
        _axis=axis,
        _real=real,
    )


def through_vae(base: Base, pictures: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """Pictures uint8 [height, width, 3] as the base's VAE gives them back from the mean of their posterior.

    One at a time, so that each depends on nothing but itself. Raises ValueError for sides that the VAE's
    factor does not divide.
    """
    autoencoder, factor = Autoencoder(base), base.latent_factor
    reconstructed = []
    for picture in pictures:
        if picture.ndim != 3 or picture.shape[2] != 3 or any(side % factor for side in picture.shape[:2]):
            raise ValueError(
                f"picture of shape {picture.shape}: must be [height, width, 3], both multiples of {factor}"
            )
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]  # (1, 3, H, W)
        means = autoencoder.encode(pixels)[:, 0]  # (1, C, h, w)
        reconstructed.append(autoencoder.decode(means)[0].numpy())
    autoencoder.warn_of_overflows()
    return reconstructed


def _fit(
    base: NDArray[np.float64], real: NDArray[np.float64], seed: int
) -> tuple[StyleAxis | None, float | None, str | None]:
    """The axis, its AUC and why there is none."""
    try:
        axis = fit_style_axis(base, real, seed=seed)
    except ValueError as error:
        return None, None, f"not measured: {error}"
    # Without a scale a direction gives no numbers.
    if axis.auc < MIN_AUC or not np.isfinite(axis.offsets).all():
        return None, axis.auc, f"not separable here: AUC {axis.auc:.2f}, must be at least {MIN_AUC:g}"
    return axis, axis.auc, None


def _discrepancy(
    drawn: NDArray[np.float64], real: NDArray[np.float64], prompts: Sequence[str] | None
) -> Discrepancy | None:
    if min(len(drawn), len(real)) < MIN_ROWS:
        return None
    groups = None
    if prompts is not None:
        groups = [f"prompt {prompt}" for prompt in prompts], [f"picture {n}" for n in range(len(real))]
    return Discrepancy(squared_mmd(drawn, real), mmd_p(drawn, real, groups=groups))


def _null_mmd(real: NDArray[np.float64], seed: int) -> tuple[float, float] | None:
    if len(real) < MIN_ROWS:
        return None
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(_NUM_HALVINGS):
        order = generator.permutation(len(real))
        values.append(squared_mmd(real[order[: len(real) // 2]], real[order[len(real) // 2 :]]))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
