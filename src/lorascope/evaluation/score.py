"""CLIP similarity: the table of scores, paired differences with their intervals, calibration rows and the
verdict.

Scores are 100 x cosine. Pictures of one prompt are averaged over sampling seeds first, so that the prompt is
the unit of every interval. Undefined numbers (an interval of too few prompts, the deviation of one picture)
are None, never a filler.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from lorascope.config import StudyConfig
from lorascope.errors import RunError, StorageError
from lorascope.evaluation.prompts import Prompt
from lorascope.store import RunDir, atomic_path

BASE = "base"
ALL = "all"
NOISE = "noise"
SHUFFLED = "shuffled prompts"
REAL = "real held-out"
CAPTIONS = "captions"
MAX_REAL = 50

# Two-sided 5 % and 80 % power: 1.96 + 0.84 standard errors.
POWER_FACTOR = 2.8
POWER_FORMULA = "2.8 x sd / sqrt(n): 80 % power, two-sided 5 %, sd of the per-prompt differences, n prompts"
# With five prompts even a difference of one sign throughout has a sign-flip p of 2 / 2^5 = 0.06: no 95 %
# statement is possible.
MIN_PROMPTS = 6

RULE = (
    "An arm qualifies if it learned the style: after its last epoch its held-out denoising loss is "
    "below the base's, with the whole "
    "95 % interval of the paired difference below 0. Of the qualifying arms the one with the highest "
    "mean CLIP similarity over all "
    "prompts is kept; but where the 95 % interval of its paired difference to a qualifying arm of lower "
    "rank includes 0, the lowest such "
    "rank is kept: no difference in prompt fidelity was shown, and its file is smaller. If no arm "
    "qualifies, only the base is kept."
)
RULE_WITHOUT_STYLE = (
    "Held-out loss was not measured, so the rule rests on CLIP similarity alone: of all arms the one "
    "with the highest mean over all "
    "prompts is kept; but where the 95 % interval of its paired difference to an arm of lower rank "
    "includes 0, that rank is kept."
)

_CATEGORIES = ("normal", "abstract")
_CALIBRATION = (NOISE, SHUFFLED, REAL)
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


class Encoder(Protocol):
    """What scoring needs of `features.ClipEncoder` or `features.CachedEncoder`; features are float32 [n, d]
    of unit norm.

    A picture is a path, a PIL image or a uint8 array [height, width, 3].
    """

    @property
    def identity(self) -> dict[str, Any]: ...

    def encode_images(self, pictures: Sequence[Any]) -> NDArray[np.float32]: ...

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]: ...

    def count_truncated(self, texts: Sequence[str]) -> int: ...

    def digest_picture(self, picture: Any) -> str: ...

    def cached(self, path: Path) -> "Encoder": ...


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


@dataclass(frozen=True)
class Style:
    """Held-out denoising loss of an arm minus the base's, after the arm's last epoch."""

    arm: str
    difference: float
    low: float
    high: float
    num_pictures: int

    @property
    def is_learned(self) -> bool:
        """Whether the loss fell, with the whole interval below 0; never for a loss that is not finite."""
        return (
            math.isfinite(self.difference)
            and math.isfinite(self.low)
            and self.difference < 0
            and self.high < 0
        )


@dataclass(frozen=True)
class Verdict:
    """Which arm to keep. `keep` is None where nothing but the base is worth keeping."""

    headline: str
    keep: str | None
    runner_up: str | None
    rule: str
    reasons: tuple[str, ...]
    undecided: tuple[str, ...]
    against_base: PairedDifference | None
    against_runner_up: PairedDifference | None
    style_measured: bool
    num_prompts: int
    num_seeds: int
    num_training_seeds: int


def clip_score(image_features: ArrayLike, text_features: ArrayLike) -> NDArray[np.float64]:
    """100 x cosine of each picture [n, d] with its own text [n, d]; float64 [n] in [-100, 100], negative
    values kept.

    This is torchmetrics' scale (Hessel et al. 2021 multiply by 2.5 instead) without its floor at 0.
    """
    images, texts = np.asarray(image_features, np.float64), np.asarray(text_features, np.float64)
    if images.ndim != 2 or images.shape != texts.shape:
        raise ValueError(
            f"features must be two arrays [n, d] of one shape, got {images.shape} and {texts.shape}"
        )
    products = np.einsum("nd,nd->n", images, texts)
    cosine = products / (np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1))
    return np.asarray(100.0 * np.clip(cosine, -1.0, 1.0))


def derange(prompts: Sequence[tuple[str, str]]) -> list[int] | None:
    """For each (category, prompt) the position of a different prompt: half the category's list further on.

    Where a category has no two different prompts the whole list is shifted instead; None where that fails
    too.
    """
    places = range(len(prompts))
    groups = [
        [i for i in places if prompts[i][0] == category]
        for category in dict.fromkeys(category for category, _ in prompts)
    ]
    for split in (groups, [list(places)]):
        shifted = [_shift([prompts[i][1] for i in group]) for group in split]
        if prompts and all(shift is not None for shift in shifted):
            target = {
                i: group[shift[n]]
                for group, shift in zip(split, shifted, strict=True)
                if shift
                for n, i in enumerate(group)
            }
            return [target[i] for i in places]
    return None


def _shift(texts: Sequence[str]) -> list[int] | None:
    """Positions shifted by half the length, or by the nearest other step that gives no text itself."""
    n = len(texts)
    for step in sorted(range(1, n), key=lambda step: (abs(step - n // 2), step)):
        moved = [(i + step) % n for i in range(n)]
        if all(texts[i] != texts[j] for i, j in enumerate(moved)):
            return moved
    return None


def draw_noise(count: int, side_px: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    """`count` pictures of uniform noise, uint8 [side_px, side_px, 3]; each a function of (seed, position)."""
    return [
        np.random.default_rng([seed, i]).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
        for i in range(count)
    ]


def score_run(
    run: RunDir,
    config: StudyConfig,
    encoder: Encoder,
    generated: Sequence[Generated],
    heldout: Sequence[tuple[Any, str]],
    prompts: Sequence[Prompt],
) -> Scores:
    """Score every sampled picture and the calibration rows, and write `scores.parquet`.

    `heldout` are real held-out pictures (PIL, uint8 array or path) with their captions; the first 50 are
    used. `prompts` are all the study's prompts. An arm without pictures is left out. Calibration: `noise`
    scores uniform noise against every prompt, `shuffled prompts` the base's pictures against other prompts
    (`derange`), `real held-out` real pictures against their own captions. Features are kept in
    `features.safetensors`; every arm is encoded in batches of its own, so that neither other arms nor an
    interruption changes its numbers. Raises `RunError` if there is no picture at all, or if arms differ in
    prompts or seeds.
    """
    if not generated:
        raise RunError(f"{run.path}: no pictures to score: sample this run first")
    encoder = encoder.cached(run.features_safetensors)
    by_arm: dict[str, list[Generated]] = {}
    for item in sorted(generated, key=_generated_order):
        by_arm.setdefault(item.arm, []).append(item)
    _check_same_prompts(
        {arm: [(i.category, i.prompt_index, i.seed) for i in items] for arm, items in by_arm.items()}
    )
    position = {(prompt.category, prompt.index): n for n, prompt in enumerate(prompts)}
    for item in generated:
        if (item.category, item.prompt_index) not in position:
            raise RunError(
                f"{item.image}: {item.category} prompt {item.prompt_index} is not in the study's list: "
                "sample this run again"
            )

    texts = encoder.encode_texts([prompt.text for prompt in prompts])  # (P, D)
    targets = derange([(prompt.category, prompt.text) for prompt in prompts])
    rows: list[ScoreRow] = []
    for arm, items in by_arm.items():
        paths = [run.path / item.image for item in items]
        features = encoder.encode_images(paths)  # (N, D)
        digests = [encoder.digest_picture(path) for path in paths]
        own = [position[item.category, item.prompt_index] for item in items]
        for item, digest, score in zip(
            items, digests, clip_score(features, texts[own]).tolist(), strict=True
        ):
            values = {key: value for key, value in asdict(item).items() if key != "image"}
            rows.append(
                ScoreRow(kind="arm", **values, clip_score=score, image=item.image, image_digest=digest)
            )
        if arm == BASE and targets is not None:
            other = [targets[place] for place in own]
            for item, place, digest, score in zip(
                items, other, digests, clip_score(features, texts[other]).tolist(), strict=True
            ):
                rows.append(_calibration_row(SHUFFLED, prompts[place], score, digest, item.seed, item.image))

    noise = draw_noise(len(prompts), config.data.resolution_px)
    for picture, prompt, score in zip(
        noise, prompts, clip_score(encoder.encode_images(noise), texts).tolist(), strict=True
    ):
        rows.append(_calibration_row(NOISE, prompt, score, encoder.digest_picture(picture)))
    captions = [Prompt(CAPTIONS, n, caption) for n, (_, caption) in enumerate(heldout[:MAX_REAL])]
    if captions:
        pictures = [picture for picture, _ in heldout[:MAX_REAL]]
        real = clip_score(
            encoder.encode_images(pictures), encoder.encode_texts([caption.text for caption in captions])
        )
        for picture, caption, score in zip(pictures, captions, real.tolist(), strict=True):
            rows.append(_calibration_row(REAL, caption, score, encoder.digest_picture(picture)))
    num_truncated = encoder.count_truncated([prompt.text for prompt in (*prompts, *captions)])
    scores = Scores.from_rows(rows, encoder.identity, num_truncated)
    write_scores(run, scores)
    return scores


def _calibration_row(
    name: str, prompt: Prompt, score: float, digest: str, seed: int = 0, image: str = ""
) -> ScoreRow:
    return ScoreRow(
        kind="calibration",
        arm=name,
        rank=None,
        alpha=None,
        lr=None,
        training_seed=None,
        category=prompt.category,
        prompt_index=prompt.index,
        prompt=prompt.text,
        seed=seed,
        clip_score=score,
        image=image,
        image_digest=digest,
    )


def write_scores(run: RunDir, scores: Scores) -> None:
    """Write `scores.parquet`; equal scores give equal bytes."""
    facts = json.dumps(
        {"scorer": scores.scorer, "num_truncated": scores.num_truncated}, sort_keys=True, ensure_ascii=False
    )
    schema = _SCHEMA.with_metadata({"lorascope": facts})
    table = pa.Table.from_pylist(
        [asdict(row) for row in Scores.from_rows(scores.rows, scores.scorer).rows], schema=schema
    )
    with atomic_path(run.scores_parquet) as partial:
        pq.write_table(
            table, partial, compression="zstd", version="2.6", row_group_size=1 << 20, data_page_version="1.0"
        )


def read_scores(run: RunDir) -> Scores:
    """Read `scores.parquet`; raise `StorageError` if it is missing, damaged or has other columns."""
    path = run.scores_parquet
    try:
        table = pq.ParquetFile(path).read()
        facts = json.loads((table.schema.metadata or {})[b"lorascope"])
        scorer = facts["scorer"]
    except FileNotFoundError as error:
        raise StorageError(f"{path}: not there: score this run first") from error
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise StorageError(
            f"{path}: not a readable score file: delete it and score this run again"
        ) from error
    if [(field.name, field.type) for field in table.schema] != [
        (field.name, field.type) for field in _SCHEMA
    ]:
        raise StorageError(
            f"{path}: columns are {', '.join(table.schema.names)}, must be {', '.join(_SCHEMA.names)}: "
            "score this run again"
        )
    return Scores.from_rows(
        (ScoreRow(**row) for row in table.to_pylist()), scorer, facts.get("num_truncated", 0)
    )


def bootstrap_interval(
    values: ArrayLike, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Expanded percentile bootstrap interval of the mean of `values` [n] (Hesterberg 2015, section 5.3).

    The percentile interval is too narrow for few values; taking its quantiles further out, where Student's
    interval would lie, mends that: at 50 prompts it widens by 4 %, at 6 by more than a third. The draws
    depend on (seed, n, resamples) alone, so equal inputs give equal bounds. None for fewer than
    `MIN_PROMPTS`.
    """
    sample = np.asarray(values, np.float64)
    if not np.isfinite(sample).all():
        raise ValueError("values must be finite")
    if len(sample) < MIN_PROMPTS:
        return None
    if np.all(sample == sample[0]):
        return float(sample[0]), float(sample[0])
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 4096):
        part = means[start : start + 4096]
        part[:] = sample[generator.integers(0, len(sample), (len(part), len(sample)))].mean(axis=1)
    tail = expanded_tail(len(sample), level)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def expanded_tail(count: int, level: float) -> float:
    """The share to cut from each end of a bootstrap of `count` values, so that it is as wide as Student's
    interval.
    """
    quantile = stats.t.ppf((1 + level) / 2, count - 1) * math.sqrt(count / (count - 1))
    return float(stats.norm.sf(quantile))


def smallest_detectable_effect(std: float, num_prompts: int) -> float:
    """The difference that would be seen with 80 % power at two-sided 5 %: 2.8 x std / sqrt(num_prompts)."""
    return POWER_FACTOR * std / math.sqrt(num_prompts)


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
            prompts = _prompt_means(part)
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
    _check_same_prompts(places)
    left, right = _prompt_means(ours), _prompt_means(theirs)
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


def sign_flip_p(differences: ArrayLike, resamples: int = 10_000) -> float:
    """Two-sided p-value of the mean under random signs of the per-prompt differences; exact where 2^n <=
    resamples.
    """
    values = np.asarray(differences, np.float64)
    if len(values) < 2 or not values.any():
        return 1.0

    def mean(sample: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        return np.asarray(sample.mean(axis=axis))

    test = stats.permutation_test(
        (values,),
        mean,
        permutation_type="samples",
        n_resamples=resamples,
        batch=4096,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down adjustment (Holm 1979): the running maximum of (m - i) p_(i), at most 1, in the given
    order.
    """
    p = np.asarray(p_values, np.float64)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise ValueError("p-values must be a list of numbers from 0 to 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def planned_contrasts(scores: Scores, resamples: int = 10_000) -> list[Contrast]:
    """Every arm against the base, then every arm against the one before it in the table, over all prompts."""
    arms = scores.arms
    pairs = [(arm, BASE) for arm in arms if scores.of(BASE)] + list(zip(arms[1:], arms[:-1], strict=True))
    differences = [paired_differences(scores, arm, against, resamples=resamples) for arm, against in pairs]
    p_values = [sign_flip_p([item.difference for item in d.per_prompt], resamples) for d in differences]
    return [
        Contrast(*fields) for fields in zip(differences, p_values, map(float, holm(p_values)), strict=True)
    ]


def read_styles(probes: Iterable[Mapping[str, Any]]) -> dict[str, Style]:
    """Each arm's last held-out, conditional, all-bands record of `metrics.jsonl`; other records are passed
    over.
    """
    last: dict[str, Mapping[str, Any]] = {}
    for record in probes:
        wanted = {"kind": "probe", "split": "heldout", "band": ALL, "conditional": True}
        if all(record.get(key) == value for key, value in wanted.items()) and record["arm"] != BASE:
            arm = str(record["arm"])
            if arm not in last or (record["step"], record["epoch"]) >= (
                last[arm]["step"],
                last[arm]["epoch"],
            ):
                last[arm] = record
    styles = {}
    for arm, record in last.items():
        difference, low, high = (
            _number(record.get(key)) for key in ("difference", "difference_low", "difference_high")
        )
        styles[arm] = Style(arm, difference, low, high, int(record.get("count", 0)))
    return styles


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def choose_arm(
    scores: Scores, probes: Iterable[Mapping[str, Any]], failed: Sequence[str] = (), resamples: int = 10_000
) -> Verdict:
    """Which arm to keep, and why.

    An arm qualifies if it learned the style: after its last epoch its held-out denoising loss (records of
    `metrics.jsonl`, split heldout, band `all`, conditional) is below the base's with the whole 95 % interval
    below 0. Of the qualifying arms the one with the highest mean CLIP similarity over all prompts is kept;
    but where the interval of its paired difference to a qualifying arm of lower rank includes 0, the lowest
    such rank is kept. If none qualifies, nothing is kept. Without any such record the rule falls back to CLIP
    similarity alone and says so. `failed` names arms that ended without pictures; arms with records but no
    pictures count as such too.
    """
    styles = read_styles(probes)
    arms = scores.arms
    missing = [arm for arm in dict.fromkeys((*failed, *styles)) if arm not in arms]
    measured = any(arm in styles for arm in arms) or (not arms and bool(styles))
    reasons = [f"{arm} failed: it has no pictures, so it was not compared." for arm in missing]
    if measured:
        reasons += [
            _describe_style(styles[arm]) if arm in styles else f"{arm}: held-out loss not measured."
            for arm in arms
        ]
    qualifying = [arm for arm in arms if not measured or (arm in styles and styles[arm].is_learned)]
    settings = {arm: scores.of(arm)[0] for arm in arms}
    means = {arm: float(np.mean(list(_prompt_means(scores.of(arm)).values()))) for arm in arms}
    by_mean = sorted(qualifying, key=lambda arm: (-means[arm], settings[arm].rank or 0))

    def compare(arm: str, against: str) -> PairedDifference:
        return paired_differences(scores, arm, against, resamples=resamples)

    keep = runner_up = None
    if by_mean:
        top = keep = by_mean[0]
        lower = [
            arm
            for arm in by_mean[1:]
            if (settings[arm].rank or 0) < (settings[top].rank or 0) and not compare(top, arm).is_shown
        ]
        if lower:
            keep = min(lower, key=lambda arm: (settings[arm].rank or 0, -means[arm]))
            runner_up = top
            reasons.append(
                f"{top} has the highest mean CLIP similarity, {means[top]:.1f}; {keep}, of lower rank, "
                f"has {means[keep]:.1f}."
            )
            reasons.append(
                f"{describe_difference(compare(top, keep))} So the lower rank is kept: its file is smaller."
            )
        else:
            runner_up = by_mean[1] if len(by_mean) > 1 else None
            whom = "qualifying arms" if measured else "arms"
            only = (
                f"is the only one of the {whom}"
                if len(by_mean) == 1
                else f"has the highest mean CLIP similarity of the {whom}"
            )
            reasons.append(
                f"{keep} {only}, {means[keep]:.1f}."
                if len(by_mean) > 1
                else f"{keep} {only}; its mean is {means[keep]:.1f}."
            )
            if runner_up is not None:
                reasons.append(describe_difference(compare(keep, runner_up)))
    against_base = compare(keep, BASE) if keep and scores.of(BASE) else None
    if against_base is not None:
        reasons.append(describe_difference(against_base))
    elif keep:
        reasons.append("The base has no pictures: the difference to it was not measured.")
    if not arms:
        reasons.append("No arm has pictures: there is nothing to compare.")
    elif not qualifying:
        reasons.append(
            "No arm was shown to have learned the style, so there is nothing to keep: keep the base."
        )

    rows = [row for row in scores.rows if row.kind == "arm"]
    rivals = [compare(keep, arm) for arm in qualifying if arm != keep] if keep else []
    return Verdict(
        headline=f"Keep {keep}" if keep else "Keep the base",
        keep=keep,
        runner_up=runner_up,
        rule=RULE if measured or not arms else RULE_WITHOUT_STYLE,
        reasons=tuple(reasons),
        undecided=tuple(_undecided(scores, rivals, against_base, measured)),
        against_base=against_base,
        against_runner_up=compare(keep, runner_up) if keep and runner_up else None,
        style_measured=measured,
        num_prompts=len({(row.category, row.prompt_index) for row in rows}),
        num_seeds=len({row.seed for row in rows}),
        num_training_seeds=min(_runs_per_setting(scores).values(), default=0),
    )


def _describe_style(style: Style) -> str:
    if not all(math.isfinite(value) for value in (style.difference, style.low, style.high)):
        return f"{style.arm} did not learn the style: its held-out loss is not finite."
    what = "learned the style" if style.is_learned else "was not shown to have learned the style"
    side = "below" if style.difference < 0 else "above"
    interval = (
        f"95 % interval {style.low:+.2g} to {style.high:+.2g}; {style.num_pictures} pictures, 1 training run"
    )
    return f"{style.arm} {what}: its held-out loss is {abs(style.difference):.2g} {side} the base's ({interval})."


def _runs_per_setting(scores: Scores) -> dict[tuple[Any, ...], int]:
    """Number of training runs for each (rank, alpha, lr)."""
    runs: dict[tuple[Any, ...], set[Any]] = {}
    for arm in scores.arms:
        row = scores.of(arm)[0]
        runs.setdefault((row.rank, row.alpha, row.lr), set()).add(row.training_seed)
    return {setting: len(seeds) for setting, seeds in runs.items()}


def _undecided(
    scores: Scores,
    differences: Sequence[PairedDifference],
    against_base: PairedDifference | None,
    measured: bool,
) -> list[str]:
    sentences = []
    if scores.arms and not measured:
        sentences.append("Whether the arms learned the style: held-out loss was not measured.")
    for difference in (*differences, *([against_base] if against_base else [])):
        pair = f"between {difference.arm} and {difference.against}"
        if difference.low is None:
            sentences.append(
                f"Whether there is a difference {pair}: no interval from "
                f"{_count(difference.num_prompts, 'prompt')}."
            )
        elif not difference.is_shown:
            sentences.append(
                f"No difference shown {pair}; under {_unseen(difference)} could not have been seen."
            )
    runs = _runs_per_setting(scores)
    if len(runs) > 1 and min(runs.values()) == 1:
        what = "rank" if len({setting[0] for setting in runs}) == len(runs) else "setting"
        sentences.append(f"One training run per {what} cannot separate {what} from luck.")
    elif runs and min(runs.values()) == 1:
        sentences.append("One training run cannot say how another seed of the same setting would score.")
    return sentences


def describe_difference(difference: PairedDifference) -> str:
    """One sentence: the effect, its 95 % interval, how many prompts, seeds and training runs."""
    d = difference
    runs = "1 training run" if BASE in (d.arm, d.against) else "1 training run each"
    basis = (
        _count(d.num_prompts, "prompt") + (f" x {d.num_seeds} seeds" if d.num_seeds > 1 else "") + f", {runs}"
    )
    if d.share_below == d.share_above == 0:
        return f"{d.arm} scores the same as {d.against} for every prompt ({basis})."
    if d.low is None or d.high is None:
        shown = _amount(d.difference, d.difference)
        return f"{d.arm} scores {shown} {_side(d.difference)} {d.against} ({basis}); no interval: it takes at least {MIN_PROMPTS} prompts."
    if not d.is_shown:
        shown = f"mean difference {d.difference:+.1f}, 95 % interval {d.low:+.1f} to {d.high:+.1f}"
        return f"{d.arm} against {d.against}: no difference shown; under {_unseen(d)} could not have been seen ({shown}; {basis})."
    near, far = sorted((abs(d.low), abs(d.high)))
    amount, nearest, farthest = (_amount(value, near) for value in (d.difference, near, far))
    side = _side(d.difference)
    return (
        f"{d.arm} scores {amount} {side} {d.against} (95 % interval {nearest} to {farthest} {side}; {basis})."
    )


def _side(value: float) -> str:
    return "below" if value < 0 else "above"


def _amount(value: float, smallest: float) -> str:
    """Size of a value with one decimal, or with as many as keep the smallest beside it from reading 0.0."""
    decimals = 1 if abs(smallest) >= 0.1 or smallest == 0 else min(6, -math.floor(math.log10(abs(smallest))))
    return f"{abs(value):.{decimals}f}"


def _unseen(difference: PairedDifference) -> str:
    return _amount(difference.smallest_detectable or 0.0, difference.smallest_detectable or 0.0)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def scores_as_dict(scores: Scores, verdict: Verdict | None = None, resamples: int = 10_000) -> dict[str, Any]:
    """Summary, planned contrasts and verdict as plain values for JSON; undefined numbers are None."""
    contrasts = planned_contrasts(scores, resamples)
    return {
        "scorer": scores.scorer,
        "num_truncated": scores.num_truncated,
        "summary": [asdict(row) for row in summary_table(scores, resamples)],
        "contrasts": [
            {**_plain(c.difference), "p_value": c.p_value, "p_adjusted": c.p_adjusted} for c in contrasts
        ],
        "smallest_detectable": POWER_FORMULA,
        "verdict": None if verdict is None else _plain_verdict(verdict),
    }


def _plain(difference: PairedDifference) -> dict[str, Any]:
    """A difference without its list of prompts, with its sentence."""
    values = {key: value for key, value in asdict(difference).items() if key != "per_prompt"}
    return {**values, "sentence": describe_difference(difference)}


def _plain_verdict(verdict: Verdict) -> dict[str, Any]:
    values = {**asdict(verdict), "reasons": list(verdict.reasons), "undecided": list(verdict.undecided)}
    for key, difference in (
        ("against_base", verdict.against_base),
        ("against_runner_up", verdict.against_runner_up),
    ):
        values[key] = None if difference is None else _plain(difference)
    return values


def scores_as_markdown(scores: Scores, verdict: Verdict | None = None, resamples: int = 10_000) -> str:
    """The table of mean and deviation by arm and category as aligned Markdown, which reads as plain text
    too.
    """
    summary = {(row.arm, row.category): row for row in summary_table(scores, resamples)}
    lines = [
        ["arm", *scores.categories, ALL, "95 % interval", "minus base", "95 % interval", "could be seen from"]
    ]
    for arm in dict.fromkeys(row.arm for row in scores.rows):
        cells = [_mean_and_std(summary.get((arm, category))) for category in (*scores.categories, ALL)]
        whole = summary[arm, ALL]
        beside = ["", "", ""]
        if whole.kind == "arm" and arm != BASE and scores.of(BASE):
            d = paired_differences(scores, arm, resamples=resamples)
            seen = "not measured" if d.smallest_detectable is None else f"{d.smallest_detectable:.2f}"
            beside = [f"{d.difference:+.2f}", _interval(d.low, d.high, "+.2f"), seen]
        lines.append([arm, *cells, _interval(whole.low, whole.high, ".2f"), *beside])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    table = "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
    if verdict is None:
        return table + "\n"
    notes = [f"- {sentence}" for sentence in verdict.reasons]
    open_questions = (
        ["", "Not decided:", *(f"- {sentence}" for sentence in verdict.undecided)]
        if verdict.undecided
        else []
    )
    return (
        "\n".join(
            [f"{verdict.headline}.", "", table, "", *notes, *open_questions, "", f"Rule: {verdict.rule}"]
        )
        + "\n"
    )


def _mean_and_std(row: SummaryRow | None) -> str:
    if row is None:
        return ""
    return f"{row.mean:.2f}" if row.std is None else f"{row.mean:.2f} ± {row.std:.2f}"


def _interval(low: float | None, high: float | None, form: str) -> str:
    return "not measured" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def _prompt_means(rows: Sequence[ScoreRow]) -> dict[tuple[str, int], float]:
    """Score of each (category, prompt index), averaged over seeds, in the rows' order."""
    values: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        values.setdefault((row.category, row.prompt_index), []).append(row.clip_score)
    return {place: float(np.mean(scores)) for place, scores in values.items()}


def _check_same_prompts(places: Mapping[str, Sequence[tuple[str, int, int]]]) -> None:
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
    return (*kind, *_arm_order(row), *_category_order(row.category), row.prompt_index, row.seed)


def _generated_order(item: Generated) -> tuple[Any, ...]:
    return (*_arm_order(item), *_category_order(item.category), item.prompt_index, item.seed)


def _arm_order(item: ScoreRow | Generated) -> tuple[Any, ...]:
    settings = (
        -1 if value is None else value for value in (item.rank, item.alpha, item.lr, item.training_seed)
    )
    return (item.arm != BASE, *settings, item.arm)
