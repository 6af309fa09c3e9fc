"""Memory of a device: what is free, what is in use, the peak of a stage, and when it has run out."""

import ctypes
import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from torch import nn

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")

_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "could not create a primitive",  # all that torch passes on of oneDNN's failed allocation
    "CUBLAS_STATUS_ALLOC_FAILED",  # of CUDA's libraries, which allocate for themselves
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: of a CUDA GPU's own memory; elsewhere of the machine's or of its
    container's, which Apple's GPUs share.

    Memory that only caches files counts as free, since the system gives it up.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    return min(_machine_free(_PROC / "meminfo"), *_container_free(_PROC / "self" / "cgroup", _CGROUPS))


def _machine_free(meminfo: Path) -> int:
    """What the system says is available: Linux in its own file."""
    for line in _read(meminfo).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return int(psutil.virtual_memory().available)


def machine_bytes() -> int:
    """The whole memory of the machine."""
    return int(psutil.virtual_memory().total)


def _container_free(own: Path, root: Path) -> Iterator[int]:
    """What is left to this process by each control group that holds it, of version 2 or 1, and first a number
    beyond all memory, since there may be none.

    `own` lists the process's groups, `root` is where they are mounted. A container sees its own group at the
    root or at the path that `own` names, and groups above it limit it too.
    """
    yield sys.maxsize
    for line in _read(own).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, limit, usage, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage, cache = (
                root / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (limited := _read(folder / limit).strip()).isdigit():
                reclaimable = dict(line.split() for line in _read(folder / "memory.stat").splitlines()).get(
                    cache, 0
                )
                yield int(limited) - int(_read(folder / usage) or 0) + int(reclaimable)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def used_bytes(device: torch.device) -> int:
    """Bytes in use: what torch has allocated on a CUDA GPU, the resident set of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status_bytes("VmRSS") or int(psutil.Process().memory_info().rss)


def free_cached(device: torch.device) -> None:
    """Let go of what nothing holds any more: on a GPU, torch would keep it from other programs."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from here on, after giving back to the system what this process has freed.

    A CPU's peak stays that of the process's life where the system is not Linux.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError, AttributeError):  # AttributeError: a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)
        (_PROC / "self" / "clear_refs").write_text("5")  # resets VmHWM (proc_pid_clear_refs(5))


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Peak memory in bytes since the last reset, and its kind: CUDA's allocated peak, or the process's peak
    resident set.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "cuda"
    return _status_bytes("VmHWM") or _peak_of_life(), "rss"


def _peak_of_life() -> int:
    """The peak resident set of this process's life where there is no /proc: of Windows, macOS or another
    Unix.
    """
    now = psutil.Process().memory_info()
    if peak := getattr(now, "peak_wset", 0):
        return int(peak)
    try:
        resource = importlib.import_module("resource")
    except ImportError:
        return int(now.rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


def reserved_peak(device: torch.device) -> int:
    """The most bytes of a GPU that torch has held since the last reset, in use or not: other programs could
    not have them. 0 on a CPU.
    """
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def _status_bytes(key: str) -> int:
    """A value of /proc/self/status, 0 where the system has none."""
    lines = (line.split() for line in _read(_PROC / "self" / "status").splitlines())
    return next((int(words[1]) * 1024 for words in lines if words and words[0] == f"{key}:"), 0)


@contextmanager
def parked(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Within, modules that their GPU can do without lie in the machine's memory; they come back with the same
    bits. Nothing happens where the device has no memory of its own.
    """
    away = modules if device.type == "cuda" else ()
    for module in away:
        module.to("cpu")
    try:
        yield
    finally:
        for module in away:
            module.to(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch has a type of its own for what it allocates on GPUs, and only a
    message for CPUs and for what CUDA's libraries allocate.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
