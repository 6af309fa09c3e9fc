"""The frozen base: a Stable Diffusion v1 pipeline from a folder, a hub repository or one checkpoint file, in
its parts.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from transformers import CLIPTextModel, CLIPTokenizer

from lorascope.base.attention import barred_kernels, set_kernels
from lorascope.base.configs import (
    SD15_DIR,
    check_tokenizer,
    checked_configs,
    config_folder,
    load_part,
    read_part_configs,
)
from lorascope.base.ldm import list_pairs
from lorascope.base.location import PATTERNS, WEIGHT_STEMS, locate
from lorascope.base.models import load_file, load_folder
from lorascope.base.schedule import build_scheduler, noise_schedule, read_scheduler
from lorascope.console import log, size
from lorascope.machine.device import choose_device
from lorascope.machine.memory import free_bytes
from lorascope.machine.transfer import send
from lorascope.sections import BaseSection
from lorascope.store import digest_folder, kept_digest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PICTURE_BYTES = 2 * 2**30  # what drawing one picture may take


@dataclass(frozen=True)
class Base:
    """The frozen model's parts on one device. No tensor in here ever changes."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    name: str  # of the folder or file, or what else it was made from
    source: str  # `diffusers folder`, `checkpoint file` or `random weights`
    folder: Path | None  # of a diffusers folder
    digest: str
    configs: dict[str, dict[str, Any]]  # of unet, vae and text_encoder, as in their config.json
    scheduler_config: dict[str, Any]
    alphas_cumprod: torch.Tensor  # float32 [T] in [0, 1], falling: `schedule.noise_schedule`
    device: torch.device
    half_vae: bool = True  # whether the VAE may work in fp16 on a GPU

    @property
    def prediction_type(self) -> str:
        """`epsilon` or `v_prediction`: what the U-Net predicts."""
        return str(self.scheduler_config.get("prediction_type", "epsilon"))

    @property
    def latent_factor(self) -> int:
        """Pixels per latent position along a side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def describe(self) -> dict[str, Any]:
        """What was loaded, for the manifest."""
        return {
            "model": self.name,
            "source": self.source,
            "digest": self.digest,
            "parameters": {
                name: sum(p.numel() for p in getattr(self, name).parameters())
                for name in ("unet", "vae", "text_encoder")
            },
            "prediction_type": self.prediction_type,
            "dtype": str(self.unet.dtype).removeprefix("torch."),
        }

    @property
    def components(self) -> dict[str, torch.nn.Module]:
        """The parts that can be adapted."""
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def in_fp32(self) -> "Base":
        """The same base with a U-Net in fp32, a copy whose weights are these ones exactly; itself where it is
        in fp32.

        Kernels of attention that are barred stay so. Where a GPU has no room for the copy, its merged weights
        and a picture, all parts are copied to the CPU, where none is.
        """
        if self.unet.dtype == torch.float32:
            return self
        wanted = 2 * sum(4 * weight.numel() for weight in self.unet.parameters()) + _PICTURE_BYTES
        if self.device.type == "cpu" or free_bytes(self.device) >= wanted:
            unet = _copied(self.unet, self.device, torch.float32)
            set_kernels(unet, {}, barred_kernels(self.unet))
            return replace(self, unet=unet)
        log.info(
            "base     %s are not free on the GPU for the U-Net in fp32: it goes to the CPU", size(wanted)
        )
        cpu = torch.device("cpu")
        parts = {name: _copied(getattr(self, name), cpu, torch.float32) for name in WEIGHT_STEMS}
        set_kernels(parts["unet"], {})
        return replace(self, **parts, alphas_cumprod=self.alphas_cumprod.cpu(), device=cpu)

    def build_pipeline(self) -> StableDiffusionPipeline:
        """A diffusers pipeline of this base, with the scheduler of `build_scheduler` and no safety
        checker.
        """
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=build_scheduler(self.scheduler_config, self.alphas_cumprod.cpu()),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def tokenize(self, captions: Sequence[str]) -> torch.Tensor:
        """Token numbers int64 [n, tokens]; captions are padded to full length and cut there."""
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return send(tokens.input_ids, self.device)

    def text_states(self, tokens: torch.Tensor) -> torch.Tensor:
        """The text encoder's last hidden states, float32 [n, tokens, width], of int64 [n, tokens]; keeps
        gradients.
        """
        states: torch.Tensor = self.text_encoder(tokens).last_hidden_state
        return states.float()

    @torch.inference_mode()
    def encode_text(self, captions: Sequence[str]) -> torch.Tensor:
        """The text encoder's last hidden states of captions, float32 [n, tokens, width]."""
        return self.text_states(self.tokenize(captions))

    @torch.inference_mode()
    def encode_pixels(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's posterior, scaled as the U-Net expects: float32 [n, c, h,
        w] each.

        `pixels` is float32 [n, 3, H, W] in [-1, 1].
        """
        moments = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist.parameters
        # In half precision its exponential underflows.
        posterior = DiagonalGaussianDistribution(moments.float())
        factor = self.vae.config.scaling_factor
        return posterior.mean * factor, posterior.std * factor

    @torch.inference_mode()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels float32 [n, 3, H, W], about [-1, 1], from scaled latents [n, c, h, w];
        `autoencoder.to_bytes` makes pictures of them.
        """
        pixels: torch.Tensor = self.vae.decode(
            latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        ).sample
        return pixels.float()


def load_base(base: BaseSection | str, device: torch.device | str = "auto", precision: str = "fp32") -> Base:
    """Load all parts of a base, frozen, in evaluation mode, on `device`.

    `base` is what the key `base.model` takes (`pocket`, a folder in the diffusers layout, one checkpoint file
    in the original layout, a hub id) or the whole section; a `device` in words is as for `choose_device`. The
    U-Net is held in `precision` (`fp32`, `bf16` or `fp16`), VAE and text encoder in fp32. Raises
    `BaseModelError` for a base that is of another family of models, which is named, lacks a part, or has a
    tensor too few, too many or of another shape; and `WeightsError` for damaged weights and values that are
    not finite.
    """
    section = BaseSection(model=base) if isinstance(base, str) else base
    device = choose_device(device) if isinstance(device, str) else device
    place = locate(section)
    with config_folder(place) as folder:
        configs, scheduler_config = checked_configs(folder, place), read_scheduler(folder)
        tokenizer = load_part(CLIPTokenizer, folder, "tokenizer")
    check_tokenizer(tokenizer, configs["text_encoder"], place)
    if section.prediction_type != "auto":
        scheduler_config = {**scheduler_config, "prediction_type": section.prediction_type}
    is_told = section.prediction_type != "auto" or scheduler_config.get("prediction_type") == "v_prediction"
    dtype = DTYPES[precision]
    if place.is_dir():
        facts = {
            "source": "diffusers folder",
            "folder": place,
            "digest": digest_folder(place, PATTERNS, kept_digest),
        }
        models = load_folder(place, dtype)
    else:
        facts = {"source": "checkpoint file", "folder": None, "digest": kept_digest(place)}
        models = load_file(place, configs, dtype, is_told)
    return freeze(models, tokenizer, configs, scheduler_config, device, name=place.name, **facts)


def is_sd15(base: Base) -> bool:
    """Whether all tensors of the base have the names and shapes of Stable Diffusion v1.5's."""
    own, theirs = list_pairs(base.configs), list_pairs(read_part_configs(SD15_DIR))
    return {pair.ldm: pair.ldm_shape for pair in own} == {pair.ldm: pair.ldm_shape for pair in theirs}


def freeze(
    models: dict[str, Any],
    tokenizer: CLIPTokenizer,
    configs: dict[str, dict[str, Any]],
    scheduler_config: dict[str, Any],
    device: torch.device,
    **facts: Any,
) -> Base:
    """The base of these parts, which from here on do not change."""
    set_kernels(models["unet"], {})
    for module in models.values():
        module.eval().requires_grad_(False).to(device)
    alphas_cumprod = noise_schedule(scheduler_config).to(device)
    parts = {
        "tokenizer": tokenizer,
        "configs": configs,
        "scheduler_config": scheduler_config,
        "alphas_cumprod": alphas_cumprod,
    }
    return Base(**models, **parts, **facts, device=device)


def _copied(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """A copy of a frozen module on a device, its floating-point weights in `dtype`; no other copy is made on
    the way.
    """
    known: dict[int, Any] = {id(buffer): buffer.to(device, copy=True) for buffer in module.buffers()}
    for weight in module.parameters():
        moved = weight.detach().to(device, dtype, copy=True)
        known[id(weight)] = torch.nn.Parameter(moved, requires_grad=False)
    return copy.deepcopy(module, known)
