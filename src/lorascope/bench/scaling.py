"""Time and memory of a step over adapters, rank and batch size."""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorascope.bench.entries import Conditions, Entry
from lorascope.bench.entry import LaneError
from lorascope.bench.race import Protocol, Run
from lorascope.console import log, size


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


def measure_scaling(
    conditions: Conditions,
    protocol: Protocol,
    folder: Path,
    device: torch.device,
    result: dict[str, Any],
    again: bool,
) -> None:
    """Time every point and put them into `result`, unless it has them; nothing else runs meanwhile."""
    if result.get("scaling") and not again:
        return
    points = []
    for what, value, entry, batch_size in plan_scaling(device):
        run = Run(entry.within(conditions.fast_paths), replace(conditions, batch_size=batch_size), folder)
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
