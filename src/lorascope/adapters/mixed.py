"""Adapters of all kinds on one base, to draw and to probe with: a bank for each way to compute."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.bank import AdapterBank, Slice
from lorascope.adapters.targets import Target
from lorascope.arms import Arm


@dataclass(frozen=True)
class _Layout:
    """Which slices of a batch go through which bank, on the device."""

    slices: dict[int, torch.Tensor]  # int64, by bank
    back: torch.Tensor  # int64 [S]: where each slice lies once they stand bank by bank


class MixedBank:
    """Banks of several families of arms, attached together: every slice goes through its own.

    It stands where an `AdapterBank` does, but for training, whose passes hold one family each.
    """

    def __init__(
        self, components: Mapping[str, nn.Module], targets: Sequence[Target], arms: Sequence[Arm]
    ) -> None:
        self.components, self.targets, self.arms = components, list(targets), list(arms)
        families: dict[str, list[int]] = {}
        for index, arm in enumerate(arms):
            families.setdefault(arm.family, []).append(index)
        self.banks: list[AdapterBank] = []
        self._places: dict[int, tuple[int, int]] = {}  # which bank an adapter lies in, and where in it
        for number, indices in enumerate(families.values()):
            self.banks.append(AdapterBank(components, targets, [arms[index] for index in indices]))
            self._places |= {index: (number, place) for place, index in enumerate(indices)}
        self.layers: dict[str, _MixedLayer] = {}
        for target in self.targets:
            plain: Any = components[target.component].get_submodule(target.path)
            own = [bank.layers.get(target.name, plain) for bank in self.banks]
            if any(layer is not plain for layer in own):
                self.layers[target.name] = _MixedLayer(plain, own)
        self.select_all()

    @property
    def adapts_text(self) -> bool:
        """As of a bank."""
        return any(bank.adapts_text for bank in self.banks)

    @property
    def is_masked(self) -> bool:
        """As of a bank."""
        return any(bank.is_masked for bank in self.banks)

    def attach(self) -> "MixedBank":
        """As of a bank."""
        for target in self.targets:
            if target.name in self.layers:
                self.components[target.component].set_submodule(target.path, self.layers[target.name])
        return self

    def detach(self) -> None:
        """As of a bank."""
        for target in self.targets:
            if target.name in self.layers:
                self.components[target.component].set_submodule(target.path, self.layers[target.name].plain)

    def select_all(self) -> None:
        """As of a bank."""
        self.select([Slice(index) for index in range(len(self.arms))])

    def select(self, slices: Sequence[Slice]) -> None:
        """As of a bank."""
        own: dict[int, list[int]] = {}
        for number, item in enumerate(slices):
            own.setdefault(self._places[item.adapter][0], []).append(number)
        for number, chosen in own.items():
            places = (self._places[slices[index].adapter][1] for index in chosen)
            self.banks[number].select(
                [replace(slices[index], adapter=place) for index, place in zip(chosen, places, strict=True)]
            )
        device = self.banks[0].parameters.device
        indices = {number: torch.tensor(chosen, device=device) for number, chosen in own.items()}
        back = torch.cat(tuple(indices.values())).argsort()
        self._layout = _Layout(indices, back)
        for layer in self.layers.values():
            layer.layout = self._layout

    def at(self, timesteps: torch.Tensor, training: bool = False) -> None:
        """As of a bank."""
        of_slices = timesteps.reshape(len(self._layout.back), -1)
        for number, chosen in self._layout.slices.items():
            self.banks[number].at(of_slices[chosen].flatten(), training)

    def load(self, index: int, adapter: Adapter) -> None:
        """As of a bank."""
        number, place = self._places[index]
        self.banks[number].load(place, adapter)


class _MixedLayer(nn.Module):
    """A layer whose slices go through the adapted layers of several banks."""

    layout: _Layout

    def __init__(self, plain: nn.Module, own: Sequence[nn.Module]) -> None:
        super().__init__()
        self.plain = plain
        self.own = nn.ModuleList(own)  # of each bank; `plain` where it adapts nothing here

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        """x [S * samples, ...] -> what each slice's own layer gives of it."""
        slices, back = self.layout.slices, self.layout.back
        if len(slices) == 1:
            y: torch.Tensor = self.own[next(iter(slices))](x)
            return y
        rows = x.unflatten(0, (len(back), -1))
        parts = [
            self.own[number](rows[chosen].flatten(0, 1)).unflatten(0, (len(chosen), -1))
            for number, chosen in slices.items()
        ]
        return torch.cat(parts)[back].flatten(0, 1)


Bank = AdapterBank | MixedBank


def open_bank(components: Mapping[str, nn.Module], targets: Sequence[Target], arms: Sequence[Arm]) -> Bank:
    """A bank for arms of whatever kinds."""
    kind = AdapterBank if len({arm.family for arm in arms}) < 2 else MixedBank
    return kind(components, targets, arms)
