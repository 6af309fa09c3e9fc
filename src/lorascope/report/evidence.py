"""What a run folder says: everything read once, the answer in two sentences, and whether the test was fair.

Every number with an interval comes from `score`; what a stage has not written yet is absent here and reads
"not measured" in the report.
"""

import functools
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from lorascope.config import Arm, StudyConfig, load_study
from lorascope.errors import StorageError
from lorascope.evaluation.scores import (
    ALL,
    BASE,
    NOISE,
    REAL,
    SHUFFLED,
    PairedDifference,
    Scores,
    SummaryRow,
    paired_differences,
    read_scores,
    summary_table,
)
from lorascope.evaluation.verdict import Style, Verdict, choose_arm, describe_difference, read_styles
from lorascope.store import RunDir, read_json

MAX_DETAILED = 4  # with more arms, details are for the kept one, the runner-up and the worst
NOT_MEASURED = "not measured"

SIGNS = {"yes": "\N{CHECK MARK}", "caution": "!", "no": "\N{MULTIPLICATION X}", NOT_MEASURED: "?"}


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
    """The verdict in two sentences; `keep` is None where the base should be kept, or nothing is scored
    yet.
    """

    keep: str | None
    headline: str
    sentences: tuple[str, ...]

    @property
    def answer(self) -> str:
        """Headline and sentences as one line."""
        return " ".join([f"{self.headline}.", *self.sentences])


@dataclass(frozen=True)
class Condition:
    """One condition of a fair test: `state` is yes, caution, no or not measured."""

    name: str
    state: str
    text: str

    @property
    def css(self) -> str:
        return self.state.replace(" ", "-")

    @property
    def sign(self) -> str:
        return SIGNS[self.state]


class Facts:
    """Everything the run folder holds, and the statistics over it, each computed once."""

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
        self.failed: dict[str, str] = {}
        for name in self.settings:
            path = run.adapters_dir / name / "training.json"
            if path.exists():
                facts = read_json(path)
                self.training[name] = facts
                if facts.get("failed"):
                    self.failed[name] = str(facts["failed"])
        if not self.training:
            raise StorageError(
                f"{run.path}: nothing to report yet: no arm has finished stage `train`; run `lorascope "
                f"train {run.path}` first"
            )
        self.data: dict[str, Any] | None = read_json(run.data_json) if run.data_json.exists() else None
        self.merges: dict[str, dict[str, Any]] | None = (
            read_json(run.merge_check_json) if run.merge_check_json.exists() else None
        )
        self.metrics = run.read_metrics(self.settings)
        self.probes = [record for record in self.metrics if record.get("kind") == "probe"]
        self.styles: dict[str, Style] = read_styles(self.probes)
        self.quality = (
            _pocket_quality() if "pocket" in (self.config.base.model, self.config.score.model) else None
        )
        self.scores: Scores | None = read_scores(run) if run.scores_parquet.exists() else None
        self.verdict: Verdict | None = None
        self.summary: dict[tuple[str, str], SummaryRow] = {}
        self.effects: dict[tuple[str, str], PairedDifference] = {}
        if self.scores is not None:
            if strangers := [arm for arm in self.scores.arms if arm not in self.arms]:
                raise StorageError(
                    f"{run.scores_parquet}: scores {', '.join(strangers)}, not a finished arm of this "
                    "study: delete it and score again"
                )
            resamples = self.config.score.resamples
            self.verdict = choose_arm(self.scores, self.probes, tuple(self.failed), resamples)
            self.summary = {(row.arm, row.category): row for row in summary_table(self.scores, resamples)}
            for arm in self.scores.arms if self.scores.of(BASE) else ():
                for category in (*self.scores.categories, ALL):
                    self.effects[arm, category] = paired_differences(
                        self.scores, arm, BASE, category, resamples
                    )
        self.pictures = self._pictures()

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
            self.verdict.runner_up or self.ranked[min(1, len(self.ranked) - 1)],
            self.ranked[-1],
        ]
        return tuple(dict.fromkeys(picked))

    def role(self, arm: str) -> str:
        """What the arm is in the verdict, or nothing."""
        if self.verdict is None:
            return ""
        worst = self.ranked[-1] if len(self.ranked) > 2 else None
        return {self.verdict.keep: "kept", self.verdict.runner_up: "runner-up", worst: "worst"}.get(arm, "")

    def gain(self, arm: str) -> float:
        """lr x alpha / rank x sqrt(rank): how strongly the update is driven, on one axis for all set-ups."""
        setting = self.settings[arm]
        return setting.lr * setting.scale * math.sqrt(setting.rank)

    @functools.cached_property
    def previews(self) -> list[tuple[int, Picture]]:
        """Pictures drawn during training, each with the epochs done; the base's are of epoch 0."""
        found = []
        for arm in (BASE, *self.arms):
            for path in sorted((self.run.previews_dir / arm).glob("epoch-*/*.png")):
                category, index, seed = [*path.stem.split("-"), "", ""][:3]
                epoch = path.parent.name.removeprefix("epoch-")
                if epoch.isdigit() and index.isdigit() and seed.isdigit():
                    prompt = str(open_picture(path).info.get("prompt", path.stem))
                    relative = path.relative_to(self.run.path).as_posix()
                    found.append(
                        (int(epoch), Picture(arm, category, int(index), prompt, int(seed), relative, None))
                    )
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
        pictures = []
        for arm in (BASE, *self.arms):
            for path in sorted((self.run.images_dir / arm).glob("*.png")):
                category, index, seed = [*path.stem.split("-"), "", ""][:3]
                if index.isdigit() and seed.isdigit():
                    prompt = str(open_picture(path).info.get("prompt", path.stem))
                    pictures.append(
                        Picture(
                            arm,
                            category,
                            int(index),
                            prompt,
                            int(seed),
                            path.relative_to(self.run.path).as_posix(),
                            None,
                        )
                    )
        return pictures


def open_picture(path: Path) -> Image.Image:
    """A decoded picture; raises `StorageError` for a damaged file."""
    try:
        image = Image.open(path)
        image.load()
        return image
    except OSError as error:
        raise StorageError(
            f"{path}: not a readable picture ({error}): delete it and run `lorascope sample` again"
        ) from error


def _pocket_quality() -> dict[str, float] | None:
    """How well the shipped pocket models do, if the package holds them."""
    entry = resources.files("lorascope") / "pocket" / "quality.json"
    if not entry.is_file():
        return None
    values: dict[str, float] = json.loads(entry.read_text(encoding="utf-8"))
    return values


def answer_of(facts: Facts) -> Answer:
    """The verdict in words: how the kept arm compares with the base and with the runner-up."""
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
    if verdict.keep is None:
        best = facts.ranked[:1]
        shown = [describe_difference(facts.effects[arm, ALL]) for arm in best if (arm, ALL) in facts.effects]
        return Answer(None, verdict.headline, (verdict.reasons[-1], *shown))
    sentences = [
        describe_difference(verdict.against_base)
        if verdict.against_base
        else "The difference to the base was not measured."
    ]
    if verdict.against_runner_up is not None:
        sentences.append(describe_difference(verdict.against_runner_up))
    else:
        sentences += verdict.undecided[-1:]
    return Answer(verdict.keep, verdict.headline, tuple(sentences))


# Fair test? -------------------------------------------------------------------------------------------------


def judge_conditions(facts: Facts) -> list[Condition]:
    """Whether the arms were compared under equal conditions, one by one."""
    conditions = [
        _same_training(facts),
        _same_length(facts),
        _same_noise(facts),
        *_leaks(facts),
        _training_seeds(facts),
        _same_gain(facts),
    ]
    return [
        *conditions,
        _merged(facts),
        _base_quality(facts),
        _scorer_quality(facts),
        _scorer_apart(facts),
        _all_finished(facts),
    ]


def _same_training(facts: Facts) -> Condition:
    name = "Same order, noise and timesteps in training"
    seeds: dict[str, set[int]] = {}
    for arm in facts.arms:
        setting = facts.settings[arm]
        seeds.setdefault(_but_seed(setting), set()).add(setting.seed)
    used = sorted({seed for group in seeds.values() for seed in group})
    shown = ", ".join(map(str, used))
    if len(facts.arms) < 2:
        return Condition(name, NOT_MEASURED, "Only one arm finished: there is nothing to hold equal.")
    if all(group == set(used) for group in seeds.values()):
        return Condition(
            name,
            "yes",
            "Order, noise, timesteps and dropped captions are functions of (training seed, position), "
            f"and every setting has training seed {shown}.",
        )
    return Condition(
        name,
        "caution",
        (
            f"Settings were trained with different seeds out of {shown}: a part of their difference is the "
            "seed's."
        ),
    )


def _but_seed(setting: Arm) -> str:
    """All choices of an arm but its name and training seed."""
    return setting.model_dump_json(exclude={"name", "seed"})


def _same_length(facts: Facts) -> Condition:
    name = "Same training length"
    lengths = {
        arm: (
            facts.training[arm].get("steps") or 0,
            facts.settings[arm].batch_size * facts.config.train.accumulation_steps,
        )
        for arm in facts.arms
    }
    shown = ", ".join(
        f"{arm} {steps:,} steps of {pictures} pictures" for arm, (steps, pictures) in lengths.items()
    )
    if len(set(lengths.values())) <= 1:
        steps, pictures = next(iter(lengths.values()), (0, 0))
        return Condition(name, "yes", f"{steps:,} steps of {pictures} pictures each.")
    batches = {facts.settings[arm].batch_size for arm in facts.arms}
    if len({facts.settings[arm].epochs for arm in facts.arms}) == 1 and len(batches) == len(
        set(lengths.values())
    ):
        return Condition(
            name, "caution", f"Every arm saw the same pictures, but in batches of several sizes: {shown}."
        )
    return Condition(name, "no", f"{shown}.")


def _same_noise(facts: Facts) -> Condition:
    name = "Same prompts and initial noise in the test"
    if facts.scores is None:
        return Condition(name, NOT_MEASURED, "The score stage has not run.")
    verdict = facts.verdict
    assert verdict is not None
    basis = f"{count(verdict.num_prompts, 'prompt')} x {count(verdict.num_seeds, 'sampling seed')}"
    return Condition(
        name,
        "yes",
        (
            f"The base and every arm drew the same {basis}, each from the same noise. Scoring refuses a run "
            "where one is missing."
        ),
    )


def _leaks(facts: Facts) -> list[Condition]:
    split, prompts = "No training picture among the held-out ones", "Test prompts are not training captions"
    if facts.data is None:
        return [Condition(name, NOT_MEASURED, "The data stage has not run.") for name in (split, prompts)]
    train, heldout = facts.data["train"], facts.data["heldout"]
    train_ids, heldout_ids = ({example["id"] for example in side} for side in (train, heldout))
    same = {example["digest"] for example in train} & {example["digest"] for example in heldout}
    straddling = [
        group
        for group in facts.data["duplicates"]
        if train_ids & set(group["ids"]) and heldout_ids & set(group["ids"])
    ]
    found = count(len(facts.data["duplicates"]), "group")
    if same or straddling:
        found = f"{count(len(same), 'picture')} and {count(len(straddling), 'group')} of near duplicates"
        text = f"{found} lie on both sides: held-out loss is too low."
        conditions = [Condition(split, "no", text)]
    else:
        text = (
            f"No digest and no group of near duplicates lies on both sides ({len(train)} training, "
            f"{len(heldout)} held-out pictures; "
        )
        text += f"{found} of duplicates found in the source and handled)."
        conditions = [Condition(split, "yes", text)]
    asked = {_plain(picture.prompt): picture.prompt for picture in facts.pictures}
    if not asked:
        return [*conditions, Condition(prompts, NOT_MEASURED, "The sample stage has not run.")]
    seen = sorted(asked[key] for key in asked.keys() & {_plain(example["caption"]) for example in train})
    if seen:
        return [
            *conditions,
            Condition(
                prompts,
                "caution",
                f"{len(seen)} of {len(asked)} prompts were trained on word for word, such as “{seen[0]}”.",
            ),
        ]
    return [
        *conditions,
        Condition(prompts, "yes", f"None of the {len(asked)} prompts equals one of the training captions."),
    ]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .")


def _training_seeds(facts: Facts) -> Condition:
    name = "Several training seeds"
    counts = Counter(_but_seed(facts.settings[arm]) for arm in facts.arms)
    least = min(counts.values(), default=0)
    if least < 2:
        return Condition(
            name,
            "caution",
            (
                "One training run per setting: the report describes these files, and cannot separate rank "
                "from luck."
            ),
        )
    return Condition(
        name,
        "yes",
        f"At least {least} training runs per setting. Intervals are still over prompts, for each file apart.",
    )


def _same_gain(facts: Facts) -> Condition:
    name = "Same strength of the update"
    gains = {arm: facts.gain(arm) for arm in facts.arms}
    if len(gains) < 2:
        return Condition(name, NOT_MEASURED, "Only one arm finished.")
    low, high = min(gains, key=lambda arm: gains[arm]), max(gains, key=lambda arm: gains[arm])
    ratio = gains[high] / gains[low]
    if ratio <= 1.05:
        return Condition(
            name, "yes", f"The gain lr x alpha / rank x √rank is {gains[low]:.2g} for every arm."
        )
    text = (
        f"The gain lr x alpha / rank x √rank goes from {gains[low]:.2g} ({low}) to {gains[high]:.2g} "
        f"({high}), {ratio:.2g} times as much: "
    )
    text += "what looks like rank may be strength."
    return Condition(name, "caution", text)


def _merged(facts: Facts) -> Condition:
    name = "Merged weights draw the same pictures"
    if not facts.merges:
        return Condition(name, NOT_MEASURED, "The merge check has not run.")
    bad = [arm for arm, result in facts.merges.items() if not result["ok"]]
    worst = max(facts.merges.values(), key=lambda result: float(result["relative_error"]))
    measured = f"relative difference at most {worst['relative_error']:.1g}, tolerance {worst['tolerance']:g}"
    if bad:
        return Condition(
            name,
            "no",
            (
                f"Merged and unmerged outputs differ for {', '.join(bad)} ({measured}): use the adapter "
                "unmerged."
            ),
        )
    missing = [arm for arm in facts.arms if arm not in facts.merges]
    if missing:
        return Condition(
            name,
            "caution",
            f"Checked for {len(facts.merges)} arms ({measured}), not for {', '.join(missing)}.",
        )
    return Condition(name, "yes", f"Merged against unmerged: {measured}.")


def _base_quality(facts: Facts) -> Condition:
    name = "The base follows its prompts"
    base, shuffled = facts.summary.get((BASE, ALL)), facts.summary.get((SHUFFLED, ALL))
    if base is None or shuffled is None or base.low is None or shuffled.high is None:
        return Condition(name, NOT_MEASURED, "There are no scores of the base against shuffled prompts.")
    text = (
        f"The base's pictures score {base.mean:.1f} with their own prompts and {shuffled.mean:.1f} with "
        "others'."
    )
    quality = facts.quality if facts.config.base.model == "pocket" else None
    if quality and "base_r1" in quality:
        text += f" The pocket base as shipped: {_retrieval(quality, 'base')}."
    if base.low > shuffled.high:
        return Condition(name, "yes", text)
    return Condition(
        name, "caution", f"{text} The intervals overlap: a low score says little about an arm here."
    )


def _scorer_quality(facts: Facts) -> Condition:
    name = "The scorer tells captions apart"
    real, noise = facts.summary.get((REAL, ALL)), facts.summary.get((NOISE, ALL))
    quality = facts.quality if facts.config.score.model == "pocket" else None
    texts, states = [], []
    if real is not None and noise is not None and real.low is not None and noise.high is not None:
        apart = real.low > noise.high
        overlap = "" if apart else "; the intervals overlap"
        texts.append(
            f"Real held-out pictures score {real.mean:.1f} with their captions, noise "
            f"{noise.mean:.1f}{overlap}."
        )
        states.append(apart)
    if quality and "scorer_r1" in quality:
        texts.append(f"The pocket scorer as shipped: {_retrieval(quality, 'scorer')}.")
        states.append(quality["scorer_r5"] >= 0.5)
    if not states:
        return Condition(name, NOT_MEASURED, "There are no scores of real held-out pictures.")
    return Condition(name, "yes" if all(states) else "caution", " ".join(texts))


def _retrieval(quality: Mapping[str, float], which: str) -> str:
    first, first_five = quality[f"{which}_r1"], quality[f"{which}_r5"]
    return (
        f"the right caption comes first for {first:.0%} of pictures, among the first five for "
        f"{first_five:.0%}"
    )


def _scorer_apart(facts: Facts) -> Condition:
    name = "The scorer is not the base's own text encoder"
    model = facts.config.score.model
    if model == "pocket":
        return Condition(name, "yes", "The pocket scorer was trained apart from the pocket base.")
    if "clip-vit-large-patch14" in model.lower():
        return Condition(
            name,
            "caution",
            (
                f"{model} holds Stable Diffusion 1's own text encoder: base and arms are judged by the "
                "model that steers them."
            ),
        )
    return Condition(name, NOT_MEASURED, f"Whether {model} shares weights with the base is not known.")


def _all_finished(facts: Facts) -> Condition:
    name = "Every planned arm was compared"
    missing = [arm for arm in facts.settings if arm not in facts.arms]
    if not missing:
        return Condition(name, "yes", f"All {len(facts.settings)} arms finished.")
    shown = "; ".join(f"{arm}: {facts.failed.get(arm, 'not trained')}" for arm in missing[:4])
    return Condition(
        name,
        "caution",
        (
            f"{len(missing)} of {len(facts.settings)} arms did not finish ({shown}). Those left may be the "
            "easier settings."
        ),
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
        if facts.data["duplicates"]:
            warnings.append(
                f"{count(len(facts.data['duplicates']), 'group')} of duplicate pictures; data.json says "
                "what was done with each."
            )
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
    if facts.merges:
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
        "Intervals are over prompts. They say how these files would do on other prompts of this kind, "
        "not how another training run would do.",
    ]
    if facts.config.base.model == "pocket":
        limits.append(
            "The pocket base draws 64 pixels wide: the procedure carries over to Stable Diffusion, the "
            "numbers do not."
        )
    if not facts.probes:
        limits.append("Held-out loss was not measured, so whether an arm learned the style rests on the eye.")
    return limits


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it needs it."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
