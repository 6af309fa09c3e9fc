"""How exactly a device computes in float32."""

from contextlib import AbstractContextManager

import torch


def full_fp32(deterministic: bool = False) -> AbstractContextManager[None]:
    """Within, float32 convolutions have all their bits on a GPU too, as matrix products have by torch's
    default.

    Left to itself, cuDNN rounds their operands to TF32, whose 10 bits of mantissa cost about 1e-3. With
    `deterministic` a convolution gives the same bits every time.
    """
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, deterministic=deterministic, allow_tf32=False
    )
    return flags
