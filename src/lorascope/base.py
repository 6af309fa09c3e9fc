"""The frozen base: a Stable Diffusion pipeline in the diffusers layout, taken apart into what training needs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from lorascope.config import BaseSection
from lorascope.errors import BaseModelError, first_line
from lorascope.store import digest_folder

_COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_PREDICTION_TYPES = ("epsilon", "v_prediction")

for _logging in (diffusers_logging, transformers_logging):  # their bars for loading weights would break ours
    _logging.disable_progress_bar()
    _logging.set_verbosity_error()


@dataclass(frozen=True)
class Base:
    """Everything frozen, on one device. No tensor in here ever changes."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    folder: Path
    digest: str
    scheduler_config: dict[str, Any]
    alphas_cumprod: torch.Tensor  # float32 [T], in (0, 1), falling
    device: torch.device

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
            "model": str(self.folder.name),
            "digest": self.digest,
            "parameters": {name: sum(p.numel() for p in getattr(self, name).parameters()) for name in ("unet", "vae", "text_encoder")},
            "prediction_type": self.prediction_type,
            "dtype": str(self.unet.dtype).removeprefix("torch."),
        }

    @property
    def components(self) -> dict[str, torch.nn.Module]:
        """The parts that can be adapted."""
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def tokenize(self, captions: Sequence[str]) -> torch.Tensor:
        """Token numbers int64 [n, tokens]; captions are padded to full length and cut there."""
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids.to(self.device)

    def text_states(self, tokens: torch.Tensor) -> torch.Tensor:
        """The text encoder's last hidden states, float32 [n, tokens, width], of int64 [n, tokens]; keeps gradients."""
        states: torch.Tensor = self.text_encoder(tokens).last_hidden_state
        return states.float()

    @torch.inference_mode()
    def encode_text(self, captions: Sequence[str]) -> torch.Tensor:
        """The text encoder's last hidden states of captions, float32 [n, tokens, width]."""
        return self.text_states(self.tokenize(captions))

    @torch.inference_mode()
    def encode_pixels(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's posterior, scaled as the U-Net expects: float32 [n, c, h, w] each.

        `pixels` is float32 [n, 3, H, W] in [-1, 1].
        """
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        factor = self.vae.config.scaling_factor
        return posterior.mean.float() * factor, posterior.std.float() * factor

    @torch.inference_mode()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures uint8 [n, H, W, 3] from scaled latents [n, c, h, w]."""
        pixels = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample.float()
        rounded: torch.Tensor = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return rounded.permute(0, 2, 3, 1).cpu()


def choose_device(name: str) -> torch.device:
    """The device called `auto`, `cpu` or `cuda`; raise `BaseModelError` for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BaseModelError('device = "cuda": torch sees no GPU here: use device = "cpu" or install a CUDA build of torch')
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def resolve_model(model: str, revision: str | None, packaged: str, patterns: list[str]) -> Path:
    """The folder of a model: the package's own for `pocket`, an existing folder, or a hub snapshot (downloaded once).

    `packaged` names the folder below `lorascope/pocket`; `patterns` limit what is downloaded. Raises `BaseModelError`.
    """
    if model == "pocket":
        return Path(str(resources.files("lorascope") / "pocket" / packaged))
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        state = "is a file" if folder.exists() else "no such folder"
        raise BaseModelError(f"model {model!r}: {state}: give `pocket`, a model folder in the diffusers layout, or a hub id owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise BaseModelError(
            f"model {model!r}: not in the local hub cache and the hub cannot be reached: go online once, or give a folder"
        ) from error
    except HfHubHTTPError as error:
        code = getattr(error.response, "status_code", "?")
        raise BaseModelError(
            f"model {model!r} (revision {revision or 'main'}): the hub answered {code}: check id, revision and HF_TOKEN"
        ) from error


def load_tokenizer(section: BaseSection) -> CLIPTokenizer:
    """The base's tokenizer alone, to count the tokens of captions."""
    return _load(CLIPTokenizer, _resolve(section), "tokenizer")


def load_base(section: BaseSection, device: torch.device, precision: str = "auto") -> Base:
    """Load all parts of a base, frozen, in evaluation mode, on `device`.

    The U-Net is held in bf16 on a GPU and fp32 on a CPU (`precision` `auto`), VAE and text encoder in fp32. Raises
    `BaseModelError` for a folder that lacks a part or holds another family of models.
    """
    folder = _resolve(section)
    dtype = torch.bfloat16 if precision == "bf16" or (precision == "auto" and device.type == "cuda") else torch.float32
    unet = _load(UNet2DConditionModel, folder, "unet", torch_dtype=dtype)
    vae = _load(AutoencoderKL, folder, "vae", torch_dtype=torch.float32)
    text_encoder = _load(CLIPTextModel, folder, "text_encoder", dtype=torch.float32)
    scheduler_config = _scheduler_config(folder)
    if unet.config.in_channels != vae.config.latent_channels:
        raise BaseModelError(
            f"{folder}: the U-Net takes {unet.config.in_channels} channels and the VAE gives {vae.config.latent_channels}: "
            "this is an inpainting or other variant; give a plain text-to-image base"
        )
    if device.type == "cpu" and dtype == torch.bfloat16:
        # The fused SDPA that diffusers calls by default has a very slow bf16 backward pass on CPUs (EXPERIMENTS.md).
        unet.set_attn_processor(AttnProcessor())
    for module in (unet, vae, text_encoder):
        module.eval().requires_grad_(False).to(device)
    return Base(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=_load(CLIPTokenizer, folder, "tokenizer"),
        folder=folder,
        digest=digest_folder(folder),
        scheduler_config=scheduler_config,
        alphas_cumprod=_alphas_cumprod(scheduler_config).to(device),
        device=device,
    )


def _resolve(section: BaseSection) -> Path:
    patterns = [f"{part}/*.{ending}" for part in _COMPONENTS for ending in ("json", "txt", "safetensors")]
    folder = resolve_model(section.model, section.revision, "base", ["model_index.json", *patterns])
    missing = [part for part in _COMPONENTS if not (folder / part).is_dir()]
    if missing:
        raise BaseModelError(f"{folder}: lacks {', '.join(missing)}: give a complete Stable Diffusion folder in the diffusers layout")
    return folder


def _load(kind: Any, folder: Path, part: str, **options: Any) -> Any:
    weights = {} if kind is CLIPTokenizer else {"use_safetensors": True}
    try:
        return kind.from_pretrained(folder / part, local_files_only=True, **weights, **options)
    except Exception as error:  # the libraries raise anything here, from KeyError to SafetensorError
        raise BaseModelError(
            f"{folder / part}: cannot be loaded as {kind.__name__} ({first_line(error)}): the folder is damaged or of another family"
        ) from error


def _scheduler_config(folder: Path) -> dict[str, Any]:
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path}: cannot be read ({error}): the folder is damaged") from error
    if config.get("prediction_type", "epsilon") not in _PREDICTION_TYPES:
        raise BaseModelError(f"{path}: prediction_type = {config['prediction_type']!r}: must be one of {', '.join(_PREDICTION_TYPES)}")
    return config


def _alphas_cumprod(config: dict[str, Any]) -> torch.Tensor:
    """The noise schedule of the base, by diffusers' own scheduler: float32 [T]."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(config).alphas_cumprod.float()
