"""The benchmark: lorascope's training step beside its peers', on one machine, in one run, checked before it
is timed.

Every entry must first take the same 20 steps as a plain fp32 reference: same base, adapters, pictures, noise
and timesteps. One that does not is reported and not timed. Then all take turns, block by block, so that what
disturbs the machine disturbs them alike. Each runs in a process of its own, whose peak memory is therefore
its own.
"""

import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from lorascope import __version__
from lorascope.bench.entry import (
    Conditions,
    Entry,
    Lane,
    LaneError,
    Trajectory,
    build_runner,
    elsewhere,
    prepare_workload,
    tune_all,
)
from lorascope.bench.peers import Recipe, missing_for
from lorascope.bench.table import as_markdown, draw_scaling
from lorascope.console import log, size
from lorascope.errors import ConfigError, RunError
from lorascope.machine.device import choose_device
from lorascope.machine.facts import device_name, now, software_versions
from lorascope.machine.fast_paths import ALL_PATHS, FastPaths
from lorascope.machine.memory import free_bytes, peak_memory
from lorascope.store import read_json, write_bytes, write_json, write_text

NUM_GATE_STEPS = 20
REFERENCE_STEPS = 3750  # of one arm of the reference study: 1,500 pictures, 10 epochs, batch 4
_RANKS = (16, 64)
_RESOLUTION_PX = {"pocket": 64, "sd15": 512}
_LANE_BYTES = {"pocket": 2**30, "sd15": 8 * 2**30}  # of the machine's memory that a waiting process may need
# Of a GPU's memory that a process may hold for each of its adapters, its base's share included: a stack of
# eight on SD v1.5 at 512 px was counted at 3.5 GiB an adapter with its graphs, beside 2 GiB of base and
# context.
_ADAPTER_BYTES = {"pocket": 2**30, "sd15": 6 * 2**30}

TOLERANCES: Mapping[str, Mapping[str, float]] = {
    "fp32": {"loss": 1e-3, "norm": 1e-2, "weights": 2e-2},
    "bf16": {"loss": 2e-2, "norm": 1e-1, "weights": 3e-1},
    "fp16": {"loss": 2e-2, "norm": 1e-1, "weights": 3e-1},
    "bf16 adapters": {"loss": 4e-2, "norm": 1.5e-1, "weights": 6e-1},
}
"""How far an entry may be from the reference: largest difference of a step's loss over the mean loss; largest
relative difference of a gradient's norm; l2 distance of all weights from the reference's over the way that
those have come. AdamW's first steps go by the sign of each gradient, so in bf16 the smallest gradients decide
over a good part of the way.
"""


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


def plan_entries(base: str, device: torch.device, quick: bool) -> list[Entry]:
    """The entries of the table: peers P1 to P4 and ours O1 to O7, at rank 16 and, unless `quick`, rank 64."""
    ranks = _RANKS[:1] if quick else _RANKS
    return [
        entry
        for rank in ranks
        for entry in (_gpu_entries(rank) if device.type == "cuda" else _cpu_entries(rank, quick))
    ] + ([] if quick else [_mixed_entry(device)])


def _cpu_entries(rank: int, quick: bool) -> list[Entry]:
    one, cached = (rank,), Recipe(cached=True, channels_last=True, fused=True)
    example = Entry(
        "P1",
        "diffusers' example, its step",
        "peft",
        one,
        recipe=Recipe(cached=False, clips=False),
        max_grad_norm=0.0,
    )
    entries = [
        example,
        Entry("P2", "the same, clipping repaired", "peft", one, recipe=Recipe(cached=False)),
        Entry("P3", "kohya's sd-scripts, its modules and step", "kohya", one),
        Entry("P4", "PEFT, cached, fp32", "peft", one, recipe=cached),
        Entry("P4b", "PEFT, cached, bf16", "peft", one, "bf16", recipe=cached, tolerance="bf16"),
        Entry("P4c", "PEFT, cached, fp32, compiled", "peft", one, recipe=replace(cached, compiled=True)),
        Entry("O1", "ours, fp32", "ours", one),
        Entry("O3", "ours, as tuned", "ours", one, "auto", best_attention=True),
    ]
    tuned = entries[-1]
    entries += [_stacked(tuned, count) for count in ((2, 4) if quick else (2, 4, 8))]
    entries.append(replace(tuned, name="O7", label="ours, 2 processes side by side", num_processes=2))
    return [entry for entry in entries if not quick or entry.name not in ("P2", "P3", "P4c")]


def _gpu_entries(rank: int) -> list[Entry]:
    one = (rank,)
    cached = Recipe(cached=True, channels_last=True, fused=True)
    shipped = Recipe(cached=False, autocast=True, fp32_adapters=False, clips=False)
    repaired = replace(shipped, fp32_adapters=True, clips=True)
    eager = Entry("O1", "ours, cached, eager", "ours", one, "bf16", tolerance="bf16")
    channels_last = replace(eager, name="O2", label="+ channels_last", channels_last=True)
    attention = replace(channels_last, name="O3", label="+ best attention", best_attention=True)
    graph = replace(attention, name="O4", label="+ CUDA graph", cuda_graph=True)
    return [
        Entry(
            "P1",
            "diffusers' example, its step",
            "peft",
            one,
            "bf16",
            shipped,
            "bf16 adapters",
            max_grad_norm=0.0,
        ),
        Entry("P2", "the same, repaired", "peft", one, "bf16", repaired, "bf16"),
        Entry("P3", "kohya's sd-scripts, its modules and step", "kohya", one, "bf16", tolerance="bf16"),
        Entry("P4", "PEFT, cached, compiled", "peft", one, "bf16", replace(cached, compiled=True), "bf16"),
        Entry("P4e", "PEFT, cached, eager", "peft", one, "bf16", cached, "bf16"),
        eager,
        channels_last,
        attention,
        graph,
        replace(graph, name="O5", label="+ compile", compiled=True),
        *(_stacked(graph, count) for count in (2, 4, 8)),
    ]


def _stacked(entry: Entry, count: int) -> Entry:
    return replace(
        entry, name=f"O6x{count}", label=f"ours, {count} adapters stacked", ranks=entry.ranks * count
    )


def _mixed_entry(device: torch.device) -> Entry:
    alone = {
        entry.name: entry
        for entry in (_gpu_entries(16) if device.type == "cuda" else _cpu_entries(16, False))
    }
    return replace(
        alone["O4" if device.type == "cuda" else "O3"],
        name="O6",
        label="ours, both ranks stacked",
        ranks=_RANKS,
    )


def choose_entries(entries: Sequence[Entry], names: Sequence[str]) -> list[Entry]:
    """The entries of these names (`P4`) or keys (`P4-r16`); raises `ConfigError` for one that is not
    known.
    """
    known = dict.fromkeys(itertools.chain.from_iterable((entry.name, entry.key) for entry in entries))
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--arms {name}: no such arm here: choose from "
                f"{', '.join(dict.fromkeys(entry.name for entry in entries))}"
            )
    return [entry for entry in entries if entry.name in names or entry.key in names]


# The gate ---------------------------------------------------------------------------------------------------


def compare(
    reference: Sequence[Trajectory], start: Sequence[Mapping[str, torch.Tensor]], seen: Trajectory
) -> dict[str, float]:
    """How far the adapters of `seen` went astray, the worst of them: errors of `loss`, `norm` and `weights`
    as `TOLERANCES` has them.

    `reference` and `start` (the weights before the first step) hold for each adapter of `seen` the reference
    of its rank.
    """
    errors = []
    for index, (true, before) in enumerate(zip(reference, start, strict=True)):
        loss = np.abs(seen.losses[:, index] - true.losses[:, 0]).max() / true.losses.mean()
        norm = (np.abs(seen.norms[:, index] - true.norms[:, 0]) / true.norms[:, 0]).max()
        astray = way = 0.0
        for name, end in true.weights.items():
            rank_cut = seen.weights[name][index]
            rank_cut = rank_cut[: end.shape[1]] if name.endswith(".down") else rank_cut[:, : end.shape[2]]
            astray += float((rank_cut - end[0]).square().sum())
            way += float((end[0] - before[name][0]).square().sum())
        errors.append((float(loss), float(norm), float((astray / way) ** 0.5)))
    worst = np.array(errors).max(axis=0) if np.isfinite(errors).all() else np.full(3, np.inf)
    return dict(zip(("loss", "norm", "weights"), worst.tolist(), strict=True))


def verdict(errors: Mapping[str, float], tolerance: str) -> str | None:
    """None where all errors are within the tolerance, else what is too far."""
    limits = TOLERANCES[tolerance]
    bad = [
        f"{name} {errors[name]:.2g} (at most {limits[name]:g})"
        for name in limits
        if not errors[name] <= limits[name]
    ]
    return f"not the reference's steps: {', '.join(bad)}" if bad else None


@dataclass
class _References:
    """The reference's first steps by (rank, clipping), FLOPs of a step by rank, and the device's FLOP/s by
    dtype.
    """

    steps: dict[tuple[int, float], Trajectory] = field(default_factory=dict)
    start: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    flops: dict[int, int] = field(default_factory=dict)
    limit: dict[str, float] = field(default_factory=dict)

    def run(self, entries: Iterable[Entry], conditions: Conditions, folder: Path) -> None:
        """Take the steps that `entries` will be held against."""
        wanted = dict.fromkeys((rank, entry.max_grad_norm) for entry in entries for rank in entry.ranks)
        plain = Entry("R", "plain reference", "reference", ())
        for rank, norm in wanted:  # one after another: each holds the base in fp32
            lane = Lane(replace(plain, ranks=(rank,), max_grad_norm=norm), conditions, folder)
            with closing(lane):
                if not self.limit:
                    self.limit = {dtype: lane.ask("matmul", dtype) for dtype in ("float32", "bfloat16")}
                lane.ask("build")
                if rank not in self.start:
                    self.start[rank] = lane.trajectory(0).weights
                self.steps[rank, norm] = lane.trajectory(NUM_GATE_STEPS)
                if rank not in self.flops:
                    self.flops[rank] = lane.ask("flops")

    def check(self, entry: Entry, seen: Trajectory) -> dict[str, float]:
        """The entry's errors."""
        return compare(
            [self.steps[rank, entry.max_grad_norm] for rank in entry.ranks],
            [self.start[rank] for rank in entry.ranks],
            seen,
        )


# Timing -----------------------------------------------------------------------------------------------------


def run_bench(
    base: str,
    device_kind: str = "auto",
    *,
    quick: bool = False,
    names: Sequence[str] = (),
    protocol: Protocol | None = None,
    scaling: bool = False,
    again: bool = False,
    out: Path = Path("bench"),
    peers_dir: Path = Path("benchmarks/peers"),
    batch_size: int = 4,
    fast_paths: FastPaths = ALL_PATHS,
) -> dict[str, Any]:
    """Run the benchmark, write `bench.json`, `bench.md` and with `scaling` its plot to `out`, and return what
    `bench.json` holds.

    `base` is `pocket`, `sd15` (random weights) or a diffusers folder. Entries that `out` holds already from
    the same machine and versions are kept, unless `again`. What `fast_paths` bars our own entries do without,
    and their rows say so. Raises `ConfigError` for an unknown entry or a
    result of other conditions in `out`, `RunError` where the reference cannot be run.
    """
    device = choose_device(device_kind)
    protocol = protocol or (Protocol.quick() if quick else Protocol())
    conditions = _conditions(base, device, batch_size, peers_dir, fast_paths)
    result = _open_result(out / "bench.json", conditions, protocol, device, again)
    entries = plan_entries(base, device, quick)
    entries = choose_entries(entries, names) if names else entries
    entries = [entry.within(fast_paths) for entry in entries]
    rows: dict[str, Any] = result["entries"]
    missing = [entry for entry in entries if again or not _is_measured(entry, rows.get(entry.key, {}))]
    with TemporaryDirectory(prefix="lorascope-bench-") as name:
        folder = Path(name)
        try:
            elsewhere(prepare_workload, conditions, folder)  # its memory is given back
            runnable = []
            for entry in missing:
                if reason := missing_for(entry.kind, peers_dir, base):
                    rows[entry.key] = _row(entry, "skipped", reason)
                else:
                    runnable.append(entry)
            if runnable:
                elsewhere(tune_all, runnable, conditions, folder)
                references = _References()
                references.run(runnable, conditions, folder)
                result.setdefault("limit", references.limit)
                result["flops"] |= {f"r{rank}": flops for rank, flops in references.flops.items()}
                _measure_all(
                    runnable, conditions, protocol, folder, references, result, lambda: _write(result, out)
                )
            if scaling:
                _measure_scaling(conditions, protocol, folder, device, result, again)
        except LaneError as error:
            raise RunError(
                f"bench: the reference cannot be run: {error}: give a smaller --base, or another --device"
            ) from error
    result["finished"] = now()
    _write(result, out)
    return result


def _conditions(
    base: str, device: torch.device, batch_size: int, peers_dir: Path, fast_paths: FastPaths
) -> Conditions:
    return Conditions(
        base,
        _RESOLUTION_PX.get(base, 64),
        batch_size,
        str(device),
        torch.get_num_threads(),
        str(peers_dir),
        fast_paths,
    )


def _is_measured(entry: Entry, row: Mapping[str, Any]) -> bool:
    """Whether a result's row holds the entry's figures, with what is barred now."""
    return row.get("status") == "measured" and row.get("barred", []) == list(entry.barred)


def _measure_all(
    entries: Sequence[Entry],
    conditions: Conditions,
    protocol: Protocol,
    folder: Path,
    references: _References,
    result: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Gate and time all entries, as many side by side as memory holds; one that runs out of it has a turn
    alone at the end.
    """
    groups = _side_by_side(entries, conditions)
    while groups:
        group = groups.pop(0)
        with ExitStack() as stack:
            runs: list[_Run] = []
            for entry in group:
                runs.append(_Run(entry, conditions, folder))
                stack.callback(runs[-1].close)
            for run in runs:  # nothing else runs while one is set up and tunes itself
                run.ask("ready")
            passed = [run for run in runs if _pass_gate(run, references, result)]
            if len(runs) > 1:
                groups += [[run.entry] for run in runs if run.crowded]
            for run in _race(passed, protocol, result):
                flops = sum(references.flops[rank] for rank in run.entry.ranks)
                result["entries"][run.entry.key] |= _figures(run, conditions, result["limit"], flops)
        save()


def _side_by_side(entries: Sequence[Entry], conditions: Conditions) -> list[list[Entry]]:
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


class _Run:
    """An entry under measurement: its lanes, side by side, and what was seen of them."""

    def __init__(self, entry: Entry, conditions: Conditions, folder: Path) -> None:
        self.entry = entry
        self.lanes = [Lane(entry, conditions, folder, place) for place in range(entry.num_processes)]
        self.blocks: list[float] = []  # seconds a step, all lanes at once
        self.memory: list[
            tuple[int, str, int]
        ] = []  # peak, its kind and, on a GPU, the reserved peak; of each lane
        self.setup_s = self.first_step_s = 0.0
        self.precision: str = entry.precision  # once it is built, that which `auto` came to
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


def _pass_gate(run: _Run, references: _References, result: dict[str, Any]) -> bool:
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
        rows[entry.key] = _row(entry, "failed", str(error))
        log.warning("bench    %s: %s", entry.key, error)
        return False
    seen = Trajectory(
        np.concatenate([first[0], rest.losses]), np.concatenate([first[1], rest.norms]), rest.weights
    )
    errors = references.check(entry, seen)
    tolerance = run.precision if entry.precision == "auto" else entry.tolerance
    reason = verdict(errors, tolerance)
    rows[entry.key] = {**_row(entry, "failed" if reason else "measured", reason), "precision": run.precision}
    rows[entry.key]["gate"] = (
        {**errors, "tolerance": tolerance} if np.isfinite(list(errors.values())).all() else None
    )
    log.info(
        "bench    %-22s %s",
        entry.key,
        reason or "gate passed: " + ", ".join(f"{name} {value:.1e}" for name, value in errors.items()),
    )
    return reason is None


def _race(runs: Sequence[_Run], protocol: Protocol, result: dict[str, Any]) -> list[_Run]:
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
                result["entries"][run.entry.key] = _row(run.entry, "failed", str(error))
        log.info("bench    %s", f"block {number} of {protocol.num_blocks}" if number else "warm")
    return lasting


def _row(entry: Entry, status: str, reason: str | None) -> dict[str, Any]:
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


def _figures(run: _Run, conditions: Conditions, limit: Mapping[str, float], flops: int) -> dict[str, Any]:
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


def run_alone(
    base: str,
    device_kind: str,
    name: str,
    num_steps: int,
    peers_dir: Path,
    batch_size: int = 4,
    fast_paths: FastPaths = ALL_PATHS,
) -> dict[str, Any]:
    """Run one entry in this very process, ungated: for `/usr/bin/time -v` and profilers. Raises `ConfigError`
    as `run_bench`.
    """
    device = choose_device(device_kind)
    [entry, *_] = choose_entries(plan_entries(base, device, False), [name])
    if reason := missing_for(entry.kind, peers_dir, base):
        raise ConfigError(f"--arms {name}: {reason}")
    conditions = _conditions(base, device, batch_size, peers_dir, fast_paths)
    entry = entry.within(fast_paths)
    with TemporaryDirectory(prefix="lorascope-bench-") as folder:
        elsewhere(
            prepare_workload, conditions, Path(folder)
        )  # so that this process's peak memory is the arm's
        elsewhere(tune_all, [entry], conditions, Path(folder))
        started = time.perf_counter()
        runner = build_runner(entry, conditions, Path(folder))
        setup_s = time.perf_counter() - started
        started = time.perf_counter()
        seconds = runner.race(num_steps)
        wall_s = time.perf_counter() - started
    peak, kind = peak_memory(device)
    return {
        "entry": entry.key,
        "barred": list(entry.barred),
        "num_steps": num_steps,
        "setup_s": setup_s,
        "steps_s": wall_s,
        "arm_step_ms": statistics.median(seconds) * 1e3 / len(entry.ranks),
        "peak_memory_bytes": peak,
        "peak_memory_kind": kind,
    }


# Scaling ----------------------------------------------------------------------------------------------------


def plan_scaling(device: torch.device) -> list[tuple[str, int, Entry, int]]:
    """What grows, its value, the entry and the batch size: adapters 1 to 8, rank 4 to 128, batch 1 to 16."""
    plain = Entry(
        "S",
        "ours",
        "ours",
        (16,),
        "bf16" if device.type == "cuda" else "fp32",
        cuda_graph=device.type == "cuda",
    )
    points = [("adapters", count, replace(plain, ranks=(16,) * count), 4) for count in (1, 2, 4, 8)]
    points += [("rank", rank, replace(plain, ranks=(rank,)), 4) for rank in (4, 16, 64, 128)]
    return points + [("batch", size, plain, size) for size in (1, 2, 4, 8, 16)]


def _measure_scaling(
    conditions: Conditions,
    protocol: Protocol,
    folder: Path,
    device: torch.device,
    result: dict[str, Any],
    again: bool,
) -> None:
    if result.get("scaling") and not again:
        return
    points = []
    for what, value, entry, batch_size in plan_scaling(device):
        run = _Run(entry.within(conditions.fast_paths), replace(conditions, batch_size=batch_size), folder)
        try:
            run.ask("build")
            run.ask("race", min(protocol.num_warm_ups, 5))
            blocks = [
                statistics.median(run.ask("race", max(1, protocol.num_steps // 5))[0])
                for _ in range(protocol.num_blocks)
            ]
            [(peak, kind, _)] = run.ask("memory")
            points.append(
                {
                    "what": what,
                    "value": value,
                    "step_ms": statistics.median(blocks) * 1e3,
                    "memory_bytes": peak,
                    "kind": kind,
                }
            )
            log.info("bench    %s %d: %.1f ms, %s", what, value, points[-1]["step_ms"], size(peak))
        except LaneError as error:
            points.append({"what": what, "value": value, "reason": str(error)})
            log.warning("bench    %s %d: %s", what, value, error)
        finally:
            run.close()
    result["scaling"] = points


# Files ------------------------------------------------------------------------------------------------------


def _open_result(
    path: Path, conditions: Conditions, protocol: Protocol, device: torch.device, again: bool
) -> dict[str, Any]:
    """What `path` holds of the same conditions, or a new result; raises `ConfigError` where the conditions
    differ.
    """
    cores = f", {os.cpu_count()} cores" if device.type == "cpu" else ""
    header = {
        "lorascope": __version__,
        "base": conditions.base,
        "resolution_px": conditions.resolution_px,
        "batch_size": conditions.batch_size,
        "device": device_name(device) + cores,
        "num_threads": conditions.num_threads,
        "versions": software_versions(("torch", "diffusers", "transformers", "peft")),
        "protocol": {"num_gate_steps": NUM_GATE_STEPS, **vars(protocol)},
    }
    if path.exists() and not again:
        found: dict[str, Any] = read_json(path)
        for key, value in header.items():
            if found.get(key) != value:
                raise ConfigError(
                    f"{path}: was measured with {key} = {json.dumps(found.get(key))}, now it is "
                    f"{json.dumps(value)}: give --out another folder, or --again to measure all anew"
                )
        return found
    return {**header, "started": now(), "flops": {}, "entries": {}}


def _write(result: dict[str, Any], out: Path) -> None:
    write_json(out / "bench.json", result)
    write_text(out / "bench.md", as_markdown(result))
    if result.get("scaling"):
        drawing = draw_scaling(result["scaling"])
        write_bytes(out / "scaling.svg", drawing.file_svg)
        write_bytes(out / "scaling.png", drawing.png)
