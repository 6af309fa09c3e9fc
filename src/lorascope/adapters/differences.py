"""Layers whose weight differs by what no pair of factors gives: LoHa, LoKr and full fine-tuning.

What is trained are the tensors of the file's module, and what they add to the weight is computed as for a
file, by `Module.update`. In float32 a layer computes with the sum of weight and difference; in half precision
with both apart, since the sum would round a small difference away.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lorascope.adapters.adapted import AdaptedLayer, Parts, Selection, leaf_of
from lorascope.adapters.modules import FullModule, LohaModule, LokrModule, Module
from lorascope.adapters.targets import Target
from lorascope.arms import Arm


class DifferenceLayer(AdaptedLayer):
    """A frozen Linear, convolution or norm with a difference of its weight for each adapter."""

    def __init__(self, layer: nn.Module, target: Target, arms: Sequence[Arm]) -> None:
        super().__init__(layer, target, arms)
        self.shapes = [target.parts(arm) for arm in arms]
        self.size = max(target.size(arm) for arm in arms)

    def bind(self, parameters: torch.Tensor, gradients: torch.Tensor) -> None:
        """As of every layer: each adapter has leaves of its own."""
        self.leaves: list[Parts] = []
        for index in range(len(self.arms)):
            values, slopes = (self.views(buffer[index], index) for buffer in (parameters, gradients))
            self.leaves.append({name: leaf_of(values[name], slopes[name]) for name in values})

    def select(self, selection: Selection) -> None:
        """As of every layer."""
        self.slices = list(zip(selection.adapters, selection.strengths, strict=True))

    def views(self, row: torch.Tensor, index: int) -> Parts:
        """As of every layer, by the names of the module's tensors."""
        views, start = {}, 0
        for name, shape in self.shapes[index].items():
            views[name] = row[start : start + math.prod(shape)].view(shape)
            start += math.prod(shape)
        return views

    def trained(self, index: int) -> list[tuple[slice, str]]:
        """As of every layer."""
        return [(slice(0, self.target.size(self.arms[index])), "weight")]

    def start(self, index: int, generator: torch.Generator) -> Parts:
        """As of every layer: as LyCORIS, with one factor of zeros; of full fine-tuning all are."""
        shapes, drawn = self.shapes[index], {}
        is_loha = self.arms[index].kind == "loha"
        zero = {"weight", "bias", "w2_a"} if is_loha else {"weight", "bias", "w2_b", "w2"}
        for name, shape in shapes.items():
            if name in zero:
                drawn[name] = torch.zeros(shape)
            elif is_loha:
                std = 0.1 if name == "w1_a" else 1.0
                drawn[name] = torch.randn(shape, generator=generator) * std
            else:
                bound = 1 / math.sqrt(math.prod(shape[1:]))
                drawn[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
        return drawn

    def module(self, index: int, parts: Parts) -> Module:
        """As of every layer."""
        arm, target = self.arms[index], self.target
        if arm.kind == "full":
            return FullModule(parts["weight"], parts.get("bias"))
        kind = LohaModule if arm.kind == "loha" else LokrModule
        return kind(alpha=target.alpha(arm), **parts)

    def parts(self, index: int, module: Module) -> Parts:
        """As of every layer."""
        arm, found = self.arms[index], module.tensors()
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        if module.kind != arm.kind or shapes != self.shapes[index]:
            raise self.refuse(
                index,
                f"has {_described(module.kind, shapes)}, expected "
                f"{_described(arm.kind, self.shapes[index])}: wrong base, rank or kind",
            )
        own = self.module(index, found)
        if not math.isclose(module.scale, own.scale, rel_tol=1e-6):
            raise self.refuse(
                index, f"has scale {module.scale:g}, the arm {own.scale:g}: it belongs to another arm"
            )
        return found

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        """x [S * samples, ...] -> what the layer gives of it, slice by slice."""
        parts = x.unflatten(0, (len(self.slices), -1)).unbind()
        outputs = [self._of_slice(part, *item) for part, item in zip(parts, self.slices, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _of_slice(self, x: torch.Tensor, index: int, strength: float) -> torch.Tensor:
        leaves, layer = self.leaves[index], self.layer
        if strength == 0 or not leaves:
            y: torch.Tensor = layer(x)
            return y
        weight, bias = layer.weight, layer.bias
        update = self.module(index, leaves).update().view(weight.shape) * strength
        shift = leaves["bias"] * strength if "bias" in leaves else None
        if weight.dtype != torch.float32 and not self.target.is_norm:
            apart = _compute(layer, x, update.to(x.dtype), None if shift is None else shift.to(x.dtype))
            return _compute(layer, x, weight, bias) + apart
        shifted = bias if shift is None else (bias + shift).to(weight.dtype)
        return _compute(layer, x, (weight + update).to(weight.dtype), shifted)


def _compute(
    layer: nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """What a layer would give with another weight and bias."""
    match layer:
        case nn.Linear():
            return functional.linear(x, weight, bias)
        case nn.Conv2d():
            return functional.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)
        case nn.GroupNorm():
            return functional.group_norm(x, layer.num_groups, weight, bias, layer.eps)
        case _:
            assert isinstance(layer, nn.LayerNorm)
            return functional.layer_norm(x, list(layer.normalized_shape), weight, bias, layer.eps)


def _described(kind: str, shapes: dict[str, tuple[int, ...]]) -> str:
    listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    return f"{kind} with {listed or 'nothing'}"
