"""Thresholds learnt from planted faults, and what the decision makes of arms that they were not learnt from.

One threshold at a time: the value that best splits the arms that have its fault from all others, in the
middle of the gap between the two. Half of the training seeds is learnt from, the other half judged.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.faults.arms import BY_NAME, FILE_ARM, Planned
from benchmarks.faults.files import FileFinding, read_findings

from lorascope.arms import Kind as AdapterKind
from lorascope.diagnosis.causes import Diagnosis, decide_all
from lorascope.diagnosis.record import read_diagnosis
from lorascope.diagnosis.signals import ArmSignals
from lorascope.diagnosis.thresholds import Thresholds
from lorascope.diagnosis.words import CAUSES, Cause
from lorascope.run_folder import RunDir

Found = Cause | Literal["refused"]
COLUMNS: tuple[Found, ...] = (*CAUSES, "refused")
SOURCE = "learnt from faults planted on the pocket base, half of the training seeds held back"
# A signal that splits the arms worse than this leaves its threshold as it was; 0.5 is chance.
LEAST_BALANCE = 0.75
_LEAST_COUNT = 2  # arms with the fault, and without it


@dataclass(frozen=True)
class Labelled:
    """An arm with what was planted and what was measured."""

    study: str
    seed: int
    label: Cause
    signals: ArmSignals

    @property
    def name(self) -> str:
        """The arm's name."""
        return self.signals.arm.name

    @property
    def adapter(self) -> AdapterKind:
        """The kind of its adapter."""
        return self.signals.arm.kind


def collect(out: Path, studies: Iterable[Planned]) -> list[Labelled]:
    """The arms of all finished studies below `out`; raises `StorageError` for one that is not."""
    found = []
    for planned in studies:
        for name, diagnosis in read_diagnosis(RunDir(out / planned.name)).arms.items():
            found.append(Labelled(planned.name, planned.seed, BY_NAME[name].label, diagnosis.signals))
    return found


def collect_files(out: Path, seeds: Iterable[int]) -> list[FileFinding]:
    """What the checks said of file faults, of all seeds."""
    return [finding for seed in seeds for finding in read_findings(files_path(out, seed))]


def files_path(out: Path, seed: int) -> Path:
    """Where the findings on file faults of a seed lie."""
    return out / f"files-s{seed}.json"


def split_seeds(seeds: Sequence[int]) -> tuple[list[int], list[int]]:
    """Seeds to learn from, and seeds to judge: every second one."""
    return list(seeds[::2]), list(seeds[1::2])


@dataclass(frozen=True)
class Rule:
    """How a threshold is used: the number that is held against it, and the faults that lie beyond it.

    `above` says on which side.
    """

    measure: Callable[[ArmSignals], float | None]
    labels: tuple[Cause, ...]
    above: bool


def _recovered(signals: ArmSignals) -> float | None:
    """The share of the lost prompt fidelity that the base's unconditional prediction brings back, where it
    was lost by more than a tenth.
    """
    kept, back = signals.full.retention.value, signals.unconditional_recovery
    if kept is None or back.value is None:
        return None
    lost = 1 - kept if back.control is None else back.control
    return None if kept > 0.9 or lost < 0.1 else back.value / lost


# Each is held against the same number as in the decision. What is not here is given, not learnt: the price
# in prompts, the p-value, and black pictures, of which no fault here is sure to make any.
RULES: Mapping[str, Rule] = {
    "intruder_share": Rule(lambda signals: signals.intruder_share.value, ("diverged",), True),
    "guidance_cosine": Rule(lambda signals: signals.guidance_cosine.value, ("diverged",), False),
    "train_gap": Rule(lambda signals: signals.train_gap.value, ("overfit",), True),
    "member_auc": Rule(lambda signals: signals.member_auc.value, ("overfit",), True),
    "copying_excess": Rule(lambda signals: signals.copying_excess.value, ("overfit",), True),
    "gain_ratio": Rule(lambda signals: signals.gain_ratio.high, ("unconditional_drift",), False),
    "recovered": Rule(_recovered, ("unconditional_drift",), True),
}


@dataclass(frozen=True)
class Cut:
    """Where a signal splits arms with a fault from those without.

    `value` is the middle of the gap from `low` to `high`; the shares are of arms that lie on their side of
    it. Where nothing was learnt `value` is None, and `reason` says why.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    with_fault: float | None = None
    without_fault: float | None = None
    num_with: int = 0
    num_without: int = 0
    reason: str | None = None


def best_cut(faulty: Sequence[float], sound: Sequence[float], above: bool) -> Cut:
    """The cut with the highest mean of the two shares that lie on their side; of equal ones that in the
    widest gap.

    Values are finite. `above` says that faulty ones lie above it.
    """
    counts = (len(faulty), len(sound))
    if min(counts) < _LEAST_COUNT:
        reason = f"{counts[0]} arms with the fault and {counts[1]} without it were measured: too few"
        return Cut(None, num_with=counts[0], num_without=counts[1], reason=reason)
    values = sorted({*faulty, *sound})
    cuts = []
    for low, high in itertools.pairwise(values):
        middle = (low + high) / 2
        beyond = [sum((value > middle) == above for value in group) for group in (faulty, sound)]
        shares = beyond[0] / counts[0], 1 - beyond[1] / counts[1]
        cuts.append((sum(shares) / 2, high - low, Cut(middle, low, high, *shares, *counts)))
    if not cuts:
        return Cut(None, num_with=counts[0], num_without=counts[1], reason="all values are the same")
    balance, _, cut = max(cuts, key=lambda item: item[:2])
    if balance < LEAST_BALANCE:
        reason = f"splits {100 * balance:.0f} % of the arms rightly at best, either kind counted alike"
        return Cut(None, cut.low, cut.high, cut.with_fault, cut.without_fault, *counts, reason)
    return cut


def learn_thresholds(arms: Iterable[Labelled]) -> dict[str, Cut]:
    """A cut for each threshold in `RULES`."""
    arms, found = list(arms), {}
    for key, rule in RULES.items():
        groups: dict[bool, list[float]] = {True: [], False: []}
        for arm in arms:
            value = rule.measure(arm.signals)
            if value is not None and math.isfinite(value):
                groups[arm.label in rule.labels].append(value)
        found[key] = best_cut(groups[True], groups[False], rule.above)
    return found


def learnt(cuts: Mapping[str, Cut]) -> Thresholds:
    """The thresholds with what was learnt in place of the default."""
    values = {key: cut.value for key, cut in cuts.items() if cut.value is not None}
    return Thresholds().with_values(values, SOURCE)


@dataclass(frozen=True)
class Judged:
    """What was found of one planted arm or file, and the first sentences that speak for it."""

    name: str
    seed: int
    label: Cause
    found: Found
    contributing: tuple[Cause, ...] = ()
    evidence: tuple[str, ...] = ()


def judge(arms: Iterable[Labelled], thresholds: Thresholds) -> list[Judged]:
    """What the decision makes of the arms, study by study."""
    by_study: dict[str, list[Labelled]] = {}
    for arm in arms:
        by_study.setdefault(arm.study, []).append(arm)
    judged = []
    for members in by_study.values():
        diagnoses = decide_all([arm.signals for arm in members], thresholds)
        judged += [_judged(arm, diagnoses[arm.name]) for arm in members]
    return judged


def _judged(arm: Labelled, diagnosis: Diagnosis) -> Judged:
    evidence = diagnosis.evidence_for[:2]
    return Judged(arm.name, arm.seed, arm.label, diagnosis.cause, diagnosis.contributing, evidence)


def judge_files(
    findings: Iterable[FileFinding], arms: Iterable[Labelled], thresholds: Thresholds
) -> list[Judged]:
    """What the decision makes of an arm whose merged file has a fault; `refused` where none is drawn."""
    own = {arm.seed: arm.signals for arm in arms if arm.name == FILE_ARM}
    return [
        Judged(
            f"file-{finding.fault}",
            finding.seed,
            "file_fault",
            finding.found(own[finding.seed], thresholds),
            evidence=() if finding.merge_line is None else (finding.merge_line,),
        )
        for finding in findings
        if finding.seed in own
    ]


@dataclass(frozen=True)
class Matrix:
    """How often what was planted was found as what, and what that comes to.

    A file that is refused by name counts as right. `healthy_called_faulty` are the healthy arms that were
    given any cause but healthy and cannot tell.
    """

    counts: Mapping[Cause, Mapping[Found, int]]
    num_judged: int
    num_right: int
    num_undecided: int
    num_healthy: int
    healthy_called_faulty: int
    confused: tuple[Judged, ...] = field(default=())

    @property
    def right(self) -> float | None:
        """The share of arms that were given the cause that was planted."""
        return self.num_right / self.num_judged if self.num_judged else None


def confusion(judged: Sequence[Judged]) -> Matrix:
    """The matrix of these judgements; `confused` are those with another cause, cannot tell left out."""
    counts = {
        label: dict(Counter(item.found for item in judged if item.label == label))
        for label in CAUSES
        if any(item.label == label for item in judged)
    }
    healthy = [item for item in judged if item.label == "healthy"]
    wrong = [item for item in judged if not _is_right(item)]
    return Matrix(
        counts=counts,
        num_judged=len(judged),
        num_right=len(judged) - len(wrong),
        num_undecided=sum(item.found == "cannot_tell" for item in judged),
        num_healthy=len(healthy),
        healthy_called_faulty=sum(item.found not in ("healthy", "cannot_tell") for item in healthy),
        confused=tuple(item for item in wrong if item.found != "cannot_tell"),
    )


def _is_right(item: Judged) -> bool:
    return item.found == item.label or (item.found == "refused" and item.label == "file_fault")
