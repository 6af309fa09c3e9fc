"""Encode once: the VAE's posterior per picture and the text states per unique caption, kept across runs.

Both lie in shards that are only ever added to, in a folder named after everything that shapes a row besides
its key: the base, and the size for pictures. The key of a row is the digest of the picture's bytes or of the
caption. So a study finds whatever any earlier study encoded, a set that grew has only its new pictures
encoded, an interrupted encoding goes on at the last shard, and shards are mapped rather than read where they
are too large for memory.
"""

import hashlib
import itertools
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorascope.base.autoencoder import Autoencoder
from lorascope.base.loading import Base
from lorascope.base.weights import load_sealed, load_tensors, read_header, save_sealed
from lorascope.console import log
from lorascope.data.dataset import Dataset
from lorascope.data.examples import Example
from lorascope.errors import CacheError, DataError, WeightsError
from lorascope.machine.memory import free_bytes
from lorascope.machine.transfer import send
from lorascope.store import digest_json, storage_errors, user_cache_path

MAX_RESIDENT_BYTES = 2 * 2**30
"""What latents and text states may each take on a CPU; on a GPU it is a quarter of the free memory. Latents
up to this size lie on the device, larger ones stay mapped files; text states beyond it are not kept at all,
since encoding a caption costs little beside a step on its picture.
"""

_BATCH_PIXELS = 8 * 512 * 512  # pictures encoded at once: as many as have this many pixels, at most 32
_BATCHES_AHEAD = 3  # decoded before the encoder is done with the present one
_SHARD_ROWS = 512  # what an interrupted encoding goes on by


@dataclass(frozen=True)
class Encoded:
    """The encoded pictures of one split.

    `latents[i]` is float32 [views, 2, c, h, w]: posterior mean and standard deviation of the scaled latents
    of picture i as it stands and, where flips are wanted, mirrored.
    """

    latents: tuple[torch.Tensor, ...]
    captions: tuple[str, ...]
    digests: tuple[str, ...]  # of the picture files
    repeats: tuple[int, ...]  # times each picture is seen in an epoch
    caption_index: torch.Tensor  # int64 [n], row of `text_states`
    text_states: (
        torch.Tensor | None
    )  # float32 [m, tokens, width], row 0 the empty caption's; None: encode captions when needed

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def num_entries(self) -> int:
        """Pictures seen in an epoch: repeated ones count so often."""
        return sum(self.repeats)

    def buckets(self) -> list[torch.Tensor]:
        """For each shape of latents the pictures of that shape, repeated ones so often: int64 [m]; shapes in
        order of size.
        """
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
        """Kept text states [B, tokens, width] of pictures `indices` int64 [B], the empty caption's where
        `dropped` bool [B].
        """
        assert self.text_states is not None
        rows = torch.where(dropped, 0, self.caption_index[indices])
        return self.text_states[send(rows, self.text_states.device)]

    def first(self, count: int) -> "Encoded":
        """The first `count` pictures."""
        return self.subset(range(min(count, len(self))))

    def subset(self, indices: Sequence[int]) -> "Encoded":
        """The pictures `indices`, in that order."""
        return replace(
            self,
            latents=tuple(self.latents[index] for index in indices),
            captions=tuple(self.captions[index] for index in indices),
            digests=tuple(self.digests[index] for index in indices),
            repeats=tuple(self.repeats[index] for index in indices),
            caption_index=self.caption_index[torch.tensor(list(indices), dtype=torch.int64)],
        )


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/lorascope/encoded`, or `~/.cache/lorascope/encoded`."""
    return user_cache_path("encoded")


def encode_dataset(
    dataset: Dataset,
    base: Base,
    cache_dir: Path,
    *,
    flip: bool = False,
    keep_text: bool = True,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[Encoded, Encoded, int]:
    """The encoded train and held-out pictures, and how many had to be encoded now (0 when all came from the
    cache).

    `flip` adds mirrored views; `keep_text` off leaves the text states out, for captions that change from draw
    to draw or a text encoder that is trained. `progress` is called with the number of pictures just encoded
    or found. A damaged shard is encoded again, with a warning. Raises `CacheError` for a shard that does not
    belong to its folder, and `DataError` for a picture whose latents are not finite.
    """
    examples = [*dataset.train, *dataset.heldout]
    by_size: dict[tuple[int, int], list[Example]] = {}
    for example in examples:
        by_size.setdefault((example.width_px, example.height_px), []).append(example)
    latents, num_encoded = _find_latents(dataset, by_size, base, cache_dir, flip, progress)
    captions = ["", *sorted({example.caption for example in examples} - {""})]
    text_states = _find_text(captions, base, cache_dir) if keep_text else None
    index = {caption: row for row, caption in enumerate(captions)}
    splits = [
        Encoded(
            latents=tuple(latents[example.id] for example in part),
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
    dataset: Dataset,
    by_size: Mapping[tuple[int, int], Sequence[Example]],
    base: Base,
    cache_dir: Path,
    flip: bool,
    progress: Callable[[int], None],
) -> tuple[dict[str, torch.Tensor], int]:
    """The latents of examples by id, from the cache or encoded now, and how many had to be."""
    autoencoder = Autoencoder(base)
    precision = {} if autoencoder.precision == "float32" else {"precision": autoencoder.precision}
    stores: dict[tuple[int, int], _Store] = {}
    num_encoded = 0
    for (width, height), group in sorted(by_size.items()):
        identity = {
            "kind": "latents",
            "base": base.digest,
            "width_px": width,
            "height_px": height,
            "flip": flip,
            **precision,
        }
        stores[width, height] = _Store(cache_dir, identity)
        num_encoded += _add_missing(
            stores[width, height], dataset.in_storage_order(group), dataset, autoencoder, flip, progress
        )
    autoencoder.warn_of_overflows()
    return _gather(stores, by_size, base.device), num_encoded


def _add_missing(
    store: "_Store",
    stored: Sequence[Example],
    dataset: Dataset,
    autoencoder: Autoencoder,
    flip: bool,
    progress: Callable[[int], None],
) -> int:
    """Encode those of some examples of one size that are not in the store; how many those were."""
    absent = store.missing([example.digest for example in stored])
    missing = {example.digest: example for example in stored if example.digest in absent}
    progress(len(stored) - len(missing))
    batch_size = max(1, min(32, _BATCH_PIXELS // (stored[0].width_px * stored[0].height_px)))
    queue = list(missing.values())
    shards = [queue[start : start + _SHARD_ROWS] for start in range(0, len(queue), _SHARD_ROWS)]
    batches = [
        [shard[first : first + batch_size] for first in range(0, len(shard), batch_size)] for shard in shards
    ]
    started = time.perf_counter()
    with closing(
        _decoded(dataset, list(itertools.chain(*batches)), batch_size, autoencoder.device)
    ) as decoded:
        for shard, parts in zip(shards, batches, strict=True):
            rows = []
            for batch in parts:
                rows.append(_encode_pictures(next(decoded), len(batch), autoencoder, flip))
                progress(len(batch))
            latents = torch.cat(rows).cpu()
            _require_finite(latents, shard)
            store.add([example.digest for example in shard], latents)
    if queue and autoencoder.device.type == "cuda":
        num_views = sum(map(len, batches)) * (1 + flip)
        size = (batch_size, 3, queue[0].height_px, queue[0].width_px)
        share = autoencoder.share_of_limit(size, num_views, time.perf_counter() - started)
        log.info(
            "encode   %d x %d px: %.0f %% of what the GPU reaches in a product of matrices",
            *size[:1:-1],
            100 * share,
        )
    return len(queue)


def _require_finite(latents: torch.Tensor, examples: Sequence[Example]) -> None:
    """Raise `DataError` that names the first picture whose latents [n, ...] are not finite."""
    for is_finite, example in zip(latents.flatten(1).isfinite().all(dim=1).tolist(), examples, strict=True):
        if not is_finite:
            raise DataError(
                f"{example.id}: the base's VAE makes NaN or infinity of this picture: leave it out, or use "
                "another base"
            )


def _decoded(
    dataset: Dataset, batches: Sequence[Sequence[Example]], batch_size: int, device: torch.device
) -> Generator[torch.Tensor, None, None]:
    """The pictures of each batch in order, uint8 [batch_size, H, W, 3], filled up with black; decoded ahead
    by threads.

    In pinned memory for a GPU. What a picture cannot be loaded for is raised at its batch.
    """
    pending: deque[tuple[torch.Tensor, list[Future[None]]]] = deque()

    def load(place: torch.Tensor, example: Example) -> None:
        place.numpy()[...] = dataset.load_pixels(example)

    readers = ThreadPoolExecutor(os.cpu_count())
    try:
        for number in range(len(batches) + _BATCHES_AHEAD):
            if number < len(batches):
                batch = batches[number]
                pixels = torch.zeros(
                    batch_size,
                    batch[0].height_px,
                    batch[0].width_px,
                    3,
                    dtype=torch.uint8,
                    pin_memory=device.type == "cuda",
                )
                pending.append(
                    (
                        pixels,
                        [readers.submit(load, pixels[row], example) for row, example in enumerate(batch)],
                    )
                )
            if number >= _BATCHES_AHEAD:
                pixels, loads = pending.popleft()
                for done in loads:
                    done.result()
                yield pixels
    finally:
        readers.shutdown(cancel_futures=True)


def _encode_pictures(
    pictures: torch.Tensor, count: int, autoencoder: Autoencoder, flip: bool
) -> torch.Tensor:
    """Posterior mean and std of the first `count` of uint8 pictures [B, H, W, 3] of one size: float32 [count,
    views, 2, c, h, w].

    All are encoded, also those that only fill the batch: libraries choose their kernels by its size, and a
    picture's latents must be the same to the last bit whichever pictures were encoded with it, today or by an
    earlier study.
    """
    pixels = pictures.permute(0, 3, 1, 2)
    views = [pixels, pixels.flip(-1)] if flip else [pixels]
    return torch.stack([autoencoder.encode(view)[:count] for view in views], dim=1)


def _gather(
    stores: Mapping[tuple[int, int], "_Store"],
    by_size: Mapping[tuple[int, int], Sequence[Example]],
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """The latents of all examples by id: mapped from their files, or on a CUDA GPU that has room views of one
    tensor a size.
    """
    rows = {size: [stores[size].row(example.digest) for example in group] for size, group in by_size.items()}
    if device.type == "cuda" and sum(
        row.nbytes for group in rows.values() for row in group
    ) <= _resident_bytes(device):
        rows = {size: list(torch.stack(group).to(device)) for size, group in rows.items()}
    return {
        example.id: row
        for size, group in by_size.items()
        for example, row in zip(group, rows[size], strict=True)
    }


def _resident_bytes(device: torch.device) -> int:
    return free_bytes(device) // 4 if device.type == "cuda" else MAX_RESIDENT_BYTES


def _find_text(captions: Sequence[str], base: Base, cache_dir: Path) -> torch.Tensor | None:
    """Text states float32 [m, tokens, width] of the captions on the base's device, or None where they are too
    large to keep.
    """
    config = base.text_encoder.config
    if len(captions) * base.tokenizer.model_max_length * config.hidden_size * 4 > _resident_bytes(
        base.device
    ):
        return None
    store = _Store(cache_dir, {"kind": "text", "base": base.digest})
    keys = {caption: hashlib.sha256(caption.encode()).hexdigest() for caption in captions}
    absent = store.missing(list(keys.values()))
    queue = [caption for caption in captions if keys[caption] in absent]
    for start in range(0, len(queue), _SHARD_ROWS):
        shard = queue[start : start + _SHARD_ROWS]
        states = torch.cat(
            [base.encode_text(shard[first : first + 64]).cpu() for first in range(0, len(shard), 64)]
        )
        store.add([keys[caption] for caption in shard], states)
    return torch.stack([store.row(keys[caption]) for caption in captions]).to(base.device)


class _Store:
    """Rows by key, in shards `<digest of its keys>.safetensors` of one folder."""

    def __init__(self, cache_dir: Path, identity: dict[str, object]) -> None:
        self._identity = digest_json(identity)
        self._folder = cache_dir / self._identity[:32]
        self._places: dict[str, tuple[Path, int]] = {}
        self._shards: dict[Path, torch.Tensor] = {}  # those that are known to be whole
        for path in sorted(self._folder.glob("[!.]*.safetensors")):
            self._index(path)

    def missing(self, keys: Collection[str]) -> set[str]:
        """Those of the keys that have no row; the shards of the others are read through once, held against
        their digests and thrown away with a warning where they are damaged.
        """
        for path in sorted({self._places[key][0] for key in keys if key in self._places} - set(self._shards)):
            try:
                rows = load_sealed(path)[0]["rows"]
                if not torch.stack(rows.aminmax()).isfinite().all():
                    raise ValueError("it holds NaN or infinity")
                self._shards[path] = rows
            except (WeightsError, KeyError, ValueError) as error:
                self._discard(path, error)
        return {key for key in keys if key not in self._places}

    def row(self, key: str) -> torch.Tensor:
        """One row of a key that is not missing; it is mapped from its shard's file and read when it is
        touched.
        """
        path, row = self._places[key]
        return self._shards[path][row]

    def add(self, keys: Sequence[str], rows: torch.Tensor) -> None:
        """Write a shard of rows [len(keys), ...]."""
        path = self._folder / f"{digest_json(list(keys))[:32]}.safetensors"
        save_sealed(path, {"rows": rows}, {"identity": self._identity, "keys": json.dumps(list(keys))})
        self._index(path)
        self._shards[path] = load_tensors(path)["rows"]

    def _index(self, path: Path) -> None:
        try:
            header = read_header(path)
            keys, num_rows = json.loads(header.metadata["keys"]), header.tensors["rows"].shape[0]
            if len(keys) != num_rows:
                raise ValueError(f"{num_rows} rows of {len(keys)} keys")
            if header.metadata["identity"] != self._identity:
                raise CacheError(f"{path}: was made from another base or size: delete it and run again")
        except (WeightsError, LookupError, TypeError, ValueError) as error:
            self._discard(path, error)
            return
        for row, key in enumerate(keys):
            self._places.setdefault(key, (path, row))

    def _discard(self, path: Path, error: Exception) -> None:
        """Remove a damaged shard: what it held is made again."""
        log.warning(
            "encode   %s: damaged (%s): it is encoded again", path, str(error).removeprefix(f"{path}: ")
        )
        with storage_errors(path):
            path.unlink(missing_ok=True)
        self._places = {key: place for key, place in self._places.items() if place[0] != path}
