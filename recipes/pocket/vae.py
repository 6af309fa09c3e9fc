"""Train the autoencoder, then fold its latents' shift and scale into its weights.

Stage 3. Reads the drawings, writes the `vae` folder of the base.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from recipes.pocket.checkpoint import load_checkpoint, save_checkpoint
from recipes.pocket.config import IMAGE_SIZE_PX, VaeConfig

# Green against magenta, three times, and red against blue: without a term for the hues of large
# areas they are the last thing that the latents learn, green last of all.
OPPONENT = torch.tensor([[-1.5, 3.0, -1.5], [1.0, 0.0, -1.0]])


def build_vae(config: VaeConfig) -> AutoencoderKL:
    """Allocate the autoencoder: (B, 3, H, W) in -1..1 to (B, 4, H/4, W/4) latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=config.channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE_PX,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def train_vae(
    pixels: Tensor,
    config: VaeConfig,
    seed: int,
    work_dir: Path,
    device: torch.device,
    log: Callable[..., None],
) -> AutoencoderKL:
    """Train on (N, 3, 64, 64) uint8 drawings; a third of the batches at half the size.

    Interrupted, it goes on from its checkpoint: a step's batch and noise depend on (seed, step).
    """
    torch.manual_seed(seed)
    vae = build_vae(config).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, weight_decay=1e-4, fused=True)
    opponent = OPPONENT.to(device)
    num_steps = config.num_samples // config.batch_size
    step = load_checkpoint(work_dir / "vae.ckpt", model=vae, optimizer=optimizer)
    start = time.monotonic()
    while step < num_steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        batch = pixels[torch.randint(len(pixels), (config.batch_size,), generator=generator)]
        images = augment(batch.float() / 127.5 - 1, step, generator).to(device)
        for group in optimizer.param_groups:
            warmup, done = min(1.0, (step + 1) / 50), step / num_steps
            group["lr"] = config.learning_rate * warmup * (1 + math.cos(math.pi * done)) / 2
        with torch.autocast(device.type, torch.bfloat16):
            moments = vae.quant_conv(vae.encoder(images)).float()
            mean, log_variance = moments.chunk(2, dim=1)
            log_variance = log_variance.clamp(-12, 6)
            noise = torch.randn(mean.shape, generator=generator).to(device)
            latents = mean + noise * (log_variance / 2).exp()
            drawn = vae.decoder(vae.post_quant_conv(latents)).float()
        reconstruction = (drawn - images).abs().mean()
        gradient = sum((drawn.diff(dim=d) - images.diff(dim=d)).abs().mean() for d in (2, 3))
        colour = (opponent @ F.avg_pool2d(drawn - images, 4).flatten(2)).abs().mean()
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        loss = (
            reconstruction
            + config.gradient_weight * gradient
            + config.colour_weight * colour
            + config.kl_weight * divergence
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0 or step == num_steps:
            log(
                stage="vae",
                samples=step * config.batch_size,
                l1=reconstruction.item(),
                gradient=gradient.item(),
                colour=colour.item(),
                kl=divergence.item(),
                seconds=time.monotonic() - start,
            )
        if step % 500 == 0 or step == num_steps:
            save_checkpoint(work_dir / "vae.ckpt", step, model=vae, optimizer=optimizer)
    return vae.eval()


def augment(images: Tensor, step: int, generator: torch.Generator) -> Tensor:
    """Flip half of (B, 3, 64, 64) images, permute the colour channels of some, halve every third batch in
    size.

    Emoji are mostly yellow, red and brown: other hues need the permutation to get their share.
    """
    permuted = images[:, torch.randperm(3, generator=generator)]
    recolour = torch.rand(len(images), generator=generator) < 0.3
    images = torch.where(recolour[:, None, None, None], permuted, images)
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    return F.avg_pool2d(images, 2) if step % 3 == 2 else images


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, latents: Tensor) -> None:
    """Make each channel of `latents`, (N, 4, h, w) from this model, have mean 0 and deviation 1.

    A pipeline knows one scale and no shift, and latents of white paper are far from zero mean:
    what the noise schedule leaves of the signal at its last step would tint every sample.
    `quant_conv` gives mean and log-variance: mean' = (mean - m) / s, logvar' = logvar - 2 ln s;
    `post_quant_conv` undoes it: its input z becomes z * s + m. Both are exact.
    """
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    encode, decode = vae.quant_conv, vae.post_quant_conv
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= deviation[None, :, None, None]
    encode.bias[:4] = (encode.bias[:4] - mean) / deviation
    encode.weight[:4] /= deviation[:, None, None, None]
    encode.bias[4:] -= 2 * deviation.log()


@torch.no_grad()
def encode_drawings(vae: AutoencoderKL, pixels: Tensor, device: torch.device) -> Tensor:
    """Posterior means of (N, 3, H, W) uint8 drawings: (N, 4, H/4, W/4) float32."""
    parts = []
    for chunk in pixels.split(128):
        images = (chunk.float() / 127.5 - 1).to(device)
        parts.append(vae.encode(images).latent_dist.mean.float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def reconstruction_l1(vae: AutoencoderKL, pixels: Tensor, device: torch.device) -> float:
    """Mean absolute error in the range 0..1 over (N, 3, H, W) uint8 drawings that were not trained on."""
    total = 0.0
    for chunk in pixels.split(128):
        images = (chunk.float() / 127.5 - 1).to(device)
        drawn = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        total += (drawn - images).abs().mean().item() / 2 * len(chunk)
    return total / len(pixels)
