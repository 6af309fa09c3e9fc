"""The training objective, and all of its randomness as functions of (seed, position).

A position counts the training pictures seen so far. Because each draw depends on seed and position alone,
arms of one seed see the same pictures, noise, timesteps and dropped captions whatever their rank, alone or
stacked, and a resumed run needs no saved generator state.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorascope.sections import TrainSection
from lorascope.seeding import seeded

# Order ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def epoch_order(seed: int, epoch: int, num_examples: int, bucket: int = 0) -> torch.Tensor:
    """The order of one epoch of a bucket: int64 [num_examples], a permutation."""
    key = ("order", seed, epoch) if bucket == 0 else ("order", seed, epoch, bucket)
    return torch.randperm(num_examples, generator=seeded(*key))


def plan_batches(bucket_sizes: Sequence[int], batch_size: int, num_batches: int) -> list[tuple[int, int]]:
    """The bucket of each batch, and the batch's number within its bucket.

    A batch holds pictures of one shape. Each bucket is a stream of its own pictures, epoch after epoch, cut
    into batches, and the streams run side by side, each at its share of the pictures: batch k of a bucket of
    n pictures falls at (k + u) * batch_size / n epochs, u uniform in [0, 1). The plan does not depend on
    training seeds, so that arms of several seeds share each batch's shape and can be stacked.
    """
    epochs = num_batches * batch_size / sum(bucket_sizes)
    timed = []
    for bucket, size in enumerate(bucket_sizes):
        count = int(epochs * size / batch_size) + 2
        offsets = torch.rand(count, generator=seeded("buckets", bucket), dtype=torch.float64)
        times = (torch.arange(count) + offsets) * batch_size / size
        timed += [(time, bucket, number) for number, time in enumerate(times.tolist())]
    return [(bucket, number) for _, bucket, number in sorted(timed)[:num_batches]]


def batch_indices(
    seed: int, bucket: int, entries: torch.Tensor, number: int, batch_size: int
) -> torch.Tensor:
    """The pictures of a bucket's batch `number`: int64 [batch_size] out of `entries` int64 [m], each epoch in
    an order of its own.
    """
    places = range(number * batch_size, (number + 1) * batch_size)
    return torch.stack(
        [
            entries[epoch_order(seed, place // len(entries), len(entries), bucket)[place % len(entries)]]
            for place in places
        ]
    )


# Draws ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """What training positions see besides their picture. B positions, on the CPU."""

    # float32 [B, c, h, w], standard normal: which latent the VAE's posterior gives
    posterior_noise: torch.Tensor
    noise: torch.Tensor  # float32 [B, c, h, w], standard normal, plus the offset: what the U-Net must predict
    timesteps: torch.Tensor  # int64 [B], in [0, num_timesteps)
    dropped: torch.Tensor  # bool [B]: captions replaced by the empty one
    flipped: torch.Tensor  # bool [B]: pictures mirrored, where flips are wanted


def draw(
    seed: int, positions: range, latent_shape: tuple[int, ...], num_timesteps: int, section: TrainSection
) -> Draws:
    """All randomness of the training positions `positions` under `seed`, beside the order of the pictures.

    The noise offset adds to each channel a constant, normal with standard deviation `section.noise_offset`
    (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
    """
    rows = []
    for position in positions:
        generator = seeded("position", seed, position)
        timestep = torch.randint(num_timesteps, (), generator=generator)
        dropped = torch.rand((), generator=generator) < section.caption_dropout
        posterior_noise, noise = torch.randn((2, *latent_shape), generator=generator)
        flipped = torch.rand((), generator=generator) < 0.5
        offset = torch.randn(latent_shape[0], 1, 1, generator=generator)
        rows.append((posterior_noise, noise + section.noise_offset * offset, timestep, dropped, flipped))
    return Draws(*(torch.stack(column) for column in zip(*rows, strict=True)))


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e (Ho et al. 2020, eq. 4); all [B, c, h, w], `timesteps` int64
    [B].
    """
    signal, spread = _signal_and_spread(timesteps, alphas_cumprod)
    return signal * latents + spread * noise


def prediction_target(
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    prediction_type: str,
) -> torch.Tensor:
    """What the U-Net should predict: the noise, or the velocity sqrt(a) e - sqrt(1-a) x_0 (Salimans & Ho
    2022).
    """
    if prediction_type == "epsilon":
        return noise
    signal, spread = _signal_and_spread(timesteps, alphas_cumprod)
    return signal * noise - spread * latents


def _signal_and_spread(
    timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    alphas = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()


# Loss -------------------------------------------------------------------------------------------------------


def sample_losses(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample: float32 [B] from [B, c, h, w]."""
    return (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))


def training_losses(
    prediction: torch.Tensor,
    target: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    prediction_type: str,
    section: TrainSection,
) -> torch.Tensor:
    """What training lowers, for each sample: float32 [B] from [B, c, h, w] and `timesteps` int64 [B].

    The mean squared error, or twice the Huber loss, which equals it where prediction and target are within
    `huber_delta`; weighted by timestep where `min_snr_gamma` is set.
    """
    if section.loss == "huber":
        distance = 2 * torch.nn.functional.huber_loss(
            prediction.float(), target.float(), reduction="none", delta=section.huber_delta
        )
        losses = distance.mean(dim=(1, 2, 3))
    else:
        losses = sample_losses(prediction, target)
    if section.min_snr_gamma is not None:
        losses = losses * min_snr_weights(timesteps, alphas_cumprod, prediction_type, section.min_snr_gamma)
    return losses


def min_snr_weights(
    timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, prediction_type: str, gamma: float
) -> torch.Tensor:
    """min(SNR, gamma) / SNR, or / (SNR + 1) for velocities, SNR = a / (1 - a) (Hang et al. 2023, eq. 6):
    float32 [B].
    """
    alphas = alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)  # not min / SNR: 0 / 0 where all is noise
    return snr.clamp(max=gamma) / (snr + 1)
