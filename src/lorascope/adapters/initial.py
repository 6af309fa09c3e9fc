"""What the factors of an adapter start from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorascope.arms import Init


@dataclass(frozen=True)
class Start:
    """A [r, in or in, kh, kw], B [out, r] and, where they are trained apart, S [r], whose product B S A an
    adapter with anchors subtracts again; of others it is zero.
    """

    down: torch.Tensor
    up: torch.Tensor
    values: torch.Tensor | None = None


def initial_factors(
    init: Init,
    rank: int,
    down_shape: Sequence[int],
    out_features: int,
    generator: torch.Generator,
    weight: torch.Tensor | None = None,
    scale: float = 1.0,
) -> Start:
    """Where training starts, float32. `weight` is the layer's, [out, ...], and `scale` alpha / rank: `pissa`
    alone goes by them.

    `kaiming`, with a = sqrt(5), is U(-1/sqrt(in), 1/sqrt(in)), as the reference and PEFT have it, and drawn
    row by row, so that a smaller rank starts as the first rows of a larger one. `gaussian` is N(0, 1/r^2).
    Both leave B zero. `orthogonal` lets B and A, drawn from N(0, 1/100), meet in the even and the odd rows of
    an orthogonal r x r matrix, that is in nothing. PEFT 0.21 has the three, the last for an even r.

    `pissa` takes the r leading singular triplets of the weight, their values shared between the factors
    (Meng et al. 2024); PEFT 0.21 has it too, with the base rewritten. `random-svd` is T-LoRA's (Soboleva et
    al. 2025): of the SVD of a random matrix [in, out] from N(0, 1/r^2) rows of U, columns of V' and the r
    least singular values. U, V and the values of such a matrix are independent, and both have an
    orthogonal matrix's law, so the vectors are drawn by themselves. The values grow with how far from square
    the layer is; `random-svd-square` takes those of a square matrix of the shorter side.
    """
    num_inputs, shape = math.prod(down_shape), (rank, *down_shape)
    if init == "kaiming":
        uniform = torch.rand(shape, generator=generator)
        return Start((uniform * 2 - 1) / math.sqrt(num_inputs), torch.zeros(out_features, rank))
    if init == "gaussian":
        normal = torch.randn(shape, generator=generator) / rank
        return Start(normal, torch.zeros(out_features, rank))
    if init == "orthogonal":
        rows, _ = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64, generator=generator))
        even, odd = rows[0::2].float(), rows[1::2].float()
        down = torch.randn(num_inputs, len(odd), generator=generator) / 10
        up = torch.randn(out_features, len(even), generator=generator) / 10
        return Start((down @ odd).T.reshape(shape), up @ even)
    if init == "pissa":
        assert weight is not None
        left, values, right = torch.linalg.svd(weight.detach().float().flatten(1), full_matrices=False)
        roots = (values[:rank] / scale).sqrt()
        return Start((roots[:, None] * right[:rank]).reshape(shape), left[:, :rank] * roots)
    down = _orthonormal(num_inputs, rank, generator).T.float().reshape(shape)
    up = _orthonormal(out_features, rank, generator).float()
    sides = (num_inputs, out_features)
    if init == "random-svd-square":
        sides = (min(sides),) * 2
    values = torch.linalg.svdvals(torch.randn(sides, generator=generator) / rank)[-rank:]
    return Start(down, up, values)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Orthonormal columns with the law of an orthogonal matrix's, float64 [rows, columns]."""
    q, r = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()
