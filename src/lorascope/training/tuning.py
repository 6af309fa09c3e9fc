"""What is fastest here, timed once at the start of a run on its own shapes: attention kernels, precision,
memory format.

Nothing changes what is computed but by rounding. What was found is kept for the next run in
`$XDG_CACHE_HOME/lorascope/tuning.json`, and by the run itself in its manifest, so that it goes on as it
began.
"""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from lorascope.base.attention import (
    KERNELS,
    Kernel,
    Shape,
    default_kernel,
    padded_head_dims,
    set_kernels,
)
from lorascope.base.loading import DTYPES
from lorascope.console import log
from lorascope.errors import StorageError, first_line
from lorascope.machine.facts import cpu_has_bf16, device_name
from lorascope.machine.fast_paths import ALL_PATHS, FastPaths
from lorascope.machine.memory import free_cached
from lorascope.schema import StudyConfig
from lorascope.store import digest_json, read_json, user_cache_path, write_json
from lorascope.training.timing import (
    Workload,
    attention_run,
    build_workload,
    cut_to_budget,
    pass_run,
    race,
    survey,
)

_USUAL_STACK = 4  # arms in a pass, before they are packed into the memory that is free
_LEAST_FLOPS = 1e9  # of a forward pass: below, differences are noise and nothing is timed
# of another kernel than the default: the factor, and seconds in a pass over the U-Net
_LEAST_GAIN, _LEAST_GAIN_S = 1.1, 2e-4
_LEAST_GAIN_PRECISION = 1.08  # of bf16 on a CPU, which costs accuracy
_LEAST_GAIN_FORMAT = 1.03
_MAX_SCORES_BYTES = 2**28  # of one layer, for the kernel that keeps them
_MAX_REMEMBERED = 100
_MOST_S = 20.0  # on a busy machine: what was not timed by then keeps its default
# Work of a timed attention, forward: enough to be typical, little enough that the whole takes seconds.
_ATTENTION_FLOPS = {"cpu": 2e9, "cuda": 2e11}


def study_workload(config: StudyConfig, configs: Mapping[str, Mapping[str, Any]]) -> Workload:
    """What a study asks of its base."""
    arms, sample = config.expand_arms(), config.sample
    stacked = min(len(arms), config.train.max_stacked_arms or _USUAL_STACK)
    branches = 1 if sample.guidance == 1 else 2  # with and without the prompt
    return build_workload(
        configs,
        config.data.resolution_px,
        stacked * max(arm.batch_size for arm in arms),
        sample.batch_size * branches,
    )


@dataclass(frozen=True)
class Tuning:
    """How the U-Net of a run is held and computed."""

    device: str  # name of the device it was found on
    precision: str  # `fp32`, `bf16` or `fp16`
    channels_last: bool = False
    kernels: Mapping[Shape, Kernel] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what was found, a sentence each
    barred_kernels: frozenset[str] = frozenset()  # which no shape is given; no part of its JSON

    def within(self, fast_paths: FastPaths) -> "Tuning":
        """The same without what may not be used on this device."""
        barred = fast_paths.barred_kernels
        kernels = {shape: kernel for shape, kernel in self.kernels.items() if kernel.name not in barred}
        channels_last = self.channels_last and fast_paths.channels_last
        return replace(self, channels_last=channels_last, kernels=kernels, barred_kernels=barred)

    def apply(self, unet: UNet2DConditionModel) -> None:
        """Give a loaded U-Net, which is of this precision already, the memory format and the attention
        kernels.
        """
        if self.channels_last:
            unet.to(memory_format=torch.channels_last)
        set_kernels(unet, self.kernels, self.barred_kernels)

    def to_json(self) -> dict[str, Any]:
        """As plain values, for manifests."""
        kernels = [
            {**shape._asdict(), "kernel": kernel.name, "padded_to": kernel.head_dim}
            for shape, kernel in self.kernels.items()
        ]
        facts = {"device": self.device, "precision": self.precision, "channels_last": self.channels_last}
        return {**facts, "attention": kernels, "notes": list(self.notes)}

    @classmethod
    def from_json(cls, value: Any) -> "Tuning":
        """The tuning that `to_json` gave; raise `ValueError` for anything else."""
        try:
            kernels = {}
            for item in value["attention"]:
                queries, keys, heads, head_dim = (int(item[name]) for name in Shape._fields[:-1])
                shape = Shape(queries, keys, heads, head_dim, bool(item["gradients"]))
                kernels[shape] = Kernel(
                    KERNELS[KERNELS.index(item["kernel"])], item["padded_to"] and int(item["padded_to"])
                )
            if value["precision"] not in DTYPES:
                raise ValueError(f"precision {value['precision']!r}")
            notes = tuple(map(str, value["notes"]))
            return cls(str(value["device"]), value["precision"], bool(value["channels_last"]), kernels, notes)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no tuning: {first_line(error)}") from error


def tune(
    config: Mapping[str, Any],
    workload: Workload,
    device: torch.device,
    precision: str = "auto",
    kept: Mapping[str, Any] | None = None,
    fast_paths: FastPaths = ALL_PATHS,
) -> Tuning:
    """The fastest way to compute the U-Net of this configuration, timed on random weights unless it is known
    already.

    A `precision` other than `auto` is obeyed. `auto` is bf16 on a GPU that has it, else fp16; on a CPU it is
    fp32, unless it has instructions for bf16 and a training pass and a drawing pass together gain 8 %. `kept`
    is what the run folder has of an earlier call as JSON: its precision holds, and on the same device all of
    it. What `fast_paths` bars is neither timed nor taken. Where a pass takes under 1 GFLOP nothing is timed.
    Raises `BaseModelError` for a configuration that no U-Net can be built from.
    """
    name = device_name(device)
    if known := _parsed(kept, "the run folder"):
        if known.device == name:
            return known.within(fast_paths)
        precision = known.precision
    key = {
        "device": name,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "unet": digest_json(dict(config)),
        "workload": [
            *workload.latent_shape,
            workload.text_tokens,
            workload.train_batch,
            workload.sample_batch,
        ],
        "precision": precision,
    }
    if fast_paths != ALL_PATHS:
        key["barred"] = [sorted(fast_paths.barred_kernels), fast_paths.channels_last]
    found = _recall(key)
    if found is None:
        started = time.perf_counter()
        found = _measure(config, workload, device, precision, fast_paths)
        log.debug("tuning   timed in %.1f s", time.perf_counter() - started)
        free_cached(device)  # what was timed is no memory of the run
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        _remember(key, found)
    return found.within(fast_paths)


# -- what is timed -------------------------------------------------------------------------------------------


def _measure(
    config: Mapping[str, Any],
    workload: Workload,
    device: torch.device,
    precision: str,
    fast_paths: FastPaths = ALL_PATHS,
) -> Tuning:
    """Time everything, or as much as `_MOST_S` allows."""
    until, barred = time.perf_counter() + _MOST_S, fast_paths.barred_kernels
    name, precisions = device_name(device), precisions_on(device) if precision == "auto" else [precision]
    flops, layers = survey(config, workload)
    if flops < _LEAST_FLOPS:
        return Tuning(name, precisions[0], notes=(f"nothing timed: a pass takes {flops / 1e9:.2g} GFLOP",))
    if device.type == "mps":
        return Tuning(name, precisions[0], notes=("nothing timed on an Apple GPU",))
    if device.type == "cuda":
        channels_last, told = False, "channels_last: not tried, it is wrong on this device"
        if fast_paths.channels_last:
            channels_last, told = _tune_format(config, workload, flops, precisions[0], device)
        kernels, note = _tune_attention(layers, workload, DTYPES[precisions[0]], device, until, barred)
        return Tuning(name, precisions[0], channels_last, kernels, (told, note))
    by_option = {
        option: _tune_attention(layers, workload, DTYPES[option], device, until, barred)
        for option in precisions
    }
    option, notes = precisions[0], []
    if len(precisions) > 1 and time.perf_counter() <= until:
        variants = [Tuning(name, choice, kernels=kernels) for choice, (kernels, _) in by_option.items()]
        gain = _gain(config, workload, flops, variants, device)
        option = precisions[1] if gain >= _LEAST_GAIN_PRECISION else option
        notes.append(_told(f"{precisions[1]}", f"{precisions[0]}", gain, option == precisions[1]))
    kernels, note = by_option[option]
    return Tuning(name, option, False, kernels, (*notes, note))


def _tune_format(
    config: Mapping[str, Any], workload: Workload, flops: float, precision: str, device: torch.device
) -> tuple[bool, str]:
    """Whether a GPU's convolutions are held in `channels_last`, as they are unless the usual format is
    clearly faster, and a sentence.
    """
    variants = [Tuning(device_name(device), precision, last) for last in (True, False)]
    gain = _gain(config, workload, flops, variants, device)
    is_usual = gain >= _LEAST_GAIN_FORMAT
    return not is_usual, _told("the usual format", "channels_last", gain, is_usual)


def _gain(
    config: Mapping[str, Any],
    workload: Workload,
    flops: float,
    variants: Sequence[Tuning],
    device: torch.device,
) -> float:
    """The speed of a pass under the second of two tunings over the first's, 0 where one was not timed."""
    cut, shape = cut_to_budget(config, workload, flops, device)
    runs = {}
    for number, variant in enumerate(variants):
        try:
            runs[number] = pass_run(
                cut, shape, workload.text_tokens, variant.precision, variant.apply, device
            )
        except RuntimeError as error:  # no memory for it
            log.debug("tuning   %s: %s", variant, first_line(error))
    times = race(runs, device)
    return times[0] / times[1] if len(times) == 2 else 0.0


def _told(what: str, reference: str, gain: float, is_taken: bool) -> str:
    if not gain:
        return f"{what}: could not be timed"
    return f"{what}: {gain:.2f}x the speed of {reference}, {'taken' if is_taken else 'not taken'}"


def precisions_on(device: torch.device) -> list[str]:
    """The precisions that `auto` chooses from, the default first."""
    if device.type == "cuda":
        return ["bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"]
    return ["fp32", "bf16"] if device.type == "cpu" and cpu_has_bf16() else ["fp32"]


def _tune_attention(
    layers: Mapping[Shape, int],
    workload: Workload,
    dtype: torch.dtype,
    device: torch.device,
    until: float,
    barred: Collection[str] = (),
) -> tuple[dict[Shape, Kernel], str]:
    """The fastest kernel for every shape, with and without gradients, and a sentence on them."""
    kernels, gains = {}, []
    for gradients in (True, False):
        for layer_shape, count in layers.items():
            shape = layer_shape._replace(gradients=gradients)
            batch = workload.train_batch if gradients else workload.sample_batch
            candidates = [
                kernel for kernel in _candidates(shape, batch, dtype, device) if kernel.name not in barred
            ]
            if not candidates or "sdpa" in barred:  # with torch's choice barred, what exists is not known
                candidates = [Kernel("plain"), *candidates]
            kernels[shape], gain = candidates[0], 0.0
            if len(candidates) > 1 and time.perf_counter() < until:
                kernels[shape], gain = _fastest_kernel(candidates, shape, count, batch, dtype, device)
            if kernels[shape] != Kernel():
                what = (
                    f"{shape.queries}x{shape.keys} heads "
                    f"{shape.heads}x{shape.head_dim}{'' if gradients else ' without gradients'}"
                )
                gains.append(f"{what}: {kernels[shape]}" + (f", {gain:.2f}x torch's choice" if gain else ""))
    more = [f"and {len(gains) - 3} more shapes"] if len(gains) > 3 else []
    return kernels, "attention: " + ("; ".join([*gains[:3], *more]) or "torch's choice")


def _fastest_kernel(
    candidates: Sequence[Kernel],
    shape: Shape,
    num_layers: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Kernel, float]:
    """The first of the candidates, or another that is clearly faster, and its speed over torch's choice, 0 if
    that was not timed.
    """
    flops = 4 * shape.queries * shape.keys * shape.head_dim  # of a head of a sample
    timed = max(1, min(batch * shape.heads, int(_ATTENTION_FLOPS[device.type] / flops)))
    samples, heads = max(1, timed // shape.heads), min(shape.heads, timed)
    # of the timed call in a pass over the U-Net
    passes = num_layers * batch * shape.heads / (samples * heads)
    runs = {kernel: attention_run(kernel, shape, samples, heads, dtype, device) for kernel in candidates}
    times = race(runs, device)
    default = candidates[0]
    if not times:
        return default, 0.0
    best = min(times, key=times.__getitem__)
    if default in times:
        gain_s = (times[default] - times[best]) * passes
        best = best if times[default] >= _LEAST_GAIN * times[best] and gain_s >= _LEAST_GAIN_S else default
    return best, times[Kernel()] / times[best] if Kernel() in times else 0.0


def _candidates(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Kernel]:
    """Kernels to try, the default first; whether they exist for this shape shows when they are called."""
    if device.type == "cuda":
        yield Kernel()
        for name in ("flash", "efficient", "cudnn"):
            yield Kernel(name)
            yield from (Kernel(name, head_dim) for head_dim in padded_head_dims(shape.head_dim))
        return
    kernels = [Kernel(), Kernel("plain")]
    if batch * shape.heads * shape.queries * shape.keys * dtype.itemsize > _MAX_SCORES_BYTES:
        kernels = [Kernel()]
    yield from sorted(
        kernels, key=lambda kernel: kernel != default_kernel(device.type, dtype, shape.gradients)
    )


# -- what is remembered --------------------------------------------------------------------------------------


def tuning_path() -> Path:
    """`$XDG_CACHE_HOME/lorascope/tuning.json`, or `~/.cache/lorascope/tuning.json`."""
    return user_cache_path("tuning.json")


def _recall(key: Mapping[str, Any]) -> Tuning | None:
    entry = _entries().get(digest_json(key))
    return _parsed(entry, str(tuning_path()))


def _remember(key: Mapping[str, Any], tuning: Tuning) -> None:
    """Keep it for the next run; a cache that cannot be written is no reason to stop."""
    entries = {**_entries(), digest_json(key): {"key": key, **tuning.to_json()}}
    try:
        write_json(tuning_path(), dict(list(entries.items())[-_MAX_REMEMBERED:]))
    except StorageError as error:
        log.debug("tuning   not remembered: %s", error)


def _entries() -> dict[str, Any]:
    try:
        entries = read_json(tuning_path()) if tuning_path().exists() else {}
    except (StorageError, RecursionError) as error:
        log.debug("tuning   %s", first_line(error))
        return {}
    return entries if isinstance(entries, dict) else {}


def _parsed(value: Any, place: str) -> Tuning | None:
    """What stands in JSON; None where it is absent or, with a line in the log, damaged."""
    try:
        return None if value is None else Tuning.from_json(value)
    except ValueError as error:
        log.debug("tuning   %s: %s", place, error)
        return None
