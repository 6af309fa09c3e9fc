"""Which device a study works on."""

import torch

from lorascope.console import log
from lorascope.errors import BaseModelError, first_line


def choose_device(name: str) -> torch.device:
    """The device called `auto`, `cpu`, `cuda` or `mps`; raise `BaseModelError` for a GPU that is not there.

    An Apple GPU is tried first, since torch lacks operations on some systems; `auto` then takes the CPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise BaseModelError(
            'device = "cuda": torch sees no GPU here: use device = "cpu" or install a CUDA build of torch'
        )
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", torch.cuda.current_device())  # with its number, as its tensors say it
    if name == "mps" or (name == "auto" and torch.backends.mps.is_available()):
        try:
            return _tried(torch.device("mps", 0))
        except RuntimeError as error:
            if name == "mps":
                raise BaseModelError(
                    f'device = "mps": does not work here ({first_line(error)}): use device = "cpu"'
                ) from error
            log.warning("device   the Apple GPU is left aside (%s): working on the CPU", first_line(error))
    return torch.device("cpu")


def _tried(device: torch.device) -> torch.device:
    """The device, after a convolution, attention and their backward pass on it; torch's `RuntimeError` where
    they fail.
    """
    weight = torch.ones(2, 2, 3, 3, device=device, requires_grad=True)
    pixels = torch.nn.functional.conv2d(torch.ones(1, 2, 8, 8, device=device), weight)
    tokens = pixels.flatten(2)[:, None]
    torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).sum().backward()
    if weight.grad is None or not weight.grad.isfinite().all():
        raise RuntimeError("a gradient is not finite")
    return device
