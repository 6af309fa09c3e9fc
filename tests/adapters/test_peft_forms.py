"""LoHa and LoKr as PEFT builds them: what PEFT has otherwise is multiplied out, what it lacks is refused."""

from pathlib import Path

import pytest
import torch
from peft.tuners.lokr.layer import factorization

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.files import load_adapter, save_adapter
from lorascope.adapters.modules import LohaModule, LokrModule
from lorascope.adapters.peft_config import kronecker_factors
from lorascope.adapters.peft_forms import loha_options, lokr_for_peft, lokr_options
from lorascope.errors import AdapterError
from random_adapters import ATTENTION, random_loha, random_lokr

LINEAR = f"unet.{ATTENTION}.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
CONV_SHAPE = (16, 16, 3, 3)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_sides_are_split_as_pefts() -> None:
    for size in (1, 4, 7, 12, 16, 77, 320, 1280, 2560):
        for factor in (-2, -1, 0, 1, 2, 4, 5, 6, 8, 16, 400):
            assert kronecker_factors(size, factor) == factorization(size, factor)


def rebuilt(module: LokrModule, path: str, folder: Path) -> LokrModule:
    """The module through a PEFT folder: the same update."""
    written = save_adapter(Adapter({path: module}, "kohya", {}), folder, "peft", "fp32")
    assert any("PEFT has other factors in 1 of 1 LoKr modules" in note for note in written.notes)
    back = load_adapter(folder).modules[path]
    assert isinstance(back, LokrModule)
    torch.testing.assert_close(back.update(), module.update())
    return back


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


def test_what_peft_has_whole_is_multiplied_out(tmp_path: Path) -> None:
    first = LokrModule(6.0, w1_a=draw(4, 2), w1_b=draw(2, 4), w2_a=draw(8, 2), w2_b=draw(2, 8))
    back = rebuilt(first, LINEAR, tmp_path / "1")
    assert back.w1 is not None and back.w2 is None and back.scale == 3.0
    high = LokrModule(6.0, w1=draw(4, 4), w2_a=draw(8, 4), w2_b=draw(4, 8))
    back = rebuilt(high, LINEAR, tmp_path / "2")
    assert back.w2 is not None and not back.has_scale
    beside = LokrModule(6.0, w1_a=draw(4, 2), w1_b=draw(2, 4), w2=draw(8, 8))
    assert not rebuilt(beside, LINEAR, tmp_path / "3").has_scale
    cored = LokrModule(6.0, w1=draw(4, 4), w2_a=draw(1, 4), w2_b=draw(1, 4), t2=draw(1, 1, 1, 1))
    assert rebuilt(cored, LINEAR, tmp_path / "4").w2 is not None  # PEFT's Linear layers have no cores
    flat = LokrModule(None, w1=draw(4, 4), w2=draw(4, 36))
    back = rebuilt(flat, CONV, tmp_path / "5")
    assert back.w2 is not None and back.w2.shape == (4, 4, 3, 3)


def test_convolutions_without_a_core_beside_others_are_multiplied_out() -> None:
    modules = {
        CONV: random_lokr(CONV_SHAPE, 1, 3.0, generator(), core=True),
        CONV.replace("conv1", "conv2"): random_lokr(CONV_SHAPE, 1, 3.0, generator()),
        LINEAR: random_lokr((16, 16), 1, 3.0, generator()),
    }
    changed, count = lokr_for_peft(modules)
    assert count == 1 and changed[CONV] is modules[CONV] and changed[LINEAR] is modules[LINEAR]
    for path, module in changed.items():
        torch.testing.assert_close(module.update(), modules[path].update())
    options = lokr_options("unet", {path.removeprefix("unet."): module for path, module in changed.items()})
    assert options["use_effective_conv2d"] is True and options["decompose_both"] is False


def test_the_factor_is_the_one_that_splits_all_sides() -> None:
    for factor in (-1, 2, 5):
        modules = {
            name: random_lokr(shape, None, None, generator(), factor)
            for name, shape in (("to_q", (12, 16)), ("to_k", (20, 16)))
        }
        found = lokr_options("unet", modules)["decompose_factor"]
        for size in (12, 16, 20):
            assert kronecker_factors(size, found) == kronecker_factors(size, factor)
    odd = LokrModule(None, w1=torch.ones(8, 2), w2=torch.ones(2, 8))
    with pytest.raises(
        AdapterError, match="unet: LoKr splits its layers by no one decompose_factor.*write ko"
    ):
        lokr_options("unet", {"to_q": odd})


def test_loha_cores_are_pefts_or_refused() -> None:
    name, path = "unet", CONV.removeprefix("unet.")
    core, flat = (random_loha(CONV_SHAPE, 2, 1.0, generator(), core=is_core) for is_core in (True, False))
    linear = random_loha((6, 8), 2, 1.0, generator())
    assert loha_options(name, {path: core, "to_q": linear})["use_effective_conv2d"] is True
    assert loha_options(name, {path: flat, "to_q": linear})["use_effective_conv2d"] is False
    with pytest.raises(AdapterError, match="conv2: LoHa has a convolution without a core beside others with"):
        loha_options(name, {path: core, path.replace("conv1", "conv2"): flat})
    one = torch.ones(2, 2, 1, 1)
    small = LohaModule(torch.ones(2, 6), torch.ones(2, 8), torch.ones(2, 6), torch.ones(2, 8), 1.0, one, one)
    with pytest.raises(AdapterError, match="to_q: LoHa has a core of 1x1, PEFT has cores in all larger conv"):
        loha_options(name, {"to_q": small})
