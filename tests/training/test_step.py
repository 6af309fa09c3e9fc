"""A training step: nothing waits for the device, its parts add up, and what is recorded equals what runs
eagerly.
"""

import functools
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorascope.adapters.bank import AdapterBank
from lorascope.adapters.targets import resolve_targets
from lorascope.arms import Arm
from lorascope.base.loading import Base, load_base
from lorascope.data.encoding import Encoded
from lorascope.sections import REFERENCE_TARGETS, BaseSection, TrainSection
from lorascope.seeding import seeded
from lorascope.training.feed import Batch
from lorascope.training.step import LossScale, Recorded, Step
from lorascope.training.trainer import Trainer

R4 = Arm(name="r4", rank=4, alpha=8, lr=1e-3, seed=0)
R8 = Arm(name="r8", rank=8, alpha=16, lr=2e-3, seed=0)
SECTION = TrainSection(batch_size=2, max_grad_norm=1.0, min_snr_gamma=5.0)
SAME = 1e-6  # float64 inside: of fp32 losses and gradients a last bit may differ, 1.2e-7
compiles = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # of the compiler about itself
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class NoHostReads(TorchDispatchMode):
    """Fails on what makes a host wait for a device: values read back, and shapes that depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::masked_select",
            "aten::equal",
        ):
            raise AssertionError(f"{func} reads from the device")
        if func._schema.name == "aten::index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            raise AssertionError(f"{func} by a mask reads from the device")
        return func(*args, **(kwargs or {}))


def make_step(base: Base, section: TrainSection = SECTION) -> Step:
    bank = AdapterBank(base.components, resolve_targets(base.unet, REFERENCE_TARGETS), [R4, R8])
    return Step(base, bank.attach(), section)


def make_batch(base: Base, key: int) -> Batch:
    generator = seeded("batch", key)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    text = base.encode_text(["a", "b"]).clone()
    rows = (latents, noise, torch.randint(1000, (2,), generator=generator), text)
    return Batch(*(torch.cat([row, row]).to(base.device) for row in rows))


def take(step: Step, *batches: Batch) -> None:
    step.begin(torch.tensor([1e-3, 2e-3]))
    for batch in batches:
        step.add_batch(batch)
    step.finish()


def test_no_step_reads_anything_back(base: Base) -> None:
    """What would stop a recording in a CUDA graph; forward, backward, clipping and AdamW included."""
    step, batch = make_step(base), make_batch(base, 0)
    before = step.bank.parameters.clone()
    step.begin(torch.tensor([1e-3, 2e-3]))
    with NoHostReads():
        step.add_batch(batch)
        step.finish()
    assert not torch.equal(step.bank.parameters, before)
    with NoHostReads(), pytest.raises(AssertionError, match="reads from the device"):
        step.losses.sum().item()


def test_losses_and_gradients_of_several_batches_are_their_mean(exact_base: Base) -> None:
    base = exact_base
    one, batches = make_step(base), [make_batch(base, 1), make_batch(base, 2)]
    losses, gradients = [], []
    for batch in batches:
        one.begin(torch.zeros(2))
        one.add_batch(batch)
        losses.append(one.losses.clone())
        gradients.append(one.bank.gradients.clone())
    one.bank.detach()
    two = make_step(base, SECTION.model_copy(update={"accumulation_steps": 2}))
    two.begin(torch.zeros(2))
    for batch in batches:
        two.add_batch(batch)
    torch.testing.assert_close(two.losses, sum(losses) / 2, rtol=SAME, atol=0)
    # a sum of two that nearly cancel has the last bit of the larger: relative to the norm
    error = two.bank.gradients - sum(gradients) / 2
    assert error.norm() <= SAME * two.bank.gradients.norm()


def test_a_scaled_loss_gives_the_same_step(base: Base) -> None:
    """What an fp16 base needs; with a power of two nothing is lost in fp32."""
    plain, batch = make_step(base), make_batch(base, 3)
    take(plain, batch)
    plain.bank.detach()
    scaled = make_step(base)
    scaled.loss_scale = LossScale(2, base.device)
    take(scaled, batch)
    assert torch.equal(plain.bank.parameters, scaled.bank.parameters)
    assert torch.equal(plain.norms, scaled.norms) and torch.equal(plain.losses, scaled.losses)


def test_an_arm_with_a_loss_that_is_not_finite_stands_still_for_good(base: Base) -> None:
    step, good = make_step(base), make_batch(base, 4)
    before = step.bank.parameters.clone()
    bad = good._replace(latents=torch.cat([good.latents[:2] * float("nan"), good.latents[2:]]))
    take(step, bad)
    take(step, good)
    assert step.active.tolist() == [False, True]
    assert torch.equal(step.bank.parameters[0], before[0]) and not torch.equal(
        step.bank.parameters[1], before[1]
    )
    assert step.bank.parameters.isfinite().all()


def test_an_overflowing_gradient_is_a_step_skipped_at_half_the_scale(base: Base) -> None:
    """Only the arm that it concerns; its next step is taken, and is what it is without the skipped one."""
    step, batch = make_step(base), make_batch(base, 8)
    step.loss_scale = LossScale(2, base.device)
    before = step.bank.parameters.clone()
    step.begin(torch.tensor([1e-3, 2e-3]))
    step.add_batch(batch)
    step.bank.gradients[0, 0] = float("inf")
    step.finish()
    assert step.active.tolist() == [True, True]
    assert step.loss_scale.factors.tolist() == [2048, 4096]
    assert step.loss_scale.skipped_steps.tolist() == [1, 0]
    assert torch.equal(step.bank.parameters[0], before[0])
    assert not torch.equal(step.bank.parameters[1], before[1])
    take(step, batch)
    skipped = step.bank.parameters[0].clone()
    step.bank.detach()
    plain = make_step(base)
    take(plain, batch)
    assert torch.equal(plain.bank.parameters[0], skipped)


def test_a_gradient_that_no_scale_helps_is_a_failure(base: Base) -> None:
    step, batch = make_step(base), make_batch(base, 9)
    step.loss_scale = LossScale(2, base.device)
    step.loss_scale.factors[0] = 1.0
    step.begin(torch.tensor([1e-3, 2e-3]))
    step.add_batch(batch)
    step.bank.gradients[0, 0] = float("inf")
    step.finish()
    assert step.active.tolist() == [False, True]


def test_a_scale_grows_after_many_steps_without_an_overflow() -> None:
    scale, fine = LossScale(1, torch.device("cpu")), torch.tensor([True])
    scale.calm_steps.fill_(1998)
    factors = []
    for _ in range(3):
        assert not scale.update(fine, fine).any()
        factors.append(scale.factors.item())
    assert factors == [4096, 8192, 8192]
    scale.factors.fill_(65536)
    scale.calm_steps.fill_(1999)
    scale.update(fine, fine)
    assert scale.factors.item() == 65536


def test_the_state_of_a_step_goes_on_in_another(base: Base) -> None:
    batches = [make_batch(base, key) for key in (10, 11)]
    whole = make_step(base)
    whole.loss_scale = LossScale(2, base.device)
    take(whole, batches[0])
    whole.loss_scale.factors[1] = 512
    states = [{name: value.clone() for name, value in whole.state(index).items()} for index in range(2)]
    parameters = whole.bank.parameters.clone()
    take(whole, batches[1])
    whole.bank.detach()
    again = make_step(base)
    again.loss_scale = LossScale(2, base.device)
    again.bank.parameters.data.copy_(parameters)
    for index, state in enumerate(states):
        again.load_state(index, state)
    take(again, batches[1])
    assert torch.equal(again.bank.parameters, whole.bank.parameters)
    assert again.loss_scale.factors.tolist() == [4096, 512]


def test_nothing_outlives_a_closed_step(base: Base) -> None:
    """Recordings hold the step and it holds them: what is not closed lives until cycles are collected."""
    step = make_step(base)
    step._record()
    step.bank.detach()
    step.close()
    gone = weakref.ref(step)
    gc.disable()
    try:
        del step
        assert gone() is None
    finally:
        gc.enable()


@compiles
@pytest.mark.parametrize(
    ("changes", "mode"),
    [({}, "eager: CUDA graphs need a GPU"), ({"compile": True}, "compiled, eager: CUDA graphs need a GPU")],
)
def test_the_mode_says_how_steps_run(base: Base, changes: dict[str, Any], mode: str) -> None:
    assert make_step(base, SECTION.model_copy(update=changes)).mode == mode


@compiles
def test_a_compiled_step_equals_an_eager_one(exact_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiler's own tracing of both passes; generating machine code for it takes 40 s."""
    base = exact_base
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    eager, batch = make_step(base), make_batch(base, 5)
    take(eager, batch)
    eager.bank.detach()
    compiled = make_step(base, SECTION.model_copy(update={"compile": True}))
    take(compiled, batch)
    torch.testing.assert_close(compiled.losses, eager.losses, rtol=SAME, atol=0)
    torch.testing.assert_close(compiled.norms, eager.norms, rtol=SAME, atol=0)


def test_what_cannot_be_recorded_runs_as_it_is_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    """Without a GPU a recording really fails; the buffers are as one call leaves them."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    total = torch.zeros(3)

    def add(value: torch.Tensor) -> None:
        total.add_(value)

    recorded = Recorded(add, [total])
    recorded(torch.ones(3))
    recorded(torch.ones(3))
    assert total.tolist() == [2, 2, 2]
    assert caplog.text.count("no CUDA graph, slower steps") == 1


@needs_gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_from_a_cuda_graph_equal_eager_ones(
    pipeline_folder: Path, pictures: Encoded, checkpointing: bool
) -> None:
    results = []
    for graph in (True, False):
        own = load_base(BaseSection(model=str(pipeline_folder)), torch.device("cuda"), "fp32")
        own.unet.double()  # 20 steps of AdamW in fp32 would make of another order of sums what they like
        bank = AdapterBank(own.components, resolve_targets(own.unet, REFERENCE_TARGETS), [R4, R8])
        section = SECTION.model_copy(
            update={"epochs": 4, "cuda_graph": graph, "gradient_checkpointing": checkpointing}
        )
        trainer = Trainer(own, bank.attach(), pictures, section)
        results.append(
            ([record.losses for record in trainer.run()], bank.parameters.cpu(), trainer.compute.mode)
        )
    (losses, parameters, mode), (eager_losses, eager_parameters, eager_mode) = results
    assert mode.startswith("a CUDA graph") and eager_mode.startswith("eager")
    assert torch.allclose(torch.tensor(losses), torch.tensor(eager_losses), rtol=1e-4)
    assert torch.allclose(parameters, eager_parameters, rtol=1e-3, atol=1e-5)  # a hundredth of a step
