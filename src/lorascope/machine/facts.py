"""What a run folder, a benchmark and a bug report say of this machine and its software."""

import datetime
import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lorascope.machine.memory import machine_bytes

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def device_name(device: torch.device) -> str:
    """The GPU's or CPU's model."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type == "mps":
        return f"Apple GPU ({platform.machine()})"
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def device_facts(device: torch.device) -> dict[str, Any]:
    """The device's name, this process's CPU threads, and the device's whole memory."""
    cuda = device.type == "cuda"
    return {
        "name": device_name(device),
        "threads": torch.get_num_threads(),
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else machine_bytes(),
    }


def cpu_has_bf16() -> bool:
    """Whether the CPU has instructions for products of bf16, as Linux lists them; torch before 2.13 cannot
    say.
    """
    flags = {*_cpuinfo().get("flags", "").split(), *_cpuinfo().get("Features", "").split()}  # x86, ARM
    return not flags.isdisjoint({"amx_bf16", "avx512_bf16", "bf16"})


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo, empty where there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def software_versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    versions = {"python": platform.python_version()}
    for package in packages:
        if (version := package_version(package)) is not None:
            versions[package] = version
    return versions


def package_version(package: str) -> str | None:
    """The version of an installed package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str:
    """The version of NVIDIA's driver, from the kernel or by its own tool; `unknown` where neither says."""
    with suppress(OSError):
        if match := re.search(r"Kernel Module\s+(?:for \S+\s+)?(\S+)", _NVIDIA_DRIVER.read_text()):
            return match[1]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return result.stdout.splitlines()[0].strip()
    return "unknown"


def source_commit() -> str | None:
    """The commit of the source checkout lorascope runs from, if it is one."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def now() -> str:
    """The time in UTC to the second, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
