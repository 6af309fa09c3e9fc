"""The training objective, and all of its randomness as functions of (seed, position).

A position counts the training pictures seen so far. Because each draw depends on seed and position alone, arms of one
seed see the same pictures, noise, timesteps and dropped captions whatever their rank, alone or stacked, and a resumed
run needs no saved generator state.
"""

import hashlib
from dataclasses import dataclass

import torch


def seeded(*key: object) -> torch.Generator:
    """A CPU generator whose stream depends on `key` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def epoch_order(seed: int, epoch: int, num_examples: int) -> torch.Tensor:
    """The order of one epoch: int64 [num_examples], a permutation."""
    return torch.randperm(num_examples, generator=seeded("order", seed, epoch))


@dataclass(frozen=True)
class Draws:
    """What training positions see, before any picture is touched. B positions, on the CPU."""

    indices: torch.Tensor  # int64 [B], into the training pictures
    posterior_noise: torch.Tensor  # float32 [B, c, h, w], standard normal: which latent the VAE's posterior gives
    noise: torch.Tensor  # float32 [B, c, h, w], standard normal: what the U-Net must predict
    timesteps: torch.Tensor  # int64 [B], in [0, num_timesteps)
    dropped: torch.Tensor  # bool [B]: captions replaced by the empty one


def draw(
    seed: int, positions: range, num_examples: int, latent_shape: tuple[int, ...], num_timesteps: int, caption_dropout: float
) -> Draws:
    """All randomness of the training positions `positions` under `seed`."""
    orders = {epoch: epoch_order(seed, epoch, num_examples) for epoch in {position // num_examples for position in positions}}
    rows = []
    for position in positions:
        generator = seeded("position", seed, position)
        rows.append(
            (
                orders[position // num_examples][position % num_examples],
                torch.randint(num_timesteps, (), generator=generator),
                torch.rand((), generator=generator) < caption_dropout,
                torch.randn((2, *latent_shape), generator=generator),
            )
        )
    indices, timesteps, dropped, noises = (torch.stack(column) for column in zip(*rows, strict=True))
    return Draws(indices, noises[:, 0], noises[:, 1], timesteps, dropped)


def add_noise(latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e (Ho et al. 2020, eq. 4); all [B, c, h, w], `timesteps` int64 [B]."""
    signal, spread = _signal_and_spread(timesteps, alphas_cumprod)
    return signal * latents + spread * noise


def prediction_target(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """What the U-Net should predict: the noise, or the velocity sqrt(a) e - sqrt(1-a) x_0 (Salimans & Ho 2022)."""
    if prediction_type == "epsilon":
        return noise
    signal, spread = _signal_and_spread(timesteps, alphas_cumprod)
    return signal * noise - spread * latents


def sample_losses(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample: float32 [B] from [B, c, h, w]."""
    return (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))


def _signal_and_spread(timesteps: torch.Tensor, alphas_cumprod: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    alphas = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()
