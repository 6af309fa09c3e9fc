"""DoRA in the bank: PEFT's outputs and gradients, any strength, company, and files."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.bank import AdapterBank, Slice
from lorascope.adapters.files import Layout, load_adapter, save_adapter
from lorascope.adapters.merge import merged_into
from lorascope.adapters.targets import resolve_targets
from lorascope.arms import Arm
from lorascope.base.loading import Base
from lorascope.errors import AdapterError
from lorascope.sections import REFERENCE_TARGETS
from random_adapters import assert_trains_as_alone, inputs_of, randomize

DORA = Arm(name="dora", rank=4, alpha=8, lr=1e-3, seed=0, kind="dora")
LORA = Arm(name="lora", rank=6, alpha=6, lr=1e-3, seed=1)
SECOND = DORA.model_copy(update={"name": "second", "rank": 6, "seed": 2})
TARGETS = {
    "linear": REFERENCE_TARGETS,
    "conv": ("to_q", "proj_in", "proj_out", "conv1", "downsamplers.0.conv"),
}
# Float64 through a dozen layers leaves 1e-13; norms are taken from fp32 products, 1.2e-7 each, on both sides.
NEAR = {"rtol": 1e-5, "atol": 1e-6}


def make_bank(base: Base, arms: list[Arm], targets: tuple[str, ...] = REFERENCE_TARGETS) -> AdapterBank:
    """Adapters that do something: B and, with DoRA, magnitudes off the rows' own."""
    bank = AdapterBank(base.components, resolve_targets(base.unet, targets), arms)
    randomize(bank)
    generator = torch.Generator().manual_seed(3)
    for layer in bank.layers.values():
        for index in (index for index, arm in enumerate(arms) if arm.kind == "dora"):
            magnitudes = layer.magnitudes_of(index)
            magnitudes.mul_(1 + 0.2 * torch.rand(magnitudes.shape, generator=generator))
    return bank


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_output_and_gradients_equal_pefts(exact_base: Base, targets: tuple[str, ...]) -> None:
    base = exact_base
    bank = make_bank(base, [LORA, DORA], targets)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), use_dora=True)
    theirs: Any = get_peft_model(copy.deepcopy(base.unet), config)
    state = {}
    for name, module in bank.adapter(1).modules.items():
        key = f"base_model.model.{name.removeprefix('unet.')}"
        state[f"{key}.lora_A.default.weight"], state[f"{key}.lora_B.default.weight"] = module.down, module.up
        assert module.dora_scale is not None
        shape = theirs.state_dict()[f"{key}.lora_magnitude_vector.default.weight"].shape
        state[f"{key}.lora_magnitude_vector.default.weight"] = module.dora_scale.reshape(shape)
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    theirs.double()
    expected = theirs(*inputs_of(2)).sample
    expected.square().mean().backward()
    bank.attach().select([Slice(1)])
    ours = base.unet(*inputs_of(2)).sample
    ours.square().mean().backward()
    torch.testing.assert_close(ours, expected, **NEAR)
    gradients = dict(theirs.named_parameters())
    for name, layer in bank.layers.items():
        key = f"base_model.model.{name.removeprefix('unet.')}"
        assert layer.magnitudes is not None and layer.magnitudes.values.grad is not None
        assert layer.down.grad is not None and layer.up.grad is not None
        for mine, kind in (
            (layer.down.grad[1, :4], "lora_A"),
            (layer.up.grad[1, :, :4], "lora_B"),
            (layer.magnitudes.values.grad[1], "lora_magnitude_vector"),
        ):
            other = gradients[f"{key}.{kind}.default.weight"].grad
            assert other is not None and other.any()
            scale = float(other.abs().max())
            torch.testing.assert_close(mine, other.reshape(mine.shape).float(), rtol=1e-4, atol=1e-5 * scale)
        assert not layer.magnitudes.values.grad[0].any(), "the arm beside it is LoRA"


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("strength", [1.0, 0.4, 0.0])
def test_at_any_strength_it_draws_as_its_merged_weights(
    exact_base: Base, targets: tuple[str, ...], strength: float, tmp_path: Path
) -> None:
    base = exact_base
    bank = make_bank(base, [DORA, LORA], targets)
    bank.attach().select([Slice(0, strength), Slice(1)])
    noisy, timesteps, text = (torch.cat([part, part]) for part in inputs_of(2))
    with torch.no_grad():
        ours = base.unet(noisy, timesteps, text).sample[:2]
        bank.detach()
        with merged_into(base, bank.adapter(0), torch.float64, strength):
            expected = base.unet(*inputs_of(2)).sample
    torch.testing.assert_close(ours, expected, **NEAR)


def test_a_fresh_one_is_an_exact_no_op(base: Base) -> None:
    with torch.no_grad():
        plain = base.unet(*inputs_of(2, torch.float32)).sample
        bank = AdapterBank(base.components, resolve_targets(base.unet, REFERENCE_TARGETS), [DORA]).attach()
        adapted = base.unet(*inputs_of(2, torch.float32)).sample
        bank.detach()
    # Adding the bias after the product instead of with it costs a last bit.
    torch.testing.assert_close(adapted, plain, rtol=1e-5, atol=1e-6)


def test_in_company_it_is_as_alone(exact_base: Base) -> None:
    assert_trains_as_alone(exact_base, make_bank(exact_base, [LORA, SECOND, DORA]))


@pytest.fixture
def adapter(base: Base) -> Adapter:
    return make_bank(base, [DORA], TARGETS["conv"]).adapter(0)


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_files_hold_the_magnitudes(base: Base, adapter: Adapter, layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / ("peft" if layout == "peft" else "a.safetensors")
    save_adapter(adapter, path, layout, "fp32")
    bank = make_bank(base, [LORA, DORA], TARGETS["conv"])
    bank.parameters.zero_()
    bank.load(1, load_adapter(path))
    for name, module in bank.adapter(1).modules.items():
        own = adapter.modules[name]
        assert module.dora_scale is not None and own.dora_scale is not None
        assert torch.equal(module.dora_scale, own.dora_scale) and torch.equal(module.up, own.up)


def test_magnitudes_of_another_arm_are_refused(base: Base, adapter: Adapter) -> None:
    plain = DORA.model_copy(update={"kind": "lora"})
    with pytest.raises(AdapterError, match=r"has \d+ magnitudes of DoRA, the arm 0: it belongs to another"):
        make_bank(base, [plain], TARGETS["conv"]).load(0, adapter)
    without = make_bank(base, [plain], TARGETS["conv"]).adapter(0)
    with pytest.raises(AdapterError, match=r"has 0 magnitudes of DoRA, the arm \d+: it belongs to another"):
        make_bank(base, [DORA], TARGETS["conv"]).load(0, without)
