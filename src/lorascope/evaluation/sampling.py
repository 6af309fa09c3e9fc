"""Pictures from the base and every arm: the same prompts from the same initial noise, in shared batches."""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorascope.adapters.bank import Slice
from lorascope.adapters.mixed import Bank
from lorascope.base.autoencoder import Autoencoder
from lorascope.base.loading import Base
from lorascope.console import log
from lorascope.errors import RunError, first_line
from lorascope.evaluation.inference import folded, text_projected_once
from lorascope.evaluation.prompts import Prompt
from lorascope.machine.memory import free_cached, is_out_of_memory
from lorascope.machine.transfer import send
from lorascope.sections import SampleSection
from lorascope.seeding import seeded
from lorascope.store import atomic_path

_SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
}
_TEXTS = 64  # captions encoded at once
_WRITERS = 4  # threads that write pictures
_WAITING = 64  # pictures that may wait to be written


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
    """Standard normal float32 [c, h, w], a function of seed and prompt alone: every model starts from the
    same.
    """
    return torch.randn(latent_shape, generator=seeded("initial noise", job.seed, job.prompt.text))


@torch.inference_mode()
def denoise(
    base: Base,
    noise: torch.Tensor,
    text: torch.Tensor,
    section: SampleSection,
    is_stopped: Callable[[], bool] = lambda: False,
    before_step: Callable[[torch.Tensor], None] = lambda timesteps: None,
) -> torch.Tensor:
    """Latents float32 [S * G, c, h, w] of G jobs under each of S slices of the attached bank.

    `noise` is [G, c, h, w], `text` [S, 1 + G, tokens, width], the empty caption's states first.
    Classifier-free guidance (Ho & Salimans 2022) runs both branches in one batch: within a slice, first the
    empty captions, then the prompts. `before_step` is called with the timesteps of what the U-Net is given,
    [S * branches * G]. Raises `KeyboardInterrupt` before the next step once `is_stopped`.
    """
    num_slices = len(text)
    scheduler = _SCHEDULERS[section.scheduler].from_config(base.scheduler_config)
    # The scheduler reads its timesteps and sigmas on the host: on a GPU each would wait for the U-Net.
    scheduler.set_timesteps(section.steps, device="cpu")
    guided = section.guidance != 1
    prompts, empty = text[:, 1:], text[:, :1].expand_as(text[:, 1:])  # (S, G, tokens, width)
    branches = [empty, prompts] if guided else [prompts]
    context = (
        torch.cat(branches, dim=1).flatten(0, 1).to(base.unet.dtype)
    )  # (S * branches * G, tokens, width)
    latents = send(noise * scheduler.init_noise_sigma, base.device).repeat(
        num_slices, 1, 1, 1
    )  # (S * G, c, h, w)
    on_device = send(scheduler.timesteps, base.device)
    for timestep, timestep_on_device in zip(scheduler.timesteps, on_device, strict=True):
        if is_stopped():
            raise KeyboardInterrupt
        x = latents.unflatten(0, (num_slices, 1, -1)).expand(-1, len(branches), -1, -1, -1, -1).flatten(0, 2)
        x = scheduler.scale_model_input(x, timestep)
        before_step(timestep_on_device.expand(len(x)))
        prediction = base.unet(x.to(base.unet.dtype), timestep_on_device, context).sample.float()
        prediction = prediction.unflatten(0, (num_slices, len(branches), -1))
        if guided:
            unconditional, conditional = prediction.unbind(dim=1)
            prediction = unconditional + section.guidance * (conditional - unconditional)
        latents = scheduler.step(
            prediction.flatten(0, 1) if guided else prediction.flatten(0, 2), timestep, latents
        ).prev_sample
    return latents


class Painter:
    """Draws jobs with slices of an attached bank: what is the same for all of them is made once.

    With `unconditional` "base" guidance starts from the base's prediction for the empty caption, at the same
    latents; the adapter acts on the prompt's alone.
    """

    def __init__(
        self,
        base: Base,
        bank: Bank,
        latent_shape: tuple[int, ...],
        section: SampleSection,
        prompts: Sequence[str],
        unconditional: Literal["own", "base"] = "own",
    ) -> None:
        self.base, self.bank, self.latent_shape, self.section = base, bank, latent_shape, section
        # Without guidance there is no such branch.
        self._swaps = unconditional == "base" and section.guidance != 1
        self.autoencoder = Autoencoder(base)
        captions = ["", *dict.fromkeys(self._caption(prompt) for prompt in prompts)]
        self._text: dict[
            str, torch.Tensor
        ] = {}  # states [tokens, width] by caption, where they do not depend on the adapter
        for start in range(0, 0 if bank.adapts_text else len(captions), _TEXTS):
            part = captions[start : start + _TEXTS]
            self._text |= dict(zip(part, base.encode_text(part), strict=True))

    def _caption(self, prompt: str) -> str:
        return (self.section.prompt_prefix or "") + prompt

    def select(self, slices: Sequence[Slice]) -> Sequence[Slice]:
        """Have the bank act as drawing with these slices asks for; what it was given to select."""
        if self._swaps:  # a batch holds the empty captions of a slice before its prompts: each a slice then
            slices = [part for item in slices for part in (replace(item, strength=0.0), item)]
        self.bank.select(slices)
        return slices

    @torch.inference_mode()
    def draw(
        self, num_slices: int, jobs: Sequence[Job], is_stopped: Callable[[], bool] = lambda: False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures uint8 [S, G, H, W, 3] and their latents float32 [S, G, c, h, w] of some jobs under each
        selected slice.

        Raises `RunError` where latents are not finite, and `KeyboardInterrupt` once `is_stopped`.
        """
        noise = torch.stack([initial_noise(job, self.latent_shape) for job in jobs])
        captions = ["", *[self._caption(job.prompt.text) for job in jobs]]
        if self.bank.adapts_text:
            branches = 2 if self._swaps else 1
            states = self.base.encode_text(captions * num_slices * branches)
            parts = states.unflatten(0, (num_slices, branches, -1))  # (S, branches, 1 + G, tokens, width)
            text = torch.cat([parts[:, 0, :1], parts[:, -1, 1:]], dim=1)
        else:
            text = torch.stack([self._text[caption] for caption in captions]).expand(num_slices, -1, -1, -1)
        latents = denoise(self.base, noise, text, self.section, is_stopped, self.bank.at)
        if not latents.isfinite().all():
            raise RunError(
                "sampling gave latents that are not finite: the adapter or base has broken weights; "
                'lower arms.lr or set train.precision = "fp32"'
            )
        pixels = self.autoencoder.decode(latents)
        return pixels.unflatten(0, (num_slices, -1)), latents.unflatten(0, (num_slices, -1))


def draw_pictures(
    base: Base,
    bank: Bank,
    slices: Sequence[Slice],
    jobs: Sequence[Job],
    latent_shape: tuple[int, ...],
    section: SampleSection,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures uint8 [S, G, H, W, 3] and their latents float32 [S, G, c, h, w] of some jobs under each slice,
    in one batch.

    The adapters act beside the base's weights, as in training. Raises `RunError` where latents are not
    finite.
    """
    painter = Painter(base, bank, latent_shape, section, [job.prompt.text for job in jobs])
    painter.select(slices)
    with text_projected_once(bank):
        return painter.draw(len(slices), jobs)


def draw_all(
    base: Base,
    bank: Bank,
    models: Sequence[tuple[str, Slice]],
    jobs: Sequence[Job],
    latent_shape: tuple[int, ...],
    section: SampleSection,
    path_of: Callable[[str, Job], Path],
    progress: Callable[[int], None] = lambda count: None,
    unconditional: Literal["own", "base"] = "own",
) -> None:
    """Draw every job with every model, (name, slice of the attached bank), and write the pictures.

    `unconditional` is as of `Painter`.
    Batches are fixed by the plan and one whose pictures are all there is left out, so that what is drawn
    after an interruption has the same bytes. On a CPU several are drawn side by side, a thread each: one that
    computes with two threads waits for the slower at every operation. Where memory runs out, the rest is
    drawn with half as many pictures at once. `progress` is called with the number of pictures just drawn or
    found. Raises `RunError` where latents are not finite or one picture alone does not fit, and
    `StorageError` where one cannot be written; what was drawn by then is written.
    """
    painter = Painter(base, bank, latent_shape, section, [job.prompt.text for job in jobs], unconditional)
    at_once, done = section.batch_size, set[Path]()

    def note(paths: Iterable[Path]) -> None:
        new = set(paths) - done
        done.update(new)
        progress(len(new))

    with PictureWriter() as writer:
        while True:
            try:
                _draw_all(painter, models, jobs, at_once, path_of, writer, note)
                painter.autoencoder.warn_of_overflows()
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if at_once == 1:
                    raise RunError(
                        f"sampling: out of memory with one picture at once ({first_line(error)}): lower "
                        "data.resolution_px, or free memory"
                    ) from error
            # Outside of the handler, whose traceback holds the tensors that did not leave enough room.
            at_once = min(at_once, len(models) * len(jobs)) // 2 or 1
            log.warning("sample   out of memory: going on with %d pictures at once", at_once)
            free_cached(base.device)


def _draw_all(
    painter: Painter,
    models: Sequence[tuple[str, Slice]],
    jobs: Sequence[Job],
    at_once: int,
    path_of: Callable[[str, Job], Path],
    writer: "PictureWriter",
    note: Callable[[Iterable[Path]], None],
) -> None:
    """One pass over the plan with `at_once` pictures at once, over all threads."""
    base, bank = painter.base, painter.bank
    num_threads = torch.get_num_threads() if base.device.type == "cpu" else 1
    most = max(1, at_once // num_threads)  # models at once, so that each thread has a batch
    for start in range(0, len(models), most):
        chunk, stopped = models[start : start + most], threading.Event()
        slices = [item for _, item in chunk]
        num_workers = min(num_threads, at_once // len(chunk))
        todo = []
        for batch in batches_of(jobs, len(chunk), at_once // num_workers):
            paths = [path_of(name, job) for name, _ in chunk for job in batch]
            if all(path.exists() for path in paths):
                note(paths)
            else:
                todo.append(batch)

        def draw(
            batch: Sequence[Job],
            chunk: Sequence[tuple[str, Slice]] = chunk,
            is_stopped: Callable[[], bool] = stopped.is_set,
        ) -> list[Path]:
            pictures, _ = painter.draw(len(chunk), batch, is_stopped)
            for (name, _), row in zip(chunk, pictures.numpy(), strict=True):
                for job, pixels in zip(batch, row, strict=True):
                    writer.save(path_of(name, job), pixels, job, name, painter.section)
            return [path_of(name, job) for name, _ in chunk for job in batch]

        with text_projected_once(bank), folded(bank, painter.select(slices)):
            for paths in _side_by_side(draw, todo, num_workers, stopped):
                note(paths)


def _side_by_side(
    work: Callable[[Sequence[Job]], list[Path]],
    batches: Sequence[Sequence[Job]],
    num_workers: int,
    stopped: threading.Event,
) -> Iterator[list[Path]]:
    """The results of all batches in their order; on an error the batches under way are stopped."""
    if num_workers == 1:
        yield from map(work, batches)
        return
    num_threads = torch.get_num_threads()
    workers = ThreadPoolExecutor(
        num_workers, initializer=torch.set_num_threads, initargs=(num_threads // num_workers,)
    )
    try:
        yield from workers.map(work, batches)
    finally:
        stopped.set()
        workers.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)


class PictureWriter:
    """Writes pictures in threads, since compressing them takes time that drawing the next ones need not wait
    for.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_WRITERS)
        self._places = threading.BoundedSemaphore(_WAITING)
        self._failed: list[BaseException] = []

    def __enter__(self) -> "PictureWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Wait until all is written; raise what a picture could not be written for."""
        self._threads.shutdown()
        if kind is None:
            self._raise_failed()

    def save(self, path: Path, pixels: np.ndarray, job: Job, arm: str, section: SampleSection) -> None:
        """Take a picture to write as `save_picture` does, once fewer than `_WAITING` wait; raise what an
        earlier one met.
        """
        self._raise_failed()
        self._places.acquire()
        self._threads.submit(save_picture, path, pixels, job, arm, section).add_done_callback(self._end)

    def _end(self, future: Future[None]) -> None:
        self._places.release()
        if (error := future.exception()) is not None:
            self._failed.append(error)

    def _raise_failed(self) -> None:
        if self._failed:
            raise self._failed[0]


def save_picture(path: Path, pixels: np.ndarray, job: Job, arm: str, section: SampleSection) -> None:
    """Write uint8 [H, W, 3] as a PNG that carries prompt, seed, arm, steps and guidance in its text
    chunks.
    """
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
