"""The frozen base: a Stable Diffusion v1 pipeline from a folder, a hub repository or one checkpoint file, in
its parts.
"""

import copy
import functools
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    schedulers,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from lorascope.base.attention import barred_kernels, set_kernels
from lorascope.base.family import family_of_folder, family_of_tensors, family_of_unet
from lorascope.base.hub import fetch_snapshot
from lorascope.base.ldm import (
    build_component,
    canonical_name,
    check_tensors,
    from_diffusers,
    list_pairs,
    to_diffusers,
)
from lorascope.base.weights import PICKLE_SUFFIXES, load_tensors, read_header, require_finite, save_tensors
from lorascope.console import log, size
from lorascope.errors import BaseModelError, first_line
from lorascope.machine.memory import free_bytes
from lorascope.machine.transfer import send
from lorascope.schema import BaseSection
from lorascope.store import digest_folder, digest_json, kept_digest, read_regular, require_regular

_COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_MODELS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
# What is loaded of a folder, and so fetched and digested: not the other precisions, pickles and pipelines
# beside it.
_PATTERNS = [
    "model_index.json",
    *(f"{part}/config.json" for part in _MODELS),
    *(
        f"{part}/{stem}{ending}"
        for part, stem in _STEMS.items()
        for ending in (".safetensors", "-?????-of-?????.safetensors")
    ),
    *(f"{part}/{stem}.safetensors.index.json" for part, stem in _STEMS.items()),
    *("tokenizer/*.json", "tokenizer/*.txt", "scheduler/scheduler_config.json"),
]
SD15_DIR = Path(
    str(resources.files("lorascope") / "base" / "sd15")
)  # Stable Diffusion v1.5's configurations and tokenizer, without weights
_FILE_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
_PREDICTION_TYPES = ("epsilon", "v_prediction")
# metadata of our checkpoint files that are not SD v1.5's: {path in the diffusers layout: content}
_CONFIGS_KEY = "lorascope.configs"
_CONFIG_FILE = re.compile(rf"({'|'.join(_COMPONENTS)})/[a-z_]+\.(json|txt)")
# Numbers and lists of a configuration that may not be long: models are built from them before their weights
# are looked at.
_COUNTS = {
    "layers_per_block",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "num_hidden_layers",
}
_CONFIG_LIMIT = 10_000_000  # bytes
_MAX_COUNT = 64
_MAX_LAYERS = 256  # the product of such numbers and the number of blocks
_MAX_FACTOR = 1e6
_MAX_TIMESTEPS = 100_000
_PICTURE_BYTES = 2 * 2**30  # what drawing one picture may take
_NO_EFFECT = {
    "sample_size",
    "architectures",
    "dtype",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
_FLAGS = ("v_pred", "ztsnr")  # empty tensors by which some programs mark what a checkpoint predicts
_WANTED = "give a base of Stable Diffusion v1, such as stable-diffusion-v1-5/stable-diffusion-v1-5"

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
    name: str  # of the folder or file, or what else it was made from
    source: str  # `diffusers folder`, `checkpoint file` or `random weights`
    folder: Path | None  # of a diffusers folder
    digest: str
    configs: dict[str, dict[str, Any]]  # of unet, vae and text_encoder, as in their config.json
    scheduler_config: dict[str, Any]
    alphas_cumprod: torch.Tensor  # float32 [T], in (0, 1), falling
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
        parts = {name: _copied(getattr(self, name), cpu, torch.float32) for name in _MODELS}
        set_kernels(parts["unet"], {})
        return replace(self, **parts, alphas_cumprod=self.alphas_cumprod.cpu(), device=cpu)

    def build_pipeline(self) -> StableDiffusionPipeline:
        """A diffusers pipeline of this base, with the scheduler that it names (PNDM, as SD v1.5's, without
        one) and no safety checker.
        """
        kind: Any = getattr(schedulers, str(self.scheduler_config.get("_class_name")), None)
        if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
            kind = PNDMScheduler
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=kind.from_config(self.scheduler_config),
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
        posterior = DiagonalGaussianDistribution(
            moments.float()
        )  # its exponential underflows in half precision
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


def choose_device(name: str) -> torch.device:
    """The device called `auto`, `cpu`, `cuda` or `mps`; raise `BaseModelError` for a GPU that is not there.

    An Apple GPU is tried first, since torch lacks operations on some systems; `auto` then takes the CPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise BaseModelError(
            'device = "cuda": torch sees no GPU here: use device = "cpu" or install a CUDA build of torch'
        )
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", torch.cuda.current_device())  # with its number, as its tensors say it
    if name == "mps" or (name == "auto" and torch.backends.mps.is_available()):
        try:
            return _tried(torch.device("mps", 0))
        except RuntimeError as error:
            if name == "mps":
                raise BaseModelError(
                    f'device = "mps": does not work here ({first_line(error)}): use device = "cpu"'
                ) from error
            log.warning("device   the Apple GPU is left aside (%s): working on the CPU", first_line(error))
    return torch.device("cpu")


def _tried(device: torch.device) -> torch.device:
    """The device, after a convolution, attention and their backward pass on it; torch's `RuntimeError` where
    they fail.
    """
    weight = torch.ones(2, 2, 3, 3, device=device, requires_grad=True)
    pixels = torch.nn.functional.conv2d(torch.ones(1, 2, 8, 8, device=device), weight)
    tokens = pixels.flatten(2)[:, None]
    torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).sum().backward()
    if weight.grad is None or not weight.grad.isfinite().all():
        raise RuntimeError("a gradient is not finite")
    return device


def _copied(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """A copy of a frozen module on a device, its floating-point weights in `dtype`; no other copy is made on
    the way.
    """
    known: dict[int, Any] = {id(buffer): buffer.to(device, copy=True) for buffer in module.buffers()}
    for weight in module.parameters():
        moved = weight.detach().to(device, dtype, copy=True)
        known[id(weight)] = torch.nn.Parameter(moved, requires_grad=False)
    return copy.deepcopy(module, known)


def resolve_model(
    model: str, revision: str | None, packaged: str, patterns: Sequence[str], what: str
) -> Path:
    """The folder of a model: the package's own for `pocket`, an existing folder, or a hub snapshot
    (downloaded once).

    `packaged` names the folder below `lorascope/pocket`; `patterns` limit what is downloaded; `what` is the
    key that messages start with. Raises `BaseModelError`, and `HubError` where the hub does not give it.
    """
    if model == "pocket":
        return Path(str(resources.files("lorascope") / "pocket" / packaged))
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(model):
        state = "is a file" if folder.exists() else "no such file or folder"
        raise BaseModelError(
            f"{what} = {model!r}: {state}: give `pocket`, a model folder, or a hub id owner/name"
        )
    return fetch_snapshot(
        model, kind="model", revision=revision, patterns=patterns, what=f"{what} = {model!r}"
    )


def is_hub_id(model: str) -> bool:
    """Whether `model` can only be meant as a hub id: owner/name, and no such file or folder here."""
    is_path = model.startswith((".", "/", "~")) or Path(model).suffix.lower() in _FILE_SUFFIXES
    return model.count("/") == 1 and not is_path and not Path(model).exists()


def load_tokenizer(section: BaseSection) -> CLIPTokenizer:
    """The base's tokenizer alone, to count the tokens of captions."""
    with _config_folder(_locate(section)) as folder:
        return _load(CLIPTokenizer, folder, "tokenizer")


def count_tokens(tokenizer: CLIPTokenizer, text: str) -> int:
    """How many tokens a text has, with those of its start and end, cut nowhere."""
    return len(tokenizer(text, verbose=False).input_ids)


def read_configs(section: BaseSection) -> dict[str, dict[str, Any]]:
    """The configurations of the base's `unet`, `vae` and `text_encoder`, held against each other and the
    headers of its weights, of which no data is read; raises `BaseModelError`.
    """
    place = _locate(section)
    with _config_folder(place) as folder:
        return _checked_configs(folder, place)


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
    place = _locate(section)
    with _config_folder(place) as folder:
        configs, scheduler_config = _checked_configs(folder, place), _scheduler_config(folder)
        tokenizer = _load(CLIPTokenizer, folder, "tokenizer")
    _check_tokenizer(tokenizer, configs["text_encoder"], place)
    if section.prediction_type != "auto":
        scheduler_config = {**scheduler_config, "prediction_type": section.prediction_type}
    dtype = DTYPES[precision]
    if place.is_dir():
        facts = {
            "source": "diffusers folder",
            "folder": place,
            "digest": digest_folder(place, _PATTERNS, kept_digest),
        }
        models = _load_folder(place, dtype)
    else:
        facts = {"source": "checkpoint file", "folder": None, "digest": kept_digest(place)}
        models = _load_file(place, configs, dtype, section.prediction_type)
    return _freeze(models, tokenizer, configs, scheduler_config, device, name=place.name, **facts)


def build_random_base(name: str, device: torch.device, precision: str = "fp32", seed: int = 0) -> Base:
    """A full-size base from configuration alone, with random weights that are a function of `seed`; `name` is
    `sd15`.

    Weights are uniform within 1 / sqrt(fan-in), the bounds of torch's own Linear and convolution layers,
    biases zero: its outputs are finite and mean nothing. Raises `BaseModelError` for another name.
    """
    if name != "sd15":
        raise BaseModelError(f"random base {name!r}: only 'sd15' has its configuration in the package")
    folder = SD15_DIR
    configs, scheduler_config = _read_configs(folder), _scheduler_config(folder)
    dtype = DTYPES[precision]
    states: dict[str, dict[str, torch.Tensor]] = {component: {} for component in _MODELS}
    for position, pair in enumerate(list_pairs(configs)):
        weights = _random_weights(
            pair.diffusers, pair.shape, np.random.Generator(np.random.SFC64([seed, position]))
        )
        states[pair.component][pair.diffusers] = weights.to(
            dtype if pair.component == "unet" else torch.float32
        )
    tokenizer = _load(CLIPTokenizer, folder, "tokenizer")
    facts = {
        "name": f"random {name}",
        "source": "random weights",
        "folder": None,
        "digest": digest_json(["random", configs, seed]),
    }
    return _freeze(_build_models(configs, states), tokenizer, configs, scheduler_config, device, **facts)


def save_ldm(
    base: Base, path: Path, dtype: torch.dtype = torch.float16, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a base as one safetensors checkpoint in the original layout, all weights in `dtype`, with further
    `metadata`.

    What of its configuration is not SD v1.5's travels in the file's metadata, and `load_base` reads it back.
    Raises `StorageError`.
    """
    states = {component: getattr(base, component).state_dict() for component in _MODELS}
    state = from_diffusers(states, list_pairs(base.configs))
    own = _own_configs(base)
    configs = {_CONFIGS_KEY: json.dumps(own, sort_keys=True, ensure_ascii=False)} if own else {}
    save_tensors(
        path,
        {name: tensor.to(dtype) for name, tensor in state.items()},
        {"format": "pt", **(metadata or {}), **configs},
    )


def is_sd15(base: Base) -> bool:
    """Whether all tensors of the base have the names and shapes of Stable Diffusion v1.5's."""
    own, theirs = list_pairs(base.configs), list_pairs(_read_configs(SD15_DIR))
    return {pair.ldm: pair.ldm_shape for pair in own} == {pair.ldm: pair.ldm_shape for pair in theirs}


def _freeze(
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
    alphas_cumprod = _alphas_cumprod(scheduler_config).to(device)
    parts = {
        "tokenizer": tokenizer,
        "configs": configs,
        "scheduler_config": scheduler_config,
        "alphas_cumprod": alphas_cumprod,
    }
    return Base(**models, **parts, **facts, device=device)


# -- where it lies and what it is ----------------------------------------------------------------------------


def _locate(section: BaseSection) -> Path:
    """The folder or file of the base, fetched if it must be; a folder is complete and, by its configurations,
    SD v1's.
    """
    try:
        return _locate_readable(section)
    except OSError as error:  # no right to look into it, or no path at all
        raise BaseModelError(
            f"base.model = {section.model[:200]!r}: cannot be read ({error.strerror}): check the path "
            "and its permissions"
        ) from error


def _locate_readable(section: BaseSection) -> Path:
    path = Path(section.model).expanduser()
    if path.exists() and not path.is_dir():
        require_regular(path, BaseModelError)
        if path.suffix.lower() not in _FILE_SUFFIXES:
            raise BaseModelError(
                f"base.model = {section.model!r}: a file of this kind holds no base: give a "
                ".safetensors or .ckpt file"
            )
        return path
    folder = resolve_model(section.model, section.revision, "base", _PATTERNS, "base.model")
    if family := family_of_folder(folder):
        raise BaseModelError(f"{folder}: is {family}: {_WANTED}")
    missing = [part for part in _COMPONENTS if not (folder / part).is_dir()]
    if missing:
        raise BaseModelError(
            f"{folder}: lacks {', '.join(missing)}: give a complete Stable Diffusion folder in the "
            "diffusers layout"
        )
    for file in (
        *folder.glob("*.json"),
        *folder.glob("*/*"),
    ):  # the libraries would open whatever stands there
        if file.exists() and not file.is_dir():
            require_regular(file, BaseModelError)
    return folder


@contextmanager
def _config_folder(place: Path) -> Iterator[Path]:
    """The folder with configurations and tokenizer of a base: its own, or for a file what it carries over SD
    v1.5's own.
    """
    if place.is_dir():
        yield place
        return
    own = (
        read_header(place).metadata.get(_CONFIGS_KEY) if place.suffix.lower() not in PICKLE_SUFFIXES else None
    )
    if own is None:
        yield SD15_DIR
        return
    try:
        files = json.loads(own)
        if unknown := [
            name
            for name, content in files.items()
            if not _CONFIG_FILE.fullmatch(name) or not isinstance(content, str)
        ]:
            raise ValueError(f"{unknown[0]!r} is no configuration")
    except (ValueError, AttributeError, RecursionError) as error:
        raise BaseModelError(
            f"{place}: its metadata {_CONFIGS_KEY} is damaged ({first_line(error)}): get the file again"
        ) from error
    with tempfile.TemporaryDirectory(prefix="lorascope-") as name:
        folder = Path(shutil.copytree(SD15_DIR, Path(name) / "configs"))
        for component in {path.split("/")[0] for path in files}:
            shutil.rmtree(folder / component)
            (folder / component).mkdir()
        for path, content in files.items():
            (folder / path).write_text(content, encoding="utf-8")
        yield folder


def _own_configs(base: Base) -> dict[str, str]:
    """The configuration files of those parts of a base that are not SD v1.5's, by their path in the diffusers
    layout.
    """
    packaged = SD15_DIR
    theirs = {**_read_configs(packaged), "scheduler": _scheduler_config(packaged)}
    files = {}
    for part, config in {**base.configs, "scheduler": base.scheduler_config}.items():
        if _complete(part, config) != _complete(part, theirs[part]):
            files[f"{part}/{'scheduler_config' if part == 'scheduler' else 'config'}.json"] = json.dumps(
                config
            )
    if base.tokenizer.get_vocab() != _load(CLIPTokenizer, packaged, "tokenizer").get_vocab():
        with tempfile.TemporaryDirectory(prefix="lorascope-") as name:
            base.tokenizer.save_pretrained(name)
            files.update(
                {f"tokenizer/{path.name}": path.read_text(encoding="utf-8") for path in Path(name).iterdir()}
            )
    return files


def _complete(part: str, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with all defaults, less what does not change the base's outputs."""
    if part == "scheduler":
        full = DDIMScheduler.from_config(config).config
    elif part == "text_encoder":
        full = CLIPTextConfig.from_dict(config).to_dict()
    else:
        with torch.device("meta"):
            full = build_component(part, config).config
    kept = {key: value for key, value in full.items() if not key.startswith("_") and key not in _NO_EFFECT}
    return json.loads(json.dumps(kept, default=str))


def _read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    configs = {component: _read_config(folder / component / "config.json") for component in _MODELS}
    for component, config in configs.items():
        for key, value in config.items():
            items = value if isinstance(value, list) else [value]
            counts = items if key in _COUNTS and value is not None else []
            if len(items) > _MAX_COUNT or not all(
                type(count) is int and 0 < count <= _MAX_COUNT for count in counts
            ):
                raise BaseModelError(
                    f"{folder / component}: {key[:80]!r} = {repr(value)[:80]}: must be at most "
                    f"{_MAX_COUNT}: {_WANTED}"
                )
        num_layers = max([1, *(len(value) for value in config.values() if isinstance(value, list))])
        for counts in (config[key] for key in _COUNTS if config.get(key)):
            num_layers *= max(counts) if isinstance(counts, list) else counts
        if num_layers > _MAX_LAYERS:
            raise BaseModelError(
                f"{folder / component}: means {num_layers:,} layers, at most {_MAX_LAYERS} are built: "
                f"{_WANTED}"
            )
    return configs


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_regular(path, BaseModelError, _CONFIG_LIMIT).decode())
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(
            f"{path}: cannot be read ({first_line(error)}): the folder is damaged"
        ) from error
    return config


def _scheduler_config(folder: Path) -> dict[str, Any]:
    path = folder / "scheduler" / "scheduler_config.json"
    config = _read_config(path)
    if config.get("prediction_type", "epsilon") not in _PREDICTION_TYPES:
        raise BaseModelError(
            f"{path}: prediction_type = {str(config['prediction_type'])[:80]!r}: must be one of "
            f"{', '.join(_PREDICTION_TYPES)}"
        )
    return config


def _alphas_cumprod(config: dict[str, Any]) -> torch.Tensor:
    """The noise schedule of the base, by diffusers' own scheduler: float32 [T]; raises `BaseModelError` for
    one that is none.
    """
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 0 < steps <= _MAX_TIMESTEPS:
        raise BaseModelError(
            f"num_train_timesteps = {repr(steps)[:80]} of the scheduler: must be 1 to "
            f"{_MAX_TIMESTEPS:,}: {_WANTED}"
        )
    try:
        alphas_cumprod = DDPMScheduler.from_config(config).alphas_cumprod.float()
    except Exception as error:  # the library raises anything on other types than it expects
        raise BaseModelError(
            f"the scheduler's configuration gives no noise schedule ({first_line(error)}): {_WANTED}"
        ) from error
    if alphas_cumprod.shape != (steps,) or not alphas_cumprod.isfinite().all():
        raise BaseModelError(f"the scheduler's betas give no schedule of {steps} finite steps: {_WANTED}")
    return alphas_cumprod


def _checked_configs(folder: Path, place: Path) -> dict[str, dict[str, Any]]:
    """The configurations in `folder` of the base at `place`; raises `BaseModelError` where they are not those
    of its weights, or of models that work together.
    """
    configs = _read_configs(folder)
    _check_fit(configs, place)
    if place.is_dir():
        for part in _MODELS:
            _check_size(place, part, configs[part])
    if fault := _fault_together(json.dumps(configs)):
        raise BaseModelError(f"{place}: the parts of this base do not work together ({fault}): {_WANTED}")
    return configs


def _check_fit(configs: Mapping[str, Mapping[str, Any]], place: Path) -> None:
    """Raise `BaseModelError` where the parts of a base do not belong together by their numbers alone."""
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    if family := family_of_unet(unet):
        raise BaseModelError(f"{place}: is {family}: {_WANTED}")
    fits = (
        (
            "the U-Net takes {} channels and the VAE gives {}",
            unet.get("in_channels", 4),
            vae.get("latent_channels", 4),
        ),
        (
            "the U-Net attends to text of width {} and the text encoder gives {}",
            unet.get("cross_attention_dim"),
            text.get("hidden_size"),
        ),
    )
    for what, taken, given in fits:
        if taken != given:
            raise BaseModelError(f"{place}: {what.format(repr(taken)[:80], repr(given)[:80])}: {_WANTED}")
    factor = vae.get("scaling_factor", 0.18215)
    if not isinstance(factor, int | float) or not 0 < factor < _MAX_FACTOR:
        raise BaseModelError(
            f"{place}: scaling_factor = {repr(factor)[:80]} of the VAE: must be a number above 0: {_WANTED}"
        )


def _check_tokenizer(tokenizer: CLIPTokenizer, text: Mapping[str, Any], place: Path) -> None:
    """Raise `BaseModelError` where such a text encoder does not know what the tokenizer gives."""
    length, positions = tokenizer.model_max_length, text.get("max_position_embeddings", 77)
    if not (type(length) is int and type(positions) is int and 0 < length <= positions):
        raise BaseModelError(
            f"{place}: the tokenizer's model_max_length is {repr(length)[:80]} and the text encoder has "
            f"{repr(positions)[:80]} positions: parts of two bases"
        )
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if len(tokenizer) != text.get("vocab_size") or highest >= len(tokenizer):
        raise BaseModelError(
            f"{place}: the tokenizer has {len(tokenizer)} tokens up to number {highest} and the text "
            f"encoder knows {repr(text.get('vocab_size'))[:80]}: parts of two bases"
        )


def _check_size(folder: Path, part: str, config: Mapping[str, Any]) -> None:
    """Raise `BaseModelError` where a part's configuration means another model than its weights are, before
    anything of that size is built; passes what has no weights.
    """
    shapes = {
        name: info.shape
        for file in _weight_files(folder, part)
        for name, info in read_header(file).tensors.items()
    }
    if not shapes:
        return
    remedy = "configuration and weights are of two models: get the base again"
    with torch.device("meta"):
        state = build_component(part, config).state_dict()
    if unlike := [
        name for name in state if name in shapes and state[name].numel() != math.prod(shapes[name])
    ]:
        name = unlike[0]
        raise BaseModelError(
            f"{folder / part}: {name} has shape {list(shapes[name])}, by the configuration it is "
            f"{list(state[name].shape)}: {remedy}"
        )
    meant, held = sum(t.numel() for t in state.values()), sum(math.prod(shape) for shape in shapes.values())
    if meant > 2 * held:  # fewer that are missing are named when they are loaded
        raise BaseModelError(
            f"{folder / part}: its configuration means {meant:,} weights, its files hold {held:,}: {remedy}"
        )


@functools.lru_cache(maxsize=4)
def _fault_together(configs: str) -> str | None:
    """What goes wrong when a picture goes through models of these configurations, as JSON, without data; or
    None.
    """
    own = json.loads(configs)
    with torch.device("meta"), torch.no_grad():
        parts: dict[str, Any] = {part: build_component(part, own[part]) for part in _MODELS}
        side = 2 ** (len(parts["vae"].config.block_out_channels) - 1) * 64
        try:
            tokens = torch.zeros(1, parts["text_encoder"].config.max_position_embeddings, dtype=torch.long)
            text = parts["text_encoder"](tokens).last_hidden_state
            latents = parts["vae"].encode(torch.zeros(1, 3, side, side)).latent_dist.mean
            noise = parts["unet"](latents, tokens[:, 0], text).sample
            pixels = parts["vae"].decode(latents).sample
        except Exception as error:  # models of strange configurations raise anything
            return first_line(error)
    if noise.shape != latents.shape or pixels.shape != (1, 3, side, side):
        return (
            f"latents of {list(latents.shape[1:])} give noise of {list(noise.shape[1:])} and pixels of "
            f"{list(pixels.shape[1:])}"
        )
    return None


# -- weights -------------------------------------------------------------------------------------------------


def _weight_files(folder: Path, part: str) -> list[Path]:
    """The files of a part's weights in a folder: one, or shards."""
    stem = _STEMS[part]
    endings = (".safetensors", "-?????-of-?????.safetensors")
    return sorted(path for ending in endings for path in (folder / part).glob(stem + ending))


def _load_folder(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The models of a folder in the diffusers layout; its weight files are checked before the libraries read
    them.
    """
    models = {}
    for part, kind in _MODELS.items():
        stem, files = _STEMS[part], _weight_files(folder, part)
        if not files:
            found = (
                ", ".join(
                    sorted(
                        path.name
                        for path in (folder / part).iterdir()
                        if path.suffix in (".safetensors", ".bin")
                    )
                )
                or "no weights"
            )
            raise BaseModelError(
                f"{folder / part}: lacks {stem}.safetensors (it has {found}): get the full-precision "
                "safetensors files"
            )
        options = (
            {"dtype": torch.float32}
            if part == "text_encoder"
            else {"torch_dtype": dtype if part == "unet" else torch.float32}
        )
        model, info = _load(kind, folder, part, use_safetensors=True, output_loading_info=True, **options)
        wrong = {"lacks": info["missing_keys"], "has unknown": info["unexpected_keys"]}
        for what, names in wrong.items():
            if names := sorted(name for name in names if not name.endswith("position_ids")):
                raise BaseModelError(
                    f"{folder / part}: {what} {len(names)} tensors of the {kind.__name__}, the first is "
                    f"{names[0]!r}: the folder is damaged or of another family"
                )
        require_finite(model.state_dict(), folder / part)
        models[part] = model
    return models


def _load(kind: Any, folder: Path, part: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(folder / part, local_files_only=True, **options)
    except Exception as error:  # the libraries raise anything here, from KeyError to SafetensorError
        raise BaseModelError(
            f"{folder / part}: cannot be loaded as {kind.__name__} ({first_line(error)}): the folder is "
            "damaged or of another family"
        ) from error


def _load_file(
    path: Path, configs: dict[str, dict[str, Any]], dtype: torch.dtype, prediction_type: str
) -> dict[str, Any]:
    """The models of one checkpoint file in the original layout, whose names and shapes are checked before
    data is read.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        mapped, metadata = load_tensors(path), {}
        shapes = {name: tuple(tensor.shape) for name, tensor in mapped.items()}
    else:
        header = read_header(path)
        metadata, shapes = header.metadata, {name: info.shape for name, info in header.tensors.items()}
    if family := family_of_tensors(shapes):
        raise BaseModelError(f"{path}: is {family}: {_WANTED}")
    if prediction_type == "auto" and ("v_pred" in shapes or metadata.get("modelspec.prediction_type") == "v"):
        raise BaseModelError(f'{path}: says that it predicts v: set base.prediction_type = "v_prediction"')
    pairs = list_pairs(configs)
    stored_names = {canonical_name(name): name for name in shapes if name not in _FLAGS}
    check_tensors({name: shapes[stored] for name, stored in stored_names.items()}, pairs, path)
    state = load_tensors(path, [stored_names[pair.ldm] for pair in pairs])
    require_finite(state, path)
    if integers := [name for name, tensor in state.items() if not tensor.is_floating_point()]:
        raise BaseModelError(
            f"{path}: {integers[0]} holds {state[integers[0]].dtype}, not floating-point weights: get "
            "the fp16 file"
        )
    states = to_diffusers({pair.ldm: state[stored_names[pair.ldm]] for pair in pairs}, pairs)
    for component, tensors in states.items():
        for name, tensor in tensors.items():  # copied, since what is mapped from a file ends with the file
            tensors[name] = tensor.to(dtype if component == "unet" else torch.float32, copy=True)
    return _build_models(configs, states)


def _build_models(
    configs: dict[str, dict[str, Any]], states: dict[str, dict[str, torch.Tensor]]
) -> dict[str, Any]:
    """Models that hold the tensors of `states` themselves."""
    models: dict[str, Any] = {}
    for component, state in states.items():
        if component == "text_encoder":
            config = CLIPTextConfig.from_dict(configs[component])
            models[component] = CLIPTextModel.from_pretrained(
                None, config=config, state_dict=state, dtype=torch.float32
            )
        else:
            with torch.device("meta"):
                models[component] = build_component(component, configs[component])
            models[component].load_state_dict(state, assign=True)
    return models


def _random_weights(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> torch.Tensor:
    """Weights float32 of `shape`: norms one, biases zero, all else uniform within 1 / sqrt(fan-in)."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    uniform = torch.from_numpy(generator.random(shape, dtype=np.float32))
    return uniform.sub_(0.5).mul_(2 / math.sqrt(math.prod(shape[1:])))
