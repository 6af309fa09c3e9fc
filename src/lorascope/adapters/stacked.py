"""What an adapted layer computes: a frozen Linear or convolution with several adapters beside it, a slice of
the batch each.

Dimensions: N adapters, S slices of a batch (each under one adapter at one strength), r the largest rank of a
layer, T tokens of a slice over all its samples.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class Magnitudes:
    """What DoRA learns of a layer besides A and B: the norm of each row of its weight (Liu et al. 2024)."""

    values: torch.Tensor  # m, [N, out]
    is_dora: torch.Tensor  # bool [N]: of the others nothing is scaled


class _Stacked(nn.Module):
    """What the bank's adapters beside a frozen layer have in common."""

    selection: torch.Tensor | None  # int64 [S]: which adapter each slice uses; None is 0..N-1
    factors: torch.Tensor  # float32 [S, 1, 1]: strength * scale of each slice; with magnitudes its scale
    strengths: torch.Tensor | None  # float32 [S]; None where all are 1
    mask: torch.Tensor | None = None  # [S, samples, r]: 1 for the components that act; None is all

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        down: torch.Tensor,
        up: torch.Tensor,
        scales: torch.Tensor,
        magnitudes: Magnitudes | None = None,
    ) -> None:
        super().__init__()
        self.layer: Any = layer
        self.down = down  # A, [N, r, in], of a convolution [N, r, in, kernel height, kernel width]
        self.up = up  # B, [N, out, r]
        self.scales = scales  # [N], alpha / rank
        self.magnitudes = magnitudes

    def magnitudes_of(self, index: int) -> torch.Tensor:
        """Those of adapter `index`, which is DoRA, to read or write: [out]."""
        assert self.magnitudes is not None
        return self.magnitudes.values.detach()[index]

    def _selected(self, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _at(self.selection, *parts)

    @torch.no_grad()
    def row_norms(self, down: torch.Tensor, up: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The l2 norm of each row of W + scale B A: float32 [S, out], by products of W, A and B alone."""
        weight, down = self.layer.weight.flatten(1), down.flatten(2)
        across = torch.matmul(weight, down.mT.to(weight.dtype)).float()  # (S, out, r)
        own = torch.linalg.vector_norm(weight.float(), dim=1).square()  # (out)
        mixed = (across * up).sum(dim=2) * scales[:, None]
        update = ((up @ (down @ down.mT)) * up).sum(dim=2) * scales[:, None].square()
        return (own + 2 * mixed + update).clamp(min=0).sqrt()

    def _gains(self, selection: torch.Tensor | None) -> torch.Tensor:
        """What DoRA multiplies each output of W + scale B A by: m over the norm of its row, which is held for
        constant in the gradient as the paper has it; 1 of other adapters. [S, out]
        """
        assert self.magnitudes is not None
        down, up, scales, values, is_dora = _at(
            selection, self.down, self.up, self.scales, self.magnitudes.values, self.magnitudes.is_dora
        )
        norms = self.row_norms(down, up, scales)
        return torch.where(is_dora[:, None], values / norms, 1.0)


class StackedLinear(_Stacked):
    """A frozen Linear with the bank's adapters beside it."""

    def __init__(self, layer: nn.Linear, *parts: Any) -> None:
        super().__init__(layer, *parts)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        """x [S * samples, ..., in] -> [S * samples, ..., out]."""
        down, up = self._selected(self.down, self.up)
        num_slices = len(self.factors)
        rows = x.reshape(num_slices, -1, self.in_features)  # (S, T, in)
        weight, bias = self.layer.weight, None if self.magnitudes else self.layer.bias
        down, up = down.to(x.dtype), (up * self.factors).to(x.dtype)
        y: torch.Tensor = _AdaptedLinear.apply(rows, weight, bias, down, up, self.mask)  # type: ignore[no-untyped-call]
        if self.magnitudes is not None:
            y = y * self._gains(self.selection)[:, None].to(y.dtype)
            if self.strengths is not None:  # W + strength (W' - W)
                strengths = self.strengths[:, None, None].to(y.dtype)
                y = y * strengths + functional.linear(rows, weight) * (1 - strengths)
            y = y if self.layer.bias is None else y + self.layer.bias
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def merged(self, adapters: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
        """The weight with each of these `adapters`, int64 [S], added at its strength: [S, out, in]."""
        scales = self.scales[adapters]
        factors = scales * strengths if self.magnitudes is None else scales
        update = torch.bmm(self.up[adapters] * factors.view(-1, 1, 1), self.down[adapters])
        weight: torch.Tensor = self.layer.weight
        if self.magnitudes is None:
            return weight + update
        adapted = (weight + update) * self._gains(adapters)[..., None]
        return weight + (adapted - weight) * strengths.view(-1, 1, 1)


def _at(selection: torch.Tensor | None, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return parts if selection is None else tuple(part[selection] for part in parts)


class _AdaptedLinear(torch.autograd.Function):
    """y = x W^T + b + (x A^T) M B^T for each slice, and its gradients with respect to x, A and B; M leaves
    out the components that do not act on a sample.

    Written out because both branches meet in one buffer each way: autograd would copy y, and add two
    gradients of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """x [S, T, in], weight [out, in], bias [out], down [S, r, in], up [S, out, r], mask [S, samples, r]
        or None, of one dtype -> [S, T, out].
        """
        hidden = _masked(torch.bmm(x, down.mT), mask)  # (S, T, r)
        y = functional.linear(x, weight, bias).baddbmm_(hidden, up.mT)
        ctx.save_for_backward(x, weight, down, up, hidden, mask)
        return y

    @staticmethod
    def backward(
        ctx: Any, grad_y: torch.Tensor
    ) -> tuple[torch.Tensor | None, None, None, torch.Tensor, torch.Tensor, None]:
        x, weight, down, up, hidden, mask = ctx.saved_tensors
        grad_hidden = _masked(torch.bmm(grad_y, up), mask)  # (S, T, r)
        grad_x = torch.matmul(grad_y, weight).baddbmm_(grad_hidden, down) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, torch.bmm(grad_hidden.mT, x), torch.bmm(grad_y.mT, hidden), None


def _masked(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`hidden` [S, T, r], in place where there is a `mask` [S, samples, r]; T is samples * tokens."""
    if mask is not None:
        hidden.unflatten(1, (mask.shape[1], -1)).mul_(mask[:, :, None])
    return hidden


class StackedConv(_Stacked):
    """A frozen convolution with the bank's adapters beside it."""

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        """x [S * samples, in, H, W] -> [S * samples, out, H', W']."""
        down, up = self._selected(self.down, self.up)
        num_slices, layer = len(self.factors), self.layer
        if self.magnitudes is None:
            y = layer(x)
        else:
            y = functional.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation)
        down, up = down.to(x.dtype), (up * self.factors).to(x.dtype)
        grouped = x.unflatten(0, (num_slices, -1)).transpose(0, 1).flatten(1, 2)  # (samples, S * in, H, W)
        hidden = functional.conv2d(
            grouped, down.flatten(0, 1), None, layer.stride, layer.padding, layer.dilation, num_slices
        )
        hidden = hidden.unflatten(1, (num_slices, -1)).permute(1, 2, 0, 3, 4)  # (S, r, samples, H', W')
        if self.mask is not None:
            hidden = hidden * self.mask.mT[..., None, None]
        update = torch.bmm(up, hidden.flatten(2)).unflatten(2, hidden.shape[2:])  # (S, out, samples, H', W')
        update = update.transpose(1, 2).flatten(0, 1)
        if self.magnitudes is None:
            return y + update
        num_samples, gains = len(x) // num_slices, self._gains(self.selection).to(y.dtype)
        adapted = (y + update) * gains.repeat_interleave(num_samples, 0)[..., None, None]
        if self.strengths is not None:  # W + strength (W' - W)
            strengths = self.strengths.to(y.dtype).repeat_interleave(num_samples).view(-1, 1, 1, 1)
            adapted = adapted * strengths + y * (1 - strengths)
        return adapted if layer.bias is None else adapted + layer.bias[:, None, None]
