"""`report.html`, `report.md` and figures from the run folder alone: which arm to keep, how sure that is, and why.

The page is one offline file under 5 MB with a strict Content-Security-Policy; text from outside (captions, prompts, file
names) passes Jinja's autoescaping. Every number with an interval comes from `score`. A report needs `study.toml` and at
least one arm's `training.json`; whatever a later stage has not written yet reads "not measured", with the stage's name.
Equal run folders give equal bytes.
"""

import base64
import hashlib
import html
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from lorascope import __version__
from lorascope.config import Arm, StudyConfig, load_study
from lorascope.errors import StorageError
from lorascope.figures import MAX_LINES, MAX_ROWS, Drawing, Line, Look, Row, draw_bands, draw_costs, draw_forest, draw_gain, draw_lines, draw_scale, looks_of
from lorascope.score import (
    ALL,
    BASE,
    POWER_FORMULA,
    PairedDifference,
    Scores,
    Style,
    SummaryRow,
    Verdict,
    choose_arm,
    describe_difference,
    paired_differences,
    planned_contrasts,
    read_scores,
    read_styles,
    summary_table,
)
from lorascope.store import JsonLines, RunDir, digest_file, read_json, write_bytes, write_text

MAX_HTML_BYTES = 5_000_000
EMBED_SIDE_PX = 256
LOSSLESS_SIDE_PX = 96  # pictures up to this side are embedded as they are
MAX_DETAILED = 4  # with more arms, details are for the kept one, the runner-up and the worst
MAX_CONTRASTS = 12
NUM_CURVE_POINTS = 160
NOT_MEASURED = "not measured"

# The reference study as published: SD 1.5, 1,500 cartoon pictures, one GPU (its Table 1, Figure 1 and text).
REFERENCE: dict[str, dict[str, float]] = {
    "reference r16": {"normal": 29.2631, "normal std": 3.4643, "abstract": 23.3837, "abstract std": 2.4608,
                      "loss": 0.1192, "run_time_s": 4383, "memory": 16.2e9, "file": 16e6},
    "reference r64": {"normal": 19.7907, "normal std": 2.8496, "abstract": 22.1148, "abstract std": 1.5294,
                      "loss": 0.1266, "run_time_s": 4541, "memory": 16.6e9, "file": 64e6},
}  # fmt: skip
_SIGNS = {"yes": "\N{CHECK MARK}", "caution": "!", "no": "\N{MULTIPLICATION X}", NOT_MEASURED: "?"}


@dataclass(frozen=True)
class Report:
    """Where the report was written and what it answers; shows itself in a notebook."""

    html_path: Path
    md_path: Path
    figure_paths: tuple[Path, ...]
    keep: str | None
    answer: str

    def _repr_html_(self) -> str:
        page = html.escape(self.html_path.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{page}" sandbox="allow-scripts allow-downloads" title="lorascope report" width="100%" height="720" style="border:0"></iframe>'


@dataclass(frozen=True)
class Answer:
    """The verdict in two sentences; `keep` is None where the base should be kept, or nothing is scored yet."""

    keep: str | None
    headline: str
    sentences: tuple[str, ...]

    @property
    def answer(self) -> str:
        """Headline and sentences as one line."""
        return " ".join([f"{self.headline}.", *self.sentences])


class Cell(NamedTuple):
    """One cell of a table; `value` is what it sorts by; `void` marks a missing number."""

    text: str
    value: float | None = None
    void: bool = False


class Column(NamedTuple):
    """The head of a table's column."""

    name: str
    numeric: bool = True


class TableRow(NamedTuple):
    """One row; `marked` rows stand out: the kept arm."""

    cells: tuple[Cell, ...]
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """A table as both the page and the Markdown show it."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    sortable: bool = False


@dataclass(frozen=True)
class Figure:
    """A drawing with its title, description, text alternative and data."""

    key: str
    title: str
    description: str
    alt: str
    drawing: Drawing
    table: Table
    reference: str = ""


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
        return _SIGNS[self.state]


@dataclass(frozen=True)
class Section:
    """One numbered part of the report after the first two."""

    number: int
    id: str
    title: str
    texts: tuple[str, ...]
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()


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
class Shown:
    """A picture as the page shows it; without `source` it is only linked."""

    arm: str
    path: str
    score: str
    alt: str
    source: str = ""
    side: int = 0


@dataclass(frozen=True)
class PromptRow:
    """The pictures of one prompt and seed side by side."""

    key: str
    category: str
    prompt: str
    seed: int
    note: str
    pictures: tuple[Shown, ...]


class Facts:
    """Everything the run folder holds, and the statistics over it, each computed once."""

    def __init__(self, run: RunDir) -> None:
        if not run.study_toml.is_file():
            raise StorageError(f"{run.path}: no study.toml here: name a run folder, or make one with `lorascope study`")
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
            raise StorageError(f"{run.path}: nothing to report yet: no arm has finished stage `train`; run `lorascope train {run.path}` first")
        self.data: dict[str, Any] | None = read_json(run.data_json) if run.data_json.exists() else None
        self.merges: dict[str, dict[str, Any]] | None = read_json(run.merge_check_json) if run.merge_check_json.exists() else None
        self.metrics = JsonLines(run.metrics_jsonl).read()
        self.probes = [record for record in self.metrics if record.get("kind") == "probe"]
        self.styles: dict[str, Style] = read_styles(self.probes)
        self.quality = _pocket_quality() if "pocket" in (self.config.base.model, self.config.score.model) else None
        self.scores: Scores | None = read_scores(run) if run.scores_parquet.exists() else None
        self.verdict: Verdict | None = None
        self.summary: dict[tuple[str, str], SummaryRow] = {}
        self.effects: dict[tuple[str, str], PairedDifference] = {}
        if self.scores is not None:
            resamples = self.config.score.resamples
            self.verdict = choose_arm(self.scores, self.probes, tuple(self.failed), resamples)
            self.summary = {(row.arm, row.category): row for row in summary_table(self.scores, resamples)}
            for arm in self.scores.arms if self.scores.of(BASE) else ():
                for category in (*self.scores.categories, ALL):
                    self.effects[arm, category] = paired_differences(self.scores, arm, BASE, category, resamples)
        self.pictures = self._pictures()

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms that were trained, in the study's order."""
        return tuple(name for name in self.settings if name in self.training and name not in self.failed)

    @property
    def ranked(self) -> list[str]:
        """Scored arms from the highest mean CLIP similarity to the lowest."""
        arms = self.scores.arms if self.scores else ()
        return sorted(arms, key=lambda arm: (-self.summary[arm, ALL].mean, arm))

    @property
    def detailed(self) -> tuple[str, ...]:
        """Arms shown in detail: all of a few, else the kept one (or the best), the runner-up and the worst."""
        if len(self.arms) <= MAX_DETAILED or self.verdict is None or not self.ranked:
            return self.arms[:MAX_DETAILED]
        picked = [self.verdict.keep or self.ranked[0], self.verdict.runner_up or self.ranked[min(1, len(self.ranked) - 1)], self.ranked[-1]]
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

    def _pictures(self) -> list[Picture]:
        if self.scores is not None:
            rows = [row for row in self.scores.rows if row.kind == "arm"]
            return [Picture(row.arm, row.category, row.prompt_index, row.prompt, row.seed, row.image, row.clip_score) for row in rows]
        pictures = []
        for arm in (BASE, *self.arms):
            for path in sorted((self.run.images_dir / arm).glob("*.png")):
                category, index, seed = (path.stem.split("-") + ["", ""])[:3]
                if index.isdigit() and seed.isdigit():
                    prompt = str(_open_picture(path).info.get("prompt", path.stem))
                    pictures.append(Picture(arm, category, int(index), prompt, int(seed), path.relative_to(self.run.path).as_posix(), None))
        return pictures


def build_report(run: RunDir) -> Report:
    """Write `report.html`, `report.md`, `figures/*.svg` and `figures/*.png`, each atomically, the page last.

    Raises `StorageError` if the folder holds no study, no trained arm, or a damaged file.
    """
    facts = Facts(run)
    answer = _answer(facts)
    figures = _figures(facts)
    content = _content(facts, answer, figures)
    page = _render_page(facts, content)
    paths = []
    for figure in figures.values():
        for suffix, content_bytes in (("svg", figure.drawing.file_svg), ("png", figure.drawing.png)):
            path = run.figures_dir / f"{figure.key}.{suffix}"
            write_bytes(path, content_bytes)
            paths.append(path)
    write_text(run.report_md, _render_markdown(facts, content))
    write_text(run.report_html, page)
    return Report(run.report_html, run.report_md, tuple(paths), answer.keep, answer.answer)


def verdict_of(run: RunDir) -> Answer:
    """The answer alone, without drawing anything."""
    return _answer(Facts(run))


# Verdict ---------------------------------------------------------------------------------------------------------------


def _answer(facts: Facts) -> Answer:
    verdict = facts.verdict
    if verdict is None:
        done = f"{_count(len(facts.arms), 'arm')} trained" + (f", {len(facts.failed)} failed" if facts.failed else "")
        return Answer(None, "No verdict yet", (f"{done}; stage `score` has not run, so nothing was compared.", f"Run `lorascope score {facts.run.path.name}` next."))
    if verdict.keep is None:
        best = facts.ranked[:1]
        shown = [describe_difference(facts.effects[arm, ALL]) for arm in best if (arm, ALL) in facts.effects]
        return Answer(None, verdict.headline, (verdict.reasons[-1], *shown))
    sentences = [describe_difference(verdict.against_base) if verdict.against_base else "The difference to the base was not measured."]
    if verdict.against_runner_up is not None:
        sentences.append(describe_difference(verdict.against_runner_up))
    return Answer(verdict.keep, verdict.headline, tuple(sentences))


def _verdict_content(facts: Facts, answer: Answer) -> dict[str, Any]:
    verdict, keep = facts.verdict, answer.keep
    verb, _, rest = answer.headline.partition(" ")
    items: list[tuple[str, str, str]] = []
    if keep is not None:
        items.append(("The file", f"adapters/{keep}/adapter_model.safetensors", f"adapters/{keep}/adapter_model.safetensors"))
        style = next((reason for reason in verdict.reasons if reason.startswith(f"{keep} learned the style")), None) if verdict else None
        items.append(("Style", style or "Whether it learned the style was not measured: no held-out loss.", ""))
    if verdict is not None:
        runner_up = verdict.runner_up or "none: no other arm qualifies"
        items.append(("Runner-up", runner_up if verdict.runner_up is None else f"{runner_up}, {_mean_text(facts, runner_up)}", ""))
        items.append(("Not decided", " ".join(verdict.undecided) or "Nothing that the rule asks.", ""))
    hero_arms = (BASE, *([keep] if keep else []), *(arm for arm in facts.detailed if arm != keep))[:4]
    hero = [picture for arm in hero_arms for picture in _pictures_of(facts, arm)[:1]]
    return {
        "headline": answer.headline,
        "verb": verb,
        "object": rest,
        "sentences": answer.sentences,
        "facts": [{"label": label, "text": text, "path": path} for label, text, path in items],
        "rule": verdict.rule if verdict else "",
        "reasons": verdict.reasons if verdict else (),
        "hero": hero,
        "picture_note": f"“{hero[0].prompt}”, the first {hero[0].category} prompt of the list, from one initial noise (seed {hero[0].seed})." if hero else "",
    }


def _mean_text(facts: Facts, arm: str) -> str:
    row = facts.summary.get((arm, ALL))
    return f"mean CLIP score {row.mean:.2f}" if row else NOT_MEASURED


def _pictures_of(facts: Facts, arm: str) -> list[Picture]:
    return [picture for picture in facts.pictures if picture.arm == arm]


# Fair test? ------------------------------------------------------------------------------------------------------------


def _conditions(facts: Facts) -> list[Condition]:
    conditions = [_same_training(facts), _same_length(facts), _same_noise(facts), *_leaks(facts), _training_seeds(facts), _same_gain(facts)]
    return [*conditions, _merged(facts), _base_quality(facts), _scorer_quality(facts), _scorer_apart(facts), _all_finished(facts)]


def _same_training(facts: Facts) -> Condition:
    name = "Same order, noise and timesteps in training"
    seeds: dict[tuple[int, float, float], set[int]] = {}
    for arm in facts.arms:
        setting = facts.settings[arm]
        seeds.setdefault((setting.rank, setting.alpha, setting.lr), set()).add(setting.seed)
    used = sorted({seed for group in seeds.values() for seed in group})
    shown = ", ".join(map(str, used))
    if len(facts.arms) < 2:
        return Condition(name, NOT_MEASURED, "Only one arm finished: there is nothing to hold equal.")
    if all(group == set(used) for group in seeds.values()):
        return Condition(name, "yes", f"Order, noise, timesteps and dropped captions are functions of (training seed, position), and every setting has training seed {shown}.")
    return Condition(name, "caution", f"Settings were trained with different seeds out of {shown}: a part of their difference is the seed's.")


def _same_length(facts: Facts) -> Condition:
    name = "Same training length"
    steps = {arm: facts.training[arm].get("steps") for arm in facts.arms}
    if len(set(steps.values())) <= 1:
        return Condition(name, "yes", f"{next(iter(steps.values()), 0):,} steps of {facts.config.train.batch_size} pictures each.")
    return Condition(name, "no", "Steps: " + ", ".join(f"{arm} {count}" for arm, count in steps.items()) + ".")


def _same_noise(facts: Facts) -> Condition:
    name = "Same prompts and initial noise in the test"
    if facts.scores is None:
        return Condition(name, NOT_MEASURED, "Stage `score` has not run.")
    verdict = facts.verdict
    assert verdict is not None
    basis = f"{_count(verdict.num_prompts, 'prompt')} x {_count(verdict.num_seeds, 'sampling seed')}"
    return Condition(name, "yes", f"The base and every arm drew the same {basis}, each from the same noise. Scoring refuses a run where one is missing.")


def _leaks(facts: Facts) -> list[Condition]:
    split, prompts = "No training picture among the held-out ones", "Test prompts are not training captions"
    if facts.data is None:
        return [Condition(name, NOT_MEASURED, "Stage `data` has not run.") for name in (split, prompts)]
    train, heldout = facts.data["train"], facts.data["heldout"]
    train_ids, heldout_ids = ({example["id"] for example in side} for side in (train, heldout))
    same = {example["digest"] for example in train} & {example["digest"] for example in heldout}
    straddling = [group for group in facts.data["duplicates"] if train_ids & set(group["ids"]) and heldout_ids & set(group["ids"])]
    found = _count(len(facts.data["duplicates"]), "group")
    if same or straddling:
        text = f"{_count(len(same), 'picture')} by digest and {_count(len(straddling), 'group')} of near duplicates lie on both sides: held-out loss is too low."
        conditions = [Condition(split, "no", text)]
    else:
        text = f"No digest and no group of near duplicates lies on both sides of {len(train)} training and {len(heldout)} held-out pictures; {found} of duplicates found and handled."
        conditions = [Condition(split, "yes", text)]
    asked = {_plain(picture.prompt): picture.prompt for picture in facts.pictures}
    if not asked:
        return [*conditions, Condition(prompts, NOT_MEASURED, "Stage `sample` has not run.")]
    seen = sorted(asked[key] for key in asked.keys() & {_plain(example["caption"]) for example in train})
    if seen:
        return [*conditions, Condition(prompts, "caution", f"{len(seen)} of {len(asked)} prompts were trained on word for word, such as “{seen[0]}”.")]
    return [*conditions, Condition(prompts, "yes", f"None of the {len(asked)} prompts equals one of the training captions.")]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .")


def _training_seeds(facts: Facts) -> Condition:
    name = "Several training seeds"
    counts: dict[tuple[int, float, float], int] = {}
    for arm in facts.arms:
        setting = facts.settings[arm]
        key = (setting.rank, setting.alpha, setting.lr)
        counts[key] = counts.get(key, 0) + 1
    least = min(counts.values(), default=0)
    if least < 2:
        return Condition(name, "caution", "One training run per setting: the report describes these files, and cannot separate rank from luck.")
    return Condition(name, "yes", f"At least {least} training runs per setting. Intervals are still over prompts, for each file apart.")


def _same_gain(facts: Facts) -> Condition:
    name = "Same strength of the update"
    gains = {arm: facts.gain(arm) for arm in facts.arms}
    if len(gains) < 2:
        return Condition(name, NOT_MEASURED, "Only one arm finished.")
    low, high = min(gains, key=lambda arm: gains[arm]), max(gains, key=lambda arm: gains[arm])
    ratio = gains[high] / gains[low]
    if ratio <= 1.05:
        return Condition(name, "yes", f"The gain lr x alpha / rank x √rank is {gains[low]:.2g} for every arm.")
    text = f"The gain lr x alpha / rank x √rank goes from {gains[low]:.2g} ({low}) to {gains[high]:.2g} ({high}), {ratio:.2g} times as much: what looks like rank may be strength."
    return Condition(name, "caution", text)


def _merged(facts: Facts) -> Condition:
    name = "Merged weights draw the same pictures"
    if not facts.merges:
        return Condition(name, NOT_MEASURED, "Stage `merge_check` has not run.")
    bad = [arm for arm, result in facts.merges.items() if not result["ok"]]
    worst = max(facts.merges.values(), key=lambda result: float(result["relative_error"]))
    measured = f"relative difference at most {worst['relative_error']:.1g}, tolerance {worst['tolerance']:g}"
    if bad:
        return Condition(name, "no", f"Merged and unmerged outputs differ for {', '.join(bad)} ({measured}): use the adapter unmerged.")
    missing = [arm for arm in facts.arms if arm not in facts.merges]
    if missing:
        return Condition(name, "caution", f"Checked for {len(facts.merges)} arms ({measured}), not for {', '.join(missing)}.")
    return Condition(name, "yes", f"Merged against unmerged: {measured}.")


def _base_quality(facts: Facts) -> Condition:
    name = "The base follows its prompts"
    base, shuffled = facts.summary.get((BASE, ALL)), facts.summary.get(("shuffled prompts", ALL))
    if base is None or shuffled is None or base.low is None or shuffled.high is None:
        return Condition(name, NOT_MEASURED, "There are no scores of the base against shuffled prompts.")
    text = f"The base's pictures score {base.mean:.1f} with their own prompts and {shuffled.mean:.1f} with others'."
    quality = facts.quality if facts.config.base.model == "pocket" else None
    if quality and "base_r1" in quality:
        text += f" The pocket base as shipped: {_retrieval(quality, 'base')}."
    if base.low > shuffled.high:
        return Condition(name, "yes", text)
    return Condition(name, "caution", f"{text} The intervals overlap: a low score says little about an arm here.")


def _scorer_quality(facts: Facts) -> Condition:
    name = "The scorer tells captions apart"
    real, noise = facts.summary.get(("real held-out", ALL)), facts.summary.get(("noise", ALL))
    quality = facts.quality if facts.config.score.model == "pocket" else None
    texts, states = [], []
    if real is not None and noise is not None and real.low is not None and noise.high is not None:
        texts.append(f"Real held-out pictures score {real.mean:.1f} with their captions, noise {noise.mean:.1f}.")
        states.append(real.low > noise.high)
    if quality and "scorer_r1" in quality:
        texts.append(f"The pocket scorer as shipped: {_retrieval(quality, 'scorer')}.")
        states.append(quality["scorer_r5"] >= 0.5)
    if not states:
        return Condition(name, NOT_MEASURED, "There are no scores of real held-out pictures.")
    return Condition(name, "yes" if all(states) else "caution", " ".join(texts))


def _retrieval(quality: Mapping[str, float], which: str) -> str:
    return f"the right caption comes first for {quality[f'{which}_r1']:.0%} of pictures, among the first five for {quality[f'{which}_r5']:.0%}"


def _scorer_apart(facts: Facts) -> Condition:
    name = "The scorer is not the base's own text encoder"
    model = facts.config.score.model
    if model == "pocket":
        return Condition(name, "yes", "The pocket scorer was trained apart from the pocket base.")
    if "clip-vit-large-patch14" in model.lower():
        return Condition(name, "caution", f"{model} holds Stable Diffusion 1's own text encoder: base and arms are judged by the model that steers them.")
    return Condition(name, NOT_MEASURED, f"Whether {model} shares weights with the base is not known.")


def _all_finished(facts: Facts) -> Condition:
    name = "Every planned arm was compared"
    missing = [arm for arm in facts.settings if arm not in facts.arms]
    if not missing:
        return Condition(name, "yes", f"All {len(facts.settings)} arms finished.")
    shown = "; ".join(f"{arm}: {facts.failed.get(arm, 'not trained')}" for arm in missing[:4])
    return Condition(name, "caution", f"{len(missing)} of {len(facts.settings)} arms did not finish ({shown}). Those left may be the easier settings.")


def _pocket_quality() -> dict[str, float] | None:
    """How well the shipped pocket models do, if the package holds them."""
    entry = resources.files("lorascope") / "pocket" / "quality.json"
    if not entry.is_file():
        return None
    values: dict[str, float] = json.loads(entry.read_text(encoding="utf-8"))
    return values


# Figures ---------------------------------------------------------------------------------------------------------------


def _figures(facts: Facts) -> dict[str, Figure]:
    looks = looks_of(list(facts.settings), facts.detailed)
    drawn = [_effect_figure(facts, looks), _gain_figure(facts, looks), _scale_figure(facts, looks), _loss_figure(facts, looks)]
    drawn += [_epochs_figure(facts, looks), _bands_figure(facts, looks), _cost_figure(facts, looks)]
    return {figure.key: figure for figure in drawn if figure is not None}


def _rows_shown(facts: Facts, arms: Sequence[str]) -> list[str]:
    """All arms of a few; of many the first and last by mean score, so that the figure stays readable."""
    if len(arms) <= MAX_LINES:
        return list(arms)
    ordered = [arm for arm in facts.ranked if arm in arms] or list(arms)
    return ordered if len(ordered) <= MAX_ROWS else [*ordered[: MAX_ROWS - 4], *ordered[-4:]]


def _effect_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    if not facts.effects or facts.scores is None:
        return None
    scored = list(dict.fromkeys(arm for arm, _ in facts.effects))
    shown = _rows_shown(facts, scored)
    rows = []
    for category in facts.scores.categories:
        for arm in shown:
            effect = facts.effects[arm, category]
            points = tuple(item.difference for item in effect.per_prompt)
            rows.append(Row(category, arm, effect.difference, effect.low, effect.high, effect.smallest_detectable, points))
    columns = (Column("arm", False), Column("prompts", False), Column("n"), Column("difference"), Column("95 % low"), Column("95 % high"),
               Column("could be seen from"), Column("prompts above base"))  # fmt: skip
    table_rows = []
    for arm in scored:
        for category in (*facts.scores.categories, ALL):
            effect = facts.effects[arm, category]
            numbers = [_cell(effect.difference, "+.2f"), _cell(effect.low, "+.2f"), _cell(effect.high, "+.2f"), _cell(effect.smallest_detectable, ".2f")]
            table_rows.append(_row(Cell(arm), Cell(category), _cell(effect.num_prompts, "d"), *numbers, _cell(effect.share_above, ".0%")))
    seeds = facts.verdict.num_seeds if facts.verdict else 1
    left_out = f" Of {len(scored)} arms the {MAX_ROWS - 4} highest and 4 lowest are drawn; the table has all." if len(shown) < len(scored) else ""
    return Figure(
        key="effect",
        title="Each prompt against itself: arm minus base",
        description=(
            f"A small dot is one prompt{f', averaged over {seeds} sampling seeds' if seeds > 1 else ''}; the large mark is the mean, the bar its 95 % interval. "
            f"The line at 0 is the base. The grey box reaches as far as an effect could have hidden: {POWER_FORMULA}.{left_out}"
        ),
        alt="Dot plot of paired differences from the base. " + " ".join(describe_difference(facts.effects[arm, ALL]) for arm in facts.detailed if (arm, ALL) in facts.effects),
        drawing=draw_forest(rows, looks, "CLIP score minus base, points"),
        table=Table("CLIP score of each arm minus the base's, paired by prompt", columns, tuple(table_rows)),
    )


def _gain_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    scored = [arm for arm in facts.arms if (arm, ALL) in facts.effects]
    if facts.scores is None or len({round(math.log(facts.gain(arm)), 6) for arm in scored}) < 3:
        return None
    rows = []
    for category in facts.scores.categories:
        for arm in scored:
            effect = facts.effects[arm, category]
            rows.append(Row(category, arm, effect.difference, effect.low, effect.high))
    gains = {arm: facts.gain(arm) for arm in scored}
    columns = (Column("arm", False), Column("rank"), Column("alpha / rank"), Column("lr"), Column("gain"), Column("difference, all prompts"))
    table = [
        _row(Cell(arm), _cell(facts.settings[arm].rank, "d"), _cell(facts.settings[arm].scale, "g"), _cell(facts.settings[arm].lr, "g"),
             _cell(gains[arm], ".2g"), _cell(facts.effects[arm, ALL].difference, "+.2f"))
        for arm in scored
    ]  # fmt: skip
    return Figure(
        key="gain",
        title="Rank, or only strength?",
        description=(
            "The same differences over the gain of the update, which puts rank, alpha and learning rate on one axis. Where arms of different rank "
            "lie on one curve, strength explains the differences; where they part at equal gain, rank adds something."
        ),
        alt="Scatter plot of the difference from the base over the gain of the update, one mark per arm.",
        drawing=draw_gain(rows, gains, looks),
        table=Table("Gain and difference from the base", columns, tuple(table)),
    )


def _scale_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    if not facts.summary or facts.scores is None:
        return None
    sources = [name for name in ("noise", "shuffled prompts", BASE) if (name, ALL) in facts.summary]
    sources += [arm for arm in facts.detailed if (arm, ALL) in facts.summary]
    sources += [name for name in ("real held-out",) if (name, ALL) in facts.summary]
    rows, table = [], []
    for source in sources:
        for category in (*facts.scores.categories, "captions"):
            part = facts.summary.get((source, category))
            if part is not None:
                low, high = (None, None) if part.std is None else (part.mean - part.std, part.mean + part.std)
                rows.append(Row(category, source, part.mean, low, high))
                table.append(_row(Cell(source), Cell(category), _cell(part.count, "d"), _cell(part.mean), _cell(part.std), _cell(part.low), _cell(part.high)))
    columns = (Column("source", False), Column("prompts", False), Column("pictures"), Column("mean"), Column("std"), Column("95 % low"), Column("95 % high"))
    return Figure(
        key="scale",
        title="What a CLIP score means here",
        description=(
            "Mean and one standard deviation over pictures. Noise and shuffled prompts (the base's pictures against other prompts) show the floor, "
            "real held-out pictures with their captions what a good match reaches. A score near the floor means that the prompt was lost."
        ),
        alt="Strip of CLIP scores: " + "; ".join(f"{source} {facts.summary[source, ALL].mean:.1f}" for source in sources) + ".",
        drawing=draw_scale(rows, looks, "CLIP score (100 x cosine)"),
        table=Table("CLIP scores of the calibration rows, the base and the arms", columns, tuple(table)),
    )


def _loss_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in facts.metrics:
        if record.get("kind") == "train" and record["loss"] is not None and math.isfinite(record["loss"]):
            curves.setdefault(record["arm"], []).append((record["epoch"], record["loss"]))
    if not curves:
        return None
    window = max(1, round(0.04 * max(map(len, curves.values()))))
    drawn = sorted(curves, key=lambda arm: looks[arm].colour != looks[BASE].colour)  # grey ones first, below
    first, second = "training loss, smoothed", "difference from the arms' mean, smoothed"
    lines = [Line(first, arm, *_thin([x for x, _ in curves[arm]], _smooth([y for _, y in curves[arm]], window))) for arm in drawn]
    complete = [arm for arm in drawn if arm in facts.arms and len(curves[arm]) == max(map(len, curves.values()))]
    paired = len(complete) > 1 and len({facts.settings[arm].seed for arm in complete}) == 1
    if paired:
        means = [sum(values) / len(values) for values in zip(*([y for _, y in curves[arm]] for arm in complete), strict=True)]
        for arm in complete:
            gaps = [y - mean for (_, y), mean in zip(curves[arm], means, strict=True)]
            lines.append(Line(second, arm, *_thin([x for x, _ in curves[arm]], _smooth(gaps, window))))
    epochs = range(1, math.ceil(max(x for points in curves.values() for x, _ in points) - 1e-9) + 1)
    table = []
    for arm in curves:
        parts = [[y for x, y in curves[arm] if epoch - 1 < x - 1e-9 <= epoch] for epoch in epochs]
        table.append(_row(Cell(arm), *(_cell(sum(part) / len(part) if part else None, ".4f") for part in parts)))
    finals = "; ".join(f"{arm} {facts.training[arm]['final_loss']:.4f}" for arm in facts.detailed if "final_loss" in facts.training[arm])
    why = " The arms met the same noise at every step, so their difference is far quieter than either curve." if paired else ""
    return Figure(
        key="loss",
        title="Training loss",
        description=f"Mean squared error per step, averaged over {window} steps. Last epoch: {finals}.{why} Training loss says little about which arm to keep.",
        alt=f"Line plot of the smoothed training loss of {_count(len(curves), 'arm')}. Mean of the last epoch: {finals}.",
        drawing=draw_lines(lines, looks, "epoch", {first: "loss", second: "loss difference"}, "loss", (1, 0.75) if paired else (), (second,)),
        table=Table("Mean training loss in each epoch", (Column("arm", False), *(Column(f"epoch {epoch}") for epoch in epochs)), tuple(table)),
        reference="Figure 2 of the reference study; its last losses were 0.1192 at rank 16 and 0.1266 at rank 64.",
    )


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average; at the ends over the part of the window that exists."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    bounds = [(max(0, i - window // 2), min(len(values), i - window // 2 + window)) for i in range(len(values))]
    return [(sums[high] - sums[low]) / (high - low) for low, high in bounds]


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """At most `NUM_CURVE_POINTS` points, evenly spaced, first and last among them."""
    count = min(len(x), NUM_CURVE_POINTS)
    places = [round(i * (len(x) - 1) / max(1, count - 1)) for i in range(count)]
    return tuple(x[i] for i in places), tuple(y[i] for i in places)


def _probes_of(facts: Facts, **wanted: Any) -> list[dict[str, Any]]:
    return [record for record in facts.probes if all(record.get(key) == value for key, value in wanted.items()) and record["arm"] in facts.settings]


def _epochs_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    records = _probes_of(facts, band=ALL, conditional=True)
    if not records:
        return None
    names = {"heldout": "held-out pictures", "train": "training pictures"}
    lines, table = [], []
    for arm in facts.detailed:
        for split, facet in names.items():
            points = [(0.0, 0.0, 0.0, 0.0)]
            points += [(r["epoch"], r["difference"], r["difference_low"], r["difference_high"]) for r in records if r["arm"] == arm and r["split"] == split]
            if len(points) > 1:
                x, y, low, high = (tuple(values) for values in zip(*points, strict=True))
                lines.append(Line(facet, arm, x, y, low, high))
            table += [_row(Cell(arm), Cell(facet), _cell(p[0], "g"), _cell(p[1], "+.4f"), _cell(p[2], "+.4f"), _cell(p[3], "+.4f")) for p in points[1:]]
    if not lines:
        return None
    columns = (Column("arm", False), Column("pictures", False), Column("epoch"), Column("difference"), Column("95 % low"), Column("95 % high"))
    return Figure(
        key="probe-epochs",
        title="What was learned, and what was only memorised",
        description=(
            "Denoising loss at fixed pictures, noise and timesteps, minus the base's; the band is the 95 % interval over pictures. Below 0 on held-out "
            "pictures, the style was learned; where training pictures go on falling and held-out ones turn up, the arm memorises."
        ),
        alt="Line plot of the loss difference from the base over epochs, held-out and training pictures.",
        drawing=draw_lines(lines, looks, "epoch", dict.fromkeys(names.values(), "loss minus base"), "probe-epochs", zero=tuple(names.values())),
        table=Table("Denoising loss minus the base's, all timesteps, with caption", columns, tuple(table)),
    )


def _bands_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    groups: dict[str, list[Row]] = {}
    table = []
    for conditional, facet in ((True, "with caption"), (False, "without caption")):
        records = _probes_of(facts, split="heldout", conditional=conditional)
        for arm in facts.detailed:
            own = [record for record in records if record["arm"] == arm]
            last = max((record["step"] for record in own), default=None)
            for record in own:
                if record["step"] == last:
                    values = [record["difference"], record["difference_low"], record["difference_high"]]
                    table.append(_row(Cell(arm), Cell(facet), Cell(record["band"]), _cell(record["loss"], ".4f"), *(_cell(value, "+.4f") for value in values)))
                    if record["band"] != ALL:
                        groups.setdefault(facet, []).append(Row(record["band"], arm, *values))
    if not groups:
        return None
    columns = (Column("arm", False), Column("caption", False), Column("timesteps", False), Column("loss"), Column("minus base"), Column("95 % low"), Column("95 % high"))
    return Figure(
        key="probe-bands",
        title="Held-out loss by timestep",
        description=(
            "After the last epoch, minus the base's, with 95 % intervals over pictures. Early timesteps (0-250) hold fine detail, late ones (750-1000) layout. "
            "An arm that is better with captions and worse without has lost its unconditional branch, which guidance then amplifies."
        ),
        alt="Dot plot of the held-out loss difference from the base in four timestep bands, with and without caption.",
        drawing=draw_bands(groups, looks, "timestep", "loss minus base", "probe-bands"),
        table=Table("Held-out denoising loss by timestep band after the last epoch", columns, tuple(table)),
    )


def _cost_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    arms = [arm for arm in facts.arms if "file_bytes" in facts.training[arm]]
    if not arms:
        return None
    shown = [arm for arm in _rows_shown(facts, arms)]
    measures = {"run time, s": ("run_time_s", 1.0), "memory, GB": ("peak_memory_bytes", 1e-9), "file, MB": ("file_bytes", 1e-6)}
    costs = {name: {arm: facts.training[arm][key] * factor for arm in shown} for name, (key, factor) in measures.items()}
    keys = {"run time, s": ("run_time_s", 1.0), "memory, GB": ("memory", 1e-9), "file, MB": ("file", 1e-6)}
    reference = {name: {arm: values[key] * factor for arm, values in REFERENCE.items()} for name, (key, factor) in keys.items()}
    columns = (Column("arm", False), Column("run time"), Column("peak memory"), Column("kind", False), Column("file"), Column("parameters"), Column("trained with", False))
    table = []
    for arm in arms:
        own = facts.training[arm]
        group = ", ".join(other for other in own.get("group", ()) if other != arm) or "alone"
        sizes = [Cell(f"{own['run_time_s']:,.0f} s", own["run_time_s"]), Cell(f"{own['peak_memory_bytes'] / 1e9:.2f} GB", own["peak_memory_bytes"])]
        kind = {"rss": "whole process", "cuda": "GPU, allocated"}.get(own["peak_memory_kind"], own["peak_memory_kind"])
        table.append(_row(Cell(arm), *sizes, Cell(kind), Cell(f"{own['file_bytes'] / 1e6:.1f} MB", own["file_bytes"]), _cell(own["parameters"], ",d"), Cell(group)))
    for arm, values in REFERENCE.items():
        numbers = [Cell(f"{values['run_time_s']:,.0f} s", values["run_time_s"]), Cell(f"{values['memory'] / 1e9:.1f} GB", values["memory"])]
        table.append(_row(Cell(arm), *numbers, Cell("GPU"), Cell(f"{values['file'] / 1e6:.0f} MB", values["file"]), _cell(None), Cell("alone")))
    stacked = any(len(facts.training[arm].get("group", ())) > 1 for arm in arms)
    note = " Arms trained together in one pass share its time and memory." if stacked else ""
    return Figure(
        key="cost",
        title="Run time, peak memory and file size",
        description=(
            f"Each scale is logarithmic.{note} The hollow marks are the reference study's, on another base and machine: their distance between ranks can be "
            "compared, their height cannot."
        ),
        alt="Three dot plots: " + "; ".join(f"{name} " + ", ".join(f"{arm} {value:.3g}" for arm, value in list(values.items())[:MAX_LINES]) for name, values in costs.items()) + ".",
        drawing=draw_costs(costs, reference, looks),
        table=Table("Cost of each arm", columns, tuple(table)),
        reference="Figure 1 of the reference study.",
    )


# Tables ----------------------------------------------------------------------------------------------------------------


def _cell(value: float | None, form: str = ".2f") -> Cell:
    """A number with a true minus sign, or `not measured`."""
    if value is None or not math.isfinite(value):
        return Cell(NOT_MEASURED, None, True)
    return Cell(format(value, form).replace("-", "\N{MINUS SIGN}") if not form.endswith("g") else format(value, form), float(value))


def _row(*cells: Cell, marked: bool = False) -> TableRow:
    return TableRow(cells, marked)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _arms_table(facts: Facts) -> Table:
    """Every arm of the study with what was measured: the reference study's Table 1 with the base as its first row."""
    categories = facts.scores.categories if facts.scores else ("normal", "abstract")
    columns = [Column("arm", False), Column("", False), Column("rank"), Column("alpha"), Column("lr"), Column("seed")]
    columns += [Column(name) for category in categories for name in (f"{category} mean", "std")]
    columns += [Column("minus base"), Column("95 % low"), Column("95 % high"), Column("held-out loss minus base")]
    rows = []
    for arm in (BASE, *facts.settings):
        setting = facts.settings.get(arm)
        role = "failed" if arm in facts.failed else "not trained" if arm != BASE and arm not in facts.training else facts.role(arm)
        blank = Cell("", None)
        cells = [Cell(arm), Cell(role)]
        cells += [blank] * 4 if setting is None else [_cell(setting.rank, "d"), _cell(setting.alpha, "g"), _cell(setting.lr, "g"), _cell(setting.seed, "d")]
        for category in categories:
            part = facts.summary.get((arm, category))
            cells += [_cell(part.mean if part else None), _cell(part.std if part else None)]
        effect, style = facts.effects.get((arm, ALL)), facts.styles.get(arm)
        if arm == BASE:
            cells += [blank] * 4
        else:
            cells += [_cell(getattr(effect, key, None), "+.2f") for key in ("difference", "low", "high")]
            cells.append(_cell(style.difference if style else None, "+.4f"))
        rows.append(TableRow(tuple(cells), marked=role == "kept"))
    return Table(f"CLIP score of the base and {_count(len(facts.settings), 'arm')}: mean and standard deviation over pictures", tuple(columns), tuple(rows), sortable=True)


def _reference_table() -> Table:
    columns = (Column("arm", False), Column("normal mean"), Column("std"), Column("abstract mean"), Column("std"))
    keys = ("normal", "normal std", "abstract", "abstract std")
    rows = tuple(_row(Cell(arm), *(_cell(values[key]) for key in keys)) for arm, values in REFERENCE.items())
    return Table("The reference study's Table 1 as published (SD 1.5; it has no row for the base and no intervals)", columns, rows)


def _contrast_table(facts: Facts) -> Table | None:
    if facts.scores is None or not 2 <= len(facts.scores.arms) <= MAX_CONTRASTS:
        return None
    columns = (Column("contrast", False), Column("difference"), Column("95 % low"), Column("95 % high"), Column("p"), Column("p, Holm"))
    rows = []
    for contrast in planned_contrasts(facts.scores, facts.config.score.resamples):
        d = contrast.difference
        numbers = [_cell(d.difference, "+.2f"), _cell(d.low, "+.2f"), _cell(d.high, "+.2f"), _cell(contrast.p_value, ".3f"), _cell(contrast.p_adjusted, ".3f")]
        rows.append(_row(Cell(f"{d.arm} minus {d.against}"), *numbers))
    return Table("Planned contrasts over all prompts: sign-flip test, and adjusted for their number after Holm", columns, tuple(rows))


def _fact_tables(facts: Facts) -> list[Table]:
    manifest, data = facts.manifest, facts.data or {}
    device, base, adapter = manifest.get("device", {}), manifest.get("base", {}), manifest.get("adapter", {})
    memory = device.get("memory_bytes")
    run = {
        "lorascope": manifest.get("lorascope"), "commit": manifest.get("commit"), "started": manifest.get("started"), "finished": manifest.get("finished"),
        "device": device.get("name"), "threads": device.get("threads"), "memory": f"{memory / 2**30:.1f} GiB" if memory else None,
        "adapted layers": adapter.get("modules"), "base dtype": base.get("dtype"), "prediction": base.get("prediction_type"),
    }  # fmt: skip
    keep = facts.verdict.keep if facts.verdict else None
    file = facts.run.adapters_dir / str(keep) / "adapter_model.safetensors"
    scorer = facts.scores.scorer if facts.scores else {}
    digests = {
        f"base {base.get('model', facts.config.base.model)}": base.get("digest"),
        f"scorer {scorer.get('model', facts.config.score.model)}": scorer.get("digest"),
        "data": data.get("fingerprint"),
        "configuration": manifest.get("config_digest"),
        **({f"adapter {keep}": digest_file(file)} if keep and file.exists() else {}),
    }
    stages = {name: f"{entry['seconds']:,.1f} s" for name, entry in manifest["stages"].items() if name != "report"}
    return [
        _facts("The run", "fact", run),
        _facts("Packages", "package", manifest.get("versions", {})),
        _facts("Digests (SHA-256)", "of", digests),
        _facts("Time of each stage", "stage", stages),
        _facts("Scorer", "fact", {key: value for key, value in scorer.items() if key != "digest"}),
    ]


def _facts(caption: str, first: str, values: Mapping[str, Any]) -> Table:
    def shown(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)

    rows = tuple(_row(Cell(name), Cell(NOT_MEASURED, None, True) if value is None else Cell(shown(value))) for name, value in values.items())
    return Table(caption, (Column(first, False), Column("value", False)), rows)


def _warnings(facts: Facts) -> list[str]:
    warnings = [f"Arm {arm} failed: {reason}." for arm, reason in facts.failed.items()]
    warnings += [f"Arm {arm} was not trained." for arm in facts.settings if arm not in facts.training]
    if facts.data:
        for key, what in (("refused", "could not be used"), ("treated", "were changed before use")):
            items = facts.data[key]
            if items:
                first = items[0]
                detail = first.get("reason") or first.get("treatment")
                warnings.append(f"{len(items)} of {facts.data['num_rows']:,} rows {what}, such as {first['id']}: {detail}. All of them stand in data.json.")
        if facts.data["duplicates"]:
            warnings.append(f"{_count(len(facts.data['duplicates']), 'group')} of duplicate pictures; data.json says what was done with each.")
    if facts.scores is not None and facts.scores.num_truncated:
        warnings.append(f"{_count(facts.scores.num_truncated, 'text')} were longer than the scorer reads and were cut.")
    if facts.merges:
        warnings += [f"Arm {arm}: merged and unmerged outputs differ by {r['relative_error']:.2g}." for arm, r in facts.merges.items() if not r["ok"]]
    return warnings


def _limits(facts: Facts) -> list[str]:
    limits = [
        "CLIP similarity measures whether a picture fits its prompt, not whether it is beautiful, in style, or free of copies from the training pictures.",
        "Intervals are over prompts. They say how these files would do on other prompts of this kind, not how another training run would do.",
    ]
    if facts.config.base.model == "pocket":
        limits.append("The pocket base is a small model of drawings 64 pixels wide: its numbers do not carry over to Stable Diffusion, only the procedure does.")
    if not facts.probes:
        limits.append("Held-out loss was not measured, so whether an arm learned the style rests on the eye.")
    return limits


# Pictures --------------------------------------------------------------------------------------------------------------


def _open_picture(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
        return image
    except OSError as error:
        raise StorageError(f"{path}: not a readable picture ({error}): delete it and run `lorascope sample` again") from error


def _embed(path: Path) -> tuple[str, int]:
    """A picture as a data URI, with its side in pixels: small ones as they are, others as WebP of at most `EMBED_SIDE_PX`."""
    image = _open_picture(path).convert("RGB")
    lossless = max(image.size) <= LOSSLESS_SIDE_PX
    if max(image.size) > EMBED_SIDE_PX:
        factor = EMBED_SIDE_PX / max(image.size)
        image = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=lossless, quality=75, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(), max(image.size)


class Album:
    """Chooses the prompts to show and embeds pictures, the most telling first, until the budget is used."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.by_place = {(p.arm, p.category, p.index, p.seed): p for p in facts.pictures}
        self.seeds = list(dict.fromkeys(p.seed for p in facts.pictures))
        self.prompts = list(dict.fromkeys((p.category, p.index) for p in facts.pictures))
        drawn = [arm for arm in (BASE, *facts.arms) if _pictures_of(facts, arm)]
        self.first = [arm for arm in drawn if arm == BASE or arm in facts.detailed]
        self.others = [arm for arm in drawn if arm not in self.first]
        self.chosen = self._choose()
        self._cache: dict[str, tuple[str, int]] = {}

    def _choose(self) -> dict[tuple[str, int], str]:
        """The prompts to show, each with why: two of each category, then the largest gains and losses of the others."""
        chosen = {}
        for category in dict.fromkeys(category for category, _ in self.prompts):
            for place in [place for place in self.prompts if place[0] == category][:2]:
                chosen[place] = f"{category}, among the first two"
        arm = self.judged
        if arm is not None:
            effects = sorted(self.facts.effects[arm, ALL].per_prompt, key=lambda item: (-item.difference, item.category, item.prompt_index))
            left = [item for item in effects if (item.category, item.prompt_index) not in chosen]
            gains = [item for item in left[:2] if item.difference > 0]
            losses = [item for item in left[::-1][:2] if item.difference < 0 and item not in gains]
            for items, word in ((gains, "gains"), (losses, "losses")):
                for item in items:
                    chosen[item.category, item.prompt_index] = f"{item.category}, among {arm}'s largest {word} ({_cell(item.difference, '+.1f').text})"
        return chosen

    @property
    def judged(self) -> str | None:
        """The arm whose gains and losses choose prompts: the kept one, else the best."""
        arm = (self.facts.verdict.keep if self.facts.verdict else None) or next(iter(self.facts.ranked), None)
        return arm if arm is not None and (arm, ALL) in self.facts.effects else None

    @property
    def rule(self) -> str:
        """How the prompts were chosen, in words."""
        text = "The first two prompts of each category"
        if self.judged is not None:
            text += f", then of all others the two with the largest gains and the two with the largest losses of {self.judged} against the base"
        seed = f" Pictures in a row start from the same noise, seed {self.seeds[0]};" if self.seeds else ""
        return f"{text}. Nobody picked them by eye.{seed} the number is the CLIP score." if self.facts.scores else f"{text}.{seed} scores were not measured."

    def blocks(self) -> list[list[Picture]]:
        """Pictures in the order in which they are worth embedding; a block is embedded whole or not at all."""
        rest = [place for place in self.prompts if place not in self.chosen]
        blocks = [self._take(self.first, list(self.chosen), self.seeds[:1])]
        blocks += [self._take([arm], rest, self.seeds[:1]) for arm in self.first]
        blocks += [self._take([arm], self.prompts, self.seeds[:1]) for arm in self.others]
        blocks += [self._take([arm], self.prompts, [seed]) for seed in self.seeds[1:] for arm in (*self.first, *self.others)]
        return [block for block in blocks if block]

    def _take(self, arms: Iterable[str], places: Sequence[tuple[str, int]], seeds: Sequence[int]) -> list[Picture]:
        keys = [(arm, *place, seed) for seed in seeds for place in places for arm in arms]
        return [self.by_place[key] for key in keys if key in self.by_place]

    def embedded(self, picture: Picture) -> tuple[str, int]:
        """Data URI and side of a picture, made once; empty if its file is not there."""
        if picture.path not in self._cache:
            path = self.facts.run.path / picture.path
            self._cache[picture.path] = _embed(path) if picture.path and path.is_file() else ("", 0)
        return self._cache[picture.path]

    def fill(self, budget_bytes: int) -> set[str]:
        """Paths of the pictures that fit into the budget."""
        taken: set[str] = set()
        left = budget_bytes
        for block in self.blocks():
            size = 0
            for picture in block:
                size += len(self.embedded(picture)[0]) + 400
                if size > left:
                    return taken
            taken |= {picture.path for picture in block}
            left -= size
        return taken

    def show(self, picture: Picture, taken: set[str]) -> Shown:
        """A picture for the page."""
        score = "" if picture.score is None else f"{picture.score:.1f}"
        alt = f"{picture.arm}: {picture.prompt} (seed {picture.seed})"
        if picture.path in taken:
            source, side = self.embedded(picture)
            return Shown(picture.arm, picture.path, score, alt, source, side)
        exists = picture.path and (self.facts.run.path / picture.path).is_file()
        return Shown(picture.arm, picture.path if exists else "", score, alt)

    def content(self, taken: set[str]) -> dict[str, Any]:
        """The chosen prompts and the contact sheet."""
        chosen = [self._prompt_row(place, self.seeds[0], self.first, note, taken) for place, note in self.chosen.items()]
        sheet = []
        for seed in self.seeds:
            for place in self.prompts:
                skip = self.first if seed == self.seeds[0] and place in self.chosen else []
                arms = [a for a in (*self.first, *self.others) if a not in skip and (p := self.by_place.get((a, *place, seed))) and p.path in taken]
                if arms:
                    sheet.append(self._prompt_row(place, seed, arms, f"{place[0]}, seed {seed}", taken))
        left_out = len([picture for picture in self.facts.pictures if picture.path not in taken])
        note = f"{left_out:,} pictures are not embedded, to keep this page under 5 MB; they lie in the folder images, by arm." if left_out else "Every picture of the run is on this page."
        return {
            "rule": self.rule,
            "chosen": chosen,
            "sheet": sheet,
            "sheet_title": f"Contact sheet: {_count(len(sheet), 'further row')} of pictures",
            "sheet_note": f"{note} The prompts above are not repeated for the arms shown there.",
        }

    def _prompt_row(self, place: tuple[str, int], seed: int, arms: Iterable[str], note: str, taken: set[str]) -> PromptRow:
        pictures = [self.by_place[arm, *place, seed] for arm in arms if (arm, *place, seed) in self.by_place]
        shown = tuple(self.show(picture, taken) for picture in pictures)
        prompt = pictures[0].prompt if pictures else ""
        return PromptRow(f"{place[0]}-{place[1]:03d}-{seed}", place[0], prompt, seed, note, shown)


# The whole -------------------------------------------------------------------------------------------------------------


def _content(facts: Facts, answer: Answer, figures: Mapping[str, Figure]) -> dict[str, Any]:
    conditions = _conditions(facts)
    manifest = facts.manifest
    return {
        "name": facts.config.name,
        "version": __version__,
        "dateline": f"finished {manifest['finished']}" if manifest.get("finished") else "not finished",
        "verdict": _verdict_content(facts, answer),
        "conditions": conditions,
        "fair_summary": _fair_summary(conditions),
        "sections": _sections(facts, figures),
        "command": manifest.get("command", "lorascope study study.toml"),
        "facts": _fact_tables(facts),
        "toml": facts.config.to_toml(),
        "warnings": _warnings(facts),
        "limits": _limits(facts),
    }


def _fair_summary(conditions: Sequence[Condition]) -> str:
    counts = {state: sum(condition.state == state for condition in conditions) for state in _SIGNS}
    parts = [f"{counts['yes']} of {len(conditions)} conditions hold"]
    parts += [f"{counts['caution']} call for caution"] if counts["caution"] else []
    parts += [f"{counts['no']} {'is' if counts['no'] == 1 else 'are'} violated"] if counts["no"] else []
    parts += [f"{counts[NOT_MEASURED]} {'was' if counts[NOT_MEASURED] == 1 else 'were'} not measured"] if counts[NOT_MEASURED] else []
    return ", ".join(parts) + "."


def _sections(facts: Facts, figures: Mapping[str, Figure]) -> list[Section]:
    def pick(*keys: str) -> tuple[Figure, ...]:
        return tuple(figures[key] for key in keys if key in figures)

    unscored = "Not measured: stage `score` has not run."
    scored = facts.scores is not None
    contrasts = _contrast_table(facts)
    effect = [describe_difference(facts.effects[arm, ALL]) for arm in facts.detailed if (arm, ALL) in facts.effects]
    training = "Loss on pictures the arms were trained on, and on pictures they never saw, at fixed noise." if facts.probes else "Held-out loss: not measured."
    look = "The base and the arms on the same prompts from the same noise." if facts.pictures else "Not measured: stage `sample` has not run."
    look_reference = " Figures 3 to 6 of the reference study show one normal and one abstract prompt this way." if facts.pictures else ""
    tables = (_arms_table(facts), *([contrasts] if contrasts else []), _reference_table())
    return [
        Section(3, "effect", "Effect on the fit to the prompt", tuple(effect) if scored else (unscored,), pick("effect", "gain"), tables),
        Section(4, "scale", "Where the scores lie", ("The scorer's own floor and ceiling, to read the differences above by.",) if scored else (unscored,), pick("scale")),
        Section(5, "training", "Training", (training,), pick("probe-epochs", "probe-bands", "loss")),
        Section(6, "look", "How it looks", (look + look_reference,)),
        Section(7, "cost", "What it costs", (), pick("cost")),
        Section(8, "reproduce", "Reproduce", ()),
    ]


def _template(name: str, autoescape: bool) -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset), autoescape=autoescape, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["md"] = _markdown
    environment.filters["md_table"] = _markdown_table
    return environment.get_template(name)


def _asset(name: str) -> str:
    return (resources.files("lorascope") / "templates" / name).read_text(encoding="utf-8")


def _render_page(facts: Facts, content: dict[str, Any]) -> str:
    """The page with as many pictures as fit; the rest stays in the run folder."""
    script = _asset("viewer.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    album = Album(facts)
    template = _template("report.html.j2", autoescape=True)
    hero = content["verdict"]["hero"]
    budget = MAX_HTML_BYTES
    while True:
        taken = album.fill(budget)
        verdict = {**content["verdict"], "pictures": [shown for shown in (album.show(picture, taken) for picture in hero) if shown.source]}
        page: str = template.render(
            r={**content, "verdict": verdict, "look": album.content(taken) if facts.pictures else {"chosen": ()}},
            css=_asset("report.css"),
            script=script,
            script_hash=f"sha256-{digest}",
        )
        excess = len(page.encode()) - MAX_HTML_BYTES
        if excess < 0 or not taken:
            return page
        budget = min(budget, sum(len(album.embedded(picture)[0]) + 400 for picture in facts.pictures if picture.path in taken)) - excess - 1


def _render_markdown(facts: Facts, content: dict[str, Any]) -> str:
    album = Album(facts)
    text: str = _template("report.md.j2", autoescape=False).render(r={**content, "look": album.content(set()) if facts.pictures else {"chosen": ()}})
    return text


def _markdown(text: object) -> str:
    """Text with everything escaped that Markdown or HTML would read as markup."""
    shown = str(text)
    for character in "\\`*_{}[]|#~$":
        shown = shown.replace(character, "\\" + character)
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\r", " ").replace("\n", " ")


def _markdown_table(table: Table) -> str:
    head = "| " + " | ".join(_markdown(column.name) or " " for column in table.columns) + " |"
    rule = "|" + "|".join("---:" if column.numeric else "---" for column in table.columns) + "|"
    rows = ["| " + " | ".join(_markdown(cell.text) for cell in row.cells) + " |" for row in table.rows]
    return "\n".join([head, rule, *rows])
