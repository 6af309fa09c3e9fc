"""What a model predicts at fixed noise: the denoising loss that shows what each arm learned."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats

from lorascope.adapters.bank import Slice
from lorascope.adapters.mixed import Bank
from lorascope.base.loading import Base
from lorascope.data.encoding import Encoded
from lorascope.machine.transfer import send
from lorascope.seeding import seeded
from lorascope.training.objective import add_noise, prediction_target, sample_losses

NUM_BANDS = 4
PROBE_BATCH = 8  # pictures per slice at once
_PROBED_SLICES = 8  # at once: beside a training's recorded passes a GPU has little room


@dataclass(frozen=True)
class Probe:
    """What S slices predicted of B pictures at the noise of one band, under each of C conditions."""

    first_slice: int  # the place of the first of them among all that are probed
    pictures: torch.Tensor  # int64 [B], on the CPU
    band: int
    predictions: tuple[torch.Tensor, ...]  # of each condition, [S, B, c, h, w]
    target: torch.Tensor  # float32 [B, c, h, w]: what they should be

    @property
    def num_slices(self) -> int:
        """S."""
        return len(self.predictions[0])

    def losses(self, condition: int) -> torch.Tensor:
        """Denoising loss under a condition: float32 [S, B]."""
        prediction = self.predictions[condition]
        target = self.target.repeat(self.num_slices, 1, 1, 1)
        return sample_losses(prediction.flatten(0, 1), target).view(self.num_slices, -1)


def band_names(num_timesteps: int) -> list[str]:
    """The timesteps of each band, such as `0-250`."""
    width = num_timesteps // NUM_BANDS
    return [f"{band * width}-{(band + 1) * width}" for band in range(NUM_BANDS)]


@torch.inference_mode()
def probe(
    base: Base,
    bank: Bank,
    slices: Sequence[Slice],
    pictures: Encoded,
    conditions: Sequence[bool],
) -> Iterator[Probe]:
    """Predictions of each slice of the attached bank at fixed (picture, noise, timestep), a few at a time.

    One timestep in each of `NUM_BANDS` equal bands, with its noise, is drawn by the picture's digest and the
    band, so every model, epoch and condition meets the same. A condition that is true gives the caption, else
    the empty caption. Slices come in their order, and the first ones with all pictures before others.
    """
    for start in range(0, len(slices), _PROBED_SLICES):
        part = slices[start : start + _PROBED_SLICES]
        bank.select(part)
        for bucket in pictures.buckets():
            for indices in bucket.unique().split(PROBE_BATCH):
                yield from _probe_selected(base, bank, start, len(part), pictures, indices, conditions)


def _probe_selected(
    base: Base,
    bank: Bank,
    first_slice: int,
    num_slices: int,
    pictures: Encoded,
    indices: torch.Tensor,
    conditions: Sequence[bool],
) -> Iterator[Probe]:
    """Each band of some pictures of one shape, under the slices that the bank has selected."""
    width = len(base.alphas_cumprod) // NUM_BANDS
    views = pictures.posterior(indices, torch.zeros_like(indices, dtype=torch.bool))
    mean, std = (send(part, base.device) for part in views)
    texts = [
        _probe_text(base, bank, pictures, indices, conditional, num_slices).to(base.unet.dtype)
        for conditional in conditions
    ]
    for band in range(NUM_BANDS):
        generators = [seeded("probe", pictures.digests[index], band) for index in indices.tolist()]
        drawn = [torch.randint(band * width, (band + 1) * width, (), generator=g) for g in generators]
        noises = [torch.randn((2, *mean.shape[1:]), generator=g) for g in generators]
        timesteps = send(torch.stack(drawn), base.device)
        start, noise = send(torch.stack(noises), base.device).unbind(dim=1)
        latents = mean + std * start
        noisy = add_noise(latents, noise, timesteps, base.alphas_cumprod).to(base.unet.dtype)
        target = prediction_target(latents, noise, timesteps, base.alphas_cumprod, base.prediction_type)
        noisy, timesteps = noisy.repeat(num_slices, 1, 1, 1), timesteps.repeat(num_slices)
        bank.at(timesteps)
        predictions = tuple(
            base.unet(noisy, timesteps, text).sample.unflatten(0, (num_slices, -1)) for text in texts
        )
        yield Probe(first_slice, indices, band, predictions, target)


def _probe_text(
    base: Base,
    bank: Bank,
    pictures: Encoded,
    indices: torch.Tensor,
    conditional: bool,
    num_slices: int,
) -> torch.Tensor:
    """Text states of some pictures under each slice: [S * B, tokens, width]."""
    if pictures.text_states is not None:
        dropped = torch.full_like(indices, not conditional, dtype=torch.bool)
        return pictures.text(indices, dropped).repeat(num_slices, 1, 1)
    captions = [pictures.captions[index] if conditional else "" for index in indices.tolist()]
    if bank.adapts_text:
        return base.encode_text(captions * num_slices)
    return base.encode_text(captions).repeat(num_slices, 1, 1)


@torch.inference_mode()
def probe_losses(
    base: Base,
    bank: Bank,
    slices: Sequence[Slice],
    pictures: Encoded,
    conditions: Sequence[bool],
    progress: Callable[[Probe], None] = lambda done: None,
) -> torch.Tensor:
    """Denoising loss of each slice at fixed (picture, noise, timestep) under each condition of `probe`.

    float32 [C, S, pictures, bands] on the CPU. `progress` is called with each probe as its losses are taken.
    """
    losses = torch.empty(len(conditions), len(slices), len(pictures), NUM_BANDS, device=base.device)
    for done in probe(base, bank, slices, pictures, conditions):
        rows = slice(done.first_slice, done.first_slice + done.num_slices)
        columns = send(done.pictures, base.device)
        for condition, table in enumerate(losses):
            table[rows, columns, done.band] = done.losses(condition)
        progress(done)
    return losses.cpu()


def probe_records(losses: torch.Tensor, reference: torch.Tensor, num_timesteps: int) -> list[dict[str, Any]]:
    """Mean loss and paired difference from the base per band and over all: from [pictures, bands] of a model
    and the base.

    The 95 % interval is Student's t over pictures.
    """
    names = band_names(num_timesteps)
    columns = [(name, losses[:, band], reference[:, band]) for band, name in enumerate(names)]
    columns.append(("all", losses.mean(dim=1), reference.mean(dim=1)))
    records = []
    for name, loss, base_loss in columns:
        difference = (loss - base_loss).double()
        count = len(difference)
        half = (
            float(stats.t.ppf(0.975, count - 1) * difference.std() / math.sqrt(count)) if count > 1 else 0.0
        )
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
