"""Training of a group of arms in one pass, and the denoising loss at fixed noise that shows what each learned."""

import json
import math
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
from lorascope.config import TrainSection
from lorascope.errors import RunError, StorageError
from lorascope.objective import add_noise, draw, prediction_target, sample_losses, seeded
from lorascope.store import atomic_path

NUM_BANDS = 4
PROBE_BATCH = 8  # pictures per slice at once


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step of all arms of a group."""

    step: int  # from 1
    epoch: float
    losses: tuple[float, ...]  # mean squared error of the step's batch, per arm
    grad_norms: tuple[float, ...]  # before clipping
    lrs: tuple[float, ...]
    failed: tuple[bool, ...]  # arms that met a loss or gradient that is not finite; they no longer move
    seconds: float  # wall time of the step


def count_steps(section: TrainSection, num_examples: int, epochs: int | None = None) -> int:
    """Steps after which `epochs` passes (all of the section's when absent) have been seen; no picture is left out."""
    return math.ceil((section.epochs if epochs is None else epochs) * num_examples / section.batch_size)


def learning_rates(peaks: torch.Tensor, step: int, warmup_steps: int) -> torch.Tensor:
    """Rates [N] of the step with index `step` from 0: linear warm-up to `peaks` [N], then constant."""
    return peaks * min(1.0, (step + 1) / (warmup_steps + 1))


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, as in torch.optim) over a bank's [N, P] buffer, one learning rate per adapter."""

    def __init__(self, bank: AdapterBank, section: TrainSection) -> None:
        self.bank = bank
        self.section = section
        self.mean = torch.zeros_like(bank.parameters)
        self.square = torch.zeros_like(bank.parameters)

    @torch.no_grad()
    def step(self, number: int, lrs: torch.Tensor, active: torch.Tensor) -> None:
        """Update `number` (from 1) with rates `lrs` [N]; adapters that are not `active` bool [N] stay as they are."""
        section, parameters = self.section, self.bank.parameters
        beta1, beta2 = section.betas
        gradients = torch.where(active[:, None], self.bank.gradients, 0.0)
        rates = torch.where(active, lrs, 0.0)[:, None]
        self.mean.lerp_(gradients, 1 - beta1)
        self.square.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        denominator = (self.square.sqrt() / math.sqrt(1 - beta2**number)).add_(section.eps)
        parameters.mul_(1 - rates * section.weight_decay)
        parameters.sub_(rates / (1 - beta1**number) * self.mean / denominator)


class Trainer:
    """Trains all adapters of a bank; `run` yields a record per step, and the caller logs, probes and checkpoints."""

    def __init__(self, base: Base, bank: AdapterBank, train: Encoded, section: TrainSection) -> None:
        self.base, self.bank, self.train, self.section = base, bank, train, section
        self.optimizer = AdamW(bank, section)
        self.peak_lrs = torch.tensor([arm.lr for arm in bank.arms], device=base.device)
        self.active = torch.ones(len(bank.arms), dtype=torch.bool, device=base.device)
        self.num_steps = count_steps(section, len(train))
        self.step = 0
        self.seconds = 0.0

    def run(self) -> Iterator[StepRecord]:
        """Train from the current step to the last."""
        base, bank, section = self.base, self.bank, self.section
        bank.select_all()
        while self.step < self.num_steps:
            started = time.perf_counter()
            latents, noise, timesteps, text = self.load_batch(self.step)  # slice-major: [N * batch, ...]
            noisy = add_noise(latents, noise, timesteps, base.alphas_cumprod)
            target = prediction_target(latents, noise, timesteps, base.alphas_cumprod, base.prediction_type)
            prediction = base.unet(noisy.to(base.unet.dtype), timesteps, text.to(base.unet.dtype)).sample
            losses = sample_losses(prediction, target).view(len(bank.arms), -1).mean(dim=1)  # (N)
            bank.gradients.zero_()
            losses.sum().backward()
            norms = bank.gradient_norms()
            self.active &= losses.isfinite() & norms.isfinite()
            if section.max_grad_norm:
                bank.gradients.mul_((section.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)[:, None])
            lrs = learning_rates(self.peak_lrs, self.step, section.warmup_steps)
            self.optimizer.step(self.step + 1, lrs, self.active)
            self.step += 1
            shown = [tuple(values.tolist()) for values in (losses, norms, lrs, ~self.active)]  # waits for the device
            seconds = time.perf_counter() - started
            self.seconds += seconds
            epoch = self.step * section.batch_size / len(self.train)
            yield StepRecord(self.step, epoch, losses=shown[0], grad_norms=shown[1], lrs=shown[2], failed=shown[3], seconds=seconds)

    def load_batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, noise [N * batch, c, h, w], timesteps [N * batch] and text states of one step, arm after arm.

        Arms of one seed get the same rows.
        """
        train, section = self.train, self.section
        positions = range(step * section.batch_size, (step + 1) * section.batch_size)
        num_timesteps = len(self.base.alphas_cumprod)
        batches = {}
        for seed in {arm.seed for arm in self.bank.arms}:
            draws = draw(seed, positions, len(train), tuple(train.mean.shape[1:]), num_timesteps, section.caption_dropout)
            indices, dropped = draws.indices.to(train.mean.device), draws.dropped.to(train.mean.device)
            latents = train.mean[indices] + train.std[indices] * draws.posterior_noise.to(train.mean.device)
            noise, timesteps = draws.noise.to(train.mean.device), draws.timesteps.to(train.mean.device)
            batches[seed] = (latents, noise, timesteps, train.text(indices, dropped))
        latents, noise, timesteps, text = (torch.cat(parts) for parts in zip(*(batches[arm.seed] for arm in self.bank.arms), strict=True))
        return latents, noise, timesteps, text

    def save_checkpoint(self, path: Path, inputs: str, facts: dict[str, Any]) -> None:
        """Write the whole state atomically; `facts` is what the caller needs to go on, as JSON."""
        tensors = {
            "parameters": self.bank.parameters,
            "mean": self.optimizer.mean,
            "square": self.optimizer.square,
            "active": self.active,
        }
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
        self.optimizer.mean.copy_(tensors["mean"])
        self.optimizer.square.copy_(tensors["square"])
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
    num_timesteps = len(base.alphas_cumprod)
    width = num_timesteps // NUM_BANDS
    bank.select(slices)
    columns = []
    for band in range(NUM_BANDS):
        chunks = []
        for start in range(0, len(pictures), PROBE_BATCH):
            indices = torch.arange(start, min(start + PROBE_BATCH, len(pictures)))
            generators = [seeded("probe", pictures.digests[index], band) for index in indices.tolist()]
            timesteps = torch.stack([torch.randint(band * width, (band + 1) * width, (), generator=g) for g in generators])
            noises = torch.stack([torch.randn((2, *pictures.mean.shape[1:]), generator=g) for g in generators]).to(base.device)
            indices, timesteps = indices.to(base.device), timesteps.to(base.device)
            latents = pictures.mean[indices] + pictures.std[indices] * noises[:, 0]
            text = pictures.text(indices, torch.full_like(indices, not conditional, dtype=torch.bool))
            noisy = add_noise(latents, noises[:, 1], timesteps, base.alphas_cumprod)
            target = prediction_target(latents, noises[:, 1], timesteps, base.alphas_cumprod, base.prediction_type)
            repeated = [part.repeat(len(slices), *[1] * (part.dim() - 1)) for part in (noisy, timesteps, text, target)]
            prediction = base.unet(repeated[0].to(base.unet.dtype), repeated[1], repeated[2].to(base.unet.dtype)).sample
            chunks.append(sample_losses(prediction, repeated[3]).view(len(slices), -1))
        columns.append(torch.cat(chunks, dim=1))
    return torch.stack(columns, dim=2).cpu()


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


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Peak memory in bytes and its kind: CUDA's allocated peak, or the process's peak resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "cuda"
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "rss"


def require_any_active(record: StepRecord, names: Sequence[str]) -> None:
    """Raise `RunError` when no arm of the group is left."""
    if all(record.failed):
        raise RunError(
            f"step {record.step}: loss or gradient of every arm ({', '.join(names)}) is not finite: "
            'lower arms.lr, or set train.precision = "fp32"'
        )
