"""Training of a group of arms in one pass, and the denoising loss at fixed noise that shows what each learned."""

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from scipy import stats

from lorascope.adapter import AdapterBank, Slice
from lorascope.base import Base
from lorascope.cache import Encoded
from lorascope.config import DataSection, TrainSection
from lorascope.data import shuffled_caption
from lorascope.errors import StorageError
from lorascope.objective import (
    add_noise,
    batch_indices,
    draw,
    plan_batches,
    prediction_target,
    sample_losses,
    seeded,
    training_losses,
)
from lorascope.optimizers import build_optimizer, learning_rates
from lorascope.store import atomic_path

NUM_BANDS = 4
PROBE_BATCH = 8  # pictures per slice at once


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step of all arms of a group."""

    step: int  # from 1
    epoch: float  # passes over the pictures so far, at most all there will be
    losses: tuple[float, ...]  # training loss of the step's pictures, per arm
    grad_norms: tuple[float, ...]  # before clipping
    lrs: tuple[float, ...]
    failed: tuple[bool, ...]  # arms that met a loss or gradient that is not finite; they no longer move
    seconds: float  # wall time of the step


def count_steps(section: TrainSection, num_examples: int, epochs: int | None = None) -> int:
    """Steps after which `epochs` passes (all of the section's when absent) have been seen; no picture is left out.

    With buckets this holds up to a batch of each: each is a stream of its own, see `plan_batches`.
    """
    return math.ceil((section.epochs if epochs is None else epochs) * num_examples / (section.batch_size * section.accumulation_steps))


class Trainer:
    """Trains all adapters of a bank; `run` yields a record per step, and the caller logs, probes and checkpoints."""

    def __init__(self, base: Base, bank: AdapterBank, train: Encoded, section: TrainSection, data: DataSection | None = None) -> None:
        self.base, self.bank, self.train, self.section, self.data = base, bank, train, section, data or DataSection()
        self.optimizer = build_optimizer(bank, section)
        self.peak_lrs = torch.tensor([arm.lr for arm in bank.arms], device=base.device)
        self.active = torch.ones(len(bank.arms), dtype=torch.bool, device=base.device)
        self.num_steps = count_steps(section, train.num_entries)
        self.buckets = train.buckets()
        num_batches = self.num_steps * section.accumulation_steps
        self.batches = plan_batches([len(bucket) for bucket in self.buckets], section.batch_size, num_batches)
        self.step = 0
        self.seconds = 0.0
        if section.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
        else:  # a group before this one may have needed it
            base.unet.disable_gradient_checkpointing()

    def run(self) -> Iterator[StepRecord]:
        """Train from the current step to the last."""
        base, bank, section = self.base, self.bank, self.section
        bank.select_all()
        while self.step < self.num_steps:
            started = time.perf_counter()
            bank.gradients.zero_()
            totals = torch.zeros(len(bank.arms), device=base.device)
            for part in range(section.accumulation_steps):
                losses = self.batch_losses(self.step * section.accumulation_steps + part) / section.accumulation_steps  # (N)
                losses.sum().backward()
                totals += losses.detach()
            norms = bank.gradient_norms()
            self.active &= totals.isfinite() & norms.isfinite()
            if section.max_grad_norm:
                bank.gradients.mul_((section.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)[:, None])
            lrs = learning_rates(self.peak_lrs, self.step, self.num_steps, section)
            self.optimizer.step(self.step + 1, lrs, self.active)
            self.step += 1
            shown = [tuple(values.tolist()) for values in (totals, norms, lrs, ~self.active)]  # waits for the device
            seconds = time.perf_counter() - started
            self.seconds += seconds
            epoch = self.step * section.batch_size * section.accumulation_steps / self.train.num_entries
            epoch = min(epoch, section.epochs)  # the last batch may be filled up with pictures of a further pass
            yield StepRecord(self.step, epoch, losses=shown[0], grad_norms=shown[1], lrs=shown[2], failed=shown[3], seconds=seconds)

    def batch_losses(self, number: int) -> torch.Tensor:
        """The loss of each arm on batch `number` (from 0): float32 [N]."""
        base, unet = self.base, self.base.unet
        latents, noise, timesteps, text = self.load_batch(number)  # slice-major: [N * batch, ...]
        noisy = add_noise(latents, noise, timesteps, base.alphas_cumprod)
        target = prediction_target(latents, noise, timesteps, base.alphas_cumprod, base.prediction_type)
        prediction = unet(noisy.to(unet.dtype), timesteps, text.to(unet.dtype)).sample
        losses = training_losses(prediction, target, timesteps, base.alphas_cumprod, base.prediction_type, self.section)
        return losses.view(len(self.bank.arms), -1).mean(dim=1)

    def load_batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, noise [N * batch, c, h, w], timesteps [N * batch] and text states of one batch, arm after arm.

        Arms of one seed get the same rows.
        """
        train, section, device = self.train, self.section, self.base.device
        bucket, number_in_bucket = self.batches[number]
        positions = range(number * section.batch_size, (number + 1) * section.batch_size)
        rows = {}
        for seed in {arm.seed for arm in self.bank.arms}:
            indices = batch_indices(seed, bucket, self.buckets[bucket], number_in_bucket, section.batch_size)
            shape = tuple(train.latents[int(indices[0])].shape[2:])
            draws = draw(seed, positions, shape, len(self.base.alphas_cumprod), section)
            mean, std = (part.to(device) for part in train.posterior(indices, draws.flipped))
            latents = mean + std * draws.posterior_noise.to(device)
            text = self._text_of(indices, draws.dropped, seed, positions)
            rows[seed] = (latents, draws.noise.to(device), draws.timesteps.to(device), text)
        latents, noise, timesteps, text = (torch.cat(parts) for parts in zip(*(rows[arm.seed] for arm in self.bank.arms), strict=True))
        return latents, noise, timesteps, self.base.text_states(text) if self.bank.adapts_text else text

    def _text_of(self, indices: torch.Tensor, dropped: torch.Tensor, seed: int, positions: range) -> torch.Tensor:
        """Text states of one seed's pictures, or token numbers where the states depend on the arm."""
        if self.train.text_states is not None:
            return self.train.text(indices, dropped)
        captions = ["" if drop else self.train.captions[index] for index, drop in zip(indices.tolist(), dropped.tolist(), strict=True)]
        if self.data.shuffle_tags:
            orders = [random.Random(f"tags {seed} {position}") for position in positions]
            keep, word = self.data.keep_tags, self.data.trigger_word
            captions = [shuffled_caption(caption, keep, order, word) for caption, order in zip(captions, orders, strict=True)]
        if self.bank.adapts_text:
            return self.base.tokenize(captions)
        return self.base.encode_text(captions).clone()  # a clone may enter a backward pass, what inference mode made may not

    def save_checkpoint(self, path: Path, inputs: str, facts: dict[str, Any]) -> None:
        """Write the whole state atomically; `facts` is what the caller needs to go on, as JSON."""
        tensors = {"parameters": self.bank.parameters, "active": self.active}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}
        state = {"inputs": inputs, "step": self.step, "seconds": self.seconds, "facts": facts}
        with atomic_path(path) as partial:
            safetensors.torch.save_file(tensors, partial, metadata={"state": json.dumps(state)})

    @torch.no_grad()
    def load_checkpoint(self, path: Path, inputs: str) -> dict[str, Any]:
        """Continue from a checkpoint and return its facts; raise `StorageError` if it is damaged or of other inputs."""
        try:
            with safe_open(path, framework="pt") as file:
                state = json.loads(file.metadata()["state"])
            tensors = safetensors.torch.load_file(path)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{path}: damaged checkpoint ({error}): delete it and run the same command again") from error
        if state["inputs"] != inputs:
            raise StorageError(f"{path}: checkpoint of another configuration or data: delete it and run the same command again")
        self.bank.parameters.copy_(tensors["parameters"])
        self.optimizer.load_state(
            {name.removeprefix("optimizer."): tensor for name, tensor in tensors.items() if name.startswith("optimizer.")}
        )
        self.active.copy_(tensors["active"])
        self.step, self.seconds = state["step"], state["seconds"]
        facts: dict[str, Any] = state["facts"]
        return facts


@torch.inference_mode()
def probe_losses(base: Base, bank: AdapterBank, slices: Sequence[Slice], pictures: Encoded, conditional: bool) -> torch.Tensor:
    """Denoising loss of each slice at fixed (picture, noise, timestep): float32 [S, pictures, bands].

    One timestep in each of `NUM_BANDS` equal bands, with its noise, is drawn by the picture's digest and the band, so
    every model and epoch meets the same. `conditional` gives the caption, else the empty caption.
    """
    width = len(base.alphas_cumprod) // NUM_BANDS
    bank.select(slices)
    losses = torch.empty(len(slices), len(pictures), NUM_BANDS)
    for bucket in pictures.buckets():
        for indices in bucket.unique().split(PROBE_BATCH):
            mean, std = (part.to(base.device) for part in pictures.posterior(indices, torch.zeros_like(indices, dtype=torch.bool)))
            text = _probe_text(base, bank, pictures, indices, conditional, len(slices))
            for band in range(NUM_BANDS):
                generators = [seeded("probe", pictures.digests[index], band) for index in indices.tolist()]
                timesteps = torch.stack([torch.randint(band * width, (band + 1) * width, (), generator=g) for g in generators])
                noises = torch.stack([torch.randn((2, *mean.shape[1:]), generator=g) for g in generators]).to(base.device)
                timesteps, latents = timesteps.to(base.device), mean + std * noises[:, 0]
                noisy = add_noise(latents, noises[:, 1], timesteps, base.alphas_cumprod)
                target = prediction_target(latents, noises[:, 1], timesteps, base.alphas_cumprod, base.prediction_type)
                noisy, timesteps, target = (part.repeat(len(slices), *[1] * (part.dim() - 1)) for part in (noisy, timesteps, target))
                prediction = base.unet(noisy.to(base.unet.dtype), timesteps, text.to(base.unet.dtype)).sample
                losses[:, indices, band] = sample_losses(prediction, target).view(len(slices), -1).cpu()
    return losses


def _probe_text(
    base: Base, bank: AdapterBank, pictures: Encoded, indices: torch.Tensor, conditional: bool, num_slices: int
) -> torch.Tensor:
    """Text states of some pictures under each slice: [S * B, tokens, width]."""
    if pictures.text_states is not None:
        dropped = torch.full_like(indices, not conditional, dtype=torch.bool)
        return pictures.text(indices, dropped).repeat(num_slices, 1, 1)
    captions = [pictures.captions[index] if conditional else "" for index in indices.tolist()]
    if bank.adapts_text:
        return base.encode_text(captions * num_slices)
    return base.encode_text(captions).repeat(num_slices, 1, 1)


def probe_records(losses: torch.Tensor, reference: torch.Tensor, num_timesteps: int) -> list[dict[str, Any]]:
    """Mean loss and paired difference from the base per band and over all: from [pictures, bands] of a model and the base.

    The 95 % interval is Student's t over pictures.
    """
    width = num_timesteps // NUM_BANDS
    names = [f"{band * width}-{(band + 1) * width}" for band in range(NUM_BANDS)]
    columns = [(name, losses[:, band], reference[:, band]) for band, name in enumerate(names)]
    columns.append(("all", losses.mean(dim=1), reference.mean(dim=1)))
    records = []
    for name, loss, base_loss in columns:
        difference = (loss - base_loss).double()
        count = len(difference)
        half = float(stats.t.ppf(0.975, count - 1) * difference.std() / math.sqrt(count)) if count > 1 else 0.0
        mean = float(difference.mean())
        records.append(
            {
                "band": name,
                "loss": float(loss.double().mean()),
                "difference": mean,
                "difference_low": mean - half,
                "difference_high": mean + half,
                "count": count,
            }
        )
    return records
