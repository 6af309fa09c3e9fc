"""The study to run next: a file that would decide what is open, with the reason for each thing in it."""

import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tomli_w

from lorascope.arms import Arm
from lorascope.diagnosis.causes import Diagnosis
from lorascope.diagnosis.record import Keep, Record
from lorascope.diagnosis.words import WORDS
from lorascope.errors import DataError
from lorascope.evaluation.prompts import load_prompts
from lorascope.evaluation.statistics import seeds_needed
from lorascope.schema import StudyConfig

# With one run of each setting nothing is known of their spread; three give a first look at it.
_FIRST_SEEDS = 3
_MAX_SEEDS = 5
_MAX_SAMPLING_SEEDS = 4
_ALIKE = 0.1  # learning rates that differ by less are taken for one
_LOWER_LR = 0.5
_LEAST_STRENGTH = 0.05
_MAX_TABLES = 12
_WIDTH = 110


@dataclass(frozen=True)
class Proposal:
    """A study file as TOML with comments, and its reasons, a sentence each."""

    toml: str
    reasons: tuple[str, ...]


@dataclass
class _Plan:
    """What the next study has: tables of arms, keys by section, each with its reason."""

    seeds: tuple[int, ...]
    arms: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    why: dict[str, list[str]] = field(default_factory=lambda: {"": []})  # by section; "" is the whole study

    def add(self, arm: Arm, reason: str, lr: float | None = None, epochs: int | None = None) -> None:
        """Add a table of an arm's setting with another learning rate or number of epochs, unless one like
        it is there.
        """
        table: dict[str, Any] = {
            "rank": arm.rank,
            "alpha": arm.alpha,
            "lr": arm.lr if lr is None else float(f"{lr:.3g}"),
            "epochs": arm.epochs if epochs is None else epochs,
            "batch_size": arm.batch_size,
            **arm.options,
        }
        for other, _ in self.arms:
            same = {**other, "lr": None} == {**table, "lr": None}
            if same and abs(math.log(other["lr"] / table["lr"])) < math.log1p(_ALIKE):
                return
        if len(self.arms) == _MAX_TABLES:
            self.why[""].append(f"Left out, since {_MAX_TABLES} settings are many: {reason}")
            return
        self.arms.append((table, reason))

    def set_key(self, section: str, key: str, value: Any, reason: str) -> None:
        """Set a key of a section; the first that sets it wins."""
        keys = self.keys.setdefault(section, {})
        if key not in keys:
            keys[key] = value
            self.why.setdefault(section, []).append(f"{key} = {json.dumps(value)}: {reason}")


def propose_after(config: StudyConfig, record: Record) -> Proposal:
    """`propose` with as many prompts as the study's list holds, where that is still there."""
    num_prompts = None
    with suppress(DataError):  # a list that is gone is no fault of the next study's
        num_prompts = len(load_prompts(config.sample.prompts, config.sample.num_prompts))
    return propose(config, record, num_prompts)


def propose(config: StudyConfig, record: Record, num_prompts: int | None = None) -> Proposal:
    """The study that would decide what `record` leaves open, made from the study `config` that it is of.

    Arms of the same gain as the best one, a lower learning rate beside it, what the remedies ask for, and as
    many training seeds as show a difference of the price. alpha stays what it is, so that one thing changes.
    `num_prompts` is how many the list of prompts has in all, None where that is not known.
    """
    first = _settings(record.arms)
    seeds, why_seeds = _training_seeds(record)
    plan = _Plan(seeds)
    anchor = _anchor(record, first)
    if anchor is None:
        plan.why[""].append("No arm of this study can be used: each is changed as its diagnosis asks.")
    else:
        _add_around(plan, anchor, record.keep, first)
    for found in first:
        if anchor is None or found.signals.arm.name != anchor.signals.arm.name:
            _add_changed(plan, found)
    if not record.arms:
        for arm in config.expand_arms():
            plan.add(arm, f"{arm.name} as it was: nothing was diagnosed.")
    plan.why[""].append(why_seeds)
    for found in first:
        for change in found.remedy.changes:
            section, _, key = change.key.partition(".")
            reason = f"{found.signals.arm.name}: {change.reason}"
            if change.value is None:
                plan.why[""].append(f"By hand, {change.key}: {reason}")
            elif section != "arms":
                plan.set_key(section, key, change.value, reason)
    _draw_more(plan, config, first, num_prompts)
    reasons = [*plan.why[""], *(reason for _, reason in plan.arms)]
    reasons += [reason for section, found in plan.why.items() if section for reason in found]
    return Proposal(_as_toml(config, plan), tuple(reasons))


def _settings(diagnoses: Mapping[str, Diagnosis]) -> list[Diagnosis]:
    """A diagnosis of each setting: of its arms, which differ in the training seed alone, the first."""
    return [runs[0] for runs in _runs(diagnoses)]


def _runs(diagnoses: Mapping[str, Diagnosis]) -> list[list[Diagnosis]]:
    """The diagnoses of each setting."""
    runs: dict[Any, list[Diagnosis]] = {}
    for found in diagnoses.values():
        arm = found.signals.arm
        setting = (arm.rank, arm.alpha, arm.lr, arm.batch_size, arm.epochs, arm.manner)
        runs.setdefault(setting, []).append(found)
    return list(runs.values())


def _anchor(record: Record, first: Sequence[Diagnosis]) -> Diagnosis | None:
    """The arm that others are compared with: what is kept, else a healthy one, else one that can be used at
    some strength; of several the one with the most style there.
    """
    if record.keep is not None and record.keep.arm in record.arms:
        return record.arms[record.keep.arm]
    usable = [found for found in first if found.remedy.strength is not None]
    return max(usable, key=lambda found: (found.cause == "healthy", _style_of(found)), default=None)


def _style_of(found: Diagnosis) -> float:
    remedy = found.remedy
    if remedy.strength is None or remedy.epoch is None:
        return 0.0
    point = found.signals.at(remedy.strength, remedy.epoch)
    return 0.0 if point is None else point.style.value or 0.0


def _add_around(plan: _Plan, anchor: Diagnosis, keep: Keep | None, first: Sequence[Diagnosis]) -> None:
    """The best arm as it is, with a lower learning rate, and every other setting at its gain."""
    arm = anchor.signals.arm
    is_kept = keep is not None and keep.arm == arm.name
    strength = keep.strength if keep is not None and is_kept else anchor.remedy.strength or 1.0
    what = "what is kept" if is_kept else "the best of this study"
    plan.add(arm, f"{arm.name} as it was, {what}: what the others are compared with.")
    factor = strength if strength < 1 else _LOWER_LR
    reason = (
        f"Its learning rate times {factor:g}, about what strength {strength:g} does: is that as good at 1?"
        if strength < 1
        else f"Its learning rate times {factor:g}: is less enough?"
    )
    plan.add(arm, reason, arm.lr * factor)
    scales = {(arm.rank, arm.alpha, arm.manner)}
    for found in first:
        other = found.signals.arm
        if (other.rank, other.alpha, other.manner) in scales:
            continue
        scales.add((other.rank, other.alpha, other.manner))
        plan.add(
            other,
            f"Rank {other.rank} at the gain of {arm.name}, {arm.gain:.2g} (lr x alpha / rank x sqrt(rank)): "
            "tells the rank from the strength of the update.",
            other.lr * arm.gain / other.gain,
            arm.epochs,
        )


def _add_changed(plan: _Plan, found: Diagnosis) -> None:
    """An arm with what its diagnosis asks for; as it was where that is open, and without a fault not at
    all.
    """
    arm = found.signals.arm
    changes = {change.key: change for change in found.remedy.changes}
    lr, epochs = changes.get("arms.lr"), changes.get("arms.epochs")
    asked = [change.reason for change in (lr, epochs) if change is not None]
    if asked:
        plan.add(
            arm,
            f"{arm.name}, {WORDS[found.cause]}. {' '.join(asked)}",
            None if lr is None or lr.value is None else float(lr.value),
            None if epochs is None or epochs.value is None else int(epochs.value),
        )
    elif found.cause != "healthy" or not plan.arms:
        plan.add(arm, f"{arm.name} as it was: {WORDS[found.cause]}.")


def _training_seeds(record: Record) -> tuple[tuple[int, ...], str]:
    """Training seeds for each arm of the next study, and why so many."""
    runs = _runs(record.arms)
    start = min((found.signals.arm.seed for found in record.arms.values()), default=0)
    kept = [[found.signals.full.retention for found in group] for group in runs]
    values = [[signal.value for signal in group if signal.value is not None] for group in kept]
    variances = [float(np.var(group, ddof=1)) for group in values if len(group) > 1]
    if not variances:
        why = (
            f"{_FIRST_SEEDS} training seeds: one run of each setting cannot tell the setting from luck, and "
            "three give a first look at how far runs differ."
        )
        return _from(start, _FIRST_SEEDS), why
    seed_std = math.sqrt(float(np.mean(variances)))
    first = next(signal for group in kept for signal in group if signal.is_measured)
    effect = record.thresholds.prompt_loss.value
    needed = None
    if first.count and effect > 0:
        needed = seeds_needed(effect, first.std or 0.0, first.count, seed_std)
    number = min(max(needed or _MAX_SEEDS, 2), _MAX_SEEDS)
    show = (
        f"about {needed} would show a difference of {100 * effect:g} %"
        if needed
        else f"with {first.count} prompts no number would show a difference of {100 * effect:g} %"
    )
    why = (
        f"{number} training seeds: runs of one setting differ by {100 * seed_std:.1f} % of the base's prompt "
        f"fidelity (standard deviation), so {show}."
    )
    return _from(start, number), why


def _from(start: int, number: int) -> tuple[int, ...]:
    start = start if start + number < 2**63 else 0
    return tuple(range(start, start + number))


def _draw_more(plan: _Plan, config: StudyConfig, first: Iterable[Diagnosis], num_prompts: int | None) -> None:
    """More prompts, sampling seeds and strengths, and interventions that were left out, where they would
    decide.
    """
    section = config.diagnose
    found = list(first)
    open_ones = [item for item in found if item.remedy.prompts is not None]
    if open_ones:
        most = max(open_ones, key=lambda item: item.remedy.prompts or 0)
        needed, name = most.remedy.prompts or 0, most.signals.arm.name
        drawn = max(most.signals.full.retention.count, most.signals.full.style.count, 1)
        possible = needed if num_prompts is None else min(num_prompts, needed)
        reason = f"about {needed:,} prompts instead of {drawn} would decide {name}."
        if section.num_prompts is not None and possible > drawn:
            more = math.ceil(section.num_prompts * possible / drawn)
            plan.set_key("diagnose", "num_prompts", more, reason)
        num_seeds = min(math.ceil(needed / max(possible, drawn)), _MAX_SAMPLING_SEEDS)
        if num_seeds > len(section.seeds):
            seeds = list(_from(min(section.seeds), num_seeds))
            plan.set_key("diagnose", "seeds", seeds, f"the list has too few prompts: {reason}")
    stuck = [
        item
        for item in found
        if item.cause in ("cannot_tell", "diverged") and item.remedy.strength is None and item.signals.lower
    ]
    lowest = min(section.strengths)
    if stuck and lowest / 2 >= _LEAST_STRENGTH:
        name = stuck[0].signals.arm.name
        reason = f"no strength that was drawn keeps the prompts of {name} and has style."
        plan.set_key("diagnose", "strengths", sorted({lowest / 2, *section.strengths}), reason)
    unknown = [item for item in found if item.cause == "cannot_tell"]
    if unknown and not section.swap_unconditional:
        reason = "what the base's unconditional prediction brings back was lost there."
        plan.set_key("diagnose", "swap_unconditional", True, reason)


def _as_toml(config: StudyConfig, plan: _Plan) -> str:
    """The plan as a study file: what differs from the defaults, and why."""
    values, defaults = (study.model_dump(mode="json", exclude_none=True) for study in (config, StudyConfig()))
    lines = _comment("A study that would decide what the last one left open.", *plan.why[""])
    sections = {key for key, value in values.items() if isinstance(value, dict)}
    top = {
        key: value
        for key, value in values.items()
        if key not in (*sections, "arms") and value != defaults.get(key)
    }
    lines += [tomli_w.dumps({**top, "name": f"{config.name[:59]}-next"})]
    for section in (key for key in values if key in sections):
        changed = {
            key: value for key, value in values[section].items() if value != defaults[section].get(key)
        }
        changed |= plan.keys.get(section, {})
        if changed:
            lines += [*_comment(*plan.why.get(section, ())), tomli_w.dumps({section: changed})]
    for table, reason in plan.arms:
        settings = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
        lines += [*_comment(reason), "[[arms]]", *settings, f"seed = {list(plan.seeds)}", ""]
    return "\n".join(lines).rstrip() + "\n"


def _comment(*sentences: str) -> list[str]:
    return [
        line
        for sentence in sentences
        for line in textwrap.wrap(sentence, _WIDTH, initial_indent="# ", subsequent_indent="#   ")
    ]
