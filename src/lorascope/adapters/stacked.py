"""What an adapted layer computes: a frozen Linear or convolution with several adapters beside it, a slice of
the batch each.

Dimensions: N adapters, S slices of a batch (each under one adapter at one strength), r the largest rank of a
layer, T tokens of a slice over all its samples.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lorascope.adapters.adapted import AdaptedLayer, Parts, Selection, leaf_of
from lorascope.adapters.initial import initial_factors
from lorascope.adapters.lowrank import balanced
from lorascope.adapters.modules import KIND_NAMES, LoraModule, Module
from lorascope.adapters.schedule import schedule_of
from lorascope.adapters.targets import Target
from lorascope.arms import Arm
from lorascope.errors import AdapterError


@dataclass(frozen=True)
class Magnitudes:
    """What DoRA learns of a layer besides A and B: the norm of each row of its weight (Liu et al. 2024)."""

    values: torch.Tensor  # m, [N, out]
    is_dora: torch.Tensor  # bool [N]: of the others nothing is scaled
    squares: torch.Tensor  # of the norms of the frozen weight's rows, float32 [out]


@dataclass(frozen=True)
class Anchors:
    """What adapters have that do not start from a product of zero: the factors that they started from, whose
    product is subtracted, and S, where the singular values of B S A are trained.
    """

    down: torch.Tensor  # S0 A0, [N, r, ...] as A; zero where an adapter starts from nothing
    up: torch.Tensor  # B0, [N, out, r]
    values: torch.Tensor | None  # S, [N, r]
    has_values: torch.Tensor  # bool [N]: of the others S is 1


class _Stacked(AdaptedLayer):
    """What the bank's adapters beside a frozen layer have in common."""

    down: torch.Tensor  # A, [N, r, in], of a convolution [N, r, in, kernel height, kernel width]
    up: torch.Tensor  # B, [N, out, r]
    magnitudes: Magnitudes | None
    anchors: Anchors | None
    selection: torch.Tensor | None  # int64 [S]: which adapter each slice uses; None is 0..N-1
    factors: torch.Tensor  # float32 [S, 1, 1]: strength * scale of each slice; with magnitudes its scale
    strengths: torch.Tensor | None  # float32 [S]; None where all are 1

    def __init__(self, layer: nn.Module, target: Target, arms: Sequence[Arm]) -> None:
        super().__init__(layer, target, arms)
        self._mask: torch.Tensor | None = None
        self._masks_of_threads = threading.local()
        self.rank = max(target.rank(arm) for arm in arms)
        down, up = (self.rank, *target.down_shape), (target.out_features, self.rank)
        shapes: dict[str, tuple[int, ...]] = {"down": down, "up": up}
        if any(arm.kind == "dora" for arm in arms):
            shapes["magnitudes"] = (target.out_features,)
        if any(arm.has_values for arm in arms):
            shapes["values"] = (self.rank,)
        if any(arm.is_anchored for arm in arms):
            shapes |= {"anchor_down": down, "anchor_up": up}
        self.shapes, self.spans, start = shapes, dict[str, slice](), 0
        for name, shape in shapes.items():
            self.spans[name] = slice(start, start := start + math.prod(shape))
        self.size = start

    def bind(self, parameters: torch.Tensor, gradients: torch.Tensor) -> None:
        """As of every layer."""
        device = parameters.device
        leaves = {
            name: leaf_of(
                *(buffer[:, span].unflatten(1, self.shapes[name]) for buffer in (parameters, gradients))
            )
            for name, span in self.spans.items()
        }
        self.down, self.up = leaves["down"], leaves["up"]
        self.scales = torch.tensor(
            [self.target.alpha(arm) / self.target.rank(arm) for arm in self.arms], device=device
        )  # [N], alpha / rank
        self.magnitudes = self.anchors = None
        if "magnitudes" in leaves:
            is_dora = torch.tensor([arm.kind == "dora" for arm in self.arms], device=device)
            squares = torch.linalg.vector_norm(self.layer.weight.detach().float().flatten(1), dim=1).square()
            self.magnitudes = Magnitudes(leaves["magnitudes"], is_dora, squares)
        if "anchor_down" in leaves:
            has_values = torch.tensor([arm.has_values for arm in self.arms], device=device)
            anchors = leaves["anchor_down"].detach(), leaves["anchor_up"].detach()
            self.anchors = Anchors(*anchors, leaves.get("values"), has_values)

    def select(self, selection: Selection) -> None:
        """As of every layer."""
        if selection.is_all:
            self.selection, self.factors, self.strengths = None, self.scales.view(-1, 1, 1), None
            return
        # DoRA's strength acts on its whole change of the weight.
        factors = self.scales[selection.indices] * (1 if self.magnitudes else selection.factors)
        self.selection, self.factors = selection.indices, factors.view(-1, 1, 1)
        self.strengths = None if selection.is_full else selection.factors

    # -- the parameters of an adapter ------------------------------------------------------------------------

    def views(self, row: torch.Tensor, index: int) -> Parts:
        """As of every layer: `down`, `up`, of DoRA `magnitudes`, of what starts from a product that is not
        zero `values` and `anchor_down`, `anchor_up`.
        """
        arm, rank = self.arms[index], self.target.rank(self.arms[index])
        whole = {name: row[span].unflatten(0, self.shapes[name]) for name, span in self.spans.items()}
        own = {"down": whole["down"][:rank], "up": whole["up"][:, :rank]}
        if arm.kind == "dora":
            own["magnitudes"] = whole["magnitudes"]
        if arm.has_values:
            own["values"] = whole["values"][:rank]
        if arm.is_anchored:
            own |= {"anchor_down": whole["anchor_down"][:rank], "anchor_up": whole["anchor_up"][:, :rank]}
        return own

    def trained(self, index: int) -> list[tuple[slice, str]]:
        """As of every layer."""
        arm = self.arms[index]
        names = ["down", "up", *["magnitudes"] * (arm.kind == "dora"), *["values"] * arm.has_values]
        return [(self.spans[name], name) for name in names]

    def start(self, index: int, generator: torch.Generator) -> Parts:
        """As of every layer."""
        arm, target = self.arms[index], self.target
        rank, scale = target.rank(arm), target.alpha(arm) / target.rank(arm)
        sides = math.prod(target.down_shape), target.out_features
        if arm.is_anchored and rank > min(sides):
            raise AdapterError(
                f"arm {arm.name!r}: init = {arm.init!r}: {target.name} has {min(sides)} singular vectors, "
                f"fewer than the rank {rank}: lower it, or leave the layer out of adapter.targets"
            )
        shapes, weight = (target.down_shape, target.out_features), self.layer.weight
        drawn = initial_factors(arm.init, rank, *shapes, generator, weight, scale)
        parts = {"down": drawn.down, "up": drawn.up}
        if arm.is_anchored:
            anchor = drawn.down
            if drawn.values is not None:
                parts["values"] = drawn.values
                anchor = _scaled_rows(anchor, drawn.values)
            parts |= {"anchor_down": anchor, "anchor_up": drawn.up}
        if arm.kind == "dora":  # so that it starts as the base: nothing is added to the weight yet
            assert self.magnitudes is not None
            parts["magnitudes"] = self.magnitudes.squares.sqrt()
        return parts

    def module(self, index: int, parts: Parts) -> LoraModule:
        """As of every layer; with anchors LoRA of twice the rank, whose second half T-LoRA subtracts."""
        arm, target = self.arms[index], self.target
        down, up, alpha = parts["down"], parts["up"], target.alpha(arm)
        if arm.is_anchored:
            down = _scaled_rows(down, parts["values"]) if arm.has_values else down
            down, up = _less(down, up, parts["anchor_down"], parts["anchor_up"])
            alpha *= 2
        ones = [1] * (len(target.down_shape) - 1)
        magnitudes = parts.get("magnitudes")
        if magnitudes is not None:
            magnitudes = magnitudes.view(-1, 1, *ones)
        module = LoraModule(down, up.view(*up.shape, *ones), alpha, dora_scale=magnitudes)
        # The order of components is T-LoRA's own.
        return balanced(module) if arm.is_anchored and schedule_of(arm) is None else module

    def parts(self, index: int, module: Module) -> Parts:
        """As of every layer. What is trained apart from A is in A then, and any two halves of a file will do
        for what was trained and what is subtracted.
        """
        arm, target = self.arms[index], self.target
        if not isinstance(module, LoraModule):
            raise self.refuse(
                index, f"is {KIND_NAMES[module.kind]}, the arm {arm.kind}: it belongs to another arm"
            )
        own = target.rank(arm)
        rank = own * (2 if arm.is_anchored else 1)
        shapes = [list(module.down.shape), list(module.up.shape[:2])]
        expected = [[rank, *target.down_shape], [target.out_features, rank]]
        if shapes != expected:
            raise self.refuse(
                index,
                f"has shapes {shapes[0]} and {shapes[1]}, expected {expected[0]} and {expected[1]}: wrong "
                "base or rank",
            )
        scale = target.alpha(arm) / own
        if not math.isclose(module.scale, scale, rel_tol=1e-6):
            raise self.refuse(
                index, f"has scale {module.scale:g}, the arm {scale:g}: it belongs to another arm"
            )
        num_found = 0 if module.dora_scale is None else module.dora_scale.numel()
        num_own = target.out_features if arm.kind == "dora" else 0
        if num_found != num_own:
            raise self.refuse(
                index,
                f"has {num_found} magnitudes of DoRA, the arm {num_own}: it belongs to another arm",
            )
        up = module.up.flatten(1)
        parts = {"down": module.down[:own], "up": up[:, :own]}
        if module.dora_scale is not None:
            parts["magnitudes"] = module.dora_scale.flatten()
        if arm.is_anchored:
            parts |= {"anchor_down": module.down[own:], "anchor_up": -up[:, own:]}
        if arm.has_values:
            parts["values"] = module.down.new_ones(own)
        return parts

    @torch.no_grad()
    def limit_norms(self, most: torch.Tensor, moved: torch.Tensor) -> None:
        """Scale A and B of adapters whose update is larger than `most`, float32 [N], down to that; of those
        that have `moved`, bool [N]. kohya's `scale_weight_norms` does the same.
        """
        down = self.down.flatten(2)
        # |B A|^2 from the r x r products of each with itself.
        squares = ((down @ down.mT) * (self.up.mT @ self.up)).sum(dim=(1, 2)).clamp(min=0)
        norms = squares.sqrt() * self.scales
        factors = torch.where(moved & (norms > most), (most / norms).sqrt(), 1.0)
        self.down.mul_(factors.view(-1, *[1] * (self.down.dim() - 1)))
        self.up.mul_(factors.view(-1, 1, 1))

    # -- what it computes ------------------------------------------------------------------------------------

    def magnitudes_of(self, index: int) -> torch.Tensor:
        """Those of adapter `index`, which is DoRA, to read or write: [out]."""
        assert self.magnitudes is not None
        return self.magnitudes.values.detach()[index]

    @property
    def mask(self) -> torch.Tensor | None:
        """1 for the components that act, [S, samples, r]; None where all do."""
        mask: torch.Tensor | None = getattr(self._masks_of_threads, "mask", self._mask)
        return mask

    def set_mask(self, mask: torch.Tensor | None, training: bool) -> None:
        """Let components act: in drawing for this thread alone, since threads draw side by side; in training
        for all, since a backward pass may compute again in a thread of its own.
        """
        if training:
            self._mask = mask
            self._masks_of_threads.__dict__.pop("mask", None)
        else:
            self._masks_of_threads.mask = mask

    def _chosen(self, selection: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of each slice, whose scaled product is its update: with anchors of twice the rank."""
        down, up = _at(selection, self.down, self.up)
        if self.anchors is None:
            return down, up
        if self.anchors.values is not None:
            values, has_values = _at(selection, self.anchors.values, self.anchors.has_values)
            down = _scaled_rows(down, torch.where(has_values[:, None], values, 1.0))
        return _less(down, up, *_at(selection, self.anchors.down, self.anchors.up))

    def _acting(self) -> torch.Tensor | None:
        """The mask for what `_chosen` gives."""
        if self.mask is None or self.anchors is None:
            return self.mask
        return torch.cat([self.mask, self.mask], dim=2)

    @torch.no_grad()
    def row_norms(self, down: torch.Tensor, up: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The l2 norm of each row of W + scale B A: float32 [S, out], by products of W, A and B alone."""
        assert self.magnitudes is not None
        weight, down = self.layer.weight.flatten(1), down.flatten(2)
        across = torch.matmul(weight, down.mT.to(weight.dtype)).float()  # (S, out, r)
        mixed = (across * up).sum(dim=2) * scales[:, None]
        update = ((up @ (down @ down.mT)) * up).sum(dim=2) * scales[:, None].square()
        return (self.magnitudes.squares + 2 * mixed + update).clamp(min=0).sqrt()

    def _gains(self, selection: torch.Tensor | None) -> torch.Tensor:
        """What DoRA multiplies each output of W + scale B A by: m over the norm of its row, which is held for
        constant in the gradient as the paper has it; 1 of other adapters. [S, out]
        """
        assert self.magnitudes is not None
        down, up = self._chosen(selection)
        scales, values, is_dora = _at(selection, self.scales, self.magnitudes.values, self.magnitudes.is_dora)
        norms = self.row_norms(down, up, scales)
        return torch.where(is_dora[:, None], values / norms, 1.0)


class StackedLinear(_Stacked):
    """A frozen Linear with the bank's adapters beside it."""

    def __init__(self, layer: nn.Linear, target: Target, arms: Sequence[Arm]) -> None:
        super().__init__(layer, target, arms)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        """x [S * samples, ..., in] -> [S * samples, ..., out]."""
        down, up = self._chosen(self.selection)
        num_slices = len(self.factors)
        rows = x.reshape(num_slices, -1, self.in_features)  # (S, T, in)
        weight, bias = self.layer.weight, None if self.magnitudes else self.layer.bias
        down, up = down.to(x.dtype), (up * self.factors).to(x.dtype)
        y: torch.Tensor = _AdaptedLinear.apply(rows, weight, bias, down, up, self._acting())  # type: ignore[no-untyped-call]
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
        down, up = self._chosen(adapters)
        update = torch.bmm(up * factors.view(-1, 1, 1), down)
        weight: torch.Tensor = self.layer.weight
        if self.magnitudes is None:
            return weight + update
        adapted = (weight + update) * self._gains(adapters)[..., None]
        return weight + (adapted - weight) * strengths.view(-1, 1, 1)


def _less(
    down: torch.Tensor, up: torch.Tensor, anchor_down: torch.Tensor, anchor_up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of twice the rank, whose product is that of the first two less that of the others."""
    rows, columns = up.dim() - 2, up.dim() - 1
    return torch.cat([down, anchor_down], dim=rows), torch.cat([up, -anchor_up], dim=columns)


def _scaled_rows(down: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`down` [..., r, in or in, kh, kw] with each component times its value [..., r]."""
    return down * values.view(*values.shape, *[1] * (down.dim() - values.dim()))


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
        down, up = self._chosen(self.selection)
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
        if (mask := self._acting()) is not None:
            hidden = hidden * mask.mT[..., None, None]
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
