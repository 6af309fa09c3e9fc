"""The memory that training will take, counted before it starts: one step is run on tensors without data.

On torch's `meta` device every operation gives tensors that have a size and no content, and autograd keeps of
them what it would keep of real ones. So the count follows the U-Net, the adapters, the attention and the
checkpointing as they are. It does not see what a library takes within an operation (cuDNN's workspaces, MKL's
packed matrices) and what an allocator leaves unused.
"""

import json
import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lorascope.adapters.bank import AdapterBank
from lorascope.adapters.targets import Target
from lorascope.arms import Arm
from lorascope.base.attention import AttentionProcessor, Kernel, Shape, attention_layers
from lorascope.base.loading import Base
from lorascope.console import log, size
from lorascope.machine.memory import free_bytes
from lorascope.sections import TrainSection

FREE_SHARE = (
    0.9  # of the free memory that a plan may fill: the count misses a little, and others use the device
)
_BUFFERS = 4  # float32 copies of an adapter in training: parameters, gradients and AdamW's two moments


@dataclass(frozen=True)
class Estimate:
    """Memory of training a group of arms in one pass, in bytes."""

    num_arms: int
    checkpointing: bool
    weights_bytes: int  # of the frozen base
    adapters_bytes: int  # parameters, gradients and AdamW's two moments, all arms padded to the largest rank
    activations_bytes: (
        int  # what autograd keeps between forward and backward pass, casts of the adapters among it
    )
    working_bytes: int  # what comes on top at the step's peak

    @property
    def training_bytes(self) -> int:
        """What training adds to a base that is loaded."""
        return self.adapters_bytes + self.activations_bytes + self.working_bytes

    @property
    def total_bytes(self) -> int:
        """The base and what training adds to it."""
        return self.weights_bytes + self.training_bytes

    def as_text(self) -> str:
        """What training adds, in one line for people."""
        arms = f"{self.num_arms} arms" if self.num_arms > 1 else "one arm"
        how = " with gradient checkpointing" if self.checkpointing else ""
        return (
            f"{size(self.training_bytes)} for {arms}{how}: adapters and optimizer "
            f"{size(self.adapters_bytes)}, activations {size(self.activations_bytes)}, working memory "
            f"{size(self.working_bytes)}"
        )


def weights_bytes(components: Mapping[str, nn.Module]) -> int:
    """Bytes of all weights and buffers."""
    return sum(
        weight.nbytes
        for module in components.values()
        for weight in (*module.parameters(), *module.buffers())
    )


def estimate_training(
    components: Mapping[str, nn.Module],
    targets: Sequence[Target],
    arms: Sequence[Arm],
    batch_size: int,
    latent_shape: tuple[int, int, int],
    *,
    checkpointing: bool = False,
) -> Estimate:
    """The memory of a training step of `arms` in one pass, `batch_size` pictures of `latent_shape` (c, h, w)
    each.

    `components` are the `unet`, the `text_encoder` and whatever else of the base lies on the device, on any
    device, `meta` too; they are not touched. All arms cost alike, since they are padded to the largest rank.
    Counted once for equal models, layers, ranks and shapes, in about a second for Stable Diffusion v1.5.
    """
    widest = max(arms, key=lambda arm: arm.rank)
    kept, peak = _step_bytes(components, tuple(targets), widest, batch_size, latent_shape, checkpointing)
    parameters = sum(max(target.stored_size(arm) for arm in arms) for target in targets)
    return Estimate(
        num_arms=len(arms),
        checkpointing=checkpointing,
        weights_bytes=weights_bytes(components),
        adapters_bytes=_BUFFERS * 4 * parameters * len(arms),
        activations_bytes=kept * len(arms),
        working_bytes=(peak - kept) * len(arms),
    )


def estimate_pass(
    components: Mapping[str, nn.Module],
    targets: Sequence[Target],
    arms: Sequence[Arm],
    batch_size: int,
    latent_shape: tuple[int, int, int],
    checkpointing: bool | None,
    budget_bytes: float,
) -> Estimate:
    """As `estimate_training`; with `checkpointing` None activations are computed again only if one arm alone
    needs that.

    It does if training it adds more than `budget_bytes` to the loaded base. That several arms together do not
    fit is no reason: fewer arms in a pass cost less time than computing activations again.
    """
    if checkpointing is None:
        alone = max(arms, key=lambda arm: arm.rank)
        checkpointing = (
            estimate_training(components, targets, [alone], batch_size, latent_shape).training_bytes
            > budget_bytes
        )
    return estimate_training(components, targets, arms, batch_size, latent_shape, checkpointing=checkpointing)


def resolve_checkpointing(
    base: Base,
    targets: Sequence[Target],
    arms: Sequence[Arm],
    section: TrainSection,
    latent_shape: tuple[int, int, int],
) -> tuple[Estimate, TrainSection]:
    """What training `arms` in one pass will take, and `section` with its `gradient_checkpointing` decided
    where it is None.

    The budget is nine tenths of what is free now. The figures are logged; a group that will hardly fit is a
    warning, since what others will take of the device, and give back, is not known.
    """
    free, wanted = free_bytes(base.device), section.gradient_checkpointing
    estimate = estimate_pass(
        base.components, targets, arms, section.batch_size, latent_shape, wanted, FREE_SHARE * free
    )
    log.info("memory   training adds about %s; %s are free", estimate.as_text(), size(free))
    if estimate.checkpointing and wanted is None:
        log.info(
            "memory   gradient checkpointing is on, since one arm would not fit without it: steps take "
            "about a third longer"
        )
    if estimate.training_bytes > free:
        remedy = "lower train.batch_size (train.accumulation_steps makes up for it) or data.resolution_px"
        if not estimate.checkpointing:
            remedy = f"set train.gradient_checkpointing = true, or {remedy}"
        if len(arms) > 1:
            remedy = f"lower train.max_stacked_arms, {remedy}"
        log.warning("memory   training will probably not fit: %s", remedy)
    return estimate, section.model_copy(update={"gradient_checkpointing": estimate.checkpointing})


# -- one step without data -----------------------------------------------------------------------------------

_COUNTED: dict[Any, tuple[int, int]] = {}


def _step_bytes(
    components: Mapping[str, nn.Module],
    targets: tuple[Target, ...],
    arm: Arm,
    batch_size: int,
    latent_shape: tuple[int, int, int],
    checkpointing: bool,
) -> tuple[int, int]:
    """What a step of one arm keeps for the backward pass, and its peak; weights and the bank's buffers left
    out.
    """
    unet: Any = components["unet"]
    chosen = {name: _as_on(unet.device.type, item) for name, item in unet.attn_processors.items()}
    processors = {
        name: type(item).__qualname__ + repr(sorted(vars(item).items())) for name, item in chosen.items()
    }
    texts = [target for target in targets if target.component == "text_encoder"]
    key = (
        json.dumps([dict(unet.config), processors], default=str),
        unet.dtype,
        targets,
        arm.rank,
        arm.kind,
        arm.is_anchored,
        arm.layers,
        batch_size,
        latent_shape,
        checkpointing,
    )
    if key not in _COUNTED:
        text_encoder: Any = components["text_encoder"]
        with torch.device("meta"):
            twin: Any = UNet2DConditionModel.from_config(unet.config)
            text_twin = type(text_encoder)(text_encoder.config)
        twin.set_attn_processor(chosen)
        twin.to(unet.dtype).requires_grad_(False).eval()
        text_twin.to(text_encoder.dtype).requires_grad_(False).eval()
        if checkpointing:
            twin.enable_gradient_checkpointing(_checkpointed)
        bank = AdapterBank({"unet": twin, "text_encoder": text_twin}, targets, [arm]).attach()
        _COUNTED[key] = _count_step(
            twin, text_twin if texts else None, bank, batch_size, latent_shape, text_encoder.config
        )
    return _COUNTED[key]


def _count_step(
    unet: Any,
    text_encoder: Any,
    bank: AdapterBank,
    batch_size: int,
    latent_shape: tuple[int, int, int],
    text_config: Any,
) -> tuple[int, int]:
    """Bytes alive after the forward pass, and the most that are alive at once in forward and backward
    pass.
    """
    tokens = torch.zeros(batch_size, text_config.max_position_embeddings, dtype=torch.long, device="meta")
    with _LiveBytes(
        [*unet.parameters(), *(text_encoder or unet).parameters(), bank.parameters, bank.gradients]
    ) as live:
        with _FusedAttention():
            if text_encoder is None:
                text = torch.empty(*tokens.shape, text_config.hidden_size, dtype=unet.dtype, device="meta")
            else:
                text = text_encoder(tokens).last_hidden_state.to(unet.dtype)
            noisy = torch.empty(batch_size, *latent_shape, dtype=unet.dtype, device="meta")
            prediction = unet(noisy, tokens[:, 0], text).sample
        loss = (prediction.float() - noisy.float()).square().mean()
        kept = live.now
        loss.backward()
    return kept, live.peak


class _KernelsOf(AttentionProcessor):
    """Chooses kernels on `meta` as on another type of device."""

    def __init__(self, kernels: Mapping[Shape, Kernel], barred: Collection[str], device_type: str) -> None:
        super().__init__(kernels, barred)
        self.device_type = device_type

    def kernel(self, shape: Shape, device_type: str, dtype: torch.dtype) -> Kernel:
        """The kernel for a shape."""
        return super().kernel(shape, self.device_type, dtype)


def _as_on(device_type: str, processor: Any) -> Any:
    """A processor of attention that does on `meta` what it does on this type of device; on `meta` itself it
    stays as it is.
    """
    if device_type == "meta" or not isinstance(processor, AttentionProcessor):
        return processor
    return _KernelsOf(processor.kernels, processor.barred, device_type)


def attend_as_on(device_type: str, unet: UNet2DConditionModel) -> None:
    """Let a U-Net on `meta` take the attention kernels that it takes on this type of device where none was
    timed.
    """
    for layer in attention_layers(unet):
        layer.set_processor(_KernelsOf({}, (), device_type))


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that come to life within, and of those the ones that still live."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) not in self._alive:
            self._alive.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, num_bytes: int) -> None:
        self._alive.discard(key)
        self.now -= num_bytes


class _FusedAttention(TorchFunctionMode):
    """Within, `scaled_dot_product_attention` takes what a fused kernel takes; on `meta` torch would form the
    score matrix.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _FusedAttentionBytes.apply(*args[:3])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _FusedAttentionBytes(torch.autograd.Function):
    """Keeps query, key, value, output and the logarithm of the softmax's sums, as flash and memory-efficient
    attention do.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # laid out as the query: the heads come together again without a copy
        output = torch.empty_like(query)
        ctx.save_for_backward(
            query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32)
        )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _checkpointed(module: nn.Module, *args: Any) -> Any:
    """Gradient checkpointing as diffusers' own, but what is computed again has fused attention too."""
    return checkpoint(
        module.__call__, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _FusedAttention())
    )
