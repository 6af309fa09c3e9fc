"""Small adapter files in the spellings of several programs, and PEFT folders."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from random_adapters import ATTENTION

Tensors = dict[str, torch.Tensor]
KOHYA_ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1"


def pair(down: str, up: str, rank: int = 2, channels: int = 6) -> Tensors:
    generator = torch.Generator().manual_seed(len(down))
    return {
        down: torch.randn(rank, channels, generator=generator),
        up: torch.randn(channels, rank, generator=generator),
    }


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file(tensors, path, metadata)
    return path


def peft_folder(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir()
    write(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8, **config})
    )
    return folder


def peft_pairs() -> Tensors:
    return {
        **pair(
            f"base_model.model.{ATTENTION}.to_q.lora_A.weight",
            f"base_model.model.{ATTENTION}.to_q.lora_B.weight",
        ),
        **pair(
            f"base_model.model.{ATTENTION}.to_k.lora_A.weight",
            f"base_model.model.{ATTENTION}.to_k.lora_B.weight",
            rank=3,
        ),
    }


def kohya(name: str = f"{KOHYA_ATTENTION}_to_q", rank: int = 2, **extra: torch.Tensor) -> Tensors:
    return {
        **pair(f"{name}.lora_down.weight", f"{name}.lora_up.weight", rank),
        **{f"{name}.{key}": value for key, value in extra.items()},
    }


def without(tensors: Tensors, ending: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(ending)}
