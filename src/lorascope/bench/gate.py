"""The gate: an entry's first steps against those of a plain fp32 reference."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from lorascope.arms import Kind
from lorascope.bench.entries import Conditions, Entry
from lorascope.bench.entry import Lane, Trajectory

NUM_GATE_STEPS = 20
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
            if name.endswith(".down"):
                rank_cut = rank_cut[: end.shape[1]]
            elif name.endswith(".up"):
                rank_cut = rank_cut[:, : end.shape[2]]
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


def work_of(rank: int, kind: Kind) -> str:
    """What an adapter's step is counted as: `full`, or its rank, such as `r16`."""
    return "full" if kind == "full" else f"r{rank}"


@dataclass
class References:
    """The reference's first steps by (rank, clipping, kind of adapter), FLOPs of a step of an adapter by its
    rank and of full fine-tuning, and the device's FLOP/s by dtype.
    """

    steps: dict[tuple[int, float, Kind], Trajectory] = field(default_factory=dict)
    start: dict[tuple[int, Kind], dict[str, torch.Tensor]] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)  # as `work_of` names them
    limit: dict[str, float] = field(default_factory=dict)

    def run(self, entries: Iterable[Entry], conditions: Conditions, folder: Path) -> None:
        """Take the steps that `entries` will be held against."""
        wanted = dict.fromkeys(
            (rank, entry.max_grad_norm, entry.adapter) for entry in entries for rank in entry.ranks
        )
        plain = Entry("R", "plain reference", "reference", ())
        # LoRA's first: its FLOPs are told of other kinds of its rank too
        for rank, norm, kind in sorted(
            wanted, key=lambda item: item[2] != "lora"
        ):  # one after another: each holds the base in fp32
            reference = replace(plain, ranks=(rank,), max_grad_norm=norm, adapter=kind)
            lane = Lane(reference, conditions, folder)
            with closing(lane):
                if not self.limit:
                    self.limit = {dtype: lane.ask("matmul", dtype) for dtype in ("float32", "bfloat16")}
                lane.ask("build")
                if (rank, kind) not in self.start:
                    self.start[rank, kind] = lane.trajectory(0).weights
                self.steps[rank, norm, kind] = lane.trajectory(NUM_GATE_STEPS)
                if work_of(rank, kind) not in self.flops:
                    self.flops[work_of(rank, kind)] = lane.ask("flops")

    def check(self, entry: Entry, seen: Trajectory) -> dict[str, float]:
        """The entry's errors."""
        return compare(
            [self.steps[rank, entry.max_grad_norm, entry.adapter] for rank in entry.ranks],
            [self.start[rank, entry.adapter] for rank in entry.ranks],
            seen,
        )
