"""Adapters whose start is subtracted: T-LoRA as published, and PiSSA."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorascope.adapters.bank import AdapterBank, Slice
from lorascope.adapters.files import load_adapter, save_adapter
from lorascope.adapters.merge import merged_into
from lorascope.adapters.schedule import RankSchedule, read_schedule
from lorascope.adapters.stacked import StackedLinear
from lorascope.adapters.targets import count_parameters, resolve_targets
from lorascope.arms import Arm
from lorascope.base.loading import Base
from lorascope.errors import AdapterError
from lorascope.sections import REFERENCE_TARGETS
from random_adapters import inputs_of

TLORA = Arm(name="tlora", rank=6, alpha=6, lr=1e-3, seed=0, kind="tlora", min_rank=2, init="random-svd")
PISSA = Arm(name="pissa", rank=4, alpha=8, lr=1e-3, seed=1, init="pissa")
LORA = Arm(name="lora", rank=8, alpha=8, lr=1e-3, seed=2)
DORA = PISSA.model_copy(update={"name": "dora", "kind": "dora"})
TARGETS = {"linear": REFERENCE_TARGETS, "conv": ("to_q", "proj_in", "resnets.0.conv1")}
# Float64 through a dozen layers; the factors are fp32.
NEAR = {"rtol": 1e-5, "atol": 1e-6}


def make_bank(base: Base, arms: list[Arm], names: tuple[str, ...] = REFERENCE_TARGETS) -> AdapterBank:
    """Adapters that were moved from where they started, anchors aside."""
    bank = AdapterBank(base.components, resolve_targets(base.unet, names), arms)
    generator = torch.Generator().manual_seed(3)
    for target in bank.targets:
        for index in range(len(arms)):
            layer = bank.layers[target.name]
            for name, view in layer.views(bank.parameters[index, bank.spans[target.name]], index).items():
                if not name.startswith("anchor"):
                    view.add_(0.05 * torch.randn(view.shape, generator=generator))
    return bank


@pytest.mark.parametrize("names", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("arm", [TLORA, PISSA, DORA], ids=lambda arm: arm.name)
def test_a_fresh_one_is_a_no_op(exact_base: Base, arm: Arm, names: tuple[str, ...]) -> None:
    base = exact_base
    with torch.no_grad():
        plain = base.unet(*inputs_of(2)).sample
        bank = AdapterBank(base.components, resolve_targets(base.unet, names), [LORA, arm]).attach()
        bank.select([Slice(1)])
        bank.at(inputs_of(2)[1], training=True)
        adapted = base.unet(*inputs_of(2)).sample
        bank.detach()
    torch.testing.assert_close(adapted, plain, **NEAR)


@pytest.mark.parametrize("timestep", [0, 250, 500, 968, 999])
def test_a_layer_computes_what_the_paper_says(exact_base: Base, timestep: int) -> None:
    """W + B S M A - B0 S0 M A0 of a sample, in NumPy, with r(t) as its trainer has it."""
    bank = make_bank(exact_base, [TLORA])
    target = bank.targets[0]
    layer = bank.layers[target.name]
    assert isinstance(layer, StackedLinear)
    x = torch.randn(1, 7, target.down_shape[0], dtype=torch.float64)
    bank.select([Slice(0)])
    bank.at(torch.tensor([timestep]), training=True)
    found = layer(x).detach().numpy()[0]
    parts = layer.views(bank.parameters[0, bank.spans[target.name]], 0)
    a, b, s, a0, b0 = (
        parts[name].double().numpy() for name in ("down", "up", "values", "anchor_down", "anchor_up")
    )
    acting = int(((1000 - timestep) / 1000) ** 1.0 * (TLORA.rank - 2)) + 2
    mask = np.diag((np.arange(TLORA.rank) < acting).astype(float))
    weight = layer.layer.weight.double().numpy() + b @ np.diag(s) @ mask @ a - b0 @ mask @ a0
    bias = 0 if layer.layer.bias is None else layer.layer.bias.double().numpy()
    np.testing.assert_allclose(found, x[0].numpy() @ weight.T + bias, rtol=1e-5, atol=1e-6)


def test_what_it_started_from_stays(base: Base) -> None:
    """Of its parameters the anchors are stored and not counted, and no optimizer moves them."""
    from lorascope.sections import TrainSection
    from lorascope.training.optimizers import build_optimizer

    for name in ("adamw", "SGD"):
        arms = [TLORA, PISSA, LORA]
        bank = make_bank(base, arms)
        before = bank.parameters.clone()
        bank.gradients.fill_(1.0)
        build_optimizer(bank, TrainSection(optimizer=name)).step(
            torch.tensor([arm.lr for arm in arms]), torch.tensor([True] * 3)
        )
        for target in bank.targets:
            for index, arm in enumerate(arms):
                layer, span = bank.layers[target.name], bank.spans[target.name]
                now, then = (layer.views(buffer[index, span], index) for buffer in (bank.parameters, before))
                own = {"down", "up", "values"} if arm is TLORA else {"down", "up"}
                for part in now:
                    assert (not torch.equal(now[part], then[part])) == (part in own)
        stored = [len(bank.unpadded(bank.parameters, index)) for index in range(3)]
        assert stored == [sum(t.stored_size(arm) for t in bank.targets) for arm in arms]
        assert stored[0] > count_parameters(bank.targets, TLORA) > stored[0] / 2
        assert stored[2] == count_parameters(bank.targets, LORA)


@pytest.mark.parametrize("arm", [TLORA, PISSA, DORA], ids=lambda arm: arm.name)
def test_gradients_in_company_are_those_alone(exact_base: Base, arm: Arm) -> None:
    base = exact_base
    together = make_bank(base, [LORA, arm], TARGETS["conv"])
    noisy, timesteps, text = inputs_of(2)
    together.attach()
    together.at(timesteps, training=True)
    base.unet(noisy, timesteps, text).sample.square().sum().backward()
    together.detach()
    alone = AdapterBank(base.components, together.targets, [arm])
    alone.load_unpadded(alone.parameters, 0, together.unpadded(together.parameters, 1))
    alone.attach()
    alone.at(timesteps[1:], training=True)
    base.unet(noisy[1:], timesteps[1:], text[1:]).sample.square().sum().backward()
    alone.detach()
    own = together.unpadded(together.gradients, 1)
    scale = float(own.abs().max())
    assert scale > 0
    torch.testing.assert_close(own, alone.gradients[0], rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("arm", [PISSA, DORA], ids=lambda arm: arm.name)
@pytest.mark.parametrize("names", TARGETS.values(), ids=TARGETS)
def test_any_program_reads_it_as_lora_of_twice_the_rank(
    exact_base: Base, arm: Arm, names: tuple[str, ...], tmp_path: Path
) -> None:
    base = exact_base
    bank = make_bank(base, [arm, LORA], names)
    written = bank.adapter(0)
    assert {module.rank for module in written.modules.values()} == {2 * arm.rank}
    assert {module.scale for module in written.modules.values()} == {arm.scale}
    save_adapter(written, tmp_path / "a.safetensors", "kohya", "fp32")
    with torch.no_grad():
        bank.attach().select([Slice(0)])
        ours = base.unet(*inputs_of(2)).sample
        bank.detach()
        with merged_into(base, load_adapter(tmp_path / "a.safetensors"), torch.float64):
            expected = base.unet(*inputs_of(2)).sample
    torch.testing.assert_close(ours, expected, **NEAR)


def test_t_lora_comes_back_from_its_folder(exact_base: Base, tmp_path: Path) -> None:
    base, timesteps = exact_base, torch.tensor([700, 100])
    bank = make_bank(base, [TLORA])
    save_adapter(bank.adapter(0), tmp_path / "peft", "peft", "fp32")
    adapter = load_adapter(tmp_path / "peft")
    assert adapter.schedule == RankSchedule(6, 2, halves=True)
    other = AdapterBank(base.components, bank.targets, [TLORA.model_copy(update={"seed": 9})])
    other.load(0, adapter)
    drawn = []
    with torch.no_grad():
        for each in (bank, other):
            each.attach().select([Slice(0)])
            each.at(timesteps)
            drawn.append(base.unet(inputs_of(2)[0], timesteps, inputs_of(2)[2]).sample)
            each.detach()
    torch.testing.assert_close(drawn[0], drawn[1], **NEAR)


def test_t_lora_without_what_it_started_from_is_refused(base: Base) -> None:
    bank = make_bank(base, [TLORA])
    vanilla = make_bank(base, [TLORA.model_copy(update={"init": "kaiming"})])
    with pytest.raises(AdapterError, match=r"has the T-LoRA schedule .*, the arm .*\"halves\": true"):
        bank.load(0, vanilla.adapter(0))
    half: Any = vanilla.adapter(0)
    object.__setattr__(half, "schedule", bank.adapter(0).schedule)
    with pytest.raises(AdapterError, match=r"has shapes \[6, 16\] and \[16, 6\], expected \[12, 16\]"):
        bank.load(0, half)
    with pytest.raises(AdapterError, match="is no schedule of T-LoRA"):
        read_schedule({"lorascope_tlora": '{"rank": 4, "min_rank": 2, "halves": 1}'})


@pytest.mark.parametrize("init", ["pissa", "random-svd", "random-svd-square"])
def test_a_rank_above_a_layers_is_refused(base: Base, init: str) -> None:
    arm = LORA.model_copy(update={"init": init, "rank": 40})
    with pytest.raises(AdapterError, match=r"has 16 singular vectors, fewer than the rank 40: lower it"):
        AdapterBank(base.components, resolve_targets(base.unet, ["to_q"]), [arm])
