"""What the device tells of its memory, and the GPUs that workers see."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from lorascope.console import size
from lorascope.doctor.findings import (
    MEMORY,
    WORKERS,
    Finding,
)
from lorascope.doctor.judging import judge
from lorascope.machine.facts import device_facts
from lorascope.machine.memory import free_bytes, is_out_of_memory, used_bytes
from lorascope.machine.workers import worker_environments
from lorascope.training.footprint import FREE_SHARE

_ALLOCATED_ON_CPU = 2**29
_MEMORY_BLOCK = 2**28
# Of what was allocated: other programs allocate and free meanwhile, and on a CPU those are all there are.
_MEMORY_TOLERANCE = {"cpu": 0.9, "mps": 0.9, "cuda": 0.25}
_MEMORY_TRIES = 5  # one that is right will do
_MEMORY_SETTLES_S = 0.2  # what is freed is not told free at once
_WORKER_TIMEOUT_S = 120
_TELL_GPUS = """\
import torch
for index in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_properties(index).uuid)
"""


def check_memory(
    device: torch.device,
    free: Callable[[torch.device], int] = free_bytes,
    used: Callable[[torch.device], int] = used_bytes,
) -> Finding:
    """What `free` tells against what can be allocated: on a GPU the share that trainings plan with, on a CPU
    a small part, and whether `free` and `used` follow.
    """
    for _ in range(_MEMORY_TRIES):
        finding = _allocate(device, free, used)
        if finding.status == "ok":
            break
        time.sleep(_MEMORY_SETTLES_S)
    return finding


def _allocate(
    device: torch.device, free: Callable[[torch.device], int], used: Callable[[torch.device], int]
) -> Finding:
    """Allocate, look, and free."""
    free_before, used_before = free(device), used(device)
    total = int(device_facts(device)["memory_bytes"])
    if free_before > total:
        return Finding(MEMORY, "wrong", f"{size(free_before)} told free of {size(total)}")
    wanted = int(FREE_SHARE * free_before) if device.type == "cuda" else _ALLOCATED_ON_CPU
    sizes = [min(_MEMORY_BLOCK, wanted - start) for start in range(0, wanted, _MEMORY_BLOCK)]
    try:
        blocks = [torch.ones(count, dtype=torch.uint8, device=device) for count in sizes]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        told = f"{size(free_before)} told free, {size(wanted)} cannot be allocated"
        return Finding(MEMORY, "wrong", told)
    gained, lost = used(device) - used_before, free_before - free(device)
    del blocks
    told = (
        f"{size(free_before)} free; {size(wanted)} allocated took {size(lost)} of it and use {size(gained)}"
    )
    deviation = max(abs(lost / wanted - 1), abs(gained / wanted - 1))
    return judge(MEMORY, deviation, _MEMORY_TOLERANCE[device.type], told)


def gpus_seen(environment: Mapping[str, str]) -> list[str]:
    """The UUIDs of the GPUs that a process with this added to its environment sees."""
    command = [sys.executable, "-c", _TELL_GPUS]
    result = subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=_WORKER_TIMEOUT_S,
        check=False,
    )
    return result.stdout.split()


def check_workers(num_gpus: int, seen: Callable[[Mapping[str, str]], list[str]] = gpus_seen) -> Finding:
    """Whether workers side by side see one GPU each, and each another."""
    if num_gpus < 2:
        return Finding(
            WORKERS, "not checked", f"{num_gpus or 'no'} GPU here: nothing runs side by side on several"
        )
    environments = worker_environments("cuda", num_gpus)
    with ThreadPoolExecutor(num_gpus) as pool:
        found = list(pool.map(seen, environments))
    names = [name for names in found for name in names]
    is_right = all(len(names) == 1 for names in found) and len(set(names)) == num_gpus
    told = f"{num_gpus} workers see " + ", ".join(" and ".join(names) or "none" for names in found)
    return Finding(WORKERS, "ok" if is_right else "wrong", told)
