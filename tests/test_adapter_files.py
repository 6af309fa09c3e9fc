"""Adapter files: other programs' loaders give our pictures, round trips lose nothing, strange files are named."""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from lorascope.adapter_files import (
    Adapter,
    Layout,
    LoraModule,
    foreign_kind,
    kohya_name,
    load_adapter,
    parse_adapter,
    save_adapter,
    sd15_modules,
)
from lorascope.errors import AdapterError, WeightsError

RANK = 4
Tensors = dict[str, torch.Tensor]


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def layers_of(pipeline: StableDiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The layers that plain LoRA adapts, by our paths: attention, feed-forward, proj_in/out, and the text encoder's."""
    found = {}
    for path, module in pipeline.unet.named_modules():
        if ".attentions." in path and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            found[f"unet.{path}"] = module
    for path, module in pipeline.text_encoder.named_modules():
        if ".layers." in path and isinstance(module, torch.nn.Linear):
            found[f"text_encoder.text_model.{path}"] = module
    return found


def random_module(shape: tuple[int, ...], rank: int, alpha: float | None, generator: torch.Generator) -> LoraModule:
    """A module for a weight of `shape`, [out, in] or [out, in, kh, kw]."""
    down = torch.randn(rank, *shape[1:], generator=generator) / math.prod(shape[1:]) ** 0.5
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) * 0.3
    return LoraModule(down, up, alpha)


def random_adapter(shapes: dict[str, tuple[int, ...]], alpha: float | None = 8.0, rank: int = RANK) -> Adapter:
    generator = torch.Generator().manual_seed(5)
    return Adapter({path: random_module(shape, rank, alpha, generator) for path, shape in shapes.items()}, "kohya", {})


def shapes_of(pipeline: StableDiffusionPipeline) -> dict[str, tuple[int, ...]]:
    return {path: tuple(module.weight.shape) for path, module in layers_of(pipeline).items()}


def same(a: Adapter, b: Adapter) -> bool:
    """Whether two adapters hold the same modules, bit for bit and in the same dtypes, and the same alphas."""
    return set(a.modules) == set(b.modules) and all(
        module.effective_alpha == b.modules[path].effective_alpha
        and all(torch.equal(tensor, b.modules[path].tensors()[name]) for name, tensor in module.tensors().items())
        and module.tensors().keys() == b.modules[path].tensors().keys()
        for path, module in a.modules.items()
    )


def draw(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    """The latents of a few denoising steps."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        result = pipeline("a red house", num_inference_steps=3, guidance_scale=5.0, generator=generator, output_type="latent")
    latents: torch.Tensor = result.images
    return latents


@pytest.fixture(scope="module")
def pipeline(pipeline_folder: Path) -> StableDiffusionPipeline:
    """The tiny pipeline; never change it."""
    return load_pipeline(pipeline_folder)


# -- other programs' loaders ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21 asks transformers 5 for it
@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("alpha", [2.0, 4.0, 8.0], ids=["below", "equal", "above"])
@pytest.mark.parametrize("parts", ["unet", "all"])
def test_other_loaders_draw_what_the_adapter_says(
    pipeline: StableDiffusionPipeline, pipeline_folder: Path, tmp_path: Path, layout: Layout, alpha: float, parts: str
) -> None:
    """diffusers loads our kohya and diffusers files, PEFT our folder: the same latents as weights with alpha/r * up @ down added."""
    shapes = {path: shape for path, shape in shapes_of(pipeline).items() if parts == "all" or path.startswith("unet.")}
    adapter = random_adapter(shapes, alpha)
    reference = copy.deepcopy(pipeline)
    layers = layers_of(reference)
    with torch.no_grad():
        for path, module in adapter.modules.items():
            product = torch.tensordot(module.up.flatten(1), module.down, dims=1)  # (out, in, ...)
            layers[path].weight += product * (alpha / RANK)
    expected = draw(reference)
    assert not torch.allclose(expected, draw(pipeline), atol=1e-2)

    target = tmp_path / ("folder" if layout == "peft" else "file.safetensors")
    save_adapter(adapter, target, layout, "fp32")
    loaded = load_pipeline(pipeline_folder)
    if layout != "peft":
        loaded.load_lora_weights(str(target))
    elif parts == "unet":
        loaded.unet = PeftModel.from_pretrained(loaded.unet, str(target)).base_model.model
    else:
        loaded.unet = PeftModel.from_pretrained(loaded.unet, str(target / "unet")).base_model.model
        loaded.text_encoder = PeftModel.from_pretrained(loaded.text_encoder, str(target / "text_encoder")).base_model.model
    torch.testing.assert_close(draw(loaded), expected, rtol=1e-3, atol=1e-4)
