"""Gate and timing of all entries in turns, and what a row of the result says of each."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorascope.bench.entries import Conditions, Entry
from lorascope.bench.entry import Lane, LaneError, Trajectory
from lorascope.bench.gate import NUM_GATE_STEPS, References, verdict, work_of
from lorascope.console import log
from lorascope.machine.facts import now
from lorascope.machine.memory import free_bytes

REFERENCE_STEPS = 3750  # of one arm of the reference study: 1,500 pictures, 10 epochs, batch 4
_LANE_BYTES = {"pocket": 2**30, "sd15": 8 * 2**30}  # of the machine's memory that a waiting process may need
# Of a GPU's memory that a process may hold for each of its adapters, its base's share included: a stack of
# eight on SD v1.5 at 512 px was counted at 3.5 GiB an adapter with its graphs, beside 2 GiB of base and
# context.
_ADAPTER_BYTES = {"pocket": 2**30, "sd15": 6 * 2**30}


@dataclass(frozen=True)
class Protocol:
    """How often an entry is timed."""

    num_warm_ups: int = 20  # after the gate's steps
    num_blocks: int = 3
    num_steps: int = 50  # of a block

    @classmethod
    def quick(cls) -> "Protocol":
        """A shorter one, for a look."""
        return cls(num_warm_ups=2, num_blocks=3, num_steps=10)


def measure_all(
    entries: Sequence[Entry],
    conditions: Conditions,
    protocol: Protocol,
    folder: Path,
    references: References,
    result: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Gate and time all entries, as many side by side as memory holds; one that runs out of it has a turn
    alone at the end.
    """
    groups = side_by_side(entries, conditions)
    while groups:
        group = groups.pop(0)
        with ExitStack() as stack:
            runs: list[Run] = []
            for entry in group:
                runs.append(Run(entry, conditions, folder))
                stack.callback(runs[-1].close)
            for run in runs:  # nothing else runs while one is set up and tunes itself
                run.ask("ready")
            passed = [run for run in runs if _pass_gate(run, references, result)]
            if len(runs) > 1:
                groups += [[run.entry] for run in runs if run.crowded]
            for run in _race(passed, protocol, result):
                flops = sum(references.flops[work_of(rank, run.entry.adapter)] for rank in run.entry.ranks)
                result["entries"][run.entry.key] |= _figures(run, conditions, result["limit"], flops)
        save()


def side_by_side(entries: Sequence[Entry], conditions: Conditions) -> list[list[Entry]]:
    """The entries in groups that memory, the machine's and a GPU's, should hold at once."""
    device = torch.device(conditions.device)
    num_processes = free_bytes(torch.device("cpu")) // _LANE_BYTES.get(conditions.base, 2**30)
    num_adapters: float = math.inf
    if device.type == "cuda":
        num_adapters = free_bytes(device) // _ADAPTER_BYTES.get(conditions.base, 2**30)
    groups: list[list[Entry]] = []
    for entry in entries:
        group = [*groups[-1], entry] if groups else [entry]
        fits = (
            sum(member.num_processes for member in group) <= num_processes
            and sum(len(member.ranks) * member.num_processes for member in group) <= num_adapters
        )
        if groups and fits:
            groups[-1] = group
        else:
            groups.append([entry])
    return groups


class Run:
    """An entry under measurement: its lanes, side by side, and what was seen of them."""

    def __init__(self, entry: Entry, conditions: Conditions, folder: Path) -> None:
        self.entry = entry
        self.lanes = [Lane(entry, conditions, folder, place) for place in range(entry.num_processes)]
        self.blocks: list[float] = []  # seconds a step, all lanes at once
        # of each lane: its peak, what kind that is, and on a GPU the reserved peak
        self.memory: list[tuple[int, str, int]] = []
        self.setup_s = self.first_step_s = 0.0
        self.precision: str = entry.precision  # what `auto` came to, once it is built
        self.crowded = False

    def ask(self, command: str, *arguments: Any) -> list[Any]:
        """Have all lanes do the same at once."""
        for lane in self.lanes:
            lane.send(command, *arguments)
        return [lane.receive() for lane in self.lanes]

    def close(self) -> None:
        """End its processes."""
        for lane in self.lanes:
            lane.close()


def _pass_gate(run: Run, references: References, result: dict[str, Any]) -> bool:
    """Set an entry up and hold its first steps against the reference's; notes in `result` what came of it."""
    entry, rows = run.entry, result["entries"]
    try:
        built = run.ask("build")
        run.setup_s, run.precision = max(seconds for seconds, _ in built), built[0][1]
        started = time.perf_counter()
        [first, *_] = run.ask("take", 1)
        run.first_step_s = time.perf_counter() - started
        [rest, *_] = [lane.trajectory(NUM_GATE_STEPS - 1) for lane in run.lanes]
    except LaneError as error:
        run.crowded = error.out_of_memory
        rows[entry.key] = row_of(entry, "failed", str(error))
        log.warning("bench    %s: %s", entry.key, error)
        return False
    seen = Trajectory(
        np.concatenate([first[0], rest.losses]), np.concatenate([first[1], rest.norms]), rest.weights
    )
    errors = references.check(entry, seen)
    tolerance = run.precision if entry.precision == "auto" else entry.tolerance
    reason = verdict(errors, tolerance)
    rows[entry.key] = {
        **row_of(entry, "failed" if reason else "measured", reason),
        "precision": run.precision,
    }
    rows[entry.key]["gate"] = (
        {**errors, "tolerance": tolerance} if np.isfinite(list(errors.values())).all() else None
    )
    log.info(
        "bench    %-22s %s",
        entry.key,
        reason or "gate passed: " + ", ".join(f"{name} {value:.1e}" for name, value in errors.items()),
    )
    return reason is None


def _race(runs: Sequence[Run], protocol: Protocol, result: dict[str, Any]) -> list[Run]:
    """Warm all up, then time them in turns; returns those that lasted."""
    lasting = list(runs)
    for number in range(protocol.num_blocks + 1):
        for run in list(lasting):
            try:
                seconds = run.ask("race", protocol.num_steps if number else protocol.num_warm_ups)
                if number:
                    run.blocks.append(statistics.mean(map(statistics.median, seconds)))
                run.memory = run.ask("memory")
            except LaneError as error:
                lasting.remove(run)
                result["entries"][run.entry.key] = row_of(run.entry, "failed", str(error))
        log.info("bench    %s", f"block {number} of {protocol.num_blocks}" if number else "warm")
    return lasting


def row_of(entry: Entry, status: str, reason: str | None) -> dict[str, Any]:
    """What is told of an entry whether it is timed or not; `reason` says why it failed or was skipped."""
    return {
        "name": entry.name,
        "label": entry.label,
        "ranks": list(entry.ranks),
        "precision": entry.precision,
        "num_processes": entry.num_processes,
        "barred": list(entry.barred),
        "status": status,
        "reason": reason,
        "measured": now(),
    }


def _figures(run: Run, conditions: Conditions, limit: Mapping[str, float], flops: int) -> dict[str, Any]:
    """What is told of a timed entry; `flops` are those of one step of all its adapters in one process."""
    count = len(run.entry.ranks) * run.entry.num_processes  # adapters that move in a step
    step_s = statistics.median(run.blocks)
    compile_s = max(0.0, run.first_step_s - step_s)
    fastest = limit["float32" if run.precision == "fp32" else "bfloat16"]
    return {
        "block_ms": [round(seconds * 1e3, 3) for seconds in run.blocks],
        "step_ms": step_s * 1e3,
        "arm_step_ms": step_s * 1e3 / count,
        "arm_step_ms_range": [min(run.blocks) * 1e3 / count, max(run.blocks) * 1e3 / count],
        "steps_per_s": count / step_s,
        "images_per_s": count * conditions.batch_size / step_s,
        "limit_fraction": flops * run.entry.num_processes / step_s / fastest,
        "setup_s": run.setup_s,
        "first_step_s": compile_s,
        "total_s": (run.setup_s + compile_s) / count + REFERENCE_STEPS * step_s / count,
        "peak_memory_bytes": sum(peak for peak, _, _ in run.memory),
        "peak_memory_kind": run.memory[0][1],
        "reserved_memory_bytes": sum(reserved for _, _, reserved in run.memory),
    }
