"""The scores of a run: rows, `scores.parquet`, and tables of means, paired differences and contrasts.

Pictures of one prompt are averaged over sampling seeds first, so that the prompt is the unit of every
interval. Undefined numbers (an interval of too few prompts, the deviation of one picture) are None, never a
filler.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lorascope.errors import RunError
from lorascope.evaluation.row_files import read_rows, write_rows
from lorascope.evaluation.statistics import (
    bootstrap_interval,
    holm,
    sign_flip_p,
    smallest_detectable_effect,
)
from lorascope.run_folder import RunDir

BASE = "base"
ALL = "all"
NOISE = "noise"
SHUFFLED = "shuffled prompts"
REAL = "real held-out"
CAPTIONS = "captions"  # the category of `real held-out`
_CATEGORIES = ("normal", "abstract")
_CALIBRATION = (NOISE, SHUFFLED, REAL)
_OPTIONAL = ("rank", "alpha", "lr", "training_seed")  # null for the base or for calibration rows
_SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string()),
        pa.field("arm", pa.string()),
        pa.field("rank", pa.int32()),
        pa.field("alpha", pa.float64()),
        pa.field("lr", pa.float64()),
        pa.field("training_seed", pa.int64()),
        pa.field("category", pa.string()),
        pa.field("prompt_index", pa.int32()),
        pa.field("prompt", pa.string()),
        pa.field("seed", pa.int64()),
        pa.field("clip_score", pa.float64()),
        pa.field("image", pa.string()),
        pa.field("image_digest", pa.string()),
    ]
)


@dataclass(frozen=True)
class Generated:
    """One sampled picture: the base has rank 0 and no alpha, lr or training seed. `image` is relative to the
    run folder.
    """

    arm: str
    rank: int
    alpha: float | None
    lr: float | None
    training_seed: int | None
    category: str
    prompt_index: int
    prompt: str
    seed: int
    image: str


@dataclass(frozen=True)
class ScoreRow:
    """One row of `scores.parquet`. `seed` is the sampling seed; it is 0 for `noise` and `real held-out`."""

    kind: str
    arm: str
    rank: int | None
    alpha: float | None
    lr: float | None
    training_seed: int | None
    category: str
    prompt_index: int
    prompt: str
    seed: int
    clip_score: float
    image: str
    image_digest: str


@dataclass(frozen=True)
class Scores:
    """All rows in their fixed order: the base, arms by rank, alpha, lr and training seed, then
    calibration.
    """

    rows: tuple[ScoreRow, ...]
    scorer: dict[str, Any]
    num_truncated: int = 0

    @staticmethod
    def from_rows(rows: Iterable[ScoreRow], scorer: Mapping[str, Any], num_truncated: int = 0) -> "Scores":
        """Sort and check the rows; raise `RunError` for a score that is not finite or a picture that stands
        twice.
        """
        ordered = sorted(rows, key=_row_order)
        seen = set()
        for row in ordered:
            place = (row.arm, row.category, row.prompt_index, row.seed)
            if not math.isfinite(row.clip_score):
                raise RunError(
                    f"{_place(place)}: CLIP score is {row.clip_score}, must be finite: delete the "
                    "picture and sample again"
                )
            if place in seen:
                raise RunError(
                    f"{_place(place)}: is scored twice, must be once: sample and score this run again"
                )
            seen.add(place)
        return Scores(tuple(ordered), dict(scorer), num_truncated)

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the scored arms without the base."""
        return tuple(dict.fromkeys(row.arm for row in self.rows if row.kind == "arm" and row.arm != BASE))

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories of the prompts."""
        return tuple(sorted({row.category for row in self.rows if row.kind == "arm"}, key=_category_order))

    def of(self, arm: str, category: str = ALL) -> tuple[ScoreRow, ...]:
        """Rows of an arm, the base or a calibration row; empty if it has none."""
        return tuple(row for row in self.rows if row.arm == arm and category in (ALL, row.category))


@dataclass(frozen=True)
class SummaryRow:
    """Scores of one arm in one category. `std` is over pictures (ddof 1); `low` and `high` bound the mean
    over prompts.
    """

    kind: str
    arm: str
    rank: int | None
    alpha: float | None
    lr: float | None
    training_seed: int | None
    category: str
    mean: float
    std: float | None
    count: int
    low: float | None
    high: float | None
    num_prompts: int
    num_seeds: int


@dataclass(frozen=True)
class PromptDifference:
    """Score of an arm minus that of another for one prompt, averaged over seeds."""

    category: str
    prompt_index: int
    prompt: str
    difference: float


@dataclass(frozen=True)
class PairedDifference:
    """`arm` minus `against` over the same prompts and seeds: mean over prompts with its 95 % bootstrap
    interval.

    `smallest_detectable` is `POWER_FORMULA`. `share_below` and `share_above` are shares of prompts.
    """

    arm: str
    against: str
    category: str
    difference: float
    low: float | None
    high: float | None
    std: float | None
    smallest_detectable: float | None
    num_prompts: int
    num_seeds: int
    share_below: float
    share_above: float
    per_prompt: tuple[PromptDifference, ...]

    @property
    def is_shown(self) -> bool:
        """Whether there is an interval and it lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Contrast:
    """A planned comparison: sign-flip permutation p-value over prompts, and the same after Holm's
    adjustment.
    """

    difference: PairedDifference
    p_value: float
    p_adjusted: float


def write_scores(run: RunDir, scores: Scores) -> None:
    """Write `scores.parquet` with a digest of what it holds; equal scores give equal bytes."""
    rows = [asdict(row) for row in Scores.from_rows(scores.rows, scores.scorer).rows]
    facts = {"scorer": scores.scorer, "num_truncated": scores.num_truncated}
    write_rows(run.scores_parquet, _SCHEMA, rows, facts)


def read_scores(run: RunDir) -> Scores:
    """Read `scores.parquet`; raise `StorageError` if it is missing, damaged to a bit or has other columns.

    A file without a digest, as 0.1.0 wrote it, passes if it is whole.
    """
    rows, facts = read_rows(run.scores_parquet, _SCHEMA, _OPTIONAL, "score this run", _fault)
    return Scores.from_rows((ScoreRow(**row) for row in rows), facts["scorer"], facts.get("num_truncated", 0))


def _fault(facts: Mapping[str, Any]) -> str | None:
    """What is wrong with the facts beside the rows."""
    if not isinstance(facts.get("scorer"), dict):
        return "no scorer"
    return None if type(facts.get("num_truncated", 0)) is int else "`num_truncated` is no number"


def summary_table(scores: Scores, resamples: int = 10_000) -> list[SummaryRow]:
    """Mean, deviation, count and interval per arm and category and over `all`: the base, the arms, then
    calibration.
    """
    table = []
    for arm in dict.fromkeys(row.arm for row in scores.rows):
        rows = scores.of(arm)
        for category in (*sorted({row.category for row in rows}, key=_category_order), ALL):
            part = scores.of(arm, category)
            values = np.array([row.clip_score for row in part])
            prompts = prompt_means(part)
            interval = bootstrap_interval(list(prompts.values()), resamples)
            table.append(
                SummaryRow(
                    kind=part[0].kind,
                    arm=arm,
                    rank=part[0].rank,
                    alpha=part[0].alpha,
                    lr=part[0].lr,
                    training_seed=part[0].training_seed,
                    category=category,
                    mean=float(values.mean()),
                    std=float(values.std(ddof=1)) if len(values) > 1 else None,
                    count=len(values),
                    low=interval[0] if interval else None,
                    high=interval[1] if interval else None,
                    num_prompts=len(prompts),
                    num_seeds=len({row.seed for row in part}),
                )
            )
    return table


def paired_differences(
    scores: Scores, arm: str, against: str = BASE, category: str = ALL, resamples: int = 10_000
) -> PairedDifference:
    """`arm` minus `against` per prompt, averaged over seeds; mean, 95 % bootstrap interval over prompts, and
    what could be seen.

    Raises `RunError` if either has no pictures in the category, or if their prompts or seeds differ.
    """
    ours, theirs = scores.of(arm, category), scores.of(against, category)
    for name, rows in ((arm, ours), (against, theirs)):
        if not rows:
            known = ", ".join(
                dict.fromkeys(row.arm for row in scores.rows if category in (ALL, row.category))
            )
            raise RunError(
                f"{name!r} has no scores in category {category!r}: scored there are {known or 'none'}"
            )
    places = {
        name: [(row.category, row.prompt_index, row.seed) for row in rows]
        for name, rows in ((against, theirs), (arm, ours))
    }
    check_same_prompts(places)
    left, right = prompt_means(ours), prompt_means(theirs)
    texts = {(row.category, row.prompt_index): row.prompt for row in ours}
    per_prompt = tuple(PromptDifference(*place, texts[place], left[place] - right[place]) for place in left)
    values = np.array([item.difference for item in per_prompt])
    interval = bootstrap_interval(values, resamples)
    std = float(values.std(ddof=1)) if len(values) > 1 else None
    return PairedDifference(
        arm=arm,
        against=against,
        category=category,
        difference=float(values.mean()),
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        std=std,
        smallest_detectable=None if std is None else smallest_detectable_effect(std, len(values)),
        num_prompts=len(values),
        num_seeds=len({row.seed for row in ours}),
        share_below=float(np.mean(values < 0)),
        share_above=float(np.mean(values > 0)),
        per_prompt=per_prompt,
    )


def planned_contrasts(scores: Scores, resamples: int = 10_000) -> list[Contrast]:
    """Every arm against the base, then every arm against the one before it in the table, over all prompts."""
    arms = scores.arms
    pairs = [(arm, BASE) for arm in arms if scores.of(BASE)] + list(zip(arms[1:], arms[:-1], strict=True))
    differences = [paired_differences(scores, arm, against, resamples=resamples) for arm, against in pairs]
    p_values = [sign_flip_p([item.difference for item in d.per_prompt], resamples) for d in differences]
    return [
        Contrast(*fields) for fields in zip(differences, p_values, map(float, holm(p_values)), strict=True)
    ]


def prompt_means(rows: Sequence[ScoreRow]) -> dict[tuple[str, int], float]:
    """Score of each (category, prompt index), averaged over seeds, in the rows' order."""
    values: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        values.setdefault((row.category, row.prompt_index), []).append(row.clip_score)
    return {place: float(np.mean(scores)) for place, scores in values.items()}


def check_same_prompts(places: Mapping[str, Sequence[tuple[str, int, int]]]) -> None:
    """Raise `RunError` if an arm lacks, or has beyond the first arm, a (category, prompt index, seed)."""
    (first, expected), *others = places.items()
    for arm, found in others:
        if odd := sorted(set(expected) ^ set(found)):
            lacking, having = (arm, first) if odd[0] in expected else (first, arm)
            place = f"{odd[0][0]} prompt {odd[0][1]}, seed {odd[0][2]}"
            raise RunError(
                f"{lacking} has no picture of {place}, which {having} has: prompts and seeds must be "
                "the same: sample again"
            )


def _place(place: tuple[str, str, int, int]) -> str:
    return f"{place[0]}, {place[1]} prompt {place[2]}, seed {place[3]}"


def _category_order(category: str) -> tuple[int, str]:
    return (_CATEGORIES.index(category) if category in _CATEGORIES else len(_CATEGORIES), category)


def _row_order(row: ScoreRow) -> tuple[Any, ...]:
    kind = (row.kind != "arm", _CALIBRATION.index(row.arm) if row.arm in _CALIBRATION else 0)
    return (*kind, *picture_order(row))


def picture_order(item: ScoreRow | Generated) -> tuple[Any, ...]:
    """Sort key: the base, then arms by rank, alpha, lr and training seed; then category, prompt and seed."""
    settings = (
        -1 if value is None else value for value in (item.rank, item.alpha, item.lr, item.training_seed)
    )
    arm = (item.arm != BASE, *settings, item.arm)
    return (*arm, *_category_order(item.category), item.prompt_index, item.seed)
