"""Encode once: the VAE's posterior per picture and the text states per unique caption, kept across runs.

Both lie in shards that are only ever added to, in a folder named after everything that shapes a row besides its key: the
base, and the size for pictures. The key of a row is the digest of the picture's bytes or of the caption. So a study
finds whatever any earlier study encoded, a set that grew has only its new pictures encoded, an interrupted encoding
goes on at the last shard, and shards are mapped rather than read where they are too large for memory.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from lorascope.base import Base
from lorascope.data import Dataset, Example
from lorascope.errors import CacheError
from lorascope.store import digest_json
from lorascope.weights import save_tensors

MAX_RESIDENT_BYTES = 2 * 2**30
"""Latents up to this size are moved to the device, larger ones stay mapped files; text states beyond it are not kept at
all, since encoding a caption costs little beside a step on its picture."""

_BATCH_PIXELS = 8 * 512 * 512  # pictures encoded at once: as many as have this many pixels, at most 32
_SHARD_ROWS = 512  # what an interrupted encoding goes on by


@dataclass(frozen=True)
class Encoded:
    """The encoded pictures of one split.

    `latents[i]` is float32 [views, 2, c, h, w]: posterior mean and standard deviation of the scaled latents of picture i as
    it stands and, where flips are wanted, mirrored.
    """

    latents: tuple[torch.Tensor, ...]
    captions: tuple[str, ...]
    digests: tuple[str, ...]  # of the picture files
    repeats: tuple[int, ...]  # times each picture is seen in an epoch
    caption_index: torch.Tensor  # int64 [n], row of `text_states`
    text_states: torch.Tensor | None  # float32 [m, tokens, width], row 0 the empty caption's; None: encode captions when needed

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def num_entries(self) -> int:
        """Pictures seen in an epoch: repeated ones count so often."""
        return sum(self.repeats)

    def buckets(self) -> list[torch.Tensor]:
        """For each shape of latents the pictures of that shape, repeated ones so often: int64 [m]; shapes in order of size."""
        by_shape: dict[torch.Size, list[int]] = {}
        for index, (latents, repeats) in enumerate(zip(self.latents, self.repeats, strict=True)):
            by_shape.setdefault(latents.shape[2:], []).extend([index] * repeats)
        return [torch.tensor(by_shape[shape]) for shape in sorted(by_shape)]

    def largest_shape(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of the largest latents."""
        channels, height, width = max((row.shape[2:] for row in self.latents), key=math.prod)
        return channels, height, width

    def posterior(self, indices: torch.Tensor, flipped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation, float32 [B, c, h, w] each, of pictures of one shape.

        `indices` is int64 [B], `flipped` bool [B]; it is of no account where mirrored views were not encoded.
        """
        rows = [self.latents[index] for index in indices.tolist()]
        views = [row[min(int(flip), len(row) - 1)] for row, flip in zip(rows, flipped.tolist(), strict=True)]
        mean, std = torch.stack(views).unbind(dim=1)
        return mean, std

    def text(self, indices: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
        """Kept text states [B, tokens, width] of pictures `indices` int64 [B], the empty caption's where `dropped` bool [B]."""
        assert self.text_states is not None
        device = self.text_states.device
        return self.text_states[torch.where(dropped, 0, self.caption_index[indices]).to(device)]

    def first(self, count: int) -> "Encoded":
        """The first `count` pictures."""
        return replace(
            self,
            latents=self.latents[:count],
            captions=self.captions[:count],
            digests=self.digests[:count],
            repeats=self.repeats[:count],
            caption_index=self.caption_index[:count],
        )


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/lorascope/encoded`, or `~/.cache/lorascope/encoded`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorascope" / "encoded"


def encode_dataset(
    dataset: Dataset,
    base: Base,
    cache_dir: Path,
    *,
    flip: bool = False,
    keep_text: bool = True,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[Encoded, Encoded, int]:
    """The encoded train and held-out pictures, and how many had to be encoded now (0 when all came from the cache).

    `flip` adds mirrored views; `keep_text` off leaves the text states out, for captions that change from draw to draw or a
    text encoder that is trained. `progress` is called with the number of pictures just encoded or found. Raises
    `CacheError` for a shard that is damaged or does not belong to its folder.
    """
    examples = [*dataset.train, *dataset.heldout]
    by_size: dict[tuple[int, int], list[Example]] = {}
    for example in examples:
        by_size.setdefault((example.width_px, example.height_px), []).append(example)
    latents: dict[str, torch.Tensor] = {}
    num_encoded = 0
    for (width, height), group in sorted(by_size.items()):
        identity = {"kind": "latents", "base": base.digest, "width_px": width, "height_px": height, "flip": flip}
        store = _Store(cache_dir, identity)
        rows, encoded = _find_latents(store, dataset.in_storage_order(group), dataset, base, flip, progress)
        latents |= {example.id: row for example, row in zip(group, rows(group), strict=True)}
        num_encoded += encoded
    captions = ["", *sorted({example.caption for example in examples} - {""})]
    text_states = _find_text(captions, base, cache_dir) if keep_text else None
    fits = sum(row.nbytes for row in latents.values()) <= MAX_RESIDENT_BYTES
    index = {caption: row for row, caption in enumerate(captions)}
    splits = [
        Encoded(
            latents=tuple(latents[example.id].to(base.device) if fits else latents[example.id] for example in part),
            captions=tuple(example.caption for example in part),
            digests=tuple(example.digest for example in part),
            repeats=tuple(example.repeats for example in part),
            caption_index=torch.tensor([index[example.caption] for example in part]),
            text_states=text_states,
        )
        for part in (dataset.train, dataset.heldout)
    ]
    return splits[0], splits[1], num_encoded


def _find_latents(
    store: "_Store", stored: Sequence[Example], dataset: Dataset, base: Base, flip: bool, progress: Callable[[int], None]
) -> tuple[Callable[[Iterable[Example]], Iterator[torch.Tensor]], int]:
    """What gives the latents of examples of one size, after encoding those that are not in the store, and their number."""
    missing = {example.digest: example for example in stored if example.digest not in store}
    progress(len(stored) - len(missing))
    batch_size = max(1, min(32, _BATCH_PIXELS // (stored[0].width_px * stored[0].height_px)))
    queue = list(missing.values())
    for start in range(0, len(queue), _SHARD_ROWS):
        shard = queue[start : start + _SHARD_ROWS]
        parts = []
        for first in range(0, len(shard), batch_size):
            batch = shard[first : first + batch_size]
            parts.append(_encode_pictures(batch, batch_size, dataset, base, flip))
            progress(len(batch))
        store.add([example.digest for example in shard], torch.cat(parts))
    return (lambda examples: (store.row(example.digest) for example in examples)), len(queue)


def _encode_pictures(batch: Sequence[Example], batch_size: int, dataset: Dataset, base: Base, flip: bool) -> torch.Tensor:
    """Posterior mean and std of some pictures of one size: float32 [B, views, 2, c, h, w], on the CPU.

    The batch is filled up to `batch_size`: libraries choose their kernels by it, and a picture's latents must be the same to the
    last bit whichever pictures were encoded with it, today or by an earlier study.
    """
    pictures = np.stack([dataset.load_pixels(example) for example in batch])
    filled = np.concatenate([pictures, np.zeros((batch_size - len(batch), *pictures.shape[1:]), np.uint8)])
    pixels = torch.from_numpy(filled).permute(0, 3, 1, 2)
    views = [pixels, pixels.flip(-1)] if flip else [pixels]
    posteriors = [torch.stack(base.encode_pixels(view.float() / 127.5 - 1), dim=1)[: len(batch)].cpu() for view in views]
    return torch.stack(posteriors, dim=1)


def _find_text(captions: Sequence[str], base: Base, cache_dir: Path) -> torch.Tensor | None:
    """Text states float32 [m, tokens, width] of the captions on the base's device, or None where they are too large to keep."""
    config = base.text_encoder.config
    if len(captions) * base.tokenizer.model_max_length * config.hidden_size * 4 > MAX_RESIDENT_BYTES:
        return None
    store = _Store(cache_dir, {"kind": "text", "base": base.digest})
    keys = {caption: hashlib.sha256(caption.encode()).hexdigest() for caption in captions}
    queue = [caption for caption in captions if keys[caption] not in store]
    for start in range(0, len(queue), _SHARD_ROWS):
        shard = queue[start : start + _SHARD_ROWS]
        states = torch.cat([base.encode_text(shard[first : first + 64]).cpu() for first in range(0, len(shard), 64)])
        store.add([keys[caption] for caption in shard], states)
    return torch.stack([store.row(keys[caption]) for caption in captions]).to(base.device)


class _Store:
    """Rows by key, in shards `<digest of its keys>.safetensors` of one folder."""

    def __init__(self, cache_dir: Path, identity: dict[str, object]) -> None:
        self._identity = digest_json(identity)
        self._folder = cache_dir / self._identity[:32]
        self._places: dict[str, tuple[Path, int]] = {}
        self._shards: dict[Path, torch.Tensor] = {}
        for path in sorted(self._folder.glob("[!.]*.safetensors")):
            self._index(path)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def row(self, key: str) -> torch.Tensor:
        """One row; it maps its shard's file and is read when it is touched."""
        path, row = self._places[key]
        if path not in self._shards:
            try:
                self._shards[path] = safetensors.torch.load_file(path)["rows"]
            except (SafetensorError, OSError, KeyError) as error:
                raise _damaged(path, error) from error
        return self._shards[path][row]

    def add(self, keys: Sequence[str], rows: torch.Tensor) -> None:
        """Write a shard of rows [len(keys), ...]."""
        path = self._folder / f"{digest_json(list(keys))[:32]}.safetensors"
        save_tensors(path, {"rows": rows}, {"identity": self._identity, "keys": json.dumps(list(keys))})
        self._index(path)

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                keys = json.loads(metadata["keys"])
                num_rows = file.get_slice("rows").get_shape()[0]
            if metadata["identity"] != self._identity or len(keys) != num_rows:
                raise CacheError(f"{path}: was made from another base or size: delete it and run again")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, error) from error
        for row, key in enumerate(keys):
            self._places.setdefault(key, (path, row))


def _damaged(path: Path, error: Exception) -> CacheError:
    return CacheError(f"{path}: damaged ({error}): delete it and run again")
