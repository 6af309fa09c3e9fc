"""Shortcuts for drawing many pictures with adapters that no longer change; what is drawn differs by rounding
at most.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lorascope.adapters.bank import Slice
from lorascope.adapters.mixed import Bank
from lorascope.adapters.stacked import StackedLinear
from lorascope.machine.memory import free_bytes

_TEXT_PROJECTIONS = ("attn2.to_k", "attn2.to_v")


@contextmanager
def text_projected_once(bank: Bank) -> Iterator[None]:
    """Within, keys and values of the text are computed once for each text tensor, not once a denoising step.

    It goes by the identity of the tensor, which must not be written to; each thread has its own. The same
    bits come out. Where components of adapters act by timestep, all stays as it is.
    """
    if bank.is_masked:
        yield
        return
    unet = bank.components["unet"]
    names = [name for name, _ in unet.named_modules() if name.endswith(_TEXT_PROJECTIONS)]
    with _in_place(unet, {name: _Remembered(unet.get_submodule(name)) for name in names}):
        yield


@contextmanager
def folded(bank: Bank, slices: Sequence[Slice]) -> Iterator[None]:
    """Within, each adapted Linear of the U-Net holds a weight a slice, with its adapter added: `slices` as in
    `bank.select`.

    One product takes the place of three, for a weight a slice in memory. That pays on a CPU in fp32; a weight
    in bf16 would lose much of a small update, and a GPU is hardly slowed by the adapters. So elsewhere, and
    where the weights would take more than a quarter of the free memory, all stays as it is. So it does where
    components act by timestep: there is no single weight then.
    """
    unet = bank.components["unet"]
    layers = {
        target.path: layer
        for target in bank.targets
        if target.component == "unet" and isinstance(layer := bank.layers[target.name], StackedLinear)
    }
    weights = [layer.layer.weight for layer in layers.values()]
    num_bytes = len(slices) * sum(weight.nbytes for weight in weights)
    pays = all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)
    if bank.is_masked or not pays or num_bytes > free_bytes(torch.device("cpu")) // 4:
        yield
        return
    with _in_place(unet, {path: _Folded(layer, slices) for path, layer in layers.items()}):
        yield


@contextmanager
def _in_place(module: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within, submodules are replaced."""
    own = {path: module.get_submodule(path) for path in replacements}
    for path, replacement in replacements.items():
        module.set_submodule(path, replacement)
    try:
        yield
    finally:
        for path, original in own.items():
            module.set_submodule(path, original)


class _Remembered(nn.Module):
    """A layer that gives its last output again for the same input tensor."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._last = threading.local()

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        """As the layer's."""
        if getattr(self._last, "x", None) is not x:
            self._last.x, self._last.y = x, self.layer(x)
        y: torch.Tensor = self._last.y
        return y


class _Folded(nn.Module):
    """A Linear with a weight for each slice."""

    def __init__(self, stacked: StackedLinear, slices: Sequence[Slice]) -> None:
        super().__init__()
        chosen = torch.tensor([item.adapter for item in slices])
        strengths = torch.tensor([item.strength for item in slices])
        self.weights = stacked.merged(chosen, strengths).mT.contiguous()  # (S, in, out)
        self.bias = stacked.layer.bias
        self.in_features, self.out_features = stacked.in_features, stacked.out_features

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        """x [S * samples, ..., in] -> [S * samples, ..., out]."""
        rows = x.reshape(len(self.weights), -1, self.in_features)
        y = (
            torch.bmm(rows, self.weights)
            if self.bias is None
            else torch.baddbmm(self.bias, rows, self.weights)
        )
        return y.view(*x.shape[:-1], self.out_features)
