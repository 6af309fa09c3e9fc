"""Which arms share a pass, and how many passes run side by side. A plan is kept, so that a resumed run has
the same groups.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorascope.arms import Arm
from lorascope.errors import StorageError
from lorascope.machine.workers import num_cores, threads_per_worker
from lorascope.schema import StudyConfig
from lorascope.shapes import Shape
from lorascope.store import read_table, write_json

# an arm's share of a step: 113 ms alone, 78 of 2, 68 of 4, 67 of 8 (docs/performance.md): more gain nothing
MAX_STACKED_CPU = 4
TRAIN_TO_FORWARD_FLOPS = (
    2.17  # forward, and backward to activations and adapters, over forward; counted on SD v1.5 at rank 16
)
# of a worker: two arms in a pass of two threads are as fast as two passes of one thread; four are slower
_LEAST_ARMS_CPU = 2
# what a pass costs beside its arms, in arms: less than the 0.7 by those figures, so that no worker is left
# without work
_PASS = 0.2
# what a worker must have to do: its start takes as long as some 2e11 on one core
_LEAST_FLOPS = {"cpu": 5e11, "cuda": 2e15}

_PLAN: Shape = {  # of groups.json
    "inputs": str,
    "workers": int,
    "groups": [{"arms": [str], "gradient_checkpointing": bool}],
}


@dataclass(frozen=True)
class ArmGroup:
    """Arms that are trained in one pass; all have one batch size and one number of epochs."""

    arms: tuple[Arm, ...]
    gradient_checkpointing: bool = False  # turned on for an arm that does not fit into memory without

    @property
    def names(self) -> list[str]:
        """The names of the arms."""
        return [arm.name for arm in self.arms]

    @property
    def label(self) -> str:
        """The group in a word or two."""
        return self.arms[0].name + (f" +{len(self.arms) - 1}" if len(self.arms) > 1 else "")

    @property
    def key(self) -> str:
        """What its checkpoint is called; no group made by halving has the same."""
        return f"{self.arms[0].name}-{len(self.arms)}"

    def halves(self) -> "list[ArmGroup]":
        """The group as two; there must be two arms."""
        middle = (len(self.arms) + 1) // 2
        return [replace(self, arms=self.arms[:middle]), replace(self, arms=self.arms[middle:])]


@dataclass(frozen=True)
class Packing:
    """All groups of a study, and how many are trained side by side."""

    groups: tuple[ArmGroup, ...]
    num_workers: int

    def split(self, group: ArmGroup, parts: Sequence[ArmGroup]) -> "Packing":
        """The plan with `parts` in the place of `group`."""
        groups = [item for known in self.groups for item in (parts if known == group else [known])]
        return replace(self, groups=tuple(groups))

    def save(self, path: Path, inputs: str) -> None:
        """Write the plan for training of the inputs with this digest."""
        groups = [
            {"arms": group.names, "gradient_checkpointing": group.gradient_checkpointing}
            for group in self.groups
        ]
        write_json(path, {"inputs": inputs, "workers": self.num_workers, "groups": groups})

    @classmethod
    def load(cls, path: Path, inputs: str, arms: Sequence[Arm]) -> "Packing | None":
        """The plan at `path`; None if there is none for these inputs. Raises `StorageError` if it is
        damaged.
        """
        if not path.exists():
            return None
        known = read_table(path, _PLAN)
        if known["inputs"] != inputs:
            return None
        if reason := _fault(known, arms):
            raise StorageError(f"{path}: damaged ({reason}): delete it and run the same command again")
        by_name = {arm.name: arm for arm in arms}
        groups = [
            ArmGroup(tuple(by_name[name] for name in group["arms"]), group["gradient_checkpointing"])
            for group in known["groups"]
        ]
        return cls(tuple(groups), known["workers"])


def _fault(known: Mapping[str, Any], arms: Sequence[Arm]) -> str | None:
    """What is wrong with a kept plan, of the right shape, for these arms."""
    groups, workers = known["groups"], known["workers"]
    if not 1 <= workers <= len(groups):
        return f"`workers` is {workers}, must be from 1 to {len(groups)}, the number of groups"
    names = [name for group in groups for name in group["arms"]]
    if sorted(names) != sorted(arm.name for arm in arms) or not all(group["arms"] for group in groups):
        return "it does not hold every arm of this study once"
    kinds = {arm.name: _alike(arm) for arm in arms}
    if any(len({kinds[name] for name in group["arms"]}) > 1 for group in groups):
        return "arms of several batch sizes, numbers of epochs or kinds share a group"
    return None


def way_of(arm: Arm) -> tuple[str, bool, bool]:
    """How an arm's step is computed: magnitudes and anchors would cost those beside it that have none."""
    return arm.family, arm.kind == "dora", arm.is_anchored


def _alike(arm: Arm) -> tuple[Any, ...]:
    """What arms of a group have in common."""
    return arm.batch_size, arm.epochs, way_of(arm)


def describe_passes(passes: Sequence[Sequence[str]], num_workers: int) -> list[str]:
    """A line for each pass with its arms, and where there are several, one that says how many run side by
    side.
    """
    if len(passes) == 1:
        return [f"{', '.join(passes[0])} in one pass" if len(passes[0]) > 1 else f"{passes[0][0]} alone"]
    beside = (
        f"{num_workers} side by side, each in a process of its own"
        if num_workers > 1
        else "one after another"
    )
    return [
        *(f"pass {number}: {', '.join(names)}" for number, names in enumerate(passes, 1)),
        f"{len(passes)} passes, {beside}",
    ]


def most_workers(
    config: StudyConfig, device_type: str, num_gpus: int, forward_flops: float, num_pictures: int
) -> int:
    """How many groups may be trained side by side; 1 trains all in the present process.

    That is `workers`, or one a GPU (always on an Apple one), or one a core and pair of arms, but no more than
    there are arms and, unless `workers` is given, no more than have work enough to be worth their start:
    `forward_flops` of the U-Net for a picture, `num_pictures` in an epoch.
    """
    arms = config.expand_arms()
    if device_type == "mps":
        return 1
    if device_type == "cuda":
        most = min(config.workers or num_gpus, num_gpus)
    else:
        most = config.workers or max(1, num_cores() // (threads_per_worker(num_cores())))
    if config.workers is None:
        most = most if device_type == "cuda" else min(most, len(arms) // _LEAST_ARMS_CPU)
        flops = TRAIN_TO_FORWARD_FLOPS * forward_flops * num_pictures * sum(arm.epochs for arm in arms)
        most = min(most, int(flops / _LEAST_FLOPS[device_type]))
    return max(1, min(most, len(arms)))


def pack_arms(
    config: StudyConfig, device_type: str, num_workers: int, fits: Callable[[Sequence[Arm], int], bool]
) -> Packing:
    """The groups of a study for at most `num_workers` side by side.

    `fits(arms, num_workers)` says whether one of so many passes side by side has the memory for these arms.
    There are fewer workers where the heaviest arm would not fit beside the others.
    """
    arms = config.expand_arms()
    limit = config.train.max_stacked_arms or (MAX_STACKED_CPU if device_type == "cpu" else len(arms))
    heaviest = max(arms, key=lambda arm: (arm.batch_size, arm.rank))
    num_workers = next((number for number in range(num_workers, 1, -1) if fits([heaviest], number)), 1)
    groups = plan_groups(arms, num_workers, limit, lambda group: fits(group, num_workers))
    return Packing(tuple(map(ArmGroup, groups)), min(num_workers, len(groups)))


def plan_groups(
    arms: Sequence[Arm], num_workers: int, max_stacked: int, fits: Callable[[Sequence[Arm]], bool]
) -> list[tuple[Arm, ...]]:
    """Arms in groups of one batch size, number of epochs and way to compute, for the shortest time on so many
    workers; the longest group first.

    Arms next to each other in rank stand together, so that little is padded, and groups of one kind are of
    equal size. Of several ways that take the same time the one with the fewest groups is taken. A group holds
    at most `max_stacked` arms and fits; an arm that fits nowhere is a group of its own.
    """
    kinds: dict[tuple[Any, ...], list[Arm]] = {}
    for arm in sorted(arms, key=lambda arm: arm.rank):
        kinds.setdefault(_alike(arm), []).append(arm)
    cuts = [
        [(_mean_cost(cut), cut) for cut in _possible_cuts(kind, max_stacked, fits)] for kind in kinds.values()
    ]
    plans = []
    for limit in {
        cost for possible in cuts for cost, _ in possible
    }:  # if groups may not take longer than this on average
        chosen = [next((cut for cost, cut in possible if cost <= limit), None) for possible in cuts]
        if None not in chosen:
            plans.append([group for cut in chosen for group in cut or ()])
    best = min(plans, key=lambda groups: (_time(groups, num_workers), len(groups)))
    return sorted(best, key=_cost, reverse=True)


def _possible_cuts(
    kind: Sequence[Arm], max_stacked: int, fits: Callable[[Sequence[Arm]], bool]
) -> list[list[tuple[Arm, ...]]]:
    """Arms cut into ever more groups of near equal size, from the fewest that fit."""
    for fewest in range(math.ceil(len(kind) / max_stacked), len(kind) + 1):
        if all(len(group) == 1 or fits(group) for group in reversed(_cut(kind, fewest))):
            break
    return [_cut(kind, count) for count in range(fewest, len(kind) + 1)]


def _cut(kind: Sequence[Arm], count: int) -> list[tuple[Arm, ...]]:
    """So many runs of arms, the longer ones first."""
    size, longer = divmod(len(kind), count)
    ends = [size * number + min(number, longer) for number in range(count + 1)]
    return [tuple(kind[start:end]) for start, end in itertools.pairwise(ends)]


def _cost(group: Sequence[Arm]) -> float:
    """Time of a pass, in epochs of an arm."""
    return round(group[0].epochs * (len(group) + _PASS), 6)


def _mean_cost(groups: Sequence[Sequence[Arm]]) -> float:
    return round(sum(map(_cost, groups)) / len(groups), 6)


def _time(groups: Sequence[Sequence[Arm]], num_workers: int) -> float:
    """When the last of the groups ends, if each worker takes the longest that is left."""
    ends = [0.0] * num_workers
    for cost in sorted(map(_cost, groups), reverse=True):
        heapq.heapreplace(ends, ends[0] + cost)
    return round(max(ends), 6)
