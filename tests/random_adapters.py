"""Adapters with random weights for the layers of a pipeline, and the pipeline's own layers by our paths."""

import math
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.bank import AdapterBank
from lorascope.adapters.modules import FullModule, LohaModule, LokrModule, LoraModule
from lorascope.adapters.peft_config import kronecker_factors
from lorascope.adapters.targets import count_parameters
from lorascope.base.layers import stable_diffusion_layers
from lorascope.base.loading import Base

RANK = 4
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def layers_of(pipeline: StableDiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The layers that plain LoRA adapts, by our paths: attention, feed-forward, proj_in/out, and the text
    encoder's.
    """
    found = {}
    for path, module in pipeline.unet.named_modules():
        if ".attentions." in path and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            found[f"unet.{path}"] = module
    for path, module in pipeline.text_encoder.named_modules():
        if ".layers." in path and isinstance(module, torch.nn.Linear):
            found[f"text_encoder.text_model.{path}"] = module
    return found


def inputs_of(samples: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Noisy latents, timesteps and text states for the tiny base's U-Net."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(samples, 4, 8, 8, dtype=dtype, generator=generator),
        torch.randint(1000, (samples,), generator=generator),
        torch.randn(samples, 77, 32, dtype=dtype, generator=generator),
    )


def assert_trains_as_alone(base: Base, together: AdapterBank) -> None:
    """Each adapter of a bank has the gradients that it has in a bank of its own; the base is in float64."""
    noisy, timesteps, text = inputs_of(len(together.arms))
    together.attach()
    base.unet(noisy, timesteps, text).sample.square().sum().backward()
    together.detach()
    for index, arm in enumerate(together.arms):
        alone = AdapterBank(base.components, together.targets, [arm])
        alone.load(0, together.adapter(index))
        alone.attach()
        part = slice(index, index + 1)
        base.unet(noisy[part], timesteps[part], text[part]).sample.square().sum().backward()
        alone.detach()
        own = together.unpadded(together.gradients, index)
        assert own.shape == alone.gradients[0].shape == (count_parameters(together.targets, arm),)
        # fp32 gradients of float64 products
        scale = float(own.abs().max())
        torch.testing.assert_close(own, alone.gradients[0], rtol=1e-5, atol=1e-6 * scale)
        assert torch.equal(together.unpadded(together.parameters, index), alone.parameters[0])


def randomize(bank: AdapterBank) -> None:
    """Give B values, so that the adapters do something; the padding of smaller ranks stays zero."""
    generator = torch.Generator().manual_seed(2)
    for target in bank.targets:
        for index, arm in enumerate(bank.arms):
            up = bank.layers[target.name].up.detach()[index, :, : target.rank(arm)]
            up.copy_(torch.randn(up.shape, generator=generator) * 0.1)


def random_module(
    shape: tuple[int, ...], rank: int, alpha: float | None, generator: torch.Generator
) -> LoraModule:
    """A module for a weight of `shape`, [out, in] or [out, in, kh, kw]."""
    down = torch.randn(rank, *shape[1:], generator=generator) / math.prod(shape[1:]) ** 0.5
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) * 0.3
    return LoraModule(down, up, alpha)


def random_adapter(
    shapes: dict[str, tuple[int, ...]], alpha: float | None = 8.0, rank: int = RANK
) -> Adapter:
    generator = torch.Generator().manual_seed(5)
    return Adapter(
        {path: random_module(shape, rank, alpha, generator) for path, shape in shapes.items()}, "kohya", {}
    )


def shapes_of(pipeline: StableDiffusionPipeline) -> dict[str, tuple[int, ...]]:
    return {path: tuple(module.weight.shape) for path, module in layers_of(pipeline).items()}


def plain_lora_modules() -> dict[str, tuple[int, ...]]:
    """The modules that plain LoRA adapts in Stable Diffusion v1.5."""
    return {
        path: shape
        for path, shape in stable_diffusion_layers().items()
        if ".attentions." in path or path.startswith("text_encoder.")
    }


def sd15_adapter() -> Adapter:
    """An adapter of rank 2 and alpha 4 on a few layers of Stable Diffusion v1.5's shapes."""
    wanted = (f"unet.{ATTENTION}.to_q", "unet.mid_block.attentions.0.proj_in")
    return random_adapter(
        {path: shape for path, shape in plain_lora_modules().items() if path in wanted}, alpha=4.0, rank=2
    )


def random_loha(
    shape: tuple[int, ...], rank: int, alpha: float | None, generator: torch.Generator, core: bool = False
) -> LohaModule:
    """As `random_module`; with Tucker cores where `core` is set and the weight is a convolution's."""

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator) * 0.5

    if core and len(shape) == 4:
        factors = [draw(rank, size) for size in (*shape[:2], *shape[:2])]
        cores = [draw(rank, rank, *shape[2:]) for _ in range(2)]
        return LohaModule(*factors, alpha, *cores)
    factors = [draw(*size) for size in [(shape[0], rank), (rank, math.prod(shape[1:]))] * 2]
    return LohaModule(*factors, alpha)


def random_lokr(
    shape: tuple[int, ...],
    rank: int | None,
    alpha: float | None,
    generator: torch.Generator,
    factor: int = -1,
    core: bool = False,
) -> LokrModule:
    """As `random_module`, split as LyCORIS does; w2 is whole where `rank` is None or too high for two
    factors.
    """
    (rows, more_rows), (columns, more_columns) = (kronecker_factors(size, factor) for size in shape[:2])

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator) * 0.5

    w1 = draw(rows, columns)
    if rank is None or rank >= max(more_rows, more_columns) / 2:
        return LokrModule(alpha, w1, w2=draw(more_rows, more_columns, *shape[2:]))
    if core and math.prod(shape[2:]) > 1:
        w2_a, w2_b = draw(rank, more_rows), draw(rank, more_columns)
        return LokrModule(alpha, w1, w2_a=w2_a, w2_b=w2_b, t2=draw(rank, rank, *shape[2:]))
    w2_a, w2_b = draw(more_rows, rank), draw(rank, more_columns * math.prod(shape[2:]))
    return LokrModule(alpha, w1, w2_a=w2_a, w2_b=w2_b)


def random_full(shape: tuple[int, ...], generator: torch.Generator, bias: bool = True) -> FullModule:
    """As `random_module`."""
    weight = torch.randn(shape, generator=generator) * 0.1
    return FullModule(weight, torch.randn(shape[0], generator=generator) * 0.1 if bias else None)
