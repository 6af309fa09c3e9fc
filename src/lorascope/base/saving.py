"""A base as one checkpoint file in the original layout, which other programs read."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTokenizer

from lorascope.base.configs import CONFIGS_KEY, SD15_DIR, load_part, read_part_configs
from lorascope.base.ldm import build_component, from_diffusers, list_pairs
from lorascope.base.loading import Base
from lorascope.base.location import WEIGHT_STEMS
from lorascope.base.schedule import read_scheduler
from lorascope.base.weights import save_tensors

_NO_EFFECT = {
    "sample_size",
    "architectures",
    "dtype",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}


def save_ldm(
    base: Base, path: Path, dtype: torch.dtype = torch.float16, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a base as one safetensors checkpoint in the original layout, all weights in `dtype`, with further
    `metadata`.

    What of its configuration is not SD v1.5's travels in the file's metadata, and `load_base` reads it back.
    Raises `StorageError`.
    """
    states = {component: getattr(base, component).state_dict() for component in WEIGHT_STEMS}
    state = from_diffusers(states, list_pairs(base.configs))
    own = _own_configs(base)
    configs = {CONFIGS_KEY: json.dumps(own, sort_keys=True, ensure_ascii=False)} if own else {}
    save_tensors(
        path,
        {name: tensor.to(dtype) for name, tensor in state.items()},
        {"format": "pt", **(metadata or {}), **configs},
    )


def _own_configs(base: Base) -> dict[str, str]:
    """The configuration files of those parts of a base that are not SD v1.5's, by their path in the diffusers
    layout.
    """
    theirs = {**read_part_configs(SD15_DIR), "scheduler": read_scheduler(SD15_DIR)}
    files = {}
    for part, config in {**base.configs, "scheduler": base.scheduler_config}.items():
        if _complete(part, config) != _complete(part, theirs[part]):
            name = "scheduler_config" if part == "scheduler" else "config"
            files[f"{part}/{name}.json"] = json.dumps(config)
    if base.tokenizer.get_vocab() != load_part(CLIPTokenizer, SD15_DIR, "tokenizer").get_vocab():
        with tempfile.TemporaryDirectory(prefix="lorascope-") as folder:
            base.tokenizer.save_pretrained(folder)
            for path in Path(folder).iterdir():
                files[f"tokenizer/{path.name}"] = path.read_text(encoding="utf-8")
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
