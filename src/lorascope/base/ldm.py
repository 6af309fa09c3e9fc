"""The original layout of Stable Diffusion checkpoints, from the latent-diffusion (LDM) code, against
diffusers' names.

One table of pairs, made from the components' configurations, is used in both directions. The layout's module
names are those of `ldm/modules/diffusionmodules/{openaimodel,model}.py` in CompVis/stable-diffusion;
diffusers reverses the order of the autoencoder's up blocks and holds its attention's 1x1 convolutions as
Linear layers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from lorascope.base.layers import renamed, unet_names
from lorascope.errors import BaseModelError, first_line

# Where the components stand in a checkpoint.
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.text_model.",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# What original files hold besides the three models, or beside their weights: schedules, losses, averages,
# index buffers, and the projection of the text encoder, which its hidden states do not pass.
_HARMLESS_PREFIXES = (
    "model_ema.",
    "loss.",
    "first_stage_model.loss.",
    "cond_stage_model.logit_scale",
    "cond_stage_model.transformer.text_projection.",
)
_HARMLESS_NAMES = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
    "logvar",
    "scale_factor",
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
}


@dataclass(frozen=True)
class Pair:
    """One tensor under both names."""

    component: str  # unet, vae or text_encoder
    diffusers: str  # its name in the component's state dict
    ldm: str  # its name in a checkpoint
    shape: tuple[int, ...]  # in diffusers
    ldm_shape: tuple[int, ...]


def build_component(component: str, config: Mapping[str, Any]) -> nn.Module:
    """The `unet`, `vae` or `text_encoder` of this configuration with its own random initialization, on the
    current device.

    Raises `BaseModelError` for a configuration that no model can be built from.
    """
    try:
        if component == "text_encoder":
            return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))
        module: nn.Module = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[component].from_config(
            dict(config)
        )
        return module
    except Exception as error:  # the libraries raise anything here
        raise BaseModelError(
            f"{component}: no model can be built from its configuration ({first_line(error)}): get the "
            "base again"
        ) from error


def list_pairs(configs: Mapping[str, Mapping[str, Any]]) -> list[Pair]:
    """The table for components with these configurations (`unet`, `vae`, `text_encoder`, as in their
    config.json).

    Raises `BaseModelError` for a component with a module that the layout has no name for.
    """
    pairs = []
    for component, prefix in PREFIXES.items():
        with torch.device("meta"):
            model: Any = build_component(component, configs[component])
        # The text encoder's names are the same in both layouts.
        modules = {"unet": unet_names, "vae": _vae_modules}.get(component)
        try:
            table = dict(modules(model.config)) if modules else None
        except TypeError as error:  # a list in place of a number: blocks of different depths
            raise BaseModelError(
                f"{component}: has blocks of different depths, which the original layout has no names for"
            ) from error
        for name, tensor in model.state_dict().items():
            shape = tuple(tensor.shape)
            is_conv = component == "vae" and ".attentions." in name and len(shape) == 2
            ldm = name if table is None else renamed(name, table)
            pairs.append(Pair(component, name, prefix + ldm, shape, (*shape, 1, 1) if is_conv else shape))
    return pairs


def _vae_modules(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Module paths in the autoencoder."""
    num_layers, num_blocks = config["layers_per_block"], len(config["block_out_channels"])
    yield from (("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv"))
    for half, blocks, sampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        for ours, theirs in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            yield f"{half}.{ours}", f"{half}.{theirs}"
        for ours, theirs in _VAE_ATTENTION.items():
            yield f"{half}.mid_block.attentions.0.{ours}", f"{half}.mid.attn_1.{theirs}"
        for layer in range(2):
            yield f"{half}.mid_block.resnets.{layer}", f"{half}.mid.block_{layer + 1}"
        for block in range(num_blocks):
            theirs_block = f"{half}.{blocks}.{block if half == 'encoder' else num_blocks - 1 - block}"
            ours_block = f"{half}.{blocks}_blocks.{block}"
            for layer in range(num_layers + 1):
                yield f"{ours_block}.resnets.{layer}", f"{theirs_block}.block.{layer}"
                yield (
                    f"{ours_block}.resnets.{layer}.conv_shortcut",
                    f"{theirs_block}.block.{layer}.nin_shortcut",
                )
            yield f"{ours_block}.{sampler}rs.0.conv", f"{theirs_block}.{sampler}.conv"


def is_harmless(name: str) -> bool:
    """Whether a tensor of an original checkpoint is known and of no use here: a schedule, a loss, an average,
    an index.
    """
    return name in _HARMLESS_NAMES or name.startswith(_HARMLESS_PREFIXES)


def canonical_name(name: str) -> str:
    """The layout's own name of a tensor; some programs leave `text_model.` out of the text encoder's
    names.
    """
    short = "cond_stage_model.transformer."
    if name.startswith(tuple(short + module for module in ("embeddings.", "encoder.", "final_layer_norm."))):
        return PREFIXES["text_encoder"] + name.removeprefix(short)
    return name


def check_tensors(shapes: Mapping[str, tuple[int, ...]], pairs: list[Pair], path: object) -> None:
    """Raise `BaseModelError` that names the first tensor missing, unexpected or misshapen in the checkpoint
    `path`.

    `shapes` are the checkpoint's, by canonical name.
    """
    expected = {pair.ldm: pair.ldm_shape for pair in pairs}
    missing = [name for name in expected if name not in shapes]
    unexpected = [name for name in shapes if name not in expected and not is_harmless(name)]
    for what, names in (("lacks", missing), ("has unknown", unexpected)):
        if names:
            raise BaseModelError(
                f"{path}: {what} {len(names)} tensors of Stable Diffusion v1, the first is "
                f"{names[0][:200]!r}: the file is damaged or of another architecture"
            )
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise BaseModelError(
                f"{path}: {name} has shape {list(shapes[name])}, expected {list(shape)}: the file is "
                "damaged or of another architecture"
            )


def to_diffusers(state: Mapping[str, torch.Tensor], pairs: list[Pair]) -> dict[str, dict[str, torch.Tensor]]:
    """State dicts by component from a checkpoint's tensors, which `check_tensors` has passed; views, nothing
    is copied.
    """
    components: dict[str, dict[str, torch.Tensor]] = {component: {} for component in PREFIXES}
    for pair in pairs:
        components[pair.component][pair.diffusers] = state[pair.ldm].view(pair.shape)
    return components


def from_diffusers(
    components: Mapping[str, Mapping[str, torch.Tensor]], pairs: list[Pair]
) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors from the components' state dicts; views, nothing is copied."""
    return {pair.ldm: components[pair.component][pair.diffusers].view(pair.ldm_shape) for pair in pairs}
