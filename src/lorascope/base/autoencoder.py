"""The base's VAE at work: in half precision on a GPU, and again in fp32 where that overflows."""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from lorascope.base.loading import Base
from lorascope.console import log
from lorascope.machine.speed import matmul_flops

_DECODED_PIXELS = 4 * 512 * 512  # decoded at once: some 0.5 GB a picture of 512 px in fp16
_MAX_DECODED = 16


class Autoencoder:
    """Pixels to posteriors and latents to pixels, for one stage of a run.

    On a GPU it works on a copy of the VAE in fp16 (bf16 has too few bits for a posterior's mean) in
    channels_last, and a batch whose result is not finite is done again in fp32. On a CPU it is the base's own
    VAE, in fp32.
    """

    def __init__(self, base: Base, dtype: torch.dtype | None = None) -> None:
        """`dtype` is fp16 on a GPU, unless it is wrong there, and fp32 on a CPU when absent."""
        self.base, self.device = base, base.device
        self.dtype = dtype or (
            torch.float16 if base.device.type == "cuda" and base.half_vae else torch.float32
        )
        self.num_batches = self.num_overflows = 0  # done in all, and of these again in fp32

    @functools.cached_property
    def _bases(self) -> list[Base]:
        """The base with the VAE to try first, and if that is not its own, the base itself; copied at first
        use.
        """
        if self.dtype == torch.float32:
            return [self.base]
        half = copy.deepcopy(self.base.vae).to(dtype=self.dtype, memory_format=torch.channels_last)
        return [replace(self.base, vae=half), self.base]

    @property
    def precision(self) -> str:
        """`float32`, `float16` or `bfloat16`: what posteriors depend on besides the base."""
        return str(self.dtype).removeprefix("torch.")

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Posterior mean and standard deviation of the scaled latents, float32 [n, 2, c, h, w] on the base's
        device.

        `pixels` is uint8 [n, 3, H, W]; it is moved before it is widened.
        """
        moved = pixels.to(self.device, non_blocking=True)
        return self._in_bounds(lambda base: torch.stack(base.encode_pixels(moved.float() / 127.5 - 1), dim=1))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures uint8 [n, H, W, 3] on the CPU, from scaled latents float32 [n, c, h, w]; a few at a time,
        by their pixels.
        """
        num_pixels = latents.shape[-1] * latents.shape[-2] * self.base.latent_factor**2
        count = max(1, min(_MAX_DECODED, _DECODED_PIXELS // num_pixels))
        return torch.cat([self._decode_some(chunk) for chunk in latents.split(count)])

    def _decode_some(self, latents: torch.Tensor) -> torch.Tensor:
        return to_bytes(self._in_bounds(lambda base: base.decode_latents(latents)))

    def _in_bounds(self, compute: Callable[[Base], torch.Tensor]) -> torch.Tensor:
        """What `compute` gives of the base in half precision, or in fp32 where that is not finite."""
        self.num_batches += 1
        if len(self._bases) > 1:
            result = compute(self._bases[0])
            if result.isfinite().all():
                return result
            self.num_overflows += 1
        return compute(self.base)

    def warn_of_overflows(self) -> None:
        """Say how many batches so far had to be done again in fp32, if any."""
        if self.num_overflows:
            log.warning(
                "vae      %d of %d batches overflowed in %s and were done again in fp32, which takes longer",
                self.num_overflows,
                self.num_batches,
                self.precision,
            )

    def share_of_limit(self, size: tuple[int, ...], num_batches: int, seconds: float) -> float:
        """The rate of so many batches of [n, 3, H, W] in so many seconds, as a share of a large matrix
        product's on this device.
        """
        with FlopCounterMode(display=False) as counter:
            self._bases[0].encode_pixels(torch.zeros(size, device=self.device))
        return num_batches * counter.get_total_flops() / seconds / matmul_flops(self.device, self.dtype)


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Pictures uint8 [n, H, W, 3] on the CPU, from pixels float32 [n, 3, H, W] in [-1, 1]."""
    rounded: torch.Tensor = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return rounded.permute(0, 2, 3, 1).cpu()
