"""Pictures with an adapter merged into the base, against those with it beside the base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorascope.adapters.bank import Slice
from lorascope.adapters.files import load_adapter
from lorascope.adapters.merge import merged_into
from lorascope.adapters.mixed import Bank, open_bank
from lorascope.base.loading import Base
from lorascope.evaluation.sampling import Job, draw_pictures
from lorascope.sections import SampleSection

MERGE_TOLERANCE = 1e-3  # relative l2 error of the final latents in fp32
# Strengths beside 1 that float32 holds, two of its last bits away. An arm that diverged can blow a rounding
# of its weights up to another picture: its tolerance is a multiple of what these make of it.
_ROUNDED = (1 - 2**-22, 1 + 2**-22)
_ROUNDINGS = 5.0
_MOST_TOLERANCE = 0.5  # another file differs by about 1


def compare_merged(
    base: Base,
    bank: Bank,
    adapter_dirs: Mapping[str, Path],
    job: Job,
    latent_shape: tuple[int, ...],
    section: SampleSection,
) -> dict[str, dict[str, Any]]:
    """For each arm the error of merged against unmerged output for one prompt, and whether it is tolerable.

    `base` is in fp32: in half precision the merged weights' rounding alone changes pictures by more than a
    wrong file might. `bank`, not attached, holds the arms in the order of `adapter_dirs`, which are their
    PEFT folders. `relative_error` is l2, of the final latents; `mean_pixel_difference` is of 255.
    `tolerance` is `MERGE_TOLERANCE`, or more where the arm's own pictures change so with its last bits.
    """

    def draw(strength: float) -> tuple[torch.Tensor, torch.Tensor]:
        bank.attach()
        drawn = draw_pictures(base, bank, [Slice(index, strength)], [job], latent_shape, section)
        bank.detach()
        return drawn

    results = {}
    for index, (name, folder) in enumerate(adapter_dirs.items()):
        pictures, latents = draw(1.0)
        with merged_into(base, load_adapter(folder)):
            # At strength 0 the merged weights draw alone.
            idle = open_bank(base.components, bank.targets[:1], [bank.arms[index]])
            merged_pictures, merged_latents = draw_pictures(
                base, idle, [Slice(0, 0.0)], [job], latent_shape, section
            )
        error, tolerance = _relative_error(merged_latents, latents), MERGE_TOLERANCE
        if error > tolerance:
            by_rounding = max(_relative_error(draw(strength)[1], latents) for strength in _ROUNDED)
            tolerance = max(tolerance, min(_ROUNDINGS * by_rounding, _MOST_TOLERANCE))
        results[name] = {
            "relative_error": error,
            "tolerance": tolerance,
            "mean_pixel_difference": float((merged_pictures.float() - pictures.float()).abs().mean()),
            "ok": error <= tolerance,
        }
    return results


def _relative_error(latents: torch.Tensor, reference: torch.Tensor) -> float:
    return float((latents - reference).norm() / reference.norm())
