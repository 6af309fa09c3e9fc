"""The adapter: targets, exact no-op, PEFT equality, stacking, files, merge."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model

from lorascope.adapter import AdapterBank, Slice, count_parameters, load_peft, merge, resolve_targets, save_peft
from lorascope.base import Base
from lorascope.config import REFERENCE_TARGETS, Arm
from lorascope.errors import AdapterError

R4 = Arm(name="r4", rank=4, alpha=8, lr=1e-3, seed=0)
R8 = Arm(name="r8", rank=8, alpha=4, lr=1e-3, seed=0)


def unet_inputs(samples: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(samples, 4, 8, 8, generator=generator),
        torch.randint(1000, (samples,), generator=generator),
        torch.randn(samples, 77, 32, generator=generator),
    )


def randomize(bank: AdapterBank) -> None:
    """Give B values, so that the adapters do something; the padding of smaller ranks stays zero."""
    generator = torch.Generator().manual_seed(2)
    for layer in bank.layers.values():
        for index, arm in enumerate(bank.arms):
            up = layer.up.detach()[index, :, : arm.rank]
            up.copy_(torch.randn(up.shape, generator=generator) * 0.1)


@pytest.fixture
def bank(base: Base) -> AdapterBank:
    return AdapterBank(base.components, resolve_targets(base.unet, REFERENCE_TARGETS), [R4, R8])


def test_targets_are_the_linears_with_these_endings_in_the_unets_order(base: Base) -> None:
    targets = resolve_targets(base.unet, REFERENCE_TARGETS)
    expected = [
        path
        for path, module in base.unet.named_modules()
        if isinstance(module, torch.nn.Linear) and path.endswith(tuple("." + name for name in REFERENCE_TARGETS))
    ]
    assert [target.path for target in targets] == expected
    assert len(targets) == 10 * sum(path.endswith("attn1.to_q") for path in expected)
    assert count_parameters(targets, 4) == sum(4 * (t.in_features + t.out_features) for t in targets)


def test_a_name_that_matches_nothing_is_refused(base: Base) -> None:
    with pytest.raises(AdapterError, match="'to_w' matches no module"):
        resolve_targets(base.unet, ["to_q", "to_w"])


def test_the_reference_studys_geglu_is_refused_with_the_remedy(base: Base) -> None:
    with pytest.raises(AdapterError, match=r"'ff.net.0' is a GEGLU .*use 'ff.net.0.proj'"):
        resolve_targets(base.unet, ["ff.net.0"])


def test_a_convolution_is_refused(base: Base) -> None:
    with pytest.raises(AdapterError, match="is a Conv2d"):
        resolve_targets(base.unet, ["conv_in"])


def test_a_fresh_adapter_is_an_exact_no_op(base: Base, bank: AdapterBank) -> None:
    noisy, timesteps, text = unet_inputs(4)
    with torch.no_grad():
        plain = base.unet(noisy, timesteps, text).sample
        bank.attach()
        adapted = base.unet(noisy, timesteps, text).sample
    assert torch.equal(plain, adapted)


def test_strength_zero_is_exactly_the_base(base: Base, bank: AdapterBank) -> None:
    randomize(bank)
    noisy, timesteps, text = unet_inputs(4)
    with torch.no_grad():
        plain = base.unet(noisy, timesteps, text).sample
        bank.attach().select([Slice(1, 0.0), Slice(1)])
        adapted = base.unet(noisy, timesteps, text).sample
    assert torch.equal(plain[:2], adapted[:2])
    assert not torch.allclose(plain[2:], adapted[2:], atol=1e-3)


def test_detach_gives_the_base_back(base: Base, bank: AdapterBank) -> None:
    before = dict(base.unet.named_modules())
    bank.attach()
    bank.detach()
    assert dict(base.unet.named_modules()) == before


@pytest.mark.parametrize("index", [0, 1])
def test_forward_and_gradients_equal_peft(base: Base, bank: AdapterBank, index: int) -> None:
    """PEFT with the same weights gives the same output and the same gradients of A and B."""
    randomize(bank)
    arm = bank.arms[index]
    peft_unet = get_peft_model(
        copy.deepcopy(base.unet), LoraConfig(r=arm.rank, lora_alpha=int(arm.alpha), target_modules=list(REFERENCE_TARGETS))
    )
    names = {name.replace(".weight", ".default.weight"): tensor for name, tensor in bank.state_dict(index).items()}
    missing = peft_unet.load_state_dict(names, strict=False)
    assert not missing.unexpected_keys
    noisy, timesteps, text = unet_inputs(2)
    theirs = peft_unet(noisy, timesteps, text).sample
    theirs.square().mean().backward()
    bank.attach()
    bank.select([Slice(index)])
    ours = base.unet(noisy, timesteps, text).sample
    ours.square().mean().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    gradients = dict(peft_unet.named_parameters())
    for path, layer in bank.layers.items():
        assert layer.down.grad is not None and layer.up.grad is not None
        for mine, kind in ((layer.down.grad[index, : arm.rank], "A"), (layer.up.grad[index, :, : arm.rank], "B")):
            reference = gradients[f"base_model.model.{path}.lora_{kind}.default.weight"].grad
            torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-6)


def test_each_slice_of_a_stack_equals_its_adapter_alone(base: Base, bank: AdapterBank) -> None:
    randomize(bank)
    noisy, timesteps, text = unet_inputs(3)
    bank.attach()
    with torch.no_grad():
        bank.select([Slice(0), Slice(1, 0.5), Slice(0, 0.0)])
        stacked = base.unet(noisy.repeat(3, 1, 1, 1), timesteps.repeat(3), text.repeat(3, 1, 1)).sample
        for position, item in enumerate([Slice(0), Slice(1, 0.5), Slice(0, 0.0)]):
            bank.select([item])
            alone = base.unet(noisy, timesteps, text).sample
            torch.testing.assert_close(stacked[position * 3 : position * 3 + 3], alone, rtol=1e-4, atol=1e-5)


def test_a_smaller_rank_starts_as_the_first_rows_of_a_larger_one(bank: AdapterBank) -> None:
    for layer in bank.layers.values():
        assert torch.equal(layer.down[0, :4], layer.down[1, :4])
        assert layer.down.detach()[1].abs().max() <= layer.in_features**-0.5
        assert not layer.down.detach()[0, 4:].any() and not layer.up.detach().any()


def test_a_peft_folder_round_trips_exactly_and_peft_and_diffusers_load_it(base: Base, bank: AdapterBank, tmp_path: Path) -> None:
    randomize(bank)
    size = save_peft(bank, 1, tmp_path / "r8", REFERENCE_TARGETS, "base")
    assert size == (tmp_path / "r8" / "adapter_model.safetensors").stat().st_size > 4 * count_parameters(bank.targets, 8)
    state, rank, alpha = load_peft(tmp_path / "r8")
    assert (rank, alpha) == (8, 4.0)
    other = AdapterBank(base.components, bank.targets, [R8])
    other.load_state_dict(0, state)
    assert all(torch.equal(tensor, other.state_dict(0)[name]) for name, tensor in bank.state_dict(1).items())

    noisy, timesteps, text = unet_inputs(2)
    with torch.no_grad():
        bank.attach().select([Slice(1)])
        ours = base.unet(noisy, timesteps, text).sample
        bank.detach()
        by_peft = PeftModel.from_pretrained(copy.deepcopy(base.unet), str(tmp_path / "r8"))(noisy, timesteps, text).sample
        torch.testing.assert_close(by_peft, ours, rtol=1e-4, atol=1e-5)
        pipeline = StableDiffusionPipeline.from_pretrained(base.folder, safety_checker=None)
        pipeline.unet.load_lora_adapter(str(tmp_path / "r8"), weight_name="adapter_model.safetensors", prefix="base_model.model")
        torch.testing.assert_close(pipeline.unet(noisy, timesteps, text).sample, ours, rtol=1e-4, atol=1e-5)


def test_the_same_adapter_is_written_as_the_same_bytes(bank: AdapterBank, tmp_path: Path) -> None:
    contents = set()
    for _ in range(8):
        save_peft(bank, 0, tmp_path, REFERENCE_TARGETS, "base")
        contents.add((tmp_path / "adapter_model.safetensors").read_bytes())
    assert len(contents) == 1


def test_merged_equals_unmerged_and_the_base_is_left_alone(base: Base, bank: AdapterBank) -> None:
    randomize(bank)
    noisy, timesteps, text = unet_inputs(2)
    before = {name: tensor.clone() for name, tensor in base.unet.state_dict().items()}
    merged: UNet2DConditionModel = copy.deepcopy(base.unet)
    merge(merged, bank, 0)
    with torch.no_grad():
        bank.attach().select([Slice(0)])
        unmerged = base.unet(noisy, timesteps, text).sample
        bank.detach()
        torch.testing.assert_close(merged(noisy, timesteps, text).sample, unmerged, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.unet.state_dict().items())


def test_merging_into_an_adapted_unet_is_refused(base: Base, bank: AdapterBank) -> None:
    bank.attach()
    with pytest.raises(AdapterError, match="not a plain Linear"):
        merge(base.unet, bank, 0)


def test_a_folder_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="not a readable PEFT adapter"):
        load_peft(tmp_path)


def test_tensors_of_other_targets_or_shapes_are_refused(bank: AdapterBank) -> None:
    state = bank.state_dict(0)
    name = next(iter(state))
    with pytest.raises(AdapterError, match="1 tensors do not match the targets"):
        bank.load_state_dict(0, {key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(AdapterError, match="has shape"):
        bank.load_state_dict(0, {**state, name: state[name][:1]})
