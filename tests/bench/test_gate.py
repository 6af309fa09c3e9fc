"""The gate lets right arms through and no wrong one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench_entries import PEERS_DIR, REFERENCE, RIGHT
from conftest import needs_bf16_attention
from lorascope.arms import Kind
from lorascope.bench.entries import Conditions, Entry
from lorascope.bench.entry import Runner, Trajectory, build_runner
from lorascope.bench.gate import compare, verdict
from lorascope.bench.peers import missing_for


@pytest.fixture(scope="module")
def references(
    conditions: Conditions, workload: Path
) -> dict[tuple[int, float, Kind], tuple[dict[str, torch.Tensor], Trajectory]]:
    """The weights before the first step and the first 20 steps, by rank and clipping."""
    found = {}
    keys: list[tuple[int, float, Kind]] = [(4, 0.0, "lora"), (4, 1.0, "lora"), (8, 1.0, "lora")]
    for rank, norm, kind in [*keys, (4, 1.0, "tlora"), (4, 1.0, "dora")]:
        entry = replace(REFERENCE, ranks=(rank,), max_grad_norm=norm, adapter=kind)
        runner = build_runner(entry, conditions, workload)
        found[rank, norm, kind] = (runner.weights(), take(runner))
    return found


def take(runner: Runner) -> Trajectory:
    losses, norms = runner.take(20)
    return Trajectory(losses, norms, runner.weights())


def errors_of(entry: Entry, runner: Runner, references: Any) -> dict[str, float]:
    known = [references[rank, entry.max_grad_norm, entry.adapter] for rank in entry.ranks]
    return compare([steps for _, steps in known], [start for start, _ in known], take(runner))


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=entry.name, marks=[needs_bf16_attention] * (entry.precision == "bf16"))
        for entry in RIGHT
    ],
)
def test_the_gate_lets_every_right_arm_through(
    entry: Entry, conditions: Conditions, workload: Path, references: Any
) -> None:
    if reason := missing_for(entry.kind, PEERS_DIR, "pocket"):
        pytest.skip(reason)
    runner = build_runner(entry, conditions, workload)
    errors = errors_of(entry, runner, references)
    assert verdict(errors, entry.tolerance) is None, errors
    if entry.precision == "fp32":
        assert errors["loss"] < 1e-5


def test_the_gate_stops_an_arm_with_another_alpha(
    conditions: Conditions, workload: Path, references: Any
) -> None:
    entry = RIGHT[3]
    runner: Any = build_runner(entry, conditions, workload)
    for module in runner.step.unet.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= 2
    reason = verdict(errors_of(entry, runner, references), entry.tolerance)
    assert (
        reason is not None
        and reason.startswith("not the reference's steps: ")
        and "norm 1 (at most 0.01)" in reason
    )


def test_the_gate_stops_an_arm_that_sees_other_noise(
    conditions: Conditions, workload: Path, references: Any
) -> None:
    entry = RIGHT[3]
    runner: Any = build_runner(entry, conditions, workload)
    runner.batches = [replace(batch, noise=batch.noise.flip(0)) for batch in runner.batches]
    assert "loss" in str(verdict(errors_of(entry, runner, references), "bf16"))


def test_the_gate_stops_one_wrong_adapter_among_stacked_ones(
    conditions: Conditions, workload: Path, references: Any
) -> None:
    entry = next(entry for entry in RIGHT if entry.name == "O6")
    runner: Any = build_runner(entry, conditions, workload)
    for layer in runner.bank.layers.values():
        layer.down.data[1] *= 1.1
    assert verdict(errors_of(entry, runner, references), "fp32") is not None


def test_the_gate_stops_what_is_not_finite() -> None:
    weights = {"a.down": torch.ones(1, 2, 3)}
    true = Trajectory(np.ones((20, 1)), np.ones((20, 1)), weights)
    start = {"a.down": torch.zeros(1, 2, 3)}
    assert verdict(compare([true], [start], true), "fp32") is None
    assert (
        verdict(compare([true], [start], true._replace(losses=np.full((20, 1), np.nan))), "bf16 adapters")
        is not None
    )
