"""Faults planted into steps and checkpoints are found, and right ones left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lorascope.adapters.bank import AdapterBank
from lorascope.adapters.stacked import StackedLinear
from lorascope.base.loading import Base
from lorascope.doctor.steps import check_channels_last, check_recorded_step, check_resume, check_stacked_arms
from lorascope.sections import TrainSection
from lorascope.training.step import Step

SHAPE = (4, 8, 8)


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


def test_a_resume_that_differs_is_found(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_resume(base, SHAPE).status == "ok"
    monkeypatch.setattr(Step, "load_state", lambda self, index, state: None)  # the optimizer starts anew
    finding = check_resume(base, SHAPE)
    assert finding.status == "wrong" and "not the same bits" in finding.told
