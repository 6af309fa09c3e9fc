"""LoHa, LoKr and full fine-tuning in the bank: PEFT's and torch's outputs and gradients, and company."""

import copy
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, get_peft_model

from lorascope.adapters.bank import AdapterBank, Slice
from lorascope.adapters.mixed import MixedBank, open_bank
from lorascope.adapters.targets import (
    Target,
    count_parameters,
    resolve_section,
    resolve_targets,
)
from lorascope.arms import FULL_RANK, Arm
from lorascope.base.loading import Base
from lorascope.errors import AdapterError
from lorascope.sections import REFERENCE_TARGETS, AdapterSection
from random_adapters import assert_trains_as_alone, inputs_of

LOHA = Arm(name="loha", rank=4, alpha=8, lr=1e-3, seed=0, kind="loha")
LOKR = Arm(name="lokr", rank=3, alpha=6, lr=1e-3, seed=1, kind="lokr")
FULL = Arm(name="full", rank=FULL_RANK, alpha=FULL_RANK, lr=1e-5, seed=2, kind="full")
LORA = Arm(name="lora", rank=6, alpha=6, lr=1e-3, seed=1)
TLORA = LORA.model_copy(update={"name": "tlora", "kind": "tlora", "min_rank": 2})
TARGETS = {
    "linear": REFERENCE_TARGETS,
    "conv": ("to_q", "ff.net.2", "proj_in", "proj_out", "conv1", "downsamplers.0.conv"),
}
# Float64 through a dozen layers leaves 1e-13; updates are fp32 products on both sides, 1.2e-7 each.
NEAR = {"rtol": 1e-5, "atol": 1e-6}


def randomize(bank: Any) -> None:
    """Move every parameter, so that all adapters do something."""
    for number, part in enumerate(getattr(bank, "banks", [bank])):
        noise = torch.randn(part.parameters.shape, generator=torch.Generator().manual_seed(number))
        for index in range(len(part.arms)):
            part.load_unpadded(
                part.parameters,
                index,
                part.unpadded(part.parameters, index) + 0.02 * part.unpadded(noise, index),
            )


def targets_of(base: Base, arms: list[Arm], names: tuple[str, ...] = REFERENCE_TARGETS) -> list[Target]:
    return resolve_section(base.components, AdapterSection(targets=names), arms)


def make_bank(base: Base, arms: list[Arm], names: tuple[str, ...] = REFERENCE_TARGETS) -> AdapterBank:
    bank = AdapterBank(base.components, targets_of(base, arms, names), arms)
    randomize(bank)
    return bank


@pytest.mark.parametrize("names", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("arm", [LOHA, LOKR], ids=["loha", "lokr"])
def test_output_and_gradients_equal_pefts(exact_base: Base, arm: Arm, names: tuple[str, ...]) -> None:
    base, other = exact_base, arm.model_copy(update={"name": "other", "rank": 2, "seed": 5})
    bank = make_bank(base, [other, arm], names)
    kind: Any = LoHaConfig if arm.kind == "loha" else LoKrConfig
    config = kind(r=arm.rank, alpha=arm.alpha, target_modules=list(names))
    if arm.kind == "lokr":  # PEFT scales by alpha / r even where both factors are whole
        config.alpha_pattern = {
            name.removeprefix("unet."): float(arm.rank)
            for name, module in bank.adapter(1).modules.items()
            if {"w1", "w2"} <= set(module.tensors())
        }
    theirs: Any = get_peft_model(copy.deepcopy(base.unet), config)
    state, prefix = {}, {"loha": "hada", "lokr": "lokr"}[arm.kind]
    for name, module in bank.adapter(1).modules.items():
        for part, tensor in module.tensors().items():
            key = f"base_model.model.{name.removeprefix('unet.')}.{prefix}_{part}.default"
            state[key] = tensor
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    theirs.double()
    expected = theirs(*inputs_of(2)).sample
    expected.square().mean().backward()
    bank.attach().select([Slice(1)])
    ours = base.unet(*inputs_of(2)).sample
    ours.square().mean().backward()
    torch.testing.assert_close(ours, expected, **NEAR)
    gradients = dict(theirs.named_parameters())
    for target in bank.targets:
        slopes = bank.layers[target.name].views(bank.gradients[1, bank.spans[target.name]], 1)
        for part, mine in slopes.items():
            key = f"base_model.model.{target.path}.{prefix}_{part}.default"
            other_grad = gradients[key].grad
            assert other_grad is not None and other_grad.any()
            scale = float(other_grad.abs().max())
            torch.testing.assert_close(mine, other_grad.float(), rtol=1e-4, atol=1e-5 * scale)
    assert not bank.gradients[0].any()


def test_full_fine_tuning_is_that_of_plain_torch(exact_base: Base) -> None:
    """Every weight and bias of the U-Net, norms among them."""
    base = exact_base
    plain: Any = copy.deepcopy(base.unet).requires_grad_()
    plain(*inputs_of(2)).sample.square().mean().backward()
    bank = AdapterBank(base.components, targets_of(base, [FULL]), [FULL]).attach()
    base.unet(*inputs_of(2)).sample.square().mean().backward()
    bank.detach()
    expected = {name: weight.grad for name, weight in plain.named_parameters()}
    found = {}
    for target in bank.targets:
        slopes = bank.layers[target.name].views(bank.gradients[0, bank.spans[target.name]], 0)
        found |= {f"{target.path}.{part}": slope for part, slope in slopes.items()}
    assert set(found) == set(expected)
    assert count_parameters(bank.targets, FULL) == sum(weight.numel() for weight in plain.parameters())
    for name, slope in found.items():
        other = expected[name]
        assert other is not None
        scale = float(other.abs().max())
        torch.testing.assert_close(slope, other.float(), rtol=1e-5, atol=1e-6 * scale)


def test_layers_choose_what_full_fine_tuning_trains(base: Base) -> None:
    arm = FULL.model_copy(update={"layers": ("*.attentions.*",)})
    bank = AdapterBank(base.components, targets_of(base, [LORA, arm]), [arm])
    assert all(".attentions." in target.path for target in bank.targets)
    assert any(target.is_norm for target in bank.targets)
    nowhere = FULL.model_copy(update={"layers": ("decoder",)})
    with pytest.raises(AdapterError, match="match no layer of the U-Net: use name endings"):
        targets_of(base, [nowhere])


@pytest.mark.parametrize("arm", [LOHA, LOKR, FULL], ids=lambda arm: arm.kind)
def test_a_fresh_one_is_a_no_op(base: Base, arm: Arm) -> None:
    with torch.no_grad():
        plain = base.unet(*inputs_of(2, torch.float32)).sample
        bank = AdapterBank(base.components, targets_of(base, [arm]), [arm]).attach()
        adapted = base.unet(*inputs_of(2, torch.float32)).sample
        bank.detach()
    torch.testing.assert_close(adapted, plain, rtol=1e-5, atol=1e-6)


def test_kinds_of_one_pass_train_as_alone(exact_base: Base) -> None:
    arms = [LOHA, LOKR, LOHA.model_copy(update={"name": "small", "rank": 2, "seed": 4})]
    assert_trains_as_alone(exact_base, make_bank(exact_base, arms, TARGETS["conv"]))


@pytest.mark.parametrize("masked", [False, True])
def test_arms_of_all_kinds_draw_together_as_each_alone(exact_base: Base, masked: bool) -> None:
    base, arms = exact_base, [LORA, LOKR, FULL, LOHA, *[TLORA] * masked]
    bank = open_bank(base.components, targets_of(base, arms), arms)
    assert isinstance(bank, MixedBank) and bank.is_masked == masked and not bank.adapts_text
    randomize(bank)
    noisy, _, text = inputs_of(2)
    times = torch.tensor([700, 700])
    slices = [Slice(index, strength) for strength in (1.0, 0.5) for index in (2, 0, 3, 1, *[4] * masked)]
    slices = [*slices, Slice(2, 0.0)]
    copies = [torch.cat([part] * len(slices)) for part in (noisy, times, text)]
    with torch.no_grad():
        bank.attach().select(slices)
        bank.at(copies[1])
        together = base.unet(*copies).sample.unflatten(0, (len(slices), -1))
        bank.select([Slice(0)])
        bank.at(times)
        one = base.unet(noisy, times, text).sample
        bank.detach()
        plain = base.unet(noisy, times, text).sample
        torch.testing.assert_close(together[-1], plain, **NEAR)
        torch.testing.assert_close(one, together[1], **NEAR)
        for item, found in zip(slices, together, strict=True):
            alone = AdapterBank(base.components, targets_of(base, arms), [arms[item.adapter]])
            number, place = bank._places[item.adapter]
            alone.load(0, bank.banks[number].adapter(place))
            alone.attach().select([Slice(0, item.strength)])
            alone.at(times)
            expected = base.unet(noisy, times, text).sample
            alone.detach()
            torch.testing.assert_close(found, expected, **NEAR)
            if item.strength:
                assert not torch.allclose(found, plain, rtol=1e-3, atol=1e-4)


def test_half_precision_keeps_a_small_difference(base: Base) -> None:
    """Of a size that a sum in bf16 would round away."""
    unet = copy.deepcopy(base.unet).to(torch.bfloat16)
    components = {**base.components, "unet": unet}
    bank = AdapterBank(components, resolve_targets(unet, ["to_q"]), [FULL])
    target = bank.targets[0]
    layer, row = bank.layers[target.name], bank.parameters[0, bank.spans[target.name]]
    weight = layer.layer.weight
    with torch.no_grad():
        weight[:, 1] = weight[:, 0]
        difference = weight[:, 0].float() * 2**-10
        layer.views(row, 0)["weight"][:, 0] = difference
        assert torch.equal((weight[:, 0].float() + difference).to(weight.dtype), weight[:, 0])
        x = torch.zeros(1, 1, target.down_shape[0], dtype=torch.bfloat16)
        x[..., 0], x[..., 1] = 1, -1
        torch.testing.assert_close(layer(x)[0, 0], difference.to(torch.bfloat16), rtol=0, atol=0)


def test_a_module_of_another_kind_is_refused(base: Base) -> None:
    loha, lokr = make_bank(base, [LOHA]), make_bank(base, [LOKR])
    with pytest.raises(
        AdapterError, match=r"has lokr with .*, expected loha with .*: wrong base, rank or kind"
    ):
        loha.load(0, lokr.adapter(0))
    lora = AdapterBank(base.components, loha.targets, [LORA])
    with pytest.raises(AdapterError, match=r"is LoHa, the arm lora: it belongs to another arm"):
        lora.load(0, loha.adapter(0))
    scaled = LOHA.model_copy(update={"alpha": 4.0})
    with pytest.raises(AdapterError, match=r"has scale 1, the arm 2: it belongs to another arm"):
        loha.load(0, AdapterBank(base.components, loha.targets, [scaled]).adapter(0))
