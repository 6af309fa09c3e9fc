"""Which faster ways to compute may be used on a device: all, unless one was found to be wrong there."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FastPaths:
    """What a run may use; what is barred has a slower way beside it that computes the same."""

    barred_kernels: frozenset[str] = frozenset()  # of attention, by name
    channels_last: bool = True  # the memory format of the U-Net's convolutions
    recorded_step: bool = True  # training steps as CUDA graphs
    half_vae: bool = True  # the VAE in fp16


ALL_PATHS = FastPaths()
