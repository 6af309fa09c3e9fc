"""The VAE in half precision against float32."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from lorascope.base.autoencoder import Autoencoder
from lorascope.base.loading import Base
from lorascope.doctor.findings import (
    HALF_VAE,
    Finding,
)
from lorascope.doctor.judging import judge, relative_error
from lorascope.seeding import seeded


def check_half_vae(base: Base, side_px: int, dtype: torch.dtype | None = None) -> Finding:
    """The VAE in the dtype in which it works here, or `dtype`, against float32: posteriors and pictures."""
    half, plain = Autoencoder(base, dtype), Autoencoder(base, torch.float32)
    if half.dtype == torch.float32:
        return Finding(HALF_VAE, "not checked", "not on this device: the VAE works in float32 here")
    errors = []
    for pixels in _made_up_pixels(side_px):
        expected, found = plain.encode(pixels), half.encode(pixels)
        decoded = [part.decode(expected[:, 0]).float() / 255 for part in (half, plain)]
        errors += [relative_error(found, expected), relative_error(*decoded)]
    told = f"posteriors and pictures in {half.precision} against float32"
    if half.num_overflows:
        counts = f"{half.num_overflows} of {half.num_batches} batches are beyond {half.precision}"
        return Finding(HALF_VAE, "overflow", f"half precision is not used: {counts}")
    return judge(HALF_VAE, max(errors), _vae_rounding(base.vae, half.dtype), told)


def _vae_rounding(vae: nn.Module, dtype: torch.dtype) -> float:
    """As `rounding`, for one pass each way against float32, whose own rounding is of no account."""
    num_layers = sum(parameter.dim() > 1 for parameter in vae.parameters())
    return torch.finfo(dtype).eps * math.sqrt(num_layers)


def _made_up_pixels(side_px: int) -> Iterator[torch.Tensor]:
    """Pictures uint8 [1, 3, H, W] that lead a VAE far and wide: noise, a ramp, black beside white."""
    yield torch.randint(
        0, 256, (1, 3, side_px, side_px), dtype=torch.uint8, generator=seeded("doctor pixels")
    )
    ramp = torch.linspace(0, 255, side_px).round().to(torch.uint8)
    yield torch.stack(
        [ramp.expand(side_px, -1), ramp.flip(0).expand(side_px, -1), ramp[:, None].expand(-1, side_px)]
    )[None]
    halves = torch.zeros(1, 3, side_px, side_px, dtype=torch.uint8)
    halves[..., side_px // 2 :] = 255
    yield halves
