"""How far a result may be from the plain one, and the finding that says so.

Tolerances follow from the dtypes: what is right stays several times below them, what is wrong is far above.
"""

import math

import torch
from torch import nn

from lorascope.doctor.findings import (
    Finding,
)


def rounding(unet: nn.Module) -> float:
    """The relative l2 error of a pass over a U-Net, forward and backward, that rounding may explain.

    Each layer rounds its output by up to half an epsilon of its dtype, and the sums in it, of K products each
    and in float32, by up to half an epsilon of float32 a product. Roundings are independent, so over L layers
    they grow as the square roots of L and of the sum of all K; the other half is for there being two passes.
    """
    weights = [parameter for parameter in unet.parameters() if parameter.dim() > 1]
    num_products = sum(weight[0].numel() for weight in weights)
    dtype = weights[0].dtype
    has_tf32 = dtype == torch.float32 and weights[0].is_cuda and torch.backends.cudnn.allow_tf32
    eps = 2.0**-10 if has_tf32 else torch.finfo(dtype).eps
    return eps * math.sqrt(len(weights)) + torch.finfo(torch.float32).eps * math.sqrt(num_products)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The l2 norm of the difference over that of `expected`; infinite where `found` is not finite."""
    if not found.isfinite().all():
        return math.inf
    true = expected.cpu().double()
    norm = torch.linalg.vector_norm(true).clamp(min=1e-30)
    return float(torch.linalg.vector_norm(found.cpu().double() - true) / norm)


def judge(check: str, error: float, tolerance: float, told: str) -> Finding:
    """Ok within the tolerance, else wrong."""
    if not math.isfinite(error):
        return Finding(check, "wrong", f"{told}: not finite", None, tolerance)
    return Finding(check, "ok" if error <= tolerance else "wrong", told, error, tolerance)


def excess(finding: Finding) -> float:
    """Error over tolerance."""
    return math.inf if finding.error is None else finding.error / (finding.tolerance or 1.0)
