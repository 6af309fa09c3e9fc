"""Faults planted into what is checked, each of which the check finds, and what is right beside them, which it
leaves alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from conftest import needs_bf16_attention
from lorascope.adapters.bank import AdapterBank, StackedLinear
from lorascope.base.attention import KERNELS, Kernel, Shape, attend
from lorascope.base.autoencoder import Autoencoder
from lorascope.base.loading import Base
from lorascope.doctor import checks
from lorascope.doctor.checks import (
    check_attention,
    check_channels_last,
    check_half_vae,
    check_memory,
    check_recorded_step,
    check_resume,
    check_stacked_arms,
    check_workers,
    relative_error,
    rounding,
)
from lorascope.doctor.findings import Finding
from lorascope.machine.memory import free_bytes, used_bytes
from lorascope.schema import TrainSection
from lorascope.training.step import Step

CPU = torch.device("cpu")
SHAPE = (4, 8, 8)
SHAPES = [Shape(64, 64, 2, 20, True), Shape(64, 77, 2, 20, True)]
BOTH = [torch.float32, torch.bfloat16]


def test_rounding_is_of_the_layers_and_their_products() -> None:
    layers = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(8, 2))
    assert rounding(layers) == pytest.approx(2**-23 * (math.sqrt(2) + math.sqrt(4 * 9 + 8)))
    assert rounding(layers.bfloat16()) == pytest.approx(2**-7 * math.sqrt(2) + 2**-23 * math.sqrt(44))


def test_the_relative_error_of_what_is_not_finite_is_infinite() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(torch.tensor([1.0, math.nan]), torch.ones(2)) == math.inf


# -- attention -----------------------------------------------------------------------------------------------


class _Spoiled(torch.autograd.Function):
    """A tensor whose gradient comes back wrong."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, spoil: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.spoil = spoil
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.spoil(gradient), None


def last_is_nan(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[..., -1, -1] = math.nan
    return x


def wrong_gradients(spoil: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Padded flash attention to text, whose output is right and one of whose gradients is not."""

    def attend_wrongly(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if kernel.name == "flash" and kernel.head_dim is not None and k.shape[2] == 77:
            k = _Spoiled.apply(k, spoil)
        return attend(kernel, q, k, v)

    return attend_wrongly


def wrong_output(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Flash attention that leaves the last of 77 keys out."""
    cut = kernel.name == "flash" and k.shape[2] == 77
    return attend(kernel, q, k[:, :, :76], v[:, :, :76]) if cut else attend(kernel, q, k, v)


def wrong_in_drawing(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Flash attention that is wrong without gradients alone."""
    out = attend(kernel, q, k, v)
    return out if kernel.name != "flash" or out.requires_grad else out * 1.1


def by_kernel(findings: Sequence[Finding]) -> dict[str, Finding]:
    return {finding.check.removeprefix("attention "): finding for finding in findings}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16_attention)])
@pytest.mark.parametrize(
    ("planted", "place"),
    [
        (wrong_gradients(lambda x: x * 1.1), "gradient of key, 64x77"),
        (wrong_gradients(last_is_nan), "gradient of key, 64x77"),
        (wrong_output, "64x77"),
        (wrong_in_drawing, "output without gradients"),
    ],
)
def test_a_kernel_with_wrong_numbers_is_found(planted: Any, place: str, dtype: torch.dtype) -> None:
    found = by_kernel(check_attention(SHAPES, [dtype], CPU, planted))
    assert found["flash"].status == "wrong" and place in found["flash"].told
    assert {name for name, finding in found.items() if finding.status == "wrong"} == {"flash"}


@needs_bf16_attention
def test_right_kernels_are_far_from_their_tolerance() -> None:
    """In both dtypes and with three padded head dimensions."""
    found = by_kernel(check_attention(SHAPES, BOTH, CPU))
    assert list(found) == list(KERNELS)
    assert "worst of 12" in found["sdpa"].told  # 2 shapes, 2 dtypes; 20, 32 and 64 in each head
    for name in ("sdpa", "flash", "plain"):
        assert found[name].status == "ok" and found[name].error is not None
    assert found["cudnn"] == Finding("attention cudnn", "not checked", "not on this device")


def test_a_kernel_that_runs_out_of_memory_is_not_called_absent() -> None:
    def run_out(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        check_attention(SHAPES, BOTH, CPU, run_out)


def test_large_attention_is_checked_on_fewer_heads() -> None:
    inputs, heads = checks._attention_inputs(Shape(4096, 4096, 8, 40, True), torch.float32, CPU)
    assert heads == 1 and inputs[0].shape == (1, 4096, 40)
    inputs, heads = checks._attention_inputs(Shape(64, 77, 8, 40, True), torch.float32, CPU)
    assert heads == 8 and inputs[1].shape == (2, 77, 320)


# -- a training step -----------------------------------------------------------------------------------------


def test_a_wrong_channels_last_is_found_and_left_again(base: Base) -> None:
    assert check_channels_last(base, SHAPE).status == "ok"
    weight = base.unet.conv_in.weight
    assert weight.is_contiguous()

    def spoil(layer: nn.Conv2d, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        return None if layer.weight.is_contiguous() else output * 1.01

    base.unet.conv_in.register_forward_hook(spoil)
    finding = check_channels_last(base, SHAPE)
    assert finding.status == "wrong" and finding.error is not None and finding.error > 1e-3
    assert weight.is_contiguous()


def test_arms_that_leak_into_each_other_are_found(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_stacked_arms(base, SHAPE).status == "ok"
    forward = StackedLinear.forward

    def leak(self: StackedLinear, x: torch.Tensor, *_: Any) -> torch.Tensor:
        y = forward(self, x)
        return y + 1e-3 * y.detach().roll(len(y) // len(self.factors), dims=0) * (len(self.factors) > 1)

    monkeypatch.setattr(StackedLinear, "forward", leak)
    assert check_stacked_arms(base, SHAPE).status == "wrong"


class Replayed:
    """A stand-in for a recorder on a CPU: what it was first called with for a shape it reads later."""

    failed = False

    def __init__(self, function: Callable[..., None], is_stale: bool = False) -> None:
        self.function, self.is_stale = function, is_stale
        self.buffers: dict[tuple[torch.Size, ...], list[torch.Tensor]] = {}

    def __call__(self, *arguments: torch.Tensor) -> None:
        key = tuple(argument.shape for argument in arguments)
        buffers = self.buffers.setdefault(key, [argument.clone() for argument in arguments])
        if not self.is_stale:
            for buffer, argument in zip(buffers, arguments, strict=True):
                buffer.copy_(argument)
        self.function(*buffers)

    def close(self) -> None:
        self.buffers.clear()


class RecordedStep(Step):
    """A step that says it is recorded."""

    reads_stale_batches = False

    def __init__(self, base: Base, bank: AdapterBank, section: TrainSection) -> None:
        super().__init__(base, bank, section)
        self._recorded_backward: Any = Replayed(self._backward, self.reads_stale_batches)
        self._recorded_update: Any = Replayed(self._update)

    @property
    def mode(self) -> str:
        return "a stand-in for a CUDA graph"


class StaleBatches(RecordedStep):
    """Replays the first batch of a shape for ever."""

    reads_stale_batches = True


class StaleRates(RecordedStep):
    """Holds the learning rates of the first step for ever."""

    def begin(self, lrs: torch.Tensor) -> None:
        first = self.__dict__.setdefault("first", lrs.clone())
        super().begin(first)


class Restless(RecordedStep):
    """Lets an arm that failed go on."""

    def _update(self) -> None:
        super()._update()
        self.active.fill_(True)


class SlightlyOff(RecordedStep):
    """Its gradients are a little off once it has been recorded on two shapes."""

    def _backward(self, *batch: torch.Tensor) -> None:
        super()._backward(*batch)
        if len(self._recorded_backward.buffers) > 1:
            self.bank.gradients[1] *= 1.01


def test_a_recorder_that_replays_what_it_is_given_is_right(base: Base) -> None:
    finding = check_recorded_step(base, SHAPE, RecordedStep)
    assert finding.status == "ok" and finding.error == 0


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        (StaleBatches, "eager steps: step 2"),
        (StaleRates, "eager steps: other learning rates"),
        (Restless, "an arm that fails: arms that go on are [True, True], eagerly [False, True]"),
        (SlightlyOff, "eager steps: another shape"),
    ],
)
def test_a_wrong_recorder_is_found(base: Base, kind: type[Step], place: str) -> None:
    finding = check_recorded_step(base, SHAPE, kind)
    assert finding.status == "wrong" and finding.told.endswith(place)


def test_tensors_that_move_after_the_recording_are_found(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if probes left copies of the factors behind: a replay would go on with the old ones."""
    select_all = AdapterBank.select_all

    def select_copies(self: AdapterBank) -> None:
        select_all(self)
        for layer in self.layers.values():
            layer.factors = layer.factors.clone()

    monkeypatch.setattr(AdapterBank, "select_all", select_copies)
    finding = check_recorded_step(base, SHAPE, RecordedStep)
    assert finding.status == "wrong" and "moved after the recording" in finding.told
    assert "factors" in finding.told


def test_where_nothing_is_recorded_nothing_is_checked(base: Base) -> None:
    finding = check_recorded_step(base, SHAPE)
    assert finding.status == "not checked" and "CUDA graphs need a GPU" in finding.told


class FailsToRecord(RecordedStep):
    """Falls back to eager steps when it is first called, as where recording fails."""

    @property
    def mode(self) -> str:
        return "eager: recording a CUDA graph failed" if self._recorded_backward.buffers else "a CUDA graph"


def test_a_recording_that_fails_is_the_slower_path(base: Base) -> None:
    finding = check_recorded_step(base, SHAPE, FailsToRecord)
    assert (finding.status, finding.told) == ("slower", "eager: recording a CUDA graph failed")


# -- a checkpoint --------------------------------------------------------------------------------------------


def test_a_resume_that_differs_is_found(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_resume(base, SHAPE).status == "ok"
    monkeypatch.setattr(Step, "load_state", lambda self, index, state: None)  # the optimizer starts anew
    finding = check_resume(base, SHAPE)
    assert finding.status == "wrong" and "not the same bits" in finding.told


# -- the VAE -------------------------------------------------------------------------------------------------


def test_a_vae_that_overflows_is_found(base: Base) -> None:
    assert check_half_vae(base, 32, torch.float16).status == "ok"
    base.vae.encoder.conv_in.weight.data.mul_(1e7)  # beyond fp16's 65,504
    finding = check_half_vae(base, 32, torch.float16)
    assert finding.as_line() == (
        "half-precision VAE overflow: half precision is not used: 3 of 6 batches are beyond float16"
    )


@pytest.mark.parametrize("way", ["encode_pixels", "decode_latents"])
def test_a_vae_that_is_off_in_half_precision_is_found(
    base: Base, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    whole: Any = getattr(Base, way)

    def spoil(self: Base, given: torch.Tensor) -> Any:
        factor = 1.1 if self.vae.dtype == torch.float16 else 1.0
        result = whole(self, given)
        return tuple(part * factor for part in result) if isinstance(result, tuple) else result * factor

    monkeypatch.setattr(Base, way, spoil)
    assert check_half_vae(base, 32, torch.float16).status == "wrong"


def test_a_vae_in_float32_is_its_own_reference(base: Base) -> None:
    assert check_half_vae(base, 32).status == "not checked"
    assert Autoencoder(base).dtype == torch.float32


# -- the machine ---------------------------------------------------------------------------------------------


def test_free_memory_is_told_right_here() -> None:
    assert check_memory(CPU).status == "ok"


@pytest.mark.parametrize(
    ("free", "used"),
    [
        (lambda device: 2**34, used_bytes),  # does not move
        (lambda device: 10 * free_bytes(device), used_bytes),
        (free_bytes, lambda device: 2**30),
    ],
)
def test_memory_told_wrong_is_found(
    free: Callable[[torch.device], int], used: Callable[[torch.device], int]
) -> None:
    assert check_memory(CPU, free, used).status == "wrong"


def test_memory_that_cannot_be_allocated_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_ALLOCATED_ON_CPU", 2**60)
    monkeypatch.setattr(checks, "_MEMORY_BLOCK", 2**60)
    finding = check_memory(CPU)
    assert finding.status == "wrong" and "cannot be allocated" in finding.told


def seen(*by_worker: list[str]) -> Callable[[Mapping[str, str]], list[str]]:
    return lambda environment: by_worker[int(environment["CUDA_VISIBLE_DEVICES"])]


@pytest.mark.parametrize(
    ("by_worker", "status"),
    [
        ([["A"], ["B"]], "ok"),
        ([["A"], ["A"]], "wrong"),
        ([["A", "B"], ["A", "B"]], "wrong"),
        ([["A"], []], "wrong"),
    ],
)
def test_workers_see_a_gpu_each(
    monkeypatch: pytest.MonkeyPatch, by_worker: list[list[str]], status: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert check_workers(2, seen(*by_worker)).status == status


def test_a_process_without_gpus_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.gpus_seen({"CUDA_VISIBLE_DEVICES": "-1"}) == []
    assert check_workers(1).status == check_workers(0).status == "not checked"
