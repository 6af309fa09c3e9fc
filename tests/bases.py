"""Bases on disk for the tests of loading: changed, loaded and compared."""

import json
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from lorascope.base.loading import Base, load_base
from lorascope.base.weights import load_tensors, read_header, save_tensors
from lorascope.sections import BaseSection

CPU = torch.device("cpu")


def load(folder: Path) -> Base:
    """The base at a place, on the CPU."""
    return load_base(BaseSection(model=str(folder)), CPU)


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = dict(safetensors.torch.load_file(path))
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def rewrite(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object], **metadata: str) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_tensors(checkpoint).items()}
    kept = read_header(checkpoint).metadata
    change(tensors)
    save_tensors(checkpoint, tensors, {**kept, **metadata})


def assert_same_models(one: Base, two: Base) -> None:
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(one, part).state_dict(), getattr(two, part).state_dict()
        assert ours.keys() == theirs.keys() and all(
            torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
        )
