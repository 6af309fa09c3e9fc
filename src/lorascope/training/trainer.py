"""Training of a group of arms in one pass: the loop and its checkpoints."""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorascope.adapters.bank import AdapterBank
from lorascope.base.loading import Base
from lorascope.base.weights import load_sealed, save_sealed
from lorascope.data.encoding import Encoded
from lorascope.errors import StorageError, WeightsError
from lorascope.sections import DataSection, TrainSection
from lorascope.training.feed import Feed
from lorascope.training.optimizers import learning_rates
from lorascope.training.step import Step


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step of all arms of a group."""

    step: int  # from 1
    epoch: float  # passes over the pictures so far, at most all there will be
    losses: tuple[float, ...]  # training loss of the step's pictures, per arm
    grad_norms: tuple[float, ...]  # before clipping
    lrs: tuple[float, ...]
    failed: tuple[bool, ...]  # arms that met a loss or gradient that is not finite; they no longer move
    skipped: tuple[int, ...]  # steps that each arm has skipped so far, since its gradient overflowed fp16
    seconds: float  # wall time of the step


def count_steps(section: TrainSection, num_examples: int, epochs: int | None = None) -> int:
    """Steps after which `epochs` passes (all of the section's when absent) have been seen; no picture is left
    out.

    With buckets this holds up to a batch of each: each is a stream of its own, see `plan_batches`.
    """
    return math.ceil(
        (section.epochs if epochs is None else epochs)
        * num_examples
        / (section.batch_size * section.accumulation_steps)
    )


class Trainer:
    """Trains all adapters of a bank; `run` yields a record per step, and the caller logs, probes and
    checkpoints.
    """

    def __init__(
        self,
        base: Base,
        bank: AdapterBank,
        train: Encoded,
        section: TrainSection,
        data: DataSection | None = None,
    ) -> None:
        self.base, self.bank, self.train, self.section = base, bank, train, section
        self.num_steps = count_steps(section, train.num_entries)
        num_batches = self.num_steps * section.accumulation_steps
        tokens, prefetch = bank.adapts_text, base.device.type == "cuda"
        self.feed = Feed(
            base,
            train,
            bank.arms,
            section,
            data or DataSection(),
            num_batches,
            as_tokens=tokens,
            prefetch=prefetch,
        )
        self.compute = Step(base, bank, section)
        self.peak_lrs = torch.tensor([arm.lr for arm in bank.arms])
        self.step = 0
        self.seconds = 0.0

    def run(self, pause: Callable[[int], bool] = lambda step: False) -> Iterator[StepRecord]:
        """Train from the current step to the last.

        A GPU computes a step while the record of the one before is given, so records come one step late
        there, except before a pause: after a step of which `pause` is true, and after the last, all records
        are given before anything goes on. A record of step `self.step` finds the bank just as that step left
        it.
        """
        compute, accumulation = self.compute, self.section.accumulation_steps
        lag = 1 if self.base.device.type == "cuda" else 0
        pending: deque[_Pending] = deque()
        self.bank.select_all()
        started = time.perf_counter()
        if len(self.feed.buckets) > 1:  # the memory of the largest batch serves those of other shapes too
            compute.prepare(self.feed.load(self.feed.largest_batch(self.step * accumulation)))
        while self.step < self.num_steps:
            compute.begin(learning_rates(self.peak_lrs, self.step, self.num_steps, self.section))
            for part in range(accumulation):
                compute.add_batch(self.feed.load(self.step * accumulation + part))
            compute.finish()
            self.step += 1
            pending.append(_Pending(self.step, compute))
            pauses = self.step == self.num_steps or pause(self.step)
            while len(pending) > (0 if pauses else lag):
                losses, norms, lrs, failed, skipped = pending[0].wait()
                seconds = time.perf_counter() - started
                self.seconds += seconds
                step = pending.popleft().step
                yield StepRecord(
                    step,
                    self._epoch(step),
                    losses,
                    norms,
                    lrs,
                    tuple(map(bool, failed)),
                    tuple(map(int, skipped)),
                    seconds,
                )
                started = time.perf_counter()

    def _epoch(self, step: int) -> float:
        seen = step * self.section.batch_size * self.section.accumulation_steps / self.train.num_entries
        # the last batch may be filled up with pictures of a further pass
        return min(seen, self.section.epochs)

    def save_checkpoint(self, path: Path, inputs: str, facts: dict[str, Any]) -> None:
        """Write the whole state atomically; `facts` is what the caller needs to go on, as JSON."""
        compute = self.compute
        tensors: dict[str, torch.Tensor] = {}
        for index, arm in enumerate(self.bank.arms):
            state = {"parameters": self.bank.unpadded(self.bank.parameters, index), **compute.state(index)}
            tensors |= {f"{arm.name}/{name}": tensor.cpu().contiguous() for name, tensor in state.items()}
        _write_checkpoint(
            path, tensors, {"inputs": inputs, "step": self.step, "seconds": self.seconds, "facts": facts}
        )

    @torch.no_grad()
    def load_checkpoint(self, path: Path, inputs: str) -> dict[str, Any]:
        """Continue from a checkpoint and return its facts; raise `StorageError` if it is damaged or of other
        inputs.
        """
        tensors, state = _read_checkpoint(path)
        if state["inputs"] != inputs:
            raise StorageError(
                f"{path}: checkpoint of another configuration or data: delete it and run the same "
                "command again"
            )
        for index, arm in enumerate(self.bank.arms):
            own = {
                name.removeprefix(f"{arm.name}/"): tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{arm.name}/")
            }
            self.bank.load_unpadded(self.bank.parameters, index, own["parameters"])
            self.compute.load_state(index, own)
        self.step, self.seconds = state["step"], state["seconds"]
        facts: dict[str, Any] = state["facts"]
        return facts


class _Pending:
    """The figures of a step on their way from the device."""

    def __init__(self, step: int, compute: Step) -> None:
        self.step = step
        skipped = torch.zeros_like(compute.losses)
        if compute.loss_scale is not None:
            skipped = compute.loss_scale.skipped_steps
        figures = (compute.losses, compute.norms, compute.lrs, (~compute.active).float(), skipped)
        values = torch.stack(figures)  # (5, N)
        self._values = torch.empty(values.shape, pin_memory=values.is_cuda).copy_(values, non_blocking=True)
        self._event = torch.cuda.Event() if values.is_cuda else None
        if self._event is not None:
            self._event.record()

    def wait(self) -> tuple[tuple[float, ...], ...]:
        """Losses, gradient norms, learning rates, whether it failed and steps skipped, of each arm."""
        if self._event is not None:
            self._event.synchronize()
        return tuple(tuple(values) for values in self._values.tolist())


@dataclass(frozen=True)
class CheckpointPart:
    """Where some arms of a checkpoint go to, with the inputs and facts of their new group."""

    path: Path
    arms: Sequence[str]
    inputs: str
    facts: dict[str, Any]


def split_checkpoint(path: Path, parts: Sequence[CheckpointPart]) -> None:
    """Write the state of some arms of a checkpoint as checkpoints of their own, at the same step; the whole
    one stays.

    Raises `StorageError` if it is damaged.
    """
    tensors, state = _read_checkpoint(path)
    for part in parts:
        own = {name: tensor for name, tensor in tensors.items() if name.rpartition("/")[0] in part.arms}
        _write_checkpoint(part.path, own, {**state, "inputs": part.inputs, "facts": part.facts})


def read_checkpoint_facts(path: Path) -> dict[str, Any]:
    """The facts that were saved with a checkpoint; raises `StorageError` if it is damaged."""
    facts: dict[str, Any] = _read_checkpoint(path)[1]["facts"]
    return facts


def _write_checkpoint(path: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    save_sealed(path, tensors, {"state": json.dumps(state)})


def _read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        tensors, metadata = load_sealed(path)
        return tensors, json.loads(metadata["state"])
    except (WeightsError, KeyError, ValueError) as error:
        what = str(error).removeprefix(f"{path}: ")
        raise StorageError(
            f"{path}: damaged checkpoint ({what}): delete it and run the same command again, "
            "which trains its arms from the start"
        ) from error
