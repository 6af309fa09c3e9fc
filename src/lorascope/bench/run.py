"""The benchmark: lorascope's training step beside its peers', on one machine, in one run, checked before it
is timed.

Every entry must first take the same 20 steps as a plain fp32 reference: same base, adapters, pictures, noise
and timesteps. One that does not is reported and not timed. Then all take turns, block by block, so that what
disturbs the machine disturbs them alike. Each runs in a process of its own, whose peak memory is therefore
its own.
"""

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lorascope import __version__
from lorascope.bench.entries import Conditions, Entry, choose_entries, plan_entries
from lorascope.bench.entry import LaneError, build_runner, elsewhere, prepare_workload, tune_all
from lorascope.bench.gate import NUM_GATE_STEPS, References
from lorascope.bench.peers import missing_for
from lorascope.bench.race import Protocol, measure_all, row_of
from lorascope.bench.scaling import measure_scaling
from lorascope.bench.table import as_markdown, draw_scaling
from lorascope.errors import ConfigError, RunError
from lorascope.machine.device import choose_device
from lorascope.machine.facts import device_name, now, software_versions
from lorascope.machine.fast_paths import ALL_PATHS, FastPaths
from lorascope.machine.memory import peak_memory
from lorascope.store import read_json, write_bytes, write_json, write_text

_RESOLUTION_PX = {"pocket": 64, "sd15": 512}


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
    and their rows say so. Raises `ConfigError` for an unknown entry or a result of other conditions in `out`,
    `RunError` where the reference cannot be run.
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
            _measure(missing, conditions, protocol, folder, result, out)
            if scaling:
                measure_scaling(conditions, protocol, folder, device, result, again)
        except LaneError as error:
            raise RunError(
                f"bench: the reference cannot be run: {error}: give a smaller --base, or another --device"
            ) from error
    result["finished"] = now()
    _write(result, out)
    return result


def _measure(
    entries: Sequence[Entry],
    conditions: Conditions,
    protocol: Protocol,
    folder: Path,
    result: dict[str, Any],
    out: Path,
) -> None:
    """Run the reference and measure the entries, less those whose packages are missing."""
    runnable = []
    for entry in entries:
        if reason := missing_for(entry.kind, Path(conditions.peers_dir), conditions.base):
            result["entries"][entry.key] = row_of(entry, "skipped", reason)
        else:
            runnable.append(entry)
    if not runnable:
        return
    elsewhere(tune_all, runnable, conditions, folder)
    references = References()
    references.run(runnable, conditions, folder)
    result.setdefault("limit", references.limit)
    result["flops"] |= references.flops
    measure_all(runnable, conditions, protocol, folder, references, result, lambda: _write(result, out))


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
        # elsewhere, so that this process's peak memory is the arm's
        elsewhere(prepare_workload, conditions, Path(folder))
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
