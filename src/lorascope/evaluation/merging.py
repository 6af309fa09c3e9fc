"""Pictures with an adapter merged into the base, against those with it beside the base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorascope.adapters.bank import AdapterBank, Slice
from lorascope.adapters.files import load_adapter
from lorascope.adapters.merge import merged_into
from lorascope.base.loading import Base
from lorascope.evaluation.sampling import Job, draw_pictures
from lorascope.sections import SampleSection

MERGE_TOLERANCE = 1e-3  # relative l2 error of the final latents in fp32


def compare_merged(
    base: Base,
    bank: AdapterBank,
    adapter_dirs: Mapping[str, Path],
    job: Job,
    latent_shape: tuple[int, ...],
    section: SampleSection,
) -> dict[str, dict[str, Any]]:
    """For each arm the error of merged against unmerged output for one prompt, and whether it is tolerable.

    `base` is in fp32: in half precision the merged weights' rounding alone changes pictures by more than a
    wrong file might. `bank`, not attached, holds the arms in the order of `adapter_dirs`, which are their
    PEFT folders. `relative_error` is l2, of the final latents; `mean_pixel_difference` is of 255.
    """
    results = {}
    for index, (name, folder) in enumerate(adapter_dirs.items()):
        bank.attach()
        pictures, latents = draw_pictures(base, bank, [Slice(index)], [job], latent_shape, section)
        bank.detach()
        with merged_into(base, load_adapter(folder)):
            # At strength 0 the merged weights draw alone.
            idle = AdapterBank(base.components, bank.targets[:1], [bank.arms[index]])
            merged_pictures, merged_latents = draw_pictures(
                base, idle, [Slice(0, 0.0)], [job], latent_shape, section
            )
        error = float((merged_latents - latents).norm() / latents.norm())
        results[name] = {
            "relative_error": error,
            "tolerance": MERGE_TOLERANCE,
            "mean_pixel_difference": float((merged_pictures.float() - pictures.float()).abs().mean()),
            "ok": error <= MERGE_TOLERANCE,
        }
    return results
