"""A base in full size with random weights: for benchmarks and checks without a download."""

import math

import numpy as np
import torch
from transformers import CLIPTokenizer

from lorascope.base.configs import SD15_DIR, load_part, read_part_configs
from lorascope.base.ldm import list_pairs
from lorascope.base.loading import DTYPES, Base, freeze
from lorascope.base.location import WEIGHT_STEMS
from lorascope.base.models import build_models
from lorascope.base.schedule import read_scheduler
from lorascope.errors import BaseModelError
from lorascope.store import digest_json


def build_random_base(name: str, device: torch.device, precision: str = "fp32", seed: int = 0) -> Base:
    """A full-size base from configuration alone, with random weights that are a function of `seed`; `name` is
    `sd15`.

    Weights are uniform within 1 / sqrt(fan-in), the bounds of torch's own Linear and convolution layers,
    biases zero: its outputs are finite and mean nothing. Raises `BaseModelError` for another name.
    """
    if name != "sd15":
        raise BaseModelError(f"random base {name!r}: only 'sd15' has its configuration in the package")
    folder = SD15_DIR
    configs, scheduler_config = read_part_configs(folder), read_scheduler(folder)
    dtype = DTYPES[precision]
    states: dict[str, dict[str, torch.Tensor]] = {component: {} for component in WEIGHT_STEMS}
    for position, pair in enumerate(list_pairs(configs)):
        generator = np.random.Generator(np.random.SFC64([seed, position]))
        weights = _random_weights(pair.diffusers, pair.shape, generator)
        held = dtype if pair.component == "unet" else torch.float32
        states[pair.component][pair.diffusers] = weights.to(held)
    tokenizer = load_part(CLIPTokenizer, folder, "tokenizer")
    facts = {
        "name": f"random {name}",
        "source": "random weights",
        "folder": None,
        "digest": digest_json(["random", configs, seed]),
    }
    return freeze(build_models(configs, states), tokenizer, configs, scheduler_config, device, **facts)


def _random_weights(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> torch.Tensor:
    """Weights float32 of `shape`: norms one, biases zero, all else uniform within 1 / sqrt(fan-in)."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    uniform = torch.from_numpy(generator.random(shape, dtype=np.float32))
    return uniform.sub_(0.5).mul_(2 / math.sqrt(math.prod(shape[1:])))
