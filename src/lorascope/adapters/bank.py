"""LoRA on the layers of a frozen base: several adapters stacked in one bank and computed in one pass.

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

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.modules import LoraModule
from lorascope.adapters.schedule import NUM_TIMESTEPS, schedule_of
from lorascope.adapters.stacked import Magnitudes, StackedConv, StackedLinear
from lorascope.adapters.targets import Target
from lorascope.arms import Arm, Init
from lorascope.errors import AdapterError
from lorascope.seeding import seeded

# The bank's gradients are rows of one buffer, so their strides span it; autograd calls that layout unusual,
# and it is meant.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


def initial_factors(
    init: Init, rank: int, down_shape: Sequence[int], out_features: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, *down_shape] and B [out, r], float32, whose product is zero.

    `kaiming`, with a = sqrt(5), is U(-1/sqrt(in), 1/sqrt(in)), as the reference and PEFT have it, and drawn
    row by row, so that a smaller rank starts as the first rows of a larger one. `gaussian` is N(0, 1/r^2).
    Both leave B zero. `orthogonal` lets B and A, drawn from N(0, 1/100), meet in the even and the odd rows of
    an orthogonal r x r matrix, that is in nothing. PEFT 0.21 has the three, the last for an even r.
    """
    shape, up = (rank, *down_shape), torch.zeros(out_features, rank)
    if init == "kaiming":
        uniform = torch.rand(shape, generator=generator)
        return (uniform * 2 - 1) / math.sqrt(math.prod(down_shape)), up
    if init == "gaussian":
        return torch.randn(shape, generator=generator) / rank, up
    rows, _ = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64, generator=generator))
    even, odd = rows[0::2].float(), rows[1::2].float()
    down = torch.randn(math.prod(down_shape), len(odd), generator=generator) / 10
    up = torch.randn(out_features, len(even), generator=generator) / 10
    return (down @ odd).T.reshape(shape), up @ even


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
    """What `AdapterBank.at` masks: nothing where no arm is T-LoRA."""
    if all(schedule_of(arm, training=True) is None for arm in arms):
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
        self.targets = list(targets)
        self.arms = list(arms)
        device = next(components["unet"].parameters()).device
        ranks = [max(target.rank(arm) for arm in arms) for target in self.targets]
        is_dora = [arm.kind == "dora" for arm in arms]
        self.has_magnitudes = any(is_dora)
        size = sum(
            rank * target.size_per_rank + self.has_magnitudes * target.out_features
            for rank, target in zip(ranks, self.targets, strict=True)
        )
        self.parameters = torch.zeros(len(self.arms), size, device=device)
        self.gradients = torch.zeros_like(self.parameters)
        self.layers: dict[str, StackedLinear | StackedConv] = {}
        self.spans: dict[str, slice] = {}  # columns of the buffers that hold a layer
        start = 0
        for target, rank in zip(self.targets, ranks, strict=True):
            middle, end = start + rank * math.prod(target.down_shape), start + rank * target.size_per_rank
            down = self._leaf(slice(start, middle), (rank, *target.down_shape))
            up = self._leaf(slice(middle, end), (target.out_features, rank))
            magnitudes = None
            if self.has_magnitudes:
                span = slice(end, end := end + target.out_features)
                leaf = self._leaf(span, (target.out_features,))
                magnitudes = Magnitudes(leaf, torch.tensor(is_dora, device=device))
            scales = torch.tensor([target.alpha(arm) / target.rank(arm) for arm in arms], device=device)
            layer: Any = components[target.component].get_submodule(target.path)
            self.layers[target.name] = (StackedLinear if isinstance(layer, nn.Linear) else StackedConv)(
                layer, down, up, scales, magnitudes
            )
            self.spans[target.name] = slice(start, end)
            start = end
        limits = [arm.max_weight_norm for arm in self.arms]
        self._norms_are_limited = any(limit is not None for limit in limits)
        self._most_norms = torch.tensor(
            [math.inf if limit is None else limit for limit in limits], device=device
        )
        self._masks = _plan_masks(self.targets, self.arms, self.layers, device)
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

    def _leaf(self, span: slice, shape: tuple[int, ...]) -> torch.Tensor:
        """A leaf [N, *shape] whose values and gradients live in the bank's buffers."""
        leaf = self.parameters[:, span].unflatten(1, shape).detach().requires_grad_()
        leaf.grad = self.gradients[:, span].unflatten(1, shape)
        return leaf

    @torch.no_grad()
    def initialize(self) -> None:
        """What each arm's `init` says, drawn by (arm's seed, layer)."""
        self.parameters.zero_()
        device = self.parameters.device
        for target in self.targets:
            key = target.path if target.component == "unet" else target.name
            layer = self.layers[target.name]
            for index, arm in enumerate(self.arms):
                rank, generator = target.rank(arm), seeded("adapter", arm.seed, key)
                down, up = initial_factors(arm.init, rank, target.down_shape, target.out_features, generator)
                layer.down[index, :rank].copy_(down)
                layer.up[index, :, :rank].copy_(up)
                if arm.kind == "dora":  # so that it starts as the base
                    norms = layer.row_norms(down[None].to(device), up[None].to(device), layer.scales[[index]])
                    layer.magnitudes_of(index).copy_(norms[0])

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
        self._selection = torch.arange(len(self.arms), device=self.parameters.device)
        for layer in self.layers.values():
            layer.selection = None
            layer.factors = layer.scales.view(-1, 1, 1)
            layer.strengths = None

    def select(self, slices: Sequence[Slice]) -> None:
        """The layout of the next batches: slice s goes through `slices[s]`."""
        selection = torch.tensor([item.adapter for item in slices], device=self.parameters.device)
        strengths = torch.tensor([item.strength for item in slices], device=self.parameters.device)
        self._selection = selection
        is_full = all(item.strength == 1 for item in slices)
        for layer in self.layers.values():
            # DoRA's strength acts on its whole change of the weight.
            factors = layer.scales[selection] * (1 if self.has_magnitudes else strengths)
            layer.selection, layer.factors = selection, factors.view(-1, 1, 1)
            layer.strengths = None if is_full else strengths

    def at(self, timesteps: torch.Tensor, training: bool = False) -> None:
        """Let the components of T-LoRA arms act that their schedules have at `timesteps` [S * samples].

        Of all other arms all components act, and a bank without T-LoRA arms does nothing. `training` says
        whether those that are masked in training alone are masked too. Layers of the text encoder, whose
        states do not depend on a timestep, are not masked.
        """
        is_masked = training or self.is_masked
        for mask in self._masks:
            if not is_masked:
                for layer in mask.layers:
                    layer.mask = None
                continue
            table = mask.in_training if training else mask.in_drawing
            times = timesteps.long().reshape(len(self._selection), -1)  # (S, samples)
            acting = table[self._selection[:, None], times]
            kept = (torch.arange(mask.rank, device=acting.device) < acting[..., None]).to(mask.dtype)
            for layer in mask.layers:
                layer.mask = kept

    def gradient_norms(self) -> torch.Tensor:
        """The l2 norm of each adapter's gradient: float32 [N]."""
        return torch.linalg.vector_norm(self.gradients, dim=1)

    @torch.no_grad()
    def limit_norms(self, moved: torch.Tensor) -> None:
        """Scale A and B of layers whose update is larger than the arm's `max_weight_norm` down to that.

        Arms that have not `moved`, bool [N], stay as they are. kohya's `scale_weight_norms` does the same.
        """
        if not self._norms_are_limited:
            return
        for layer in self.layers.values():
            down = layer.down.flatten(2)
            # |B A|^2 from the r x r products of each with itself.
            squares = ((down @ down.mT) * (layer.up.mT @ layer.up)).sum(dim=(1, 2)).clamp(min=0)
            norms = squares.sqrt() * layer.scales
            shrunk = (self._most_norms / norms).sqrt()
            factors = torch.where(moved & (norms > self._most_norms), shrunk, 1.0)
            layer.down.mul_(factors.view(-1, *[1] * (layer.down.dim() - 1)))
            layer.up.mul_(factors.view(-1, 1, 1))

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
        for target in self.targets:
            layer, rank, columns = (
                self.layers[target.name],
                target.rank(self.arms[index]),
                own[self.spans[target.name]],
            )
            size = layer.down[0].numel()
            end = size + layer.up[0].numel()
            columns[:size].unflatten(0, layer.down.shape[1:])[:rank] = True
            columns[size:end].unflatten(0, layer.up.shape[1:])[:, :rank] = True
            columns[end:] = self.arms[index].kind == "dora"
        return own

    def adapter(self, index: int) -> Adapter:
        """Adapter `index` as it goes into files: float32 copies, without padding, on the CPU."""
        arm = self.arms[index]
        modules = {}
        for target in self.targets:
            layer, rank = self.layers[target.name], target.rank(arm)
            up = layer.up.detach()[index, :, :rank]
            up = up if len(target.down_shape) == 1 else up[:, :, None, None]
            down = layer.down.detach()[index, :rank]
            magnitude = None
            if arm.kind == "dora":
                magnitude = layer.magnitudes_of(index).cpu().clone().view(-1, *[1] * len(target.down_shape))
            modules[target.name_in_files] = LoraModule(
                down.cpu().clone(memory_format=torch.contiguous_format),
                up.cpu().clone(memory_format=torch.contiguous_format),
                target.alpha(arm),
                dora_scale=magnitude,
            )
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
        expected = {target.name_in_files: target for target in self.targets}
        if unknown := sorted(set(adapter.modules) ^ set(expected)):
            raise AdapterError(
                f"adapter {arm.name!r}: {len(unknown)} layers do not match the targets, the first is "
                f"{unknown[0]!r}: train it again or set adapter.targets as it was"
            )
        for name, target in expected.items():
            module, rank = adapter.modules[name], target.rank(arm)
            shapes = [list(module.down.shape), list(module.up.shape[:2])]
            if shapes != [[rank, *target.down_shape], [target.out_features, rank]]:
                raise AdapterError(
                    f"adapter {arm.name!r}: {name} has shapes {shapes[0]} and {shapes[1]}, expected "
                    f"{[rank, *target.down_shape]} and {[target.out_features, rank]}: wrong base or rank"
                )
            scale = target.alpha(arm) / rank
            if not math.isclose(module.scale, scale, rel_tol=1e-6):
                raise AdapterError(
                    f"adapter {arm.name!r}: {name} has scale {module.scale:g}, the arm {scale:g}: it "
                    "belongs to another arm"
                )
            layer = self.layers[target.name]
            layer.down[index, :rank].copy_(module.down)
            layer.up[index, :, :rank].copy_(module.up.flatten(1))
            num_found = 0 if module.dora_scale is None else module.dora_scale.numel()
            num_own = target.out_features if arm.kind == "dora" else 0
            if num_found != num_own:
                raise AdapterError(
                    f"adapter {arm.name!r}: {name} has {num_found} magnitudes of DoRA, the arm {num_own}: it "
                    "belongs to another arm"
                )
            if module.dora_scale is not None:
                layer.magnitudes_of(index).copy_(module.dora_scale.flatten())
