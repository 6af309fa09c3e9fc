"""Adapters in memory: what a module adds to a layer, and which modules belong to Stable Diffusion v1.5."""

from dataclasses import replace

import pytest
import torch

from lorascope.adapters.adapter import Adapter, misfits, weight_shape
from lorascope.adapters.modules import LoraModule
from lorascope.errors import AdapterError
from random_adapters import ATTENTION, random_full, random_loha, random_lokr, sd15_adapter


def test_a_tucker_core_is_three_convolutions() -> None:
    """The update equals down, core and up applied one after the other."""
    generator = torch.Generator().manual_seed(4)
    down = torch.randn(3, 5, 1, 1, generator=generator)
    up = torch.randn(7, 3, 1, 1, generator=generator)
    mid = torch.randn(3, 3, 3, 3, generator=generator)
    module = LoraModule(down, up, 1.5, mid=mid)
    assert module.weight_shape == (7, 5, 3, 3) and module.rank == 3 and module.scale == 0.5
    x = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    conv = torch.nn.functional.conv2d
    expected = conv(conv(conv(x, down), mid, padding=1), up) * 0.5
    # fp32: 1.2e-7 * sqrt(5 * 9 * 3 * 3) products of normal numbers, up to 10 together, 2e-5
    torch.testing.assert_close(conv(x, module.update(), padding=1), expected, rtol=1e-4, atol=1e-4)


def test_without_alpha_the_scale_is_one() -> None:
    module = LoraModule(torch.ones(2, 3), torch.ones(4, 2), None)
    assert module.effective_alpha == 2.0 and module.scale == 1.0
    assert torch.equal(module.update(), torch.full((4, 3), 2.0))


def test_strength_goes_into_alpha() -> None:
    module = LoraModule(torch.ones(2, 3), torch.ones(4, 2), None)
    adapter = Adapter({"a": module, "b": replace(module, alpha=6.0)}, "kohya", {"x": "y"})
    scaled = adapter.at_strength(0.5)
    assert {path: found.alpha for path, found in scaled.modules.items()} == {"a": 1.0, "b": 3.0}
    assert scaled.metadata == adapter.metadata
    for path, found in scaled.modules.items():
        torch.testing.assert_close(found.update(), 0.5 * adapter.modules[path].update())
    dora = Adapter({"a": replace(module, dora_scale=torch.ones(4, 1))}, "kohya", {})
    with pytest.raises(AdapterError, match="DoRA: its update does not grow with alpha"):
        dora.at_strength(0.5)


def test_what_needs_two_factors_asks_for_lora() -> None:
    generator = torch.Generator().manual_seed(0)
    lora = {"unet.a": LoraModule(torch.ones(2, 3), torch.ones(4, 2), None)}
    adapter = Adapter({**lora}, "kohya", {})
    assert adapter.lora_modules("edit LoRA") == lora and adapter.kinds == ("lora",)
    mixed = Adapter({**lora, "unet.b": random_lokr((4, 6), 1, 1.0, generator)}, "kohya", {})
    assert mixed.kinds == ("lora", "lokr")
    with pytest.raises(AdapterError, match="unet.b: is LoKr, not a product of two factors: edit LoRA"):
        mixed.lora_modules("edit LoRA")


def test_the_kernel_is_the_layers_where_no_tensor_shows_it() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = (20, 16, 3, 3)
    conv = "unet.down_blocks.0.resnets.0.conv1"
    for module in (
        random_loha(wide, 2, 1.0, generator),
        random_loha(wide, 2, 1.0, generator, core=True),
        random_lokr(wide, 1, 1.0, generator),
        random_lokr(wide, None, 1.0, generator),
        random_full(wide, generator),
    ):
        assert weight_shape(conv, module) == wide
    loha = random_loha((20, 16), 2, 1.0, generator)
    assert weight_shape(f"unet.{ATTENTION}.to_q", loha) == weight_shape("unet.x", loha) == (20, 16)
    assert weight_shape(conv, loha) == (20, 16)  # no 3x3 kernel has 16 numbers an output
    assert weight_shape("unet.x", random_full((6,), generator)) == (6,)


def test_modules_of_another_model_are_named() -> None:
    adapter = sd15_adapter()
    assert misfits(adapter) == []
    other = LoraModule(torch.ones(2, 3), torch.ones(4, 2), None)
    modules = {**adapter.modules, f"unet.{ATTENTION}.to_q": other, "unet.nowhere": other}
    assert misfits(Adapter(modules, "kohya", {})) == [f"unet.{ATTENTION}.to_q", "unet.nowhere"]
    assert list(adapter.components()) == ["unet"]
