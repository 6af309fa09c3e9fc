"""What is timed: shapes and FLOPs, passes cut to a short one; what cannot run is dropped from the race."""

import json
from typing import Any

import pytest
import torch

from conftest import needs_bf16_attention
from lorascope.base.attention import AttentionProcessor, Kernel, Shape, attention_layers
from lorascope.base.configs import SD15_DIR, read_configs
from lorascope.base.ldm import build_component
from lorascope.base.loading import Base
from lorascope.sections import BaseSection
from lorascope.training.timing import Workload, attention_run, cut_to_budget, pass_run, race, survey
from lorascope.training.tuning import Tuning

CPU = torch.device("cpu")
POCKET = read_configs(BaseSection())


def build_sd15() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((SD15_DIR / "unet" / "config.json").read_text())
    return config


def test_the_survey_finds_every_attention_and_the_flops(base: Base) -> None:
    """Against a pass of the real U-Net, and against the 803 GFLOP of Stable Diffusion v1.5 that others count
    too.
    """
    seen: list[Shape] = []

    class Recorder(AttentionProcessor):
        def kernel(self, shape: Shape, device_type: str, dtype: torch.dtype) -> Kernel:
            seen.append(shape)
            return Kernel()

    for layer in attention_layers(base.unet):
        layer.set_processor(Recorder({}))
    with torch.no_grad():
        base.unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 77, 32))
    _, shapes = survey(base.configs["unet"], Workload((4, 8, 8), 77, 1, 1))
    assert shapes == {shape: seen.count(shape) for shape in seen}
    flops, shapes = survey(build_sd15(), Workload((4, 64, 64), 77, 1, 1))
    assert flops == pytest.approx(803e9, rel=0.01)
    assert shapes[Shape(4096, 4096, 8, 40, False)] == 5 and shapes[Shape(64, 77, 8, 160, False)] == 1


def test_what_cannot_run_is_dropped() -> None:
    candidates = [Kernel(), Kernel("cudnn"), Kernel("efficient"), Kernel("flash", 64)]
    runs = {
        kernel: attention_run(kernel, Shape(16, 16, 2, 8, gradients=True), 1, 2, torch.float32, CPU)
        for kernel in candidates
    }
    times = race(runs, CPU)
    assert set(times) == {Kernel(), Kernel("flash", 64)} and all(
        0 < seconds < 10 for seconds in times.values()
    )


def test_a_large_model_is_cut_before_it_is_timed() -> None:
    """Stable Diffusion v1.5 on a CPU: one sample, the finest level, a quarter of the sides; the pocket base
    as it is.
    """
    workload = Workload((4, 64, 64), 77, 8, 8)
    cut, shape = cut_to_budget(build_sd15(), workload, 8 * 803e9, CPU)
    assert (
        shape == (1, 4, 16, 16)
        and cut["block_out_channels"] == [320]
        and cut["up_block_types"] == ["CrossAttnUpBlock2D"]
    )
    with torch.device("meta"):
        build_component("unet", cut)  # diffusers takes it
    same, shape = cut_to_budget(POCKET["unet"], Workload((4, 16, 16), 77, 8, 8), 7.9e9, CPU)
    assert same == POCKET["unet"] and shape == (8, 4, 16, 16)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16_attention), "fp16"])
def test_every_variant_of_a_pass_runs(base: Base, precision: str) -> None:
    """Forward and backward with adapters, in `channels_last` too; a GPU times these, here they only run."""
    for channels_last in (False, True):
        variant = Tuning("a GPU", precision, channels_last)
        pass_run(base.configs["unet"], (2, 4, 8, 8), 77, precision, variant.apply, CPU)()
