"""Adapters in memory: what a module adds to a layer, and which modules belong to Stable Diffusion v1.5."""

from dataclasses import replace

import pytest
import torch

from lorascope.adapters.adapter import Adapter, misfits
from lorascope.adapters.modules import LoraModule
from lorascope.errors import AdapterError
from random_adapters import ATTENTION, sd15_adapter


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


def test_modules_of_another_model_are_named() -> None:
    adapter = sd15_adapter()
    assert misfits(adapter) == []
    other = LoraModule(torch.ones(2, 3), torch.ones(4, 2), None)
    modules = {**adapter.modules, f"unet.{ATTENTION}.to_q": other, "unet.nowhere": other}
    assert misfits(Adapter(modules, "kohya", {})) == [f"unet.{ATTENTION}.to_q", "unet.nowhere"]
    assert list(adapter.components()) == ["unet"]
