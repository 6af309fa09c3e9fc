"""Optimizers: AdamW equals torch's, any torch.optim class per arm, state through tensors, schedules."""

import datetime
import math
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler

from lorascope.adapters.bank import AdapterBank
from lorascope.adapters.targets import resolve_section, resolve_targets
from lorascope.arms import Arm
from lorascope.base.loading import Base
from lorascope.errors import ConfigError
from lorascope.schema import StudyConfig
from lorascope.sections import AdapterSection, TargetGroup, TrainSection
from lorascope.seeding import seeded
from lorascope.training.optimizers import (
    AdamW,
    TorchOptimizer,
    build_optimizer,
    check_optimizer,
    learning_rates,
)

R4 = Arm(name="r4", rank=4, alpha=8, lr=1e-3, seed=0)
R8 = Arm(name="r8", rank=8, alpha=16, lr=2e-3, seed=0)
ALL = torch.ones(2, dtype=torch.bool)
# The same gradients by one formula in another order: in fp32 1.2e-7 of each of 5 steps and of the weight.
STEPS = {"rtol": 1e-5, "atol": 1e-7}


@pytest.fixture
def bank(base: Base) -> AdapterBank:
    return AdapterBank(base.components, resolve_targets(base.unet, ["to_q"]), [R4, R8])


def train(
    bank: AdapterBank, optimizer: AdamW | TorchOptimizer, numbers: range, active: torch.Tensor = ALL
) -> None:
    """Steps with gradients that depend on the step's number alone, zero where a smaller rank is padded."""
    lrs = torch.tensor([arm.lr for arm in bank.arms])
    for number in numbers:
        generator = seeded("gradients", number)
        for layer in bank.layers.values():
            for index, arm in enumerate(bank.arms):
                assert layer.down.grad is not None and layer.up.grad is not None
                layer.down.grad[index, : arm.rank] = torch.randn(
                    layer.down.grad[index, : arm.rank].shape, generator=generator
                )
                layer.up.grad[index, :, : arm.rank] = torch.randn(
                    layer.up.grad[index, :, : arm.rank].shape, generator=generator
                )
        optimizer.step(lrs, active)


def test_steps_equal_torchs_adamw(bank: AdapterBank) -> None:
    reference = [row.clone().requires_grad_() for row in bank.parameters]
    section = TrainSection(weight_decay=0.1)
    optimizers = [
        torch.optim.AdamW([row], lr=arm.lr, weight_decay=0.1)
        for row, arm in zip(reference, bank.arms, strict=True)
    ]
    ours = AdamW(bank, section)
    lrs = torch.tensor([arm.lr for arm in bank.arms])
    for number in range(1, 6):
        bank.gradients.copy_(torch.randn(bank.gradients.shape, generator=seeded(number)))
        ours.step(lrs, torch.ones(2, dtype=torch.bool))
        for row, optimizer, gradient in zip(reference, optimizers, bank.gradients, strict=True):
            row.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(bank.parameters, torch.stack([row.detach() for row in reference]), **STEPS)


def test_torchs_own_adamw_over_the_matrices_moves_the_bank_as_ours_does(
    base: Base, bank: AdapterBank
) -> None:
    other = AdapterBank(base.components, bank.targets, bank.arms)
    arguments = {"weight_decay": 0.1}
    train(bank, AdamW(bank, TrainSection(weight_decay=0.1)), range(1, 6))
    train(
        other, TorchOptimizer(other, TrainSection(optimizer="adamw", optimizer_args=arguments)), range(1, 6)
    )
    torch.testing.assert_close(bank.parameters, other.parameters, **STEPS)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SGD", {"momentum": 0.9}),
        ("adafactor", {}),
        ("RAdam", {}),
        ("Adagrad", {"lr_decay": 0.1}),
        ("Rprop", {}),
        ("prodigy", {"d0": 1e-4}),
    ],
)
def test_any_optimizer_resumes_bit_for_bit_and_keeps_padding_zero(
    base: Base, name: str, arguments: dict[str, float]
) -> None:
    section = TrainSection(optimizer=name, optimizer_args=arguments)
    targets = resolve_targets(base.unet, ["to_q"])
    whole, first, second = (AdapterBank(base.components, targets, [R4, R8]) for _ in range(3))
    start = whole.parameters.clone()
    train(whole, build_optimizer(whole, section), range(1, 7))
    optimizer = build_optimizer(first, section)
    train(first, optimizer, range(1, 4))
    resumed = build_optimizer(second, section)
    for index in range(2):
        resumed.load_state(index, {key: tensor.clone() for key, tensor in optimizer.state(index).items()})
    second.parameters.copy_(first.parameters)
    train(second, resumed, range(4, 7))
    assert torch.equal(whole.parameters, second.parameters) and not torch.equal(whole.parameters, start)
    for layer in whole.layers.values():
        assert not layer.down.detach()[0, 4:].any() and not layer.up.detach()[0, :, 4:].any()


@pytest.mark.parametrize("name", ["adamw", "SGD"])
def test_an_arm_that_failed_does_not_move(bank: AdapterBank, name: str) -> None:
    before = bank.parameters.clone()
    train(bank, build_optimizer(bank, TrainSection(optimizer=name)), range(1, 3), torch.tensor([False, True]))
    assert torch.equal(bank.parameters[0], before[0]) and not torch.equal(bank.parameters[1], before[1])


@pytest.mark.parametrize("name", ["adamw", "SGD"])
def test_a_group_of_layers_moves_at_its_own_rate(base: Base, name: str) -> None:
    """Without weight decay a first step of SGD, and of AdamW, is proportional to the learning rate."""
    section = AdapterSection(targets=("to_q",), groups=(TargetGroup(targets=("to_v",), lr=R4.lr * 10),))
    bank = AdapterBank(base.components, resolve_section(base.components, section), [R4])
    before = bank.parameters.clone()
    bank.gradients.fill_(1.0)
    settings = {"weight_decay": 0.0} if name == "adamw" else {}
    optimizer = build_optimizer(bank, TrainSection(optimizer=name, **settings))
    optimizer.step(torch.tensor([R4.lr]), torch.tensor([True]))
    moved = (before - bank.parameters)[0]
    slow, fast = (
        torch.cat([moved[bank.spans[t.name]] for t in bank.targets if (t.group is None) == own])
        for own in (True, False)
    )
    # fp32 weights up to 0.25, half a last bit 1.5e-8, that move by 1e-3
    torch.testing.assert_close(fast.mean(), slow.mean() * 10, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LBFGS", "needs several passes"),
        ("SparseAdam", "sparse gradients"),
        ("Adamm", "must be adamw, prodigy or a torch.optim class: .*SGD"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused_with_those_that_can(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_optimizer(StudyConfig(train=TrainSection(optimizer=name)))


def test_arguments_that_an_optimizer_refuses_are_told(bank: AdapterBank) -> None:
    with pytest.raises(ConfigError, match=r'train.optimizer_args = {"momentun": 0.9}: SGD refuses them'):
        build_optimizer(bank, TrainSection(optimizer="SGD", optimizer_args={"momentun": 0.9}))
    with pytest.raises(ConfigError, match='not for "adamw"'):
        check_optimizer(StudyConfig(train=TrainSection(optimizer_args={"momentum": 0.9})))


def test_what_an_optimizer_would_refuse_in_training_is_told_before() -> None:
    slow = AdapterSection(groups=(TargetGroup(targets=("proj_in",), lr=1e-5),))
    check_optimizer(StudyConfig(adapter=slow))
    check_optimizer(
        StudyConfig(adapter=slow, train=TrainSection(optimizer="SGD", optimizer_args={"momentum": 0.9}))
    )
    with pytest.raises(ConfigError, match=r'optimizer_args = {"momentun": 0.9}: SGD refuses them'):
        check_optimizer(StudyConfig(train=TrainSection(optimizer="SGD", optimizer_args={"momentun": 0.9})))
    check_optimizer(StudyConfig(train=TrainSection(optimizer="prodigy")))
    with pytest.raises(
        ConfigError,
        match=(
            r"^train.optimizer = 'prodigy': Prodigy cannot take a step .*different lr.*leave lr out of "
            r"adapter.groups$"
        ),
    ):
        check_optimizer(StudyConfig(adapter=slow, train=TrainSection(optimizer="prodigy")))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("SGD", {"momentum": math.inf}, r"{\"momentum\": Infinity}: SGD makes weights of 1 infinite or NaN"),
        ("SGD", {"weight_decay": 1e30}, "SGD makes weights of 1 infinite or NaN in three steps"),
        ("SGD", {"momentum": 10**400}, "SGD cannot take a step"),
        ("SGD", {"weight_decay": 1e300}, "SGD cannot take a step"),
        ("Adam", {"betas": []}, "Adam refuses them"),
        ("Adam", {"fused": True, "foreach": True}, "Adam refuses them"),
        ("SGD", {"momentum": datetime.date(2024, 1, 1)}, r'"2024-01-01"}: SGD refuses them'),
    ],
)
def test_arguments_that_would_spoil_a_training_are_refused_before_it(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_optimizer(StudyConfig(train=TrainSection(optimizer=name, optimizer_args=arguments)))


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adafactor", "Rprop", "NAdam", "prodigy"])
def test_usual_optimizers_pass(name: str) -> None:
    check_optimizer(StudyConfig(train=TrainSection(optimizer=name)))


def test_prodigy_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prodigyopt", None)
    with pytest.raises(ConfigError, match=r'pip install "lorascope\[prodigy\]"'):
        check_optimizer(StudyConfig(train=TrainSection(optimizer="prodigy")))


def test_warm_up_is_linear_and_then_constant() -> None:
    peaks, section = torch.tensor([1.0, 2.0]), TrainSection(warmup_steps=3)
    assert [learning_rates(peaks, step, 100, section)[1].item() for step in (0, 1, 3, 9)] == [
        0.5,
        1.0,
        2.0,
        2.0,
    ]
    assert torch.equal(learning_rates(peaks, 0, 100, TrainSection()), peaks)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_schedules_after_the_warm_up_equal_diffusers(schedule: str, warmup: int) -> None:
    section = TrainSection(schedule=schedule, warmup_steps=warmup)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=50)
    for step in range(50):
        ours = learning_rates(torch.ones(1), step, 50, section).item()
        if step >= warmup:
            assert ours == pytest.approx(reference.get_last_lr()[0], abs=1e-7)  # fp32 below 1: 3e-8
        else:
            assert 0 < ours < 1
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("name", ["adamw", "SGD"])
def test_with_lora_plus_b_moves_at_a_multiple_of_a_s_rate(base: Base, name: str) -> None:
    """As PEFT's `create_loraplus_optimizer` groups them, for each arm on its own."""
    section = AdapterSection(targets=("to_q",), groups=(TargetGroup(targets=("to_v",), lr=R4.lr * 10),))
    arms = [R4.model_copy(update={"lr_ratio": 16.0}), R8]
    bank = AdapterBank(base.components, resolve_section(base.components, section), arms)
    before = bank.parameters.clone()
    bank.gradients.fill_(1.0)
    settings = {"weight_decay": 0.0} if name == "adamw" else {}
    build_optimizer(bank, TrainSection(optimizer=name, **settings)).step(
        torch.tensor([arm.lr for arm in arms]), torch.tensor([True, True])
    )
    moved = before - bank.parameters
    for target in bank.targets:
        span, size = bank.spans[target.name], bank.layers[target.name].down[0].numel()
        for index, arm in enumerate(arms):
            parts = moved[index, span].split([size, span.stop - span.start - size])
            down, up = (part[part != 0].mean() for part in parts)  # SGD leaves the padding alone
            expected = target.lr(arm)
            # fp32 weights up to 0.25, half a last bit 1.5e-8, that move by 1e-3
            torch.testing.assert_close(down, torch.tensor(expected), rtol=1e-3, atol=0)
            torch.testing.assert_close(up, torch.tensor(expected * arm.lr_ratio), rtol=1e-3, atol=0)
