"""Pictures from the base and every arm: the same prompts from the same initial noise, in shared batches."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorascope.adapter import AdapterBank, Slice
from lorascope.base import Base
from lorascope.config import SampleSection
from lorascope.errors import RunError
from lorascope.objective import seeded
from lorascope.prompts import Prompt
from lorascope.store import atomic_path

_SCHEDULERS: dict[str, Any] = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpmsolver++": DPMSolverMultistepScheduler}


@dataclass(frozen=True)
class Job:
    """One picture to draw with every model: a prompt from one initial noise."""

    prompt: Prompt
    seed: int

    @property
    def file_name(self) -> str:
        """The picture's name in the folder of its arm."""
        return f"{self.prompt.category}-{self.prompt.index:03d}-{self.seed}.png"


def plan_jobs(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Job]:
    """All prompts under all seeds, seed by seed."""
    return [Job(prompt, seed) for seed in seeds for prompt in prompts]


def batches_of(jobs: Sequence[Job], num_slices: int, batch_size: int) -> Iterator[Sequence[Job]]:
    """The jobs of each batch; fixed by the plan, so that a resumed run repeats the same arithmetic."""
    per_batch = max(1, batch_size // num_slices)
    for start in range(0, len(jobs), per_batch):
        yield jobs[start : start + per_batch]


def initial_noise(job: Job, latent_shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float32 [c, h, w], a function of seed and prompt alone: every model starts from the same."""
    return torch.randn(latent_shape, generator=seeded("initial noise", job.seed, job.prompt.text))


@torch.inference_mode()
def denoise(base: Base, noise: torch.Tensor, text: torch.Tensor, section: SampleSection) -> torch.Tensor:
    """Latents float32 [S * G, c, h, w] of G jobs under each of S slices of the attached bank.

    `noise` is [G, c, h, w], `text` [S, 1 + G, tokens, width], the empty caption's states first. Classifier-free guidance
    (Ho & Salimans 2022) runs both branches in one batch: within a slice, first the empty captions, then the prompts.
    """
    num_slices = len(text)
    scheduler = _SCHEDULERS[section.scheduler].from_config(base.scheduler_config)
    scheduler.set_timesteps(section.steps, device=base.device)
    guided = section.guidance != 1
    prompts, empty = text[:, 1:], text[:, :1].expand_as(text[:, 1:])  # (S, G, tokens, width)
    branches = [empty, prompts] if guided else [prompts]
    context = torch.cat(branches, dim=1).flatten(0, 1).to(base.unet.dtype)  # (S * branches * G, tokens, width)
    latents = (noise * scheduler.init_noise_sigma).to(base.device).repeat(num_slices, 1, 1, 1)  # (S * G, c, h, w)
    for timestep in scheduler.timesteps:
        x = latents.unflatten(0, (num_slices, 1, -1)).expand(-1, len(branches), -1, -1, -1, -1).flatten(0, 2)
        x = scheduler.scale_model_input(x, timestep)
        prediction = base.unet(x.to(base.unet.dtype), timestep, context).sample.float()
        prediction = prediction.unflatten(0, (num_slices, len(branches), -1))
        if guided:
            unconditional, conditional = prediction.unbind(dim=1)
            prediction = unconditional + section.guidance * (conditional - unconditional)
        latents = scheduler.step(prediction.flatten(0, 1) if guided else prediction.flatten(0, 2), timestep, latents).prev_sample
    return latents


def draw_pictures(
    base: Base, bank: AdapterBank, slices: Sequence[Slice], jobs: Sequence[Job], latent_shape: tuple[int, ...], section: SampleSection
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures uint8 [S, G, H, W, 3] and their latents float32 [S, G, c, h, w] of some jobs under each slice.

    Raises `RunError` where latents are not finite.
    """
    bank.select(slices)
    noise = torch.stack([initial_noise(job, latent_shape) for job in jobs])
    captions = ["", *[(section.prompt_prefix or "") + job.prompt.text for job in jobs]]
    text = base.encode_text(captions * len(slices)) if bank.adapts_text else base.encode_text(captions).repeat(len(slices), 1, 1)
    latents = denoise(base, noise, text.unflatten(0, (len(slices), -1)), section)
    if not latents.isfinite().all():
        raise RunError(
            "sampling gave latents that are not finite: the adapter or base has broken weights; "
            'lower arms.lr or set train.precision = "fp32"'
        )
    pixels = torch.cat([base.decode_latents(chunk) for chunk in latents.split(16)])
    return pixels.unflatten(0, (len(slices), -1)), latents.unflatten(0, (len(slices), -1))


def save_picture(path: Path, pixels: np.ndarray, job: Job, arm: str, section: SampleSection) -> None:
    """Write uint8 [H, W, 3] as a PNG that carries prompt, seed, arm, steps and guidance in its text chunks."""
    info = PngInfo()
    facts = {
        "prompt": job.prompt.text,
        "category": job.prompt.category,
        "seed": job.seed,
        "arm": arm,
        "steps": section.steps,
        "guidance": section.guidance,
        **({"prompt_prefix": section.prompt_prefix} if section.prompt_prefix else {}),
        "scheduler": section.scheduler,
        "software": "lorascope",
    }
    for key, value in facts.items():
        info.add_itxt(key, str(value))
    with atomic_path(path) as partial:
        Image.fromarray(pixels).save(partial, format="PNG", pnginfo=info)


def latent_shape_of(base: Base, resolution_px: int) -> tuple[int, int, int]:
    """Shape (c, h, w) of the latents of a square picture of `resolution_px`."""
    side = math.ceil(resolution_px / base.latent_factor)
    return int(base.vae.config.latent_channels), side, side
