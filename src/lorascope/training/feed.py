"""Batches for training, in their order, on the base's device before they are needed."""

import random
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from lorascope.arms import Arm
from lorascope.base.loading import Base
from lorascope.data.captions import shuffled_caption
from lorascope.data.encoding import Encoded
from lorascope.machine.transfer import send
from lorascope.sections import DataSection, TrainSection
from lorascope.training.objective import Draws, batch_indices, draw, plan_batches


class Batch(NamedTuple):
    """What all arms of a group see in one forward pass, arm after arm: N arms of B pictures."""

    latents: torch.Tensor  # float32 [N * B, c, h, w]
    noise: torch.Tensor  # float32 [N * B, c, h, w]
    timesteps: torch.Tensor  # int64 [N * B]
    # states float32 [N * B, tokens, width], or tokens int64 [N * B, tokens] where the arms adapt the text
    # encoder
    text: torch.Tensor


class _Drawn(NamedTuple):
    """A batch under one training seed, on the CPU, or where the pictures lie."""

    indices: torch.Tensor  # int64 [B]
    draws: Draws
    # mean and std, float32 [B, c, h, w] each; None: they lie on the GPU
    posterior: tuple[torch.Tensor, torch.Tensor] | None


class Feed:
    """The batches of a training, from encoded pictures.

    Which pictures, noise and timesteps batch k holds depends on the arms' seeds and k alone. Where the device
    is a GPU, a thread draws the next batch, and reads it from mapped files if the pictures did not fit, while
    the step computes.
    """

    def __init__(
        self,
        base: Base,
        pictures: Encoded,
        arms: Sequence[Arm],
        section: TrainSection,
        data: DataSection,
        num_batches: int,
        *,
        as_tokens: bool,
        prefetch: bool,
    ) -> None:
        self.base, self.pictures, self.section, self.data, self.as_tokens = (
            base,
            pictures,
            section,
            data,
            as_tokens,
        )
        self.seeds = [arm.seed for arm in arms]
        self.buckets = pictures.buckets()
        self.batches = plan_batches([len(bucket) for bucket in self.buckets], section.batch_size, num_batches)
        self._thread = ThreadPoolExecutor(1, "feed") if prefetch else None
        self._ahead: dict[int, Future[Mapping[int, _Drawn]]] = {}

    def load(self, number: int) -> Batch:
        """Batch `number` (from 0) on the base's device. Arms of one seed get the same rows."""
        drawn = self._ahead.pop(number).result() if number in self._ahead else self._draw(number)
        if self._thread is not None and number + 1 < len(self.batches):
            self._ahead = {number + 1: self._thread.submit(self._draw, number + 1)}
        rows = {seed: self._place(seed, number, part) for seed, part in drawn.items()}
        return Batch(*(torch.cat(parts) for parts in zip(*(rows[seed] for seed in self.seeds), strict=True)))

    def largest_batch(self, start: int) -> int:
        """The first batch from number `start` on of the largest pictures among these; `start` where none is
        left.
        """
        sizes = [self.pictures.latents[int(bucket[0])][0, 0].numel() for bucket in self.buckets]
        numbers = range(start, len(self.batches))
        return max(numbers, key=lambda number: sizes[self.batches[number][0]], default=start)

    def _draw(self, number: int) -> dict[int, _Drawn]:
        """What batch `number` is made of, by training seed; issues no work to a GPU, whose stream may be
        recorded meanwhile.
        """
        section = self.section
        bucket, number_in_bucket = self.batches[number]
        on_gpu = self.pictures.latents[0].is_cuda
        drawn = {}
        for seed in dict.fromkeys(self.seeds):
            indices = batch_indices(seed, bucket, self.buckets[bucket], number_in_bucket, section.batch_size)
            shape = tuple(self.pictures.latents[int(indices[0])].shape[2:])
            draws = draw(seed, self._positions(number), shape, len(self.base.alphas_cumprod), section)
            drawn[seed] = _Drawn(
                indices, draws, None if on_gpu else self.pictures.posterior(indices, draws.flipped)
            )
        return drawn

    def _positions(self, number: int) -> range:
        return range(number * self.section.batch_size, (number + 1) * self.section.batch_size)

    def _place(self, seed: int, number: int, drawn: _Drawn) -> Batch:
        """One seed's rows on the device."""
        draws = drawn.draws
        mean, std = drawn.posterior or self.pictures.posterior(drawn.indices, draws.flipped)
        mean, std, posterior_noise, noise, timesteps = (
            send(part, self.base.device)
            for part in (mean, std, draws.posterior_noise, draws.noise, draws.timesteps)
        )
        text = self._text(drawn.indices, draws.dropped, seed, self._positions(number))
        return Batch(mean + std * posterior_noise, noise, timesteps, text)

    def _text(
        self, indices: torch.Tensor, dropped: torch.Tensor, seed: int, positions: range
    ) -> torch.Tensor:
        """Text states of one seed's pictures, or tokens where the states depend on the arm."""
        if self.pictures.text_states is not None:
            return self.pictures.text(indices, dropped)
        captions = [
            "" if drop else self.pictures.captions[index]
            for index, drop in zip(indices.tolist(), dropped.tolist(), strict=True)
        ]
        if self.data.shuffle_tags:
            orders = [random.Random(f"tags {seed} {position}") for position in positions]
            keep, word = self.data.keep_tags, self.data.trigger_word
            captions = [
                shuffled_caption(caption, keep, order, word)
                for caption, order in zip(captions, orders, strict=True)
            ]
        if self.as_tokens:
            return self.base.tokenize(captions)
        return self.base.encode_text(
            captions
        ).clone()  # a clone may enter a backward pass, what inference mode made may not
