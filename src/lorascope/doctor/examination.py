"""An examination of the device at hand with a base: all checks, or the quick ones that a study makes at its
first start on a GPU.
"""

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from lorascope import __version__
from lorascope.base.configs import read_configs
from lorascope.base.loading import DTYPES, load_base
from lorascope.console import log, track
from lorascope.doctor.findings import (
    ATTENTION,
    CHANNELS_LAST,
    HALF_VAE,
    MEMORY,
    RECORDED_STEP,
    RESUME,
    STACKED_ARMS,
    WORKERS,
    Examination,
    Finding,
    recall,
    remember,
)
from lorascope.doctor.kernels import check_attention
from lorascope.doctor.resources import check_memory, check_workers
from lorascope.doctor.steps import (
    LatentShape,
    check_channels_last,
    check_recorded_step,
    check_resume,
    check_stacked_arms,
)
from lorascope.doctor.vae import check_half_vae
from lorascope.errors import first_line
from lorascope.machine.facts import device_name, driver_version, package_version
from lorascope.machine.memory import free_cached, is_out_of_memory
from lorascope.machine.threads import limited_threads
from lorascope.sections import BaseSection
from lorascope.store import digest_json
from lorascope.training.timing import build_workload, survey
from lorascope.training.tuning import precisions_on

_PACKAGES = ("diffusers", "transformers", "peft", "safetensors", "numpy")
_PASS_FLOPS = {"cpu": 1e10, "mps": 1e11, "cuda": 5e12}  # of a pass over a picture: sides are halved to it
_MAX_SIDE_PX = {"cpu": 256, "mps": 512, "cuda": 1024}  # of pictures for the VAE

Check = Callable[[], Finding | list[Finding]]


@dataclass(frozen=True)
class Subject:
    """What is examined: a base in a precision (`auto` or one of `DTYPES`), at pictures of a size (its own
    when None), on a device.
    """

    section: BaseSection
    device: torch.device
    precision: str = "auto"
    resolution_px: int | None = None

    @property
    def dtype(self) -> str:
        """The precision that the checks of a U-Net take."""
        return precisions_on(self.device)[0] if self.precision == "auto" else self.precision


def examine(subject: Subject, quick: bool = False) -> Examination:
    """Check every fast path on the device, and unless `quick` what else may be wrong with it; the result is
    kept.

    On a CPU it takes one thread: no check looks at threads, and on a busy machine several of them wait for
    each other at every small operation. Raises `BaseModelError` and `WeightsError` as `load_base` does.
    """
    device, configs, facts = subject.device, read_configs(subject.section), versions(subject.device)
    on_cpu = device.type == "cpu"
    with limited_threads(1) if on_cpu else nullcontext():
        shown, checks = _plan(subject, configs, quick)
        findings: list[Finding] = []
        with track("doctor", len(checks), "checks") as task:
            for name, check in checks.items():
                findings += _found(name, check)
                if device.type == "cuda":  # looking for garbage takes a second
                    free_cached(device)
                task.advance(1, name)
    if on_cpu:
        facts["threads"] += "; 1 during the checks"
    examination = Examination(shown, facts, tuple(findings))
    remember(examination, digest_json(configs), subject.dtype)
    return examination


def _plan(
    subject: Subject, configs: Mapping[str, Mapping[str, Any]], quick: bool
) -> tuple[str, dict[str, Check]]:
    """Load the base; what is examined, in words, and the checks by name."""
    section, device = subject.section, subject.device
    base = load_base(section, device, subject.dtype)
    side = subject.resolution_px or int(configs["unet"].get("sample_size") or 64) * base.latent_factor
    workload = build_workload(configs, side, 1, 1)
    flops, shapes = survey(configs["unet"], workload)
    levels = len(configs["unet"]["block_out_channels"])
    shape = _affordable(workload.latent_shape, flops, levels, device)
    options = precisions_on(device) if subject.precision == "auto" else [subject.precision]
    dtypes = [DTYPES[option] for option in options]
    side_px = min(side, _MAX_SIDE_PX[device.type])
    checks: dict[str, Check] = {
        ATTENTION.strip(): lambda: check_attention(shapes, dtypes, device),
        CHANNELS_LAST: lambda: check_channels_last(base, shape),
        RECORDED_STEP: lambda: check_recorded_step(base, shape),
        HALF_VAE: lambda: check_half_vae(base, side_px),
    }
    if not quick:
        checks |= {
            STACKED_ARMS: lambda: check_stacked_arms(base, shape),
            RESUME: lambda: check_resume(base, shape),
            MEMORY: lambda: check_memory(device),
            WORKERS: lambda: check_workers(torch.cuda.device_count()),
        }
    return f"{section.model}, U-Net in {subject.dtype}, latents {'x'.join(map(str, shape))}", checks


def recall_examination(subject: Subject) -> Examination | None:
    """The last examination of such models by these versions on this device; None where there is none."""
    models = digest_json(read_configs(subject.section))
    return recall(versions(subject.device), models, subject.dtype)


def recall_or_examine(subject: Subject) -> Examination:
    """The last examination of such models by these versions on this device, or a quick one where there is
    none.
    """
    if (known := recall_examination(subject)) is not None:
        return known
    log.info("doctor   first start on this device with these versions: its fast paths are checked")
    return examine(subject, quick=True)


def _found(name: str, check: Check) -> Iterator[Finding]:
    """What a check found, with its time; where it fails, that it did."""
    started = time.perf_counter()
    try:
        found = check()
    except RuntimeError as error:
        told = f"the check could not end: {first_line(error)}"
        found = Finding(name, "not checked" if is_out_of_memory(error) else "wrong", told)
    seconds = round(time.perf_counter() - started, 2)
    findings = found if isinstance(found, list) else [found]
    for finding in findings:
        yield replace(finding, seconds=seconds)


def _affordable(shape: LatentShape, flops: float, levels: int, device: torch.device) -> LatentShape:
    """Latents whose sides are halved until a pass over them is short; a U-Net halves them `levels` - 1 times,
    and the check of recorded steps halves one itself.
    """
    channels, height, width = shape
    least = 2**levels
    while flops > _PASS_FLOPS[device.type] and min(height, width) >= 2 * least:
        height, width, flops = height // 2, width // 2, flops / 4
    return channels, *(math.ceil(side / least) * least for side in (height, width))


# -- versions ------------------------------------------------------------------------------------------------


def versions(device: torch.device) -> dict[str, str]:
    """What a bug report says of the programs and the device."""
    on_gpu = device.type == "cuda"
    facts = {"lorascope": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    facts |= {package: package_version(package) or "not installed" for package in _PACKAGES}
    facts["device"] = device_name(device)
    if on_gpu:
        capability = torch.cuda.get_device_capability(device)
        facts |= {
            "CUDA": str(torch.version.cuda),
            "driver": driver_version(),
            "cuDNN": str(torch.backends.cudnn.version()),
        }
        facts |= {
            "compute capability": ".".join(map(str, capability)),
            "GPUs": str(torch.cuda.device_count()),
        }
    facts["processor"] = device_name(torch.device("cpu"))
    return facts | {"threads": str(torch.get_num_threads()), "platform": platform.platform()}
