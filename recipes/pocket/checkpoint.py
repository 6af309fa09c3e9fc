"""Checkpoints that survive being killed while they are written."""

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
