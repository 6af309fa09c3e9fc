"""What a run folder says: everything read once, the answer in two sentences, warnings and limits.

Every number with an interval comes from `evaluation.scores`; what a stage has not written yet is absent here
and reads "not measured" in the report.
"""

import functools
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from lorascope.arms import Arm
from lorascope.config import load_study
from lorascope.data.split import describe_duplicates
from lorascope.diagnosis.nearest import Nearest, read_nearest
from lorascope.diagnosis.record import Record, read_diagnosis
from lorascope.errors import StorageError, first_line
from lorascope.evaluation.choice import Decision
from lorascope.evaluation.contrast import contrast_gains
from lorascope.evaluation.front import Front, trace_front
from lorascope.evaluation.scores import (
    ALL,
    BASE,
    PairedDifference,
    Scores,
    SummaryRow,
    paired_differences,
    read_scores,
    summary_table,
)
from lorascope.evaluation.sweep_rows import Epoch, Sweep, read_sweep
from lorascope.evaluation.verdict import HeldoutLoss, Verdict, reach_verdict, read_heldout_losses
from lorascope.run_folder import RunDir
from lorascope.schema import StudyConfig
from lorascope.store import access_errors, read_regular

MAX_DETAILED = 4  # with more arms, details are for the kept one, the runner-up and the worst
NOT_MEASURED = "not measured"
_DIAGNOSE = "diagnose this run"
_COSTS = ("run_time_s", "peak_memory_bytes", "peak_memory_kind", "parameters")  # of an arm with a file


@dataclass(frozen=True)
class Picture:
    """A sampled picture: `path` is relative to the run folder."""

    arm: str
    category: str
    index: int
    prompt: str
    seed: int
    path: str
    score: float | None


@dataclass(frozen=True)
class Answer:
    """The verdict in short; `keep` is None where the base should be kept, and where nothing can be told.

    `decision` is None before the score stage. `tag` is what a prompt says to use the arm's file.
    """

    keep: str | None
    headline: str
    sentences: tuple[str, ...]
    decision: Decision | None = None
    epoch: Epoch | None = None
    strength: float | None = None
    tag: str | None = None

    @property
    def answer(self) -> str:
        """Headline and sentences as one line."""
        return " ".join([f"{self.headline}.", *self.sentences])


class Facts:
    """Everything the run folder holds, and the statistics over it, each computed once."""

    @access_errors(StorageError)
    def __init__(self, run: RunDir) -> None:
        if not run.study_toml.is_file():
            raise StorageError(
                f"{run.path}: no study.toml here: name a run folder, or make one with `lorascope study`"
            )
        self.run = run
        self.config: StudyConfig = load_study(run.study_toml, environment={})
        self.manifest = run.manifest()
        self.settings: dict[str, Arm] = {arm.name: arm for arm in self.config.expand_arms()}
        self.training: dict[str, dict[str, Any]] = {}
        for name in self.settings:
            if (run.adapters_dir / name / "training.json").exists():
                facts = run.training(name)
                self.training[name] = run.training(name, *_COSTS) if "file_bytes" in facts else facts
                run.require_unchanged(name)
        self.failed = {
            name: str(facts["failed"]) for name, facts in self.training.items() if facts.get("failed")
        }
        if not self.training:
            raise StorageError(
                f"{run.path}: nothing to report yet: no arm has finished stage `train`; run `lorascope "
                f"train {run.path}` first"
            )
        self.data = run.data() if run.data_json.exists() else None
        self.merges = run.merges(self.settings)
        self.metrics = run.read_metrics(self.settings)
        self.probes = [record for record in self.metrics if record.get("kind") == "probe"]
        self.heldout_losses: dict[str, HeldoutLoss] = read_heldout_losses(self.probes)
        self.quality = (
            _pocket_quality() if "pocket" in (self.config.base.model, self.config.score.model) else None
        )
        self.scores: Scores | None = read_scores(run) if run.scores_parquet.exists() else None
        self.sweep: Sweep | None = read_sweep(run) if run.sweep_parquet.exists() else None
        self.front: Front | None = None
        self.verdict: Verdict | None = None
        self.summary: dict[tuple[str, str], SummaryRow] = {}
        self.effects: dict[tuple[str, str], PairedDifference] = {}
        if self.scores is not None:
            self._refuse_strangers(run.scores_parquet, self.scores.arms, "scores", "score")
            resamples = self.config.score.resamples
            self.verdict = self._reach_verdict(self.scores)
            self.summary = {(row.arm, row.category): row for row in summary_table(self.scores, resamples)}
            for arm in self.scores.arms if self.scores.of(BASE) else ():
                for category in (*self.scores.categories, ALL):
                    self.effects[arm, category] = paired_differences(
                        self.scores, arm, BASE, category, resamples
                    )
        self.diagnosis: Record | None = self._read_diagnosis() if run.diagnosis_json.exists() else None
        self.nearest: dict[str, Nearest] | None = read_nearest(run)
        self.pictures = self._pictures()

    def _reach_verdict(self, scores: Scores) -> Verdict:
        """The verdict, by a front where there is a sweep."""
        resamples = self.config.score.resamples
        if self.sweep is not None:
            self._refuse_strangers(self.run.sweep_parquet, self.sweep.arms, "holds", _DIAGNOSE)
            self.front = trace_front(self.sweep, self.alike, resamples)
        contrast = (
            None if self.front is None else contrast_gains(self.front, self.settings.values(), resamples)
        )
        return reach_verdict(
            scores,
            self.front,
            self.probes,
            tuple(self.failed),
            study=self.config.name,
            contrast=contrast,
            settings=self.alike,
            max_prompt_loss=self.config.verdict.max_prompt_loss,
            resamples=resamples,
        )

    def _read_diagnosis(self) -> Record:
        record = read_diagnosis(self.run)
        # An arm that failed has a diagnosis too.
        if strangers := [arm for arm in record.arms if arm not in self.settings]:
            raise StorageError(
                f"{self.run.diagnosis_json}: diagnoses {', '.join(strangers)}, not an arm of this study: "
                f"delete it and {_DIAGNOSE} again"
            )
        return record

    def _refuse_strangers(self, path: Path, arms: Sequence[str], what: str, stage: str) -> None:
        if strangers := [arm for arm in arms if arm not in self.arms]:
            raise StorageError(
                f"{path}: {what} {', '.join(strangers)}, not a finished arm of this study: delete it and "
                f"{stage} again"
            )

    @property
    def alike(self) -> dict[str, str]:
        """Of every arm what it shares with the arms that differ from it in their training seed alone."""
        return {name: arm.but_seed for name, arm in self.settings.items()}

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms that were trained, in the study's order."""
        return tuple(name for name in self.settings if name in self.training and name not in self.failed)

    @functools.cached_property
    def ranked(self) -> list[str]:
        """Scored arms from the highest mean CLIP similarity to the lowest."""
        arms = self.scores.arms if self.scores else ()
        return sorted(arms, key=lambda arm: (-self.summary[arm, ALL].mean, arm))

    @functools.cached_property
    def detailed(self) -> tuple[str, ...]:
        """Arms shown in detail: all of a few, else the kept one (or the best), the runner-up and the
        worst.
        """
        if len(self.arms) <= MAX_DETAILED or self.verdict is None or not self.ranked:
            return self.arms[:MAX_DETAILED]
        picked = [
            self.verdict.keep or self.ranked[0],
            self.runner_up or self.ranked[min(1, len(self.ranked) - 1)],
            self.ranked[-1],
        ]
        return tuple(dict.fromkeys(picked))

    @property
    def runner_up(self) -> str | None:
        """The arm of the verdict's runner-up."""
        point = self.verdict.runner_up if self.verdict else None
        return point.arm if point else None

    def role(self, arm: str) -> str:
        """What the arm is in the verdict, or nothing."""
        if self.verdict is None:
            return ""
        worst = self.ranked[-1] if len(self.ranked) > 2 else None
        return {self.verdict.keep: "kept", self.runner_up: "runner-up", worst: "worst"}.get(arm, "")

    @property
    def with_rank(self) -> tuple[str, ...]:
        """Trained arms but full fine-tuning, which has no rank and so no gain."""
        return tuple(arm for arm in self.arms if self.settings[arm].kind != "full")

    @functools.cached_property
    def same_gain(self) -> list[list[str]]:
        """Trained arms in groups of one gain, of several ranks or scales each: compared at matched gain."""
        return _groups_of({arm: self.settings[arm] for arm in self.with_rank}, lambda arm: arm.gain)

    @functools.cached_property
    def same_lr(self) -> list[list[str]]:
        """Trained arms in groups of one lr of B, of several ranks or scales each: compared at equal lr."""
        return _groups_of({arm: self.settings[arm] for arm in self.arms}, lambda arm: arm.lr * arm.lr_ratio)

    def settings_in_words(self, arms: Sequence[str]) -> str:
        """The settings of these arms, such as `r16 and r64`: names without what tells seeds apart."""
        seeds = Counter(arm.but_seed for arm in self.settings.values())
        names = dict.fromkeys(
            name.removesuffix(f"-s{arm.seed}") if seeds[arm.but_seed] > 1 else name
            for name, arm in self.settings.items()
            if name in arms
        )
        *others, last = names
        return f"{', '.join(others)} and {last}" if others else last

    @functools.cached_property
    def previews(self) -> list[tuple[int, Picture]]:
        """Pictures drawn during training, each with the epochs done; the base's are of epoch 0."""
        found = []
        for arm in (BASE, *self.arms):
            for path in sorted((self.run.previews_dir / arm).glob("epoch-*/*.png")):
                epoch = path.parent.name.removeprefix("epoch-")
                if epoch.isdecimal() and (picture := self._drawn(arm, path)):
                    found.append((int(epoch), picture))
        return found

    def _pictures(self) -> list[Picture]:
        if self.scores is not None:
            rows = [row for row in self.scores.rows if row.kind == "arm"]
            return [
                Picture(
                    row.arm, row.category, row.prompt_index, row.prompt, row.seed, row.image, row.clip_score
                )
                for row in rows
            ]
        drawn = (
            self._drawn(arm, path)
            for arm in (BASE, *self.arms)
            for path in sorted((self.run.images_dir / arm).glob("*.png"))
        )
        return [picture for picture in drawn if picture is not None]

    def _drawn(self, arm: str, path: Path) -> Picture | None:
        """The picture in a file by its name, or nothing where the name is none of ours."""
        category, index, seed = [*path.stem.split("-"), "", ""][:3]
        if not (index.isdecimal() and seed.isdecimal()):
            return None
        prompt = str(open_picture(path).info.get("prompt", path.stem))
        relative = path.relative_to(self.run.path).as_posix()
        return Picture(arm, category, int(index), prompt, int(seed), relative, None)


def open_picture(path: Path) -> Image.Image:
    """A decoded picture; raises `StorageError` for a damaged file and for what is none."""
    try:
        content = read_regular(path)
        with Image.open(io.BytesIO(content)) as image:
            image.verify()  # of a PNG the checksums, which loading does not look at
        image = Image.open(io.BytesIO(content))
        image.load()
        return image
    except StorageError:
        raise
    except Exception as error:  # decoders raise errors of any type on damaged files
        raise StorageError(
            f"{path}: not a readable picture ({first_line(error)}): delete it and run `lorascope sample` "
            "again"
        ) from error


def _pocket_quality() -> dict[str, float] | None:
    """How well the shipped pocket models do, if the package holds them."""
    entry = resources.files("lorascope") / "pocket" / "quality.json"
    if not entry.is_file():
        return None
    values: dict[str, float] = json.loads(entry.read_text(encoding="utf-8"))
    return values


def _groups_of(arms: Mapping[str, Arm], measure: Callable[[Arm], float]) -> list[list[str]]:
    """Arms whose measure is equal but for rounding, where they are of several ranks or scales."""
    groups: list[list[str]] = []
    last = 0.0
    for name in sorted(arms, key=lambda name: measure(arms[name])):
        value = measure(arms[name])
        if not groups or value > last * (1 + 1e-6):
            groups.append([])
        groups[-1].append(name)
        last = value
    several = [group for group in groups if len({(arms[name].rank, arms[name].alpha) for name in group}) > 1]
    return [[name for name in arms if name in group] for group in several]


def answer_of(facts: Facts) -> Answer:
    """The verdict in words: what the kept arm keeps and gains, how to use it, and the runner-up."""
    verdict = facts.verdict
    if verdict is None:
        done = f"{count(len(facts.arms), 'arm')} trained" + (
            f", {len(facts.failed)} failed" if facts.failed else ""
        )
        return Answer(
            None,
            "No verdict yet",
            (
                f"{done}; the score stage has not run, so nothing was compared.",
                f"Next: lorascope score {facts.run.path.name}",
            ),
        )
    return Answer(
        verdict.keep,
        verdict.headline,
        verdict.sentences,
        verdict.decision,
        verdict.epoch,
        verdict.strength,
        verdict.tag,
    )


def list_warnings(facts: Facts) -> list[str]:
    """What went wrong or was changed on the way, a sentence each."""
    warnings = [f"Arm {arm} failed: {reason}." for arm, reason in facts.failed.items()]
    warnings += [f"Arm {arm} was not trained." for arm in facts.settings if arm not in facts.training]
    if facts.data:
        for key, what in (("refused", "could not be used"), ("treated", "were changed before use")):
            items = facts.data[key]
            if items:
                first = items[0]
                detail = first.get("reason") or first.get("treatment")
                warnings.append(
                    f"{len(items)} of {facts.data['num_rows']:,} rows {what}, such as {first['id']}: "
                    f"{detail}. data.json lists them."
                )
        warnings += [f"Beside the rows: {remark}." for remark in facts.data.get("remarks", ())]
        warnings += [
            f"{sentence}. data.json lists them." for sentence in describe_duplicates(facts.data["duplicates"])
        ]
    if facts.scores is not None and facts.scores.num_truncated:
        warnings.append(
            f"{count(facts.scores.num_truncated, 'text')} were longer than the scorer reads and were cut."
        )
    early = {
        arm: training["best"]["epoch"] for arm, training in facts.training.items() if training.get("best")
    }
    early = {
        arm: epoch
        for arm, epoch in early.items()
        if epoch < facts.settings[arm].epochs and arm not in facts.failed
    }
    if early:
        lengths = {facts.settings[arm].epochs for arm in early}
        last = f"the last of {lengths.pop()} epochs" if len(lengths) == 1 else "the last epoch"
        shown = ", ".join(f"{arm} (epoch {epoch})" for arm, epoch in list(early.items())[:5]) + (
            " and others" if len(early) > 5 else ""
        )
        warnings.append(
            f"Held-out loss was lowest before {last} in {shown}. Pictures and scores are of "
            "the last; the earlier adapters lie in adapters/<arm>/best."
        )
    warnings += [
        f"Arm {arm}: merged and unmerged outputs differ by {r['relative_error']:.2g}."
        for arm, r in facts.merges.items()
        if not r["ok"]
    ]
    return warnings


def list_limits(facts: Facts) -> list[str]:
    """What the numbers cannot say."""
    limits = [
        "CLIP similarity measures whether a picture fits its prompt, not whether it is beautiful, in "
        "style, or free of copies from the training pictures.",
        "Style is where pictures stand between the base's drawings and real pictures of the style, by one "
        "scorer's features. Other eyes may see other things in them.",
        "Intervals are over prompts. They say how these files would do on other prompts of this kind, "
        "not how another training run would do.",
    ]
    if facts.config.base.model == "pocket":
        limits.append(
            "The pocket base draws 64 pixels wide: the procedure carries over to Stable Diffusion, the "
            "numbers do not."
        )
    if not facts.probes:
        limits.append("Held-out loss was not measured: what an arm learned shows in its pictures alone.")
    return limits


def as_sentence(text: str) -> str:
    """Text with a capital letter and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it needs it."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
