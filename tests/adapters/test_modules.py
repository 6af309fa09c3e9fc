"""What one layer gets: held against torch.kron, PEFT's layers and the formulas by hand, by kind."""

from collections.abc import Callable
from dataclasses import replace

import peft
import pytest
import torch
from peft.tuners.loha import LoHaLayer
from peft.tuners.lokr import LoKrLayer
from torch import nn

from lorascope.adapters.modules import FullModule, LohaModule, LokrModule, LoraModule, Module
from random_adapters import random_full, random_loha, random_lokr, random_module

CONV, LINEAR = (12, 8, 3, 3), (24, 20)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


class Layers(nn.Module):
    """A Linear and a convolution to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(20, 24), nn.Conv2d(8, 12, 3)


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (peft.LoHaConfig, {}),
        (peft.LoKrConfig, {}),
        (peft.LoKrConfig, {"decompose_both": True, "r": 1}),
        (peft.LoKrConfig, {"decompose_factor": 2}),
        (peft.LoKrConfig, {"r": 40, "alpha": 40}),  # both whole
    ],
)
def test_updates_are_those_of_pefts_layers(
    name: str, core: bool, kind: Callable[..., peft.PeftConfig], options: dict[str, int]
) -> None:
    """PEFT's own tensors in our modules give PEFT's own difference of the weight."""
    torch.manual_seed(3)
    config = kind(
        **{"r": 2, "alpha": 3, **options},
        target_modules=[name],
        init_weights=False,
        use_effective_conv2d=core,
    )
    layer = peft.get_peft_model(Layers(), config).base_model.model.get_submodule(name)
    found = {
        key.split(".")[0]: value.detach() for key, value in layer.named_parameters() if "base" not in key
    }
    if isinstance(layer, LoHaLayer):
        module: Module = LohaModule(
            alpha=config.alpha, **{key.removeprefix("hada_"): part for key, part in found.items()}
        )
    else:
        module = LokrModule(
            alpha=config.alpha, **{key.removeprefix("lokr_"): part for key, part in found.items()}
        )
    weight = layer.get_base_layer().weight
    assert isinstance(layer, LoHaLayer | LoKrLayer) and module.fits(weight.shape)
    assert module.matrix_shape == (len(weight), weight[0].numel())
    expected = layer.get_delta_weight("default").detach()
    if not module.has_scale:  # PEFT alone multiplies by alpha / r where both are whole
        module = module.at_strength(config.alpha / config.r)
    torch.testing.assert_close(module.update().reshape(expected.shape), expected)
    other = (len(weight), weight[0].numel() + 1)
    assert not module.fits(other)


@pytest.mark.parametrize("rank", [1, None])
@pytest.mark.parametrize("shape", [LINEAR, CONV])
def test_lokr_is_the_kronecker_product(rank: int | None, shape: tuple[int, ...]) -> None:
    module = random_lokr(shape, rank, 3.0, generator())
    second = module.w2
    if second is None:
        assert module.w2_a is not None and module.w2_b is not None
        second = (module.w2_a @ module.w2_b).unflatten(1, (-1, *shape[2:]))
    assert module.w1 is not None
    first = module.w1.reshape(*module.w1.shape, *[1] * (second.ndim - 2))
    expected = torch.kron(first, second) * (3.0 if rank else 1.0)
    torch.testing.assert_close(module.update().reshape(expected.shape), expected)
    assert module.fits(shape)


MODULES = {
    "LoRA": random_module(CONV, 2, 3.0, generator()),
    "LoHa": random_loha(LINEAR, 2, 3.0, generator()),
    "LoHa with cores": random_loha(CONV, 2, None, generator(), core=True),
    "LoKr": random_lokr(LINEAR, 2, 3.0, generator()),
    "LoKr, whole": random_lokr(CONV, None, 3.0, generator()),
    "full": random_full(CONV, generator()),
    "a norm": random_full((6,), generator()),
}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_strength_multiplies_the_update(module: Module) -> None:
    half = module.at_strength(0.5)
    torch.testing.assert_close(half.update(), 0.5 * module.update())
    if isinstance(module, FullModule) and isinstance(half, FullModule):
        assert module.bias is not None and half.bias is not None
        torch.testing.assert_close(half.bias, 0.5 * module.bias)


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_tensors_can_be_of_another_dtype(module: Module) -> None:
    doubled = module.with_tensors({name: part.double() for name, part in module.tensors().items()})
    assert doubled.kind == module.kind and doubled.rank == module.rank and doubled.scale == module.scale
    assert {part.dtype for part in doubled.tensors().values()} == {torch.float64}
    torch.testing.assert_close(doubled.update(), module.update())


def test_alpha_acts_where_there_is_a_product() -> None:
    names = {name for name, module in MODULES.items() if module.has_scale}
    assert names == {"LoRA", "LoHa", "LoHa with cores", "LoKr"}
    for name, module in MODULES.items():
        assert name in names or module.scale == 1.0


def test_a_kernel_is_known_where_tensors_show_it() -> None:
    kernels = {name: module.kernel for name, module in MODULES.items()}
    shown = (3, 3)
    assert kernels == {
        "LoRA": shown,
        "LoHa": None,
        "LoHa with cores": shown,
        "LoKr": None,
        "LoKr, whole": shown,
        "full": shown,
        "a norm": (),
    }


def test_a_1x1_convolution_is_a_linear_layer() -> None:
    """For LoRA and full differences, whose tensors have the weight's dimensions."""
    for module in (random_full((6, 4, 1, 1), generator()), random_module((6, 4, 1, 1), 2, 1.0, generator())):
        assert module.fits((6, 4)) and module.fits((6, 4, 1, 1)) and not module.fits((4, 6))
    assert not random_full((6, 4, 1, 9), generator()).fits((6, 4, 3, 3))
    norm = random_full((6,), generator())
    assert norm.fits((6,)) and not norm.fits((6, 1)) and not norm.fits((5,))


def test_a_core_of_lora_is_folded_in() -> None:
    module = LoraModule(torch.ones(2, 4, 1, 1), torch.ones(6, 2, 1, 1), None, mid=torch.ones(2, 2, 3, 3))
    assert module.matrix_shape == (6, 36) and module.fits((6, 4, 3, 3))
    torch.testing.assert_close(module.update(), replace(module, down=module.full_down(), mid=None).update())
