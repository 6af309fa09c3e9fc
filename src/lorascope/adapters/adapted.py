"""What a bank asks of a layer with adapters, whatever their kind: the parameters that it has in a row of the
bank's buffers, what they start from, and how they go into files and come back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorascope.adapters.modules import Module
from lorascope.adapters.targets import Target
from lorascope.arms import Arm
from lorascope.errors import AdapterError

Parts = dict[str, torch.Tensor]  # the parameters of one adapter in one layer, by name


@dataclass(frozen=True)
class Selection:
    """Which adapter each slice of a batch goes through, and how strongly."""

    adapters: tuple[int, ...]
    strengths: tuple[float, ...]
    indices: torch.Tensor  # `adapters` as int64 [S], on the bank's device
    factors: torch.Tensor  # `strengths` as float32 [S]
    is_all: bool = False  # slice n through adapter n at full strength: the layout of training

    @property
    def is_full(self) -> bool:
        """Whether all act at full strength."""
        return all(strength == 1 for strength in self.strengths)


class AdaptedLayer(nn.Module):
    """A frozen layer with adapters beside it, a slice of the batch each."""

    size: int  # columns that it takes in a row of the bank's buffers

    def __init__(self, layer: nn.Module, target: Target, arms: Sequence[Arm]) -> None:
        super().__init__()
        self.layer: Any = layer
        self.target, self.arms = target, arms

    def bind(self, parameters: torch.Tensor, gradients: torch.Tensor) -> None:
        """Take its columns of the bank's buffers, float32 [N, size], as where its parameters and their
        gradients lie.
        """
        raise NotImplementedError

    def select(self, selection: Selection) -> None:
        """How the next batches are laid out."""
        raise NotImplementedError

    def views(self, row: torch.Tensor, index: int) -> Parts:
        """What of its columns of a row [size] is adapter `index`'s own, without padding."""
        raise NotImplementedError

    def trained(self, index: int) -> list[tuple[slice, str]]:
        """Its columns that an optimizer moves for adapter `index`, by part; padding may be among them."""
        raise NotImplementedError

    def start(self, index: int, generator: torch.Generator) -> Parts:
        """The parts of adapter `index` before training."""
        raise NotImplementedError

    def module(self, index: int, parts: Parts) -> Module:
        """The parts of adapter `index` as they go into files."""
        raise NotImplementedError

    def parts(self, index: int, module: Module) -> Parts:
        """The parts of adapter `index` from a file's module; raises `AdapterError` for one of another kind,
        shape or alpha.
        """
        raise NotImplementedError

    def refuse(self, index: int, fault: str) -> AdapterError:
        """The error for a module that is not what adapter `index` has here."""
        return AdapterError(f"adapter {self.arms[index].name!r}: {self.target.name_in_files} {fault}")


def leaf_of(parameters: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """A leaf whose values and gradients are these views of the bank's buffers."""
    leaf = parameters.detach().requires_grad_()
    leaf.grad = gradients
    return leaf
