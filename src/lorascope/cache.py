"""Encode once: the VAE's posterior per picture and the text states per unique caption, kept across runs.

The cache is addressed by the digest of everything that goes in (encoders, picture bytes, captions, resolution), so a
change of any of them is another entry, and an entry whose manifest does not say the same is refused.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from lorascope.base import Base
from lorascope.data import Dataset, Example
from lorascope.errors import CacheError
from lorascope.store import atomic_path, digest_json

_BATCH_PIXELS = 16 * 512 * 512  # pictures encoded at once: as many as have this many pixels, at most 64


@dataclass(frozen=True)
class Encoded:
    """The encoded pictures of one split."""

    mean: torch.Tensor  # float32 [n, c, h, w], posterior mean of the scaled latents
    std: torch.Tensor  # float32 [n, c, h, w], posterior standard deviation
    caption_index: torch.Tensor  # int64 [n], row of `text_states`
    text_states: torch.Tensor  # float32 [m, tokens, width]; row 0 is the empty caption
    digests: tuple[str, ...]  # of the picture files

    def __len__(self) -> int:
        return len(self.mean)

    def text(self, indices: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
        """Text states [B, tokens, width] of pictures `indices` int64 [B], the empty caption's where `dropped` bool [B]."""
        return self.text_states[torch.where(dropped, 0, self.caption_index[indices])]

    def first(self, count: int) -> "Encoded":
        """The first `count` pictures."""
        return Encoded(self.mean[:count], self.std[:count], self.caption_index[:count], self.text_states, self.digests[:count])


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/lorascope/encoded`, or `~/.cache/lorascope/encoded`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorascope" / "encoded"


def encode_dataset(
    dataset: Dataset, base: Base, cache_dir: Path, progress: Callable[[int], None] = lambda count: None
) -> tuple[Encoded, Encoded, int]:
    """The encoded train and held-out pictures, and how many had to be encoded now (0 when all came from the cache).

    `progress` is called with the number of pictures just encoded. Raises `CacheError` for an entry that is damaged or
    does not belong to these inputs.
    """
    examples = [*dataset.train, *dataset.heldout]
    captions = ["", *sorted({example.caption for example in examples} - {""})]
    manifest = {
        "base": base.digest,
        "resolution_px": dataset.summary["resolution_px"],
        "pictures": [example.digest for example in examples],
        "captions": [example.caption for example in examples],
    }
    key = digest_json(manifest)
    path = cache_dir / f"{key[:32]}.safetensors"
    num_encoded = 0
    if not path.exists():
        tensors = {**_encode_pictures(dataset, examples, base, progress), "text_states": _encode_captions(captions, base)}
        with atomic_path(path) as partial:
            safetensors.torch.save_file(tensors, partial, metadata={"key": key, "manifest": json.dumps(manifest)})
        num_encoded = len(examples)
    tensors = _load(path, key)
    index = {caption: row for row, caption in enumerate(captions)}
    caption_index = torch.tensor([index[example.caption] for example in examples])
    splits = []
    for start, part in ((0, dataset.train), (len(dataset.train), dataset.heldout)):
        span = slice(start, start + len(part))
        splits.append(
            Encoded(
                tensors["mean"][span].to(base.device),
                tensors["std"][span].to(base.device),
                caption_index[span].to(base.device),
                tensors["text_states"].to(base.device),
                tuple(example.digest for example in part),
            )
        )
    return splits[0], splits[1], num_encoded


def _load(path: Path, key: str) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata()["key"]
        if found != key:
            raise CacheError(f"{path}: was made from other pictures, captions, resolution or encoders: delete it and run again")
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise CacheError(f"{path}: damaged ({error}): delete it and run again") from error


def _encode_pictures(dataset: Dataset, examples: Sequence[Example], base: Base, progress: Callable[[int], None]) -> dict[str, torch.Tensor]:
    """Posterior mean and std in the order of `examples`, read in the order in which the source stores them."""
    resolution = dataset.summary["resolution_px"]
    batch_size = max(1, min(64, _BATCH_PIXELS // resolution**2))
    row_of = {example.id: row for row, example in enumerate(examples)}
    stored = dataset.in_storage_order(examples)
    tensors: dict[str, torch.Tensor] = {}
    for start in range(0, len(stored), batch_size):
        batch = stored[start : start + batch_size]
        pixels = torch.from_numpy(np.stack([dataset.load_pixels(example) for example in batch]))
        posterior = dict(zip(("mean", "std"), base.encode_pixels(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1), strict=True))
        rows = [row_of[example.id] for example in batch]
        for name, values in posterior.items():
            tensors.setdefault(name, torch.empty(len(examples), *values.shape[1:]))[rows] = values.cpu()
        progress(len(batch))
    return tensors


def _encode_captions(captions: list[str], base: Base) -> torch.Tensor:
    return torch.cat([base.encode_text(captions[start : start + 64]).cpu() for start in range(0, len(captions), 64)])
