"""The benchmark's entries: what each does, which the table has, and which are chosen."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from lorascope.arms import Kind
from lorascope.base.attention import KERNELS
from lorascope.bench.peers import Recipe
from lorascope.errors import ConfigError
from lorascope.machine.fast_paths import ALL_PATHS, FastPaths
from lorascope.sections import BaseSection, TrainSection

NUM_PICTURES = 32
_RANKS = (16, 64)


@dataclass(frozen=True)
class Entry:
    """One row of the table: a way to train `ranks`, one adapter each, in one pass."""

    name: str
    label: str
    kind: Literal["reference", "peft", "kohya", "torch", "ours"]
    ranks: tuple[int, ...]
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    recipe: Recipe | None = None  # of a PEFT entry
    tolerance: Literal["fp32", "bf16", "bf16 adapters"] = "fp32"  # of the gate
    num_processes: int = 1  # side by side, each with its share of the threads
    channels_last: bool = False
    best_attention: bool = False
    cuda_graph: bool = False
    compiled: bool = False
    max_grad_norm: float = 1.0
    adapter: Kind = "lora"
    barred: tuple[str, ...] = ()  # what it would use if that were right on this device

    @property
    def key(self) -> str:
        """What tells it from all others: `P4-r16`, `O6x2-r16+r64`; full fine-tuning has no rank."""
        if self.adapter == "full":
            return self.name
        return f"{self.name}-{'+'.join(f'r{rank}' for rank in dict.fromkeys(self.ranks))}"

    def within(self, fast_paths: FastPaths) -> "Entry":
        """The same without what is barred; peers keep what they use, right or wrong: the gate judges it."""
        if self.kind != "ours":
            return self
        kernels = KERNELS if self.best_attention else ("sdpa",)
        used = {f"attention {name}": name not in fast_paths.barred_kernels for name in kernels}
        used |= {"channels_last": fast_paths.channels_last} if self.channels_last else {}
        used |= {"CUDA graph": fast_paths.recorded_step} if self.cuda_graph else {}
        return replace(
            self,
            channels_last=self.channels_last and fast_paths.channels_last,
            cuda_graph=self.cuda_graph and fast_paths.recorded_step,
            barred=tuple(name for name, is_right in used.items() if not is_right),
        )

    def section(self, batch_size: int) -> TrainSection:
        """The settings of its training, with steps enough for any benchmark."""
        return TrainSection(
            epochs=20_000 * batch_size // NUM_PICTURES,
            batch_size=batch_size,
            max_grad_norm=self.max_grad_norm,
            cuda_graph=self.cuda_graph,
            compile=self.compiled,
        )


@dataclass(frozen=True)
class Conditions:
    """What all entries of a benchmark share."""

    base: str  # `pocket`, `sd15` (random weights) or a folder
    resolution_px: int
    batch_size: int
    device: str  # `cpu` or `cuda:0`
    num_threads: int
    peers_dir: str  # with kohya's modules
    fast_paths: FastPaths = ALL_PATHS  # what our own entries may use

    def base_section(self, folder: Path) -> BaseSection:
        """Where the base lies: in the work folder, if it was made at random."""
        kept = folder / "base"
        return BaseSection(model=str(kept) if kept.is_dir() else self.base)


def threads_of(entry: Entry, conditions: Conditions) -> int:
    """CPU threads of each of an entry's processes."""
    return max(1, conditions.num_threads // entry.num_processes)


def plan_entries(base: str, device: torch.device, quick: bool) -> list[Entry]:
    """The entries of the table: peers P1 to P4, ours O1 to O7 and kinds of adapter K1 to K3 at ranks 16 and
    64, full fine-tuning K4 and K5; the quick ones are at rank 16, without kinds on a CPU.
    """
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
    if not quick:
        entries += _kinds(next(entry for entry in entries if entry.name == "O1"), cached)
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
        *_kinds(graph, cached),
    ]


def _kinds(lora: Entry, recipe: Recipe) -> list[Entry]:
    """Other kinds of adapter under the conditions of `lora`, PEFT's DoRA, and once full fine-tuning, ours and
    a plain loop's.
    """
    full = replace(lora, name="K4", label="full fine-tuning, ours", adapter="full")
    plain = replace(
        full, name="K5", label="full fine-tuning, plain torch", kind="torch", best_attention=False
    )
    return [
        replace(lora, name="K1", label="T-LoRA, ours", adapter="tlora"),
        replace(lora, name="K2", label="DoRA, ours", adapter="dora"),
        Entry(
            "K3",
            "DoRA, PEFT, cached",
            "peft",
            lora.ranks,
            lora.precision,
            recipe,
            lora.tolerance,
            adapter="dora",
        ),
        *([full, replace(plain, cuda_graph=False)] if lora.ranks == _RANKS[:1] else []),
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
