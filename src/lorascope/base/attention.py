"""Attention of the U-Net by a kernel chosen for its shape, and for whether a backward pass follows.

Kernels compute softmax(q k^T / sqrt(head_dim)) v (Vaswani et al. 2017) and differ in speed alone, by a factor
of several: torch's fused ones are written for head dimensions that are multiples of 8 up to 64 or 128 (SD
v1.5 has 40, 80 and 160), and the one for CPUs has a slow backward pass in bf16. Zeros appended to q, k and v
change neither scores nor outputs.
"""

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = ("sdpa", "flash", "efficient", "cudnn", "plain")
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


class Shape(NamedTuple):
    """One attention of the U-Net: what its kernel is chosen by."""

    queries: int  # positions of the picture
    keys: int  # the same, or tokens of the text
    heads: int
    head_dim: int
    gradients: bool  # whether a backward pass follows


class Kernel(NamedTuple):
    """How attention is computed: torch's own choice by default."""

    name: str = "sdpa"  # one of `KERNELS`; `sdpa` is torch's choice
    head_dim: int | None = None  # what the head dimension is padded to; as it is when None

    def __str__(self) -> str:
        return self.name if self.head_dim is None else f"{self.name} padded to {self.head_dim}"


def attend(kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of `query` [batch, heads, queries, head_dim] to `key` and `value` [batch, heads, keys,
    head_dim], like `query`.

    Raises `RuntimeError` where torch has no such kernel for these tensors.
    """
    head_dim = query.shape[-1]
    scale = 1 / math.sqrt(head_dim)
    if kernel.name == "plain":
        return _attend_plainly(query * scale, key, value)
    if kernel.head_dim is not None:
        query, key, value = (
            functional.pad(part, (0, kernel.head_dim - head_dim)) for part in (query, key, value)
        )
    if kernel.name == "sdpa":
        out = functional.scaled_dot_product_attention(query, key, value, scale=scale)
    else:
        with sdpa_kernel(_BACKENDS[kernel.name]):
            out = functional.scaled_dot_product_attention(query, key, value, scale=scale)
    return out if kernel.head_dim is None else out[..., :head_dim]


def _attend_plainly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Two matrix products with the softmax between them; keeps all scores [batch * heads, queries, keys] for
    the backward pass.
    """
    q, k, v = (part.flatten(0, 1) for part in (query, key, value))
    return torch.bmm(torch.bmm(q, k.mT).softmax(dim=-1), v).view_as(query)


def padded_head_dims(head_dim: int) -> list[int]:
    """What fused kernels may be faster with: the next multiples of 32 and 64, and the next power of two."""
    padded = {math.ceil(head_dim / multiple) * multiple for multiple in (32, 64)}
    return sorted((padded | {2 ** math.ceil(math.log2(head_dim))}) - {head_dim})


def default_kernel(device_type: str, dtype: torch.dtype, gradients: bool) -> Kernel:
    """The kernel where nothing was timed: the fused one, but for half precision's slow backward pass on CPUs
    (EXPERIMENTS.md).
    """
    return Kernel("plain") if device_type == "cpu" and dtype != torch.float32 and gradients else Kernel()


class AttentionProcessor:
    """Computes the attention layers of a U-Net by the kernels chosen for their shapes, in place of diffusers'
    `AttnProcessor2_0`.

    A shape that was not timed gets the kernel of the timed one most like it: the same heads, likewise to
    itself or to the text, the nearest number of queries. Where there is none, `default_kernel`.
    """

    def __init__(self, kernels: Mapping[Shape, Kernel], barred: Collection[str] = ()) -> None:
        self.kernels, self.barred = dict(kernels), frozenset(barred)

    def kernel(self, shape: Shape, device_type: str, dtype: torch.dtype) -> Kernel:
        """The kernel for a shape; the plain one in place of a barred one."""
        kernel = self._choice(shape, device_type, dtype)
        return Kernel("plain") if kernel.name in self.barred else kernel

    def _choice(self, shape: Shape, device_type: str, dtype: torch.dtype) -> Kernel:
        if shape in self.kernels:
            return self.kernels[shape]
        to_itself = shape.queries == shape.keys
        like = [
            known
            for known in self.kernels
            if known[2:] == shape[2:] and (known.queries == known.keys) == to_itself
        ]
        if not like:
            return default_kernel(device_type, dtype, shape.gradients)
        return self.kernels[min(like, key=lambda known: abs(math.log(known.queries / shape.queries)))]

    def __call__(
        self,
        attention: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states [batch, positions, channels], encoder_hidden_states [batch, tokens, width] -> like
        hidden_states.
        """
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = (attention.to_q(hidden_states), attention.to_k(context), attention.to_v(context))
        query, key, value = (part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in projected)
        gradients = torch.is_grad_enabled() and any(part.requires_grad for part in projected)
        shape = Shape(query.shape[2], key.shape[2], attention.heads, query.shape[3], gradients)
        out = attend(self.kernel(shape, query.device.type, query.dtype), query, key, value)
        return attention.to_out[1](attention.to_out[0](out.transpose(1, 2).flatten(2)))


def set_kernels(
    unet: UNet2DConditionModel, kernels: Mapping[Shape, Kernel], barred: Collection[str] = ()
) -> None:
    """Compute the attention of a U-Net by these kernels, and by none whose name is `barred`.

    Layers that do more than SD v1's, such as normalizing queries or adding their input, keep diffusers'
    processor.
    """
    processor = AttentionProcessor(kernels, barred)
    for layer in attention_layers(unet):
        layer.set_processor(processor)


def barred_kernels(unet: UNet2DConditionModel) -> frozenset[str]:
    """The names of kernels that `set_kernels` barred from a U-Net."""
    own = (item for item in unet.attn_processors.values() if isinstance(item, AttentionProcessor))
    return frozenset().union(*(processor.barred for processor in own))


def attention_layers(unet: UNet2DConditionModel) -> list[Attention]:
    """The attention layers of a U-Net that are as SD v1's: to_q, to_k, to_v, softmax, to_out, and nothing
    else.
    """
    extras = (
        "spatial_norm",
        "group_norm",
        "norm_cross",
        "norm_q",
        "norm_k",
        "added_kv_proj_dim",
        "residual_connection",
    )
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    return [
        layer
        for layer in layers
        if not any(getattr(layer, name) for name in extras) and layer.rescale_output_factor == 1
    ]
