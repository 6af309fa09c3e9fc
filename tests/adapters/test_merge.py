"""Merging: the weights are those of the base beside its adapter, and the base is left alone."""

import copy
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.bank import AdapterBank
from lorascope.adapters.files import load_adapter, save_adapter
from lorascope.adapters.merge import adapter_digest, merge_weights, merged_into
from lorascope.adapters.modules import FullModule, LoraModule, Module
from lorascope.adapters.targets import resolve_section
from lorascope.arms import Arm
from lorascope.base.loading import Base
from lorascope.errors import AdapterError
from lorascope.sections import AdapterSection, TargetGroup
from random_adapters import ATTENTION, random_adapter, random_full, random_loha, random_lokr


def bank_on(base: Base, section: AdapterSection) -> AdapterBank:
    bank = AdapterBank(
        base.components,
        resolve_section(base.components, section),
        [Arm(name="r4", rank=4, alpha=8, lr=1e-3, seed=0)],
    )
    bank.parameters.normal_(generator=torch.Generator().manual_seed(3)).mul_(0.1)
    return bank


def unet_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.randint(1000, (2,), generator=generator)


def test_merged_equals_unmerged_and_the_base_is_left_alone(base: Base) -> None:
    """Convolutions and the text encoder too."""
    group = TargetGroup(component="text_encoder", targets=("fc1",))
    bank = bank_on(base, AdapterSection(targets=("to_q", "ff.net.2", "conv1", "proj_in"), groups=(group,)))
    before = {
        name: {key: tensor.clone() for key, tensor in part.state_dict().items()}
        for name, part in base.components.items()
    }
    places = {
        key: weight.data_ptr() for part in base.components.values() for key, weight in part.named_parameters()
    }
    tokens, (noisy, timesteps) = base.tokenize(["a rocket", "a snail"]), unet_inputs()
    with torch.no_grad(), pytest.raises(KeyboardInterrupt), merged_into(base, bank.adapter(0)) as report:
        merged_text = base.text_states(tokens)
        merged = base.unet(noisy, timesteps, merged_text).sample
        raise KeyboardInterrupt
    assert report.num_modules == len(bank.targets) and report.rounding < 1e-6
    for name, part in base.components.items():
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in part.state_dict().items())
        assert all(weight.data_ptr() == places[key] for key, weight in part.named_parameters()), (
            "the very same tensors"
        )
    with torch.no_grad():
        bank.attach()
        text = base.text_states(tokens)
        unmerged = base.unet(noisy, timesteps, text).sample
        bank.detach()
        # merging is in fp32: 1.2e-7 * sqrt(300) products, through 2 layers of text, 3e-6, or 12 of U-Net
        torch.testing.assert_close(merged_text, text, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(base.unet(noisy, timesteps, text).sample, unmerged, rtol=1e-2, atol=1e-2)


def test_a_merge_that_does_not_fit_is_refused(base: Base) -> None:
    state = {f"unet.{key}": value for key, value in base.unet.state_dict().items()}
    missing = random_adapter({"unet.down_blocks.7.proj_in": (4, 4, 1, 1)})
    with pytest.raises(
        AdapterError, match=r"the base lacks 1 of 1 adapted layers, the first is unet.down_blocks.7.proj_in"
    ):
        merge_weights(state, missing)
    with pytest.raises(
        AdapterError,
        match=(
            r"unet.conv_in: the adapter is for a weight of shape \[8, 4, 3, 3\], the base's is \[16, "
            r"4, 3, "
            r"3\]"
        ),
    ):
        merge_weights(state, random_adapter({"unet.conv_in": (8, 4, 3, 3)}))
    huge = {"unet.conv_in": LoraModule(torch.full((1, 4, 3, 3), 1e5), torch.ones(16, 1, 1, 1), None)}
    with pytest.raises(AdapterError, match="beyond the range of torch.float16: choose bf16 or fp32"):
        merge_weights(state, Adapter(huge, "kohya", {}), dtype=torch.float16)
    with pytest.raises(AdapterError, match="the base lacks"):
        bank = bank_on(base, AdapterSection()).attach()
        with merged_into(base, bank.adapter(0)):
            pass


def test_a_kernel_of_as_many_numbers_is_not_the_layers() -> None:
    """Only a 1x1 convolution and a Linear layer are one: nine in a row are not 3x3."""
    state = {"unet.conv_in.weight": torch.ones(8, 4, 3, 3), "unet.proj.weight": torch.ones(8, 4)}
    row = Adapter({"unet.conv_in": LoraModule(torch.ones(1, 4, 1, 9), torch.ones(8, 1, 1, 1), None)}, "", {})
    with pytest.raises(AdapterError, match=r"shape \[8, 4, 1, 9\], the base's is \[8, 4, 3, 3\]"):
        merge_weights(state, row)
    one = Adapter({"unet.proj": LoraModule(torch.ones(1, 4, 1, 1), torch.ones(8, 1, 1, 1), None)}, "", {})
    assert torch.equal(merge_weights(state, one)[0]["unet.proj.weight"], torch.full((8, 4), 2.0))


def test_other_kinds_are_merged_with_their_biases(base: Base) -> None:
    """Linear layers, convolutions and norms, by the layers' own forward pass."""
    generator = torch.Generator().manual_seed(2)
    state = {f"unet.{key}": value for key, value in base.unet.state_dict().items()}
    conv, linear, norm = "unet.conv_in", f"unet.{ATTENTION}.to_q", "unet.down_blocks.0.resnets.0.norm1"
    shapes = {path: tuple(state[f"{path}.weight"].shape) for path in (conv, linear, norm)}
    modules: dict[str, Module] = {
        conv: random_loha(shapes[conv], 2, 1.0, generator),
        linear: random_lokr(shapes[linear], 1, 2.0, generator),
        norm: random_full(shapes[norm], generator),
    }
    merged, report = merge_weights(state, Adapter(modules, "kohya", {}), strength=0.5)
    assert report.num_modules == 3
    for path, module in modules.items():
        expected = state[f"{path}.weight"] + 0.5 * module.update().reshape(shapes[path])
        torch.testing.assert_close(merged[f"{path}.weight"], expected)
    full = modules[norm]
    assert isinstance(full, FullModule) and full.bias is not None
    torch.testing.assert_close(merged[f"{norm}.bias"], state[f"{norm}.bias"] + 0.5 * full.bias)
    assert merged[f"{conv}.bias"] is state[f"{conv}.bias"]
    own = base.unet.get_parameter(f"{norm.removeprefix('unet.')}.bias")
    before, place = own.data.clone(), own.data_ptr()
    with merged_into(base, Adapter({norm: full}, "kohya", {})):
        torch.testing.assert_close(own.data, before + full.bias)
    assert own.data_ptr() == place


def test_other_kinds_that_do_not_fit_are_refused() -> None:
    generator = torch.Generator().manual_seed(2)
    state = {"unet.proj.weight": torch.ones(6, 8), "unet.conv_in.weight": torch.ones(6, 8, 3, 3)}
    for path, module, shape in (
        ("unet.proj", random_loha((6, 9), 2, 1.0, generator), r"\[6, 9\], the base's is \[6, 8\]"),
        ("unet.proj", random_lokr((6, 9), 1, 1.0, generator), r"\[6, 9\], the base's is \[6, 8\]"),
        ("unet.proj", random_full((6,), generator), r"\[6\], the base's is \[6, 8\]"),
        (
            "unet.conv_in",
            random_loha((6, 9, 3, 3), 2, 1.0, generator),
            r"\[6, 9, 3, 3\], the base's is \[6, 8,",
        ),
        (
            "unet.conv_in",
            random_full((6, 8, 1, 9), generator),
            r"\[6, 8, 1, 9\], the base's is \[6, 8, 3, 3\]",
        ),
    ):
        with pytest.raises(AdapterError, match=f"{path}: the adapter is for a weight of shape {shape}"):
            merge_weights(state, Adapter({path: module}, "", {}))
    full = Adapter({"unet.proj": random_full((6, 8), generator)}, "", {})
    with pytest.raises(
        AdapterError, match="changes a bias of 6 numbers, the base's layer has none: another b"
    ):
        merge_weights(state, full)
    with pytest.raises(
        AdapterError, match="changes a bias of 6 numbers, the base's layer has one of 7 numbers"
    ):
        merge_weights({**state, "unet.proj.bias": torch.ones(7)}, full)
    huge = Adapter({"unet.proj": FullModule(torch.zeros(6, 8), torch.full((6,), 1e5))}, "", {})
    with pytest.raises(AdapterError, match="unet.proj: the merged bias is beyond the range of torch.float16"):
        merge_weights({**state, "unet.proj.bias": torch.ones(6)}, huge, dtype=torch.float16)


def test_digests_are_those_of_the_adapter_in_every_layout(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    path = f"unet.{ATTENTION}.to_q"
    adapters = [
        Adapter({path: module}, "kohya", {})
        for module in (
            random_loha((6, 8), 2, 1.0, generator),
            random_lokr((6, 8), 1, 2.0, generator),
            random_lokr((6, 8), None, 2.0, generator),
            random_full((6, 8), generator),
        )
    ]
    digests = [adapter_digest(adapter) for adapter in adapters]
    assert len(set(digests)) == len(digests)
    for adapter, digest in zip(adapters, digests, strict=True):
        save_adapter(adapter, tmp_path / "a.safetensors", "kohya", "fp16")
        save_adapter(adapter, tmp_path / "a", "peft", "fp32")
        assert adapter_digest(load_adapter(tmp_path / "a.safetensors")) == digest
        assert adapter_digest(load_adapter(tmp_path / "a")) == digest


def test_dora_over_outputs_and_over_inputs() -> None:
    """By hand, for a square layer: rows, or columns, get the magnitudes as their norms."""
    state = {"unet.proj.weight": torch.randn(3, 3, generator=torch.Generator().manual_seed(0))}
    plain = LoraModule(torch.ones(1, 3), torch.ones(3, 1), None)
    magnitudes = torch.tensor([1.0, 2.0, 3.0])
    for axis, shape in ((1, (3, 1)), (0, (1, 3))):
        module = replace(plain, dora_scale=magnitudes.reshape(shape))
        merged, _ = merge_weights(state, Adapter({"unet.proj": module}, "", {}))
        adapted = state["unet.proj.weight"] + 1
        torch.testing.assert_close(merged["unet.proj.weight"].norm(dim=axis), magnitudes)
        torch.testing.assert_close(
            merged["unet.proj.weight"] / magnitudes.reshape(shape),
            adapted / adapted.norm(dim=axis, keepdim=True),
        )
    cancelled = {"unet.proj.weight": -torch.ones(3, 3)}
    with pytest.raises(AdapterError, match="cancel in 3 of 3 rows, so DoRA has no direction"):
        merge_weights(cancelled, Adapter({"unet.proj": module}, "", {}))


def test_dora_merges_as_peft_merges_it(base: Base, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["to_q", "conv1"], use_dora=True, init_lora_weights=False
    )
    model = peft.get_peft_model(copy.deepcopy(base.unet), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.1)
    model.save_pretrained(str(tmp_path / "dora"))
    expected: UNet2DConditionModel = model.merge_and_unload()
    with merged_into(base, load_adapter(tmp_path / "dora")):
        for key, tensor in base.unet.state_dict().items():
            # fp32: 1.2e-7 * sqrt(300) products in the norm that divides
            torch.testing.assert_close(tensor, expected.state_dict()[key], rtol=1e-4, atol=1e-5)


def test_strength_scales_the_update_and_half_precision_tells_its_cost() -> None:
    state = {"unet.conv_in.weight": torch.randn(8, 4, 3, 3), "unet.conv_in.bias": torch.ones(8)}
    adapter = random_adapter({"unet.conv_in": (8, 4, 3, 3)})
    update = adapter.modules["unet.conv_in"].update()
    merged, report = merge_weights(state, adapter, strength=-0.5)
    torch.testing.assert_close(merged["unet.conv_in.weight"], state["unet.conv_in.weight"] - 0.5 * update)
    assert merged["unet.conv_in.bias"] is state["unet.conv_in.bias"] and report.rounding == 0
    merged, report = merge_weights(state, adapter, dtype=torch.float16)
    exact = state["unet.conv_in.weight"] + update
    assert merged["unet.conv_in.weight"].dtype == torch.float16
    assert report.rounding == pytest.approx(
        float((exact.half().float() - exact).norm() / update.norm()), rel=1e-3
    )
