"""The adapter: targets, exact no-op, PEFT equality, stacking, files."""

import copy
import json
import statistics
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import get_args

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.bank import AdapterBank, Slice
from lorascope.adapters.files import Layout, load_adapter, save_adapter
from lorascope.adapters.modules import LoraModule
from lorascope.adapters.targets import count_parameters, resolve_section, resolve_targets
from lorascope.arms import Arm, ArmGrid
from lorascope.base.configs import SD15_DIR
from lorascope.base.loading import Base
from lorascope.config import load_study
from lorascope.errors import AdapterError
from lorascope.schema import StudyConfig
from lorascope.sections import REFERENCE_TARGETS, AdapterSection, TargetGroup
from random_adapters import load_pipeline, randomize

R4 = Arm(name="r4", rank=4, alpha=8, lr=1e-3, seed=0)
R8 = Arm(name="r8", rank=8, alpha=4, lr=1e-3, seed=0)


def unet_inputs(samples: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(samples, 4, 8, 8, generator=generator),
        torch.randint(1000, (samples,), generator=generator),
        torch.randn(samples, 77, 32, generator=generator),
    )


# Of a sum of a few hundred products, through a dozen layers, float64 leaves 1e-13.
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def exact_inputs(samples: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same in float64, for `exact_base`."""
    noisy, timesteps, text = unet_inputs(samples)
    return noisy.double(), timesteps, text.double()


@pytest.fixture
def bank(base: Base) -> AdapterBank:
    return AdapterBank(base.components, resolve_targets(base.unet, REFERENCE_TARGETS), [R4, R8])


def test_targets_are_the_linears_with_these_endings_in_the_unets_order(base: Base) -> None:
    targets = resolve_targets(base.unet, REFERENCE_TARGETS)
    expected = [
        path
        for path, module in base.unet.named_modules()
        if isinstance(module, torch.nn.Linear)
        and path.endswith(tuple("." + name for name in REFERENCE_TARGETS))
    ]
    assert [target.path for target in targets] == expected
    assert len(targets) == 10 * sum(path.endswith("attn1.to_q") for path in expected)
    assert count_parameters(targets, R4) == sum(4 * (t.down_shape[0] + t.out_features) for t in targets)


def test_a_name_that_matches_nothing_is_refused(base: Base) -> None:
    with pytest.raises(AdapterError, match="'to_w' matches no module"):
        resolve_targets(base.unet, ["to_q", "to_w"])


def test_the_reference_studys_geglu_is_refused_with_the_remedy(base: Base) -> None:
    with pytest.raises(AdapterError, match=r"'ff.net.0' is a GEGLU .*use 'ff.net.0.proj'"):
        resolve_targets(base.unet, ["ff.net.0"])


def test_a_layer_that_is_neither_linear_nor_convolution_is_refused(base: Base) -> None:
    with pytest.raises(AdapterError, match="'norm1' is a .*Norm .* not a Linear or Conv2d"):
        resolve_targets(base.unet, ["norm1"])
    odd = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(4, 4, 3, groups=2)})
    with pytest.raises(AdapterError, match="convolution in groups"):
        resolve_targets(odd, ["conv"])


def test_patterns_name_layers_by_their_whole_path(base: Base) -> None:
    paths = [target.path for target in resolve_targets(base.unet, ["*.resnets.*.conv1", "mid_block.*.to_q"])]
    assert paths and all(
        fnmatch(path, "*.resnets.*.conv1") or fnmatch(path, "mid_block.*.to_q") for path in paths
    )
    with pytest.raises(AdapterError, match=r"'up_blocks.\*.to_w' matches no module of the unet"):
        resolve_targets(base.unet, ["up_blocks.*.to_w"])


def test_a_group_has_its_own_rank_alpha_and_rate_and_takes_layers_over(base: Base) -> None:
    section = AdapterSection(
        targets=("to_q", "to_k"),
        groups=(
            TargetGroup(targets=("attn2.to_k", "proj_in"), rank=2, lr=1.0),
            TargetGroup(component="text_encoder", targets=("fc1",), alpha=3),
        ),
    )
    targets = {target.name: target for target in resolve_section(base.components, section)}
    assert len(targets) == len(resolve_section(base.components, section))
    by_kind = {
        kind: next(t for name, t in targets.items() if name.endswith(kind))
        for kind in ("attn1.to_k", "attn2.to_k", "proj_in", "fc1")
    }
    assert {kind: (t.rank(R8), t.alpha(R8), t.lr(R8)) for kind, t in by_kind.items()} == {
        "attn1.to_k": (8, 4, 1e-3),
        "attn2.to_k": (2, 1, 1.0),  # the arm's scale of a half is kept
        "proj_in": (2, 1, 1.0),
        "fc1": (8, 3, 1e-3),
    }
    bank = AdapterBank(base.components, list(targets.values()), [R4, R8])
    for index, arm in enumerate(bank.arms):
        stored = sum(m.down.numel() + m.up.numel() for m in bank.adapter(index).modules.values())
        assert stored == count_parameters(bank.targets, arm)
    twice = AdapterSection(
        targets=("to_q",), groups=(TargetGroup(targets=("to_v",)), TargetGroup(targets=("attn1.to_v",)))
    )
    with pytest.raises(AdapterError, match="is named by two groups"):
        resolve_section(base.components, twice)


def test_a_fresh_adapter_is_an_exact_no_op(base: Base, bank: AdapterBank) -> None:
    noisy, timesteps, text = unet_inputs(4)
    with torch.no_grad():
        plain = base.unet(noisy, timesteps, text).sample
        bank.attach()
        adapted = base.unet(noisy, timesteps, text).sample
    assert torch.equal(plain, adapted)


def test_an_adapter_taken_from_the_bank_stays_as_it_was(bank: AdapterBank) -> None:
    taken = bank.adapter(1)
    before = {name: (module.down.clone(), module.up.clone()) for name, module in taken.modules.items()}
    bank.parameters.add_(1.0)
    for name, (down, up) in before.items():
        assert torch.equal(taken.modules[name].down, down) and torch.equal(taken.modules[name].up, up)
        assert taken.modules[name].up.is_contiguous()


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
@pytest.mark.parametrize(
    "targets",
    [REFERENCE_TARGETS, ("to_q", "proj_in", "proj_out", "conv1", "downsamplers.0.conv")],
    ids=["linear", "conv"],
)
def test_forward_and_gradients_equal_peft(exact_base: Base, index: int, targets: tuple[str, ...]) -> None:
    """PEFT with the same weights gives the same output and the same gradients of A and B."""
    base = exact_base
    bank = AdapterBank(base.components, resolve_targets(base.unet, targets), [R4, R8])
    randomize(bank)
    arm = bank.arms[index]
    peft_unet = get_peft_model(
        copy.deepcopy(base.unet),
        LoraConfig(r=arm.rank, lora_alpha=int(arm.alpha), target_modules=list(targets)),
    )
    names = {}
    for name, module in bank.adapter(index).modules.items():
        path = name.removeprefix("unet.")
        names[f"base_model.model.{path}.lora_A.default.weight"] = module.down
        names[f"base_model.model.{path}.lora_B.default.weight"] = module.up
    missing = peft_unet.load_state_dict(names, strict=False)
    assert not missing.unexpected_keys
    peft_unet.double()
    noisy, timesteps, text = exact_inputs(2)
    theirs = peft_unet(noisy, timesteps, text).sample
    theirs.square().mean().backward()
    bank.attach()
    bank.select([Slice(index)])
    ours = base.unet(noisy, timesteps, text).sample
    ours.square().mean().backward()
    torch.testing.assert_close(ours, theirs, **EXACT)
    gradients = dict(peft_unet.named_parameters())
    for name, layer in bank.layers.items():
        assert layer.down.grad is not None and layer.up.grad is not None
        for mine, kind in (
            (layer.down.grad[index, : arm.rank], "A"),
            (layer.up.grad[index, :, : arm.rank], "B"),
        ):
            reference = gradients[
                f"base_model.model.{name.removeprefix('unet.')}.lora_{kind}.default.weight"
            ].grad
            assert reference is not None
            # ours are kept in fp32, which rounds at 6e-8
            torch.testing.assert_close(mine.double(), reference.view_as(mine), rtol=1e-6, atol=0)


def test_each_slice_of_a_stack_equals_its_adapter_alone(exact_base: Base, bank: AdapterBank) -> None:
    base = exact_base
    randomize(bank)
    noisy, timesteps, text = exact_inputs(3)
    bank.attach()
    with torch.no_grad():
        bank.select([Slice(0), Slice(1, 0.5), Slice(0, 0.0)])
        stacked = base.unet(noisy.repeat(3, 1, 1, 1), timesteps.repeat(3), text.repeat(3, 1, 1)).sample
        for position, item in enumerate([Slice(0), Slice(1, 0.5), Slice(0, 0.0)]):
            bank.select([item])
            alone = base.unet(noisy, timesteps, text).sample
            torch.testing.assert_close(stacked[position * 3 : position * 3 + 3], alone, **EXACT)


def test_a_smaller_rank_starts_as_the_first_rows_of_a_larger_one(bank: AdapterBank) -> None:
    for layer in bank.layers.values():
        assert torch.equal(layer.down[0, :4], layer.down[1, :4])
        assert layer.down.detach()[1].abs().max() <= layer.layer.in_features**-0.5
        assert not layer.down.detach()[0, 4:].any() and not layer.up.detach().any()


def test_a_folder_of_ours_round_trips_exactly_and_peft_and_diffusers_load_it(
    exact_base: Base, bank: AdapterBank, tmp_path: Path
) -> None:
    base = exact_base
    randomize(bank)
    folder = tmp_path / "r8"
    size = save_adapter(bank.adapter(1), folder, "peft", "fp32").num_bytes
    assert (
        size == (folder / "adapter_model.safetensors").stat().st_size > 4 * count_parameters(bank.targets, R8)
    )
    other = AdapterBank(base.components, bank.targets, [R8])
    other.load(0, load_adapter(folder))
    theirs = other.adapter(0).modules
    for name, module in bank.adapter(1).modules.items():
        assert torch.equal(module.down, theirs[name].down) and torch.equal(module.up, theirs[name].up)
        assert module.alpha == theirs[name].alpha == 4.0

    noisy, timesteps, text = exact_inputs(2)
    with torch.no_grad():
        bank.attach().select([Slice(1)])
        ours = base.unet(noisy, timesteps, text).sample
        bank.detach()
        by_peft = PeftModel.from_pretrained(copy.deepcopy(base.unet), str(folder)).double()
        torch.testing.assert_close(by_peft(noisy, timesteps, text).sample, ours, **EXACT)
        pipeline = StableDiffusionPipeline.from_pretrained(base.folder, safety_checker=None)
        pipeline.unet.load_lora_adapter(
            str(folder), weight_name="adapter_model.safetensors", prefix="base_model.model"
        )
        torch.testing.assert_close(pipeline.unet.double()(noisy, timesteps, text).sample, ours, **EXACT)


@pytest.mark.parametrize("layout", get_args(Layout))
def test_rslora_has_its_scale_in_every_programs_reading(
    base: Base, pipeline_folder: Path, tmp_path: Path, layout: Layout
) -> None:
    """PEFT and diffusers make 4 / sqrt(8) B A of our files, as PEFT's own rsLoRA does with alpha = 4."""
    (arm,) = StudyConfig(arms=(ArmGrid(rank=8, alpha=4.0, scaling="rslora"),)).expand_arms()
    bank = AdapterBank(base.components, resolve_targets(base.unet, ("to_q", "conv1")), [arm])
    randomize(bank)
    assert all(layer.scales.item() == pytest.approx(4 / 8**0.5) for layer in bank.layers.values())
    config = LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules=["to_q", "conv1"])
    theirs = dict(get_peft_model(copy.deepcopy(base.unet), config).named_modules())
    written = save_adapter(
        bank.adapter(0), tmp_path / ("folder" if layout == "peft" else "file.safetensors"), layout, "fp32"
    ).path
    bank.load(0, load_adapter(written))
    pipeline = load_pipeline(pipeline_folder)
    if layout == "peft":
        loaded, name = PeftModel.from_pretrained(pipeline.unet, str(written)).base_model.model, "default"
    else:
        pipeline.load_lora_weights(str(written))
        loaded, name = pipeline.unet, "default_0"
    for path, module in bank.adapter(0).modules.items():
        layer = loaded.get_submodule(path.removeprefix("unet."))
        assert module.scale == pytest.approx(theirs[f"base_model.model.{path[5:]}"].scaling["default"])
        update = torch.tensordot(module.up.flatten(1), module.down, dims=1) * (4 / 8**0.5)
        torch.testing.assert_close(layer.get_delta_weight(name), update, rtol=1e-5, atol=1e-6)


def test_an_alpha_of_a_groups_own_is_scaled_as_the_arm_says(base: Base) -> None:
    section = AdapterSection(targets=("to_q",), groups=(TargetGroup(targets=("to_k",), rank=2, alpha=3),))
    arm = Arm(name="r8", rank=8, alpha=4, lr=1e-3, seed=0, scaling="rslora")
    groups = {target.path.rsplit(".")[-1]: target for target in resolve_section(base.components, section)}
    assert groups["to_k"].alpha(arm) / 2 == pytest.approx(3 / 2**0.5)
    assert groups["to_q"].alpha(arm) == 4


def test_an_adapter_of_other_targets_shapes_or_alpha_is_refused(bank: AdapterBank) -> None:
    modules = bank.adapter(0).modules
    name, module = next(iter(modules.items()))

    def load(changed: dict[str, LoraModule]) -> None:
        bank.load(0, Adapter(changed, "peft", {}, ()))

    with pytest.raises(AdapterError, match="1 layers do not match the targets"):
        load({key: item for key, item in modules.items() if key != name})
    with pytest.raises(AdapterError, match="has shapes"):
        load({**modules, name: replace(module, down=module.down[:1])})
    with pytest.raises(AdapterError, match="has scale 4, the arm 2"):
        load({**modules, name: replace(module, alpha=16.0)})


@pytest.mark.parametrize(
    ("preset", "modules", "sizes"),
    [("paper", 160, (22.83, 91.31)), ("paper-as-run", 128 + 16, (15.97, 63.89))],
)
def test_the_reference_study_adapts_what_the_arithmetic_says(
    preset: str, modules: int, sizes: tuple[float, float]
) -> None:
    config = load_study(preset=preset, environment={})
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((SD15_DIR / "unet" / "config.json").read_text()))
    targets = resolve_targets(unet, config.adapter.targets)
    counts = [count_parameters(targets, arm) for arm in config.expand_arms()]
    assert len(targets) == modules
    assert [round(4 * count / 2**20, 2) for count in counts] == list(sizes)
    if preset == "paper":
        assert counts == [5_984_256, 23_937_024]


def test_arms_of_several_starts_stand_in_one_bank(base: Base) -> None:
    """Each as it would alone: its draws depend on its own rank, seed and layer."""
    arms = [
        Arm(name=init, rank=rank, alpha=8, lr=1e-3, seed=1, init=init)
        for init, rank in (("kaiming", 2), ("gaussian", 4), ("orthogonal", 6))
    ]
    targets = resolve_targets(base.unet, ["to_q", "conv1"])
    together = AdapterBank(base.components, targets, arms)
    for index, arm in enumerate(arms):
        alone = AdapterBank(base.components, targets, [arm])
        assert torch.equal(together.unpadded(together.parameters, index), alone.parameters[0])


def test_an_update_is_scaled_down_to_the_largest_norm_allowed(base: Base) -> None:
    """A and B by the square root each, as kohya's `apply_max_norm_regularization`; only if the arm moved."""
    targets = resolve_targets(base.unet, ["to_q", "conv1"])
    free = AdapterBank(base.components, targets, [R4])
    randomize(free)
    most = statistics.median(float(module.update().norm()) for module in free.adapter(0).modules.values())
    arms = [R4.model_copy(update={"max_weight_norm": limit}) for limit in (most, None, 1e9)]
    bank = AdapterBank(base.components, targets, arms)
    bank.parameters.copy_(free.parameters)
    before = bank.parameters.clone()
    updates = bank.adapter(0).modules
    bank.limit_norms(torch.tensor([False, True, True]))
    assert torch.equal(bank.parameters, before)
    bank.limit_norms(torch.tensor([True, True, True]))
    assert torch.equal(bank.parameters[1:], before[1:])
    ratios = {name: min(1.0, most / float(module.update().norm())) for name, module in updates.items()}
    assert min(ratios.values()) < 1 == max(ratios.values())
    for name, module in bank.adapter(0).modules.items():
        root = ratios[name] ** 0.5
        # fp32: norms from r x r products, 1.2e-7 each
        torch.testing.assert_close(module.up, updates[name].up * root, rtol=1e-5, atol=0)
        torch.testing.assert_close(module.down, updates[name].down * root, rtol=1e-5, atol=0)
        assert module.update().norm() <= most * (1 + 1e-5)
