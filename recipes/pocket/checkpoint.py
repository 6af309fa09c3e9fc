"""Checkpoints that survive being killed while they are written, and finished weights."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: Path, step: int, **parts: Any) -> None:
    """Write the state of every part, atomically."""
    part_path = path.with_suffix(".part")
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, part_path)
    part_path.replace(path)


def load_checkpoint(path: Path, **parts: Any) -> int:
    """Restore every part if the checkpoint exists; return its step, or 0."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])


def save_half(model: Any, folder: Path) -> None:
    """Write a diffusers or transformers model in half precision, to be loaded in single precision.

    transformers loads in the precision that `config.json` names and diffusers in single precision:
    without the correction the parts of one pipeline would not fit together.
    """
    deepcopy(model).half().save_pretrained(folder)
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    config.pop("_name_or_path", None)
    if "dtype" in config:
        config["dtype"] = "float32"
    config_path.write_text(json.dumps(config, indent=2) + "\n")
