"""Adapters on the layers of a frozen base: several stacked in one bank and computed in one pass.

Dimensions: N adapters, S slices of a batch (each under one adapter at one strength), r the largest rank of a
layer, T tokens of a slice over all its samples. Adapter n adds scale_n * B_n A_n to the weight of each
target, scale = alpha / rank (Hu et al. 2021); for a convolution A has its kernel and B is 1 x 1, as in LoCon
(LyCORIS, Yeh et al. 2024). Smaller ranks are padded with zeros: a padded row of A meets a zero column of B
and the reverse, so both keep exactly zero gradients and need no mask.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorascope.adapters.adapted import AdaptedLayer, Selection
from lorascope.adapters.adapter import Adapter
from lorascope.adapters.differences import DifferenceLayer
from lorascope.adapters.schedule import NUM_TIMESTEPS, schedule_of
from lorascope.adapters.stacked import StackedConv, StackedLinear
from lorascope.adapters.targets import Target
from lorascope.arms import Arm
from lorascope.errors import AdapterError
from lorascope.seeding import seeded

# The bank's gradients are rows of one buffer, so their strides span it; autograd calls that layout unusual,
# and it is meant.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


@dataclass(frozen=True)
class _Mask:
    """Layers of equal ranks, and how many components of each arm act there at each timestep: int64 [N, T]."""

    layers: list[Any]
    rank: int  # the largest
    dtype: torch.dtype
    in_training: torch.Tensor
    in_drawing: torch.Tensor


def _plan_masks(
    targets: Sequence[Target], arms: Sequence[Arm], layers: Mapping[str, Any], device: torch.device
) -> list[_Mask]:
    """What `AdapterBank.at` masks: nothing where no arm is T-LoRA or drops components."""
    if all(schedule_of(arm, training=True) is None and not arm.rank_dropout for arm in arms):
        return []

    def table(ranks: Sequence[int], training: bool) -> torch.Tensor:
        schedules = [schedule_of(arm, training) for arm in arms]
        rows = [
            [rank] * NUM_TIMESTEPS if schedule is None else schedule.table(rank)
            for rank, schedule in zip(ranks, schedules, strict=True)
        ]
        return torch.tensor(rows, device=device)

    alike: dict[tuple[Any, ...], list[Any]] = {}
    for target in targets:
        if target.component == "unet":
            layer = layers[target.name]
            ranks = tuple(target.rank(arm) for arm in arms)
            alike.setdefault((ranks, layer.layer.weight.dtype), []).append(layer)
    return [
        _Mask(members, max(ranks), dtype, table(ranks, True), table(ranks, False))
        for (ranks, dtype), members in alike.items()
    ]


def _chances(noise: torch.Tensor, layer: int, count: int) -> torch.Tensor:
    """Numbers in [0, 1) for `count` components of a layer, for each sample of some noise [B, c, h, w]:
    float32 [B, count].

    They are the noise's bits, mixed as MurmurHash3 does at its end, and so functions of seed and position
    alone, as all that is random in training is; a recorded step draws them anew.
    """
    bits = noise.float().flatten(1).contiguous().view(torch.int32)
    places = torch.arange(count, device=noise.device) % bits.shape[1]
    mixed = (bits[:, places].long() + layer * 0x9E3779B9) & 0xFFFFFFFF
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
    return ((mixed ^ (mixed >> 16)) >> 8).float() / 2**24


@dataclass(frozen=True)
class Slice:
    """One slice of a batch: which adapter acts on it, and how strongly. Strength 0 is exactly the base."""

    adapter: int
    strength: float = 1.0


class AdapterBank:
    """N adapters in one pass over one frozen base.

    All parameters of adapter n lie in row n of `parameters`, float32 [N, P], and its gradients in row n of
    `gradients`, so that norms, clipping and AdamW are row-wise arithmetic on one buffer. While attached, a
    batch is read slice-major: [S * samples of a slice, ...].
    """

    def __init__(
        self, components: Mapping[str, nn.Module], targets: Sequence[Target], arms: Sequence[Arm]
    ) -> None:
        self.components = components
        self.targets = [target for target in targets if any(target.is_of(arm) for arm in arms)]
        self.arms = list(arms)
        device = next(components["unet"].parameters()).device
        self.layers: dict[str, Any] = {}  # `AdaptedLayer`s
        self.spans: dict[str, slice] = {}  # columns of the buffers that hold a layer
        start = 0
        for target in self.targets:
            layer = _adapted(components[target.component].get_submodule(target.path), target, self.arms)
            self.layers[target.name] = layer
            self.spans[target.name] = slice(start, start := start + layer.size)
        self.parameters = torch.zeros(len(self.arms), start, device=device)
        self.gradients = torch.zeros_like(self.parameters)
        for name, span in self.spans.items():
            self.layers[name].bind(self.parameters[:, span], self.gradients[:, span])
        limits = [arm.max_weight_norm for arm in self.arms]
        self._norms_are_limited = any(limit is not None for limit in limits)
        self._most_norms = torch.tensor(
            [math.inf if limit is None else limit for limit in limits], device=device
        )
        self._masks = _plan_masks(self.targets, self.arms, self.layers, device)
        self._drops = any(arm.rank_dropout for arm in self.arms)
        self._dropouts = torch.tensor([arm.rank_dropout for arm in self.arms], device=device)
        if device.type != "meta":
            self.initialize()
        self.select_all()

    @property
    def adapts_text(self) -> bool:
        """Whether text states depend on the adapter."""
        return any(target.component == "text_encoder" for target in self.targets)

    @property
    def is_masked(self) -> bool:
        """Whether components act by timestep in drawing: T-LoRA."""
        return any(schedule_of(arm) is not None for arm in self.arms)

    @torch.no_grad()
    def initialize(self) -> None:
        """What each arm's `init` says, drawn by (arm's seed, layer)."""
        self.parameters.zero_()
        for target in self.targets:
            key = target.path if target.component == "unet" else target.name
            for index, arm in enumerate(self.arms):
                if target.is_of(arm):
                    start = self.layers[target.name].start(index, seeded("adapter", arm.seed, key))
                    self._put(index, target, start)

    def _put(self, index: int, target: Target, parts: Mapping[str, torch.Tensor]) -> None:
        """Write what adapter `index` has in a layer."""
        row = self.parameters[index, self.spans[target.name]]
        for name, view in self.layers[target.name].views(row, index).items():
            view.copy_(parts[name])

    def attach(self) -> "AdapterBank":
        """Put the adapted layers in place of the base's own."""
        for target in self.targets:
            self.components[target.component].set_submodule(target.path, self.layers[target.name])
        return self

    def detach(self) -> None:
        """Put the base's own layers back."""
        for target in self.targets:
            self.components[target.component].set_submodule(target.path, self.layers[target.name].layer)

    def select_all(self) -> None:
        """Slice n of a batch goes through adapter n at full strength: the layout of training."""
        self._select([Slice(index) for index in range(len(self.arms))], is_all=True)

    def select(self, slices: Sequence[Slice]) -> None:
        """The layout of the next batches: slice s goes through `slices[s]`."""
        self._select(slices, is_all=False)

    def _select(self, slices: Sequence[Slice], is_all: bool) -> None:
        adapters, strengths = (
            tuple(getattr(item, key) for item in slices) for key in ("adapter", "strength")
        )
        device = self.parameters.device
        on_device = torch.tensor(adapters, device=device), torch.tensor(strengths, device=device)
        selection = Selection(adapters, strengths, *on_device, is_all)
        self._selection = selection.indices
        for layer in self.layers.values():
            layer.select(selection)

    def at(self, timesteps: torch.Tensor, training: bool = False, noise: torch.Tensor | None = None) -> None:
        """Let the components of T-LoRA arms act that their schedules have at `timesteps` [S * samples].

        Of all other arms all components act, and a bank without T-LoRA arms does nothing. `training` says
        whether those that are masked in training alone are masked too; with the `noise` of a step, float32
        [S * samples, c, h, w], arms with `rank_dropout` leave out components of each sample and layer. Layers
        of the text encoder, whose states do not depend on a timestep, are not masked.
        """
        is_masked = training or self.is_masked
        for number, mask in enumerate(self._masks):
            if not is_masked:
                for layer in mask.layers:
                    layer.set_mask(None, training)
                continue
            table = mask.in_training if training else mask.in_drawing
            times = timesteps.long().reshape(len(self._selection), -1)  # (S, samples)
            acting = table[self._selection[:, None], times]
            kept = (torch.arange(mask.rank, device=acting.device) < acting[..., None]).to(mask.dtype)
            for place, layer in enumerate(mask.layers):
                own = kept
                if noise is not None and self._drops:
                    own = kept * self._undropped(noise, mask, len(self.targets) * number + place)
                layer.set_mask(own, training)

    def _undropped(self, noise: torch.Tensor, mask: _Mask, layer: int) -> torch.Tensor:
        """What `rank_dropout` leaves of a layer's components, scaled so that their sum is what it was in the
        mean, as kohya does it: [S, samples, r].
        """
        rates = self._dropouts[self._selection].view(-1, 1, 1)
        drawn = _chances(noise, layer, mask.rank).unflatten(0, (len(self._selection), -1))
        return ((drawn >= rates) / (1 - rates)).to(mask.dtype)

    def gradient_norms(self) -> torch.Tensor:
        """The l2 norm of each adapter's gradient: float32 [N]."""
        return torch.linalg.vector_norm(self.gradients, dim=1)

    def limit_norms(self, moved: torch.Tensor) -> None:
        """Scale A and B of layers whose update is larger than the arm's `max_weight_norm` down to that.

        Arms that have not `moved`, bool [N], stay as they are.
        """
        if self._norms_are_limited:
            for layer in self.layers.values():
                layer.limit_norms(self._most_norms, moved)

    def unpadded(self, buffer: torch.Tensor, index: int) -> torch.Tensor:
        """What row `index` of `buffer`, laid out as `parameters` [N, P], holds of adapter `index` itself:
        float32 [p].

        Its length and order depend on the adapter alone, not on those beside it.
        """
        return buffer[index, self._own_columns(index)]

    def load_unpadded(self, buffer: torch.Tensor, index: int, values: torch.Tensor) -> None:
        """Put what `unpadded` gave of an adapter, of this bank or of another, into row `index` of
        `buffer`.
        """
        buffer[index, self._own_columns(index)] = values.to(buffer.device)

    def _own_columns(self, index: int) -> torch.Tensor:
        """The columns of the buffers that are no padding for adapter `index`: bool [P]."""
        own = torch.zeros(self.parameters.shape[1], dtype=torch.bool, device=self.parameters.device)
        for name, span in self.spans.items():
            for view in self.layers[name].views(own[span], index).values():
                view.fill_(True)
        return own

    def adapter(self, index: int) -> Adapter:
        """Adapter `index` as it goes into files: float32 copies, without padding, on the CPU."""
        arm, modules = self.arms[index], {}
        for target in self.targets:
            layer, row = self.layers[target.name], self.parameters[index, self.spans[target.name]]
            parts = layer.views(row, index)
            if parts:
                copies = {
                    name: part.cpu().clone(memory_format=torch.contiguous_format)
                    for name, part in parts.items()
                }
                modules[target.name_in_files] = layer.module(index, copies)
        return Adapter(modules, "bank", {}, schedule=schedule_of(arm))

    @torch.no_grad()
    def load(self, index: int, adapter: Adapter) -> None:
        """Set adapter `index`; raise `AdapterError` for a missing, unknown or misshapen layer, or another
        alpha.
        """
        arm = self.arms[index]
        if adapter.schedule != (schedule := schedule_of(arm)):
            found, wanted = (
                "none" if item is None else item.as_text() for item in (adapter.schedule, schedule)
            )
            raise AdapterError(
                f"adapter {arm.name!r}: has the T-LoRA schedule {found}, the arm {wanted}: it belongs to "
                "another arm"
            )
        expected = {target.name_in_files: target for target in self.targets if target.is_of(arm)}
        if unknown := sorted(set(adapter.modules) ^ set(expected)):
            raise AdapterError(
                f"adapter {arm.name!r}: {len(unknown)} layers do not match the targets, the first is "
                f"{unknown[0]!r}: train it again or set adapter.targets as it was"
            )
        for name, target in expected.items():
            self._put(index, target, self.layers[target.name].parts(index, adapter.modules[name]))


def _adapted(layer: nn.Module, target: Target, arms: Sequence[Arm]) -> AdaptedLayer:
    """A layer with room for these arms' adapters, which are of kinds that compute in one way."""
    if any(arm.family != "lora" for arm in arms):
        return DifferenceLayer(layer, target, arms)
    if isinstance(layer, nn.Linear):
        return StackedLinear(layer, target, arms)
    return StackedConv(layer, target, arms)
