"""Scores, intervals, p-values and the verdict against SciPy and numbers worked out by hand."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lorascope.errors import RunError, StorageError
from lorascope.evaluation.score import (
    BASE,
    NOISE,
    REAL,
    RULE,
    RULE_WITHOUT_STYLE,
    SHUFFLED,
    ScoreRow,
    Scores,
    bootstrap_interval,
    choose_arm,
    clip_score,
    derange,
    describe_difference,
    draw_noise,
    expanded_tail,
    holm,
    paired_differences,
    planned_contrasts,
    read_scores,
    read_styles,
    scores_as_dict,
    scores_as_markdown,
    sign_flip_p,
    smallest_detectable_effect,
    summary_table,
    write_scores,
)
from lorascope.store import RunDir

SCORER = {
    "model": "pocket",
    "digest": "c" * 64,
    "dtype": "float32",
    "preprocessing": {"size_px": 64},
    "scale": "100 x cosine",
}


def make_row(
    arm: str, prompt: int, score: float, category: str = "normal", seed: int = 0, **values: Any
) -> ScoreRow:
    rank = 0 if arm == BASE else int(arm.lstrip("r").split("-")[0])
    settings = (None, None, None) if arm == BASE else (2.0 * rank, 5e-4, 0)
    row = ScoreRow(
        "arm",
        arm,
        rank,
        *settings,
        category,
        prompt,
        f"{category} {prompt}",
        seed,
        score,
        f"images/{arm}/{prompt}.png",
        "d",
    )
    return dataclasses.replace(row, **values)


def make_scores(columns: Mapping[str, Sequence[float]], seeds: int = 1, **values: Any) -> Scores:
    """One score per prompt and arm, half normal and half abstract; further seeds add -1, +1, ... around
    it.
    """
    rows = []
    for arm, scores in columns.items():
        for n, score in enumerate(scores):
            half = (len(scores) + 1) // 2
            category, prompt = ("normal", n) if n < half else ("abstract", n - half)
            for seed in range(seeds):
                rows.append(make_row(arm, prompt, score + (seed - (seeds - 1) / 2), category, seed, **values))
    return Scores.from_rows(rows, SCORER)


def draws(mean: float, count: int = 50, std: float = 3.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, std, count)


def probe(arm: str, difference: float, half: float = 0.002, epoch: int = 10, **values: Any) -> dict[str, Any]:
    bounds = {"difference_low": difference - half, "difference_high": difference + half}
    what = {"kind": "probe", "arm": arm, "split": "heldout", "band": "all", "conditional": True}
    return {
        **what,
        "step": epoch * 100,
        "epoch": epoch,
        "loss": 0.1,
        "difference": difference,
        **bounds,
        "count": 32,
        **values,
    }


# -- clip_score ----------------------------------------------------------------------------------------------


def test_clip_score_is_a_hundred_cosines() -> None:
    images = np.array([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    texts = np.array([[3.0, 4.0], [0.0, 5.0], [1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_allclose(clip_score(images, texts), [100, 0, 100 / math.sqrt(2), -100], atol=1e-12)
    assert clip_score(images.astype(np.float32), texts).dtype == np.float64
    assert clip_score(np.empty((0, 2)), np.empty((0, 2))).shape == (0,)


def test_clip_score_refuses_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match="one shape"):
        clip_score(np.ones((2, 3)), np.ones((1, 3)))


# -- the file ------------------------------------------------------------------------------------------------


def with_calibration(scores: Scores) -> Scores:
    def row(name: str, n: int, score: float, category: str = "normal") -> ScoreRow:
        return ScoreRow(
            "calibration", name, None, None, None, None, category, n, f"prompt {n}", 0, score, "", "d"
        )

    rows = [row(name, n, 10.0 + n) for name in (NOISE, SHUFFLED) for n in range(3)]
    rows += [row(REAL, n, 30.0 + n, "captions") for n in range(3)]
    return Scores.from_rows([*scores.rows, *rows], SCORER, num_truncated=2)


def test_scores_file_round_trips_in_the_contract_s_columns(tmp_path: Path) -> None:
    run, scores = (
        RunDir(tmp_path),
        with_calibration(make_scores({"r16": [1, 2, 3], BASE: [4, 5, 6]}, seeds=2)),
    )
    write_scores(run, scores)
    assert read_scores(run) == scores
    schema = pq.read_schema(run.scores_parquet)
    names = (
        "kind arm rank alpha lr training_seed category prompt_index prompt seed clip_score image image_digest"
    )
    assert schema.names == names.split()
    types = {
        name: schema.field(name).type
        for name in ("rank", "prompt_index", "seed", "clip_score", "training_seed")
    }
    assert types == {
        "rank": pa.int32(), "prompt_index": pa.int32(), "seed": pa.int64(), "clip_score": pa.float64(), "training_seed": pa.int64(),
    }  # fmt: skip
    assert json.loads(schema.metadata[b"lorascope"]) == {"scorer": SCORER, "num_truncated": 2}
    assert [row.arm for row in scores.rows] == [BASE] * 6 + ["r16"] * 6 + [NOISE] * 3 + [SHUFFLED] * 3 + [
        REAL
    ] * 3
    base, calibration = scores.of(BASE)[0], scores.of(REAL)[0]
    assert (base.rank, base.alpha, base.lr, base.training_seed) == (0, None, None, None)
    assert (calibration.rank, calibration.training_seed) == (None, None)


def test_order_of_rows_changes_nothing(tmp_path: Path) -> None:
    scores = with_calibration(
        make_scores({"r16": draws(25, 12), BASE: draws(26, 12), "r64": draws(20, 12)}, seeds=3)
    )
    rows = list(scores.rows)
    np.random.default_rng(3).shuffle(rows)  # type: ignore[arg-type]
    shuffled = Scores.from_rows(rows, dict(reversed(SCORER.items())), 2)
    contents = []
    for name, variant in (("a", scores), ("b", shuffled), ("c", Scores(tuple(rows), SCORER, 2))):
        write_scores(RunDir(tmp_path / name), variant)
        contents.append((tmp_path / name / "scores.parquet").read_bytes())
    assert contents[0] == contents[1] == contents[2]
    probes = [probe("r16", -0.01), probe("r64", -0.01)]
    for summarise in (
        summary_table,
        planned_contrasts,
        lambda s: choose_arm(s, probes),
        scores_as_markdown,
        scores_as_dict,
    ):
        assert summarise(shuffled) == summarise(scores)


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused(score: float, tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"r4, normal prompt 0, seed 0: CLIP score is (nan|inf), must be finite"
    ):
        Scores.from_rows([make_row("r4", 0, score)], SCORER)
    with pytest.raises(RunError, match="must be finite"):
        write_scores(RunDir(tmp_path), Scores((make_row("r4", 0, score),), SCORER))
    assert not (tmp_path / "scores.parquet").exists()


def test_a_picture_scored_twice_is_refused() -> None:
    with pytest.raises(RunError, match="scored twice"):
        Scores.from_rows([make_row("r4", 0, 1.0), make_row("r4", 0, 2.0)], SCORER)


def write_columns(path: Path) -> None:
    table = pa.table({"arm": ["base"]}).replace_schema_metadata({"lorascope": json.dumps({"scorer": SCORER})})
    pq.write_table(table, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: None, "not there: score this run first"),
        (lambda path: path.write_bytes(b"nothing"), "not a readable score file"),
        (lambda path: pq.write_table(pa.table({"arm": ["base"]}), path), "not a readable score file"),
        (write_columns, "columns are arm, must be kind, arm, rank"),
    ],
)
def test_files_that_are_no_scores_are_refused(
    damage: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    damage(tmp_path / "scores.parquet")
    with pytest.raises(StorageError, match=message):
        read_scores(RunDir(tmp_path))


def test_score_imports_no_torch() -> None:
    code = "import sys, lorascope.evaluation.score; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False
        ).returncode
        == 0
    )


# -- calibration ---------------------------------------------------------------------------------------------


def test_derangement_stays_in_its_category_and_gives_no_prompt_itself() -> None:
    prompts = [("normal", f"n{i}") for i in range(5)] + [("abstract", f"a{i}") for i in range(4)]
    targets = derange(prompts)
    assert targets == [2, 3, 4, 0, 1, 7, 8, 5, 6]
    assert all(prompts[i][0] == prompts[j][0] for i, j in enumerate(targets))


def test_derangement_of_awkward_lists() -> None:
    assert derange([("normal", "a"), ("abstract", "b")]) == [1, 0]  # no other prompt within the category
    assert derange([("normal", "a"), ("normal", "b"), ("normal", "a"), ("normal", "b")]) == [
        1,
        2,
        3,
        0,
    ]  # half on would be itself
    assert derange([("normal", "a")]) is None
    assert derange([("normal", "a"), ("normal", "a")]) is None
    assert derange([]) is None


def test_noise_is_uniform_and_a_function_of_seed_and_position() -> None:
    few, many = draw_noise(2, 64), draw_noise(5, 64)
    assert many[0].shape == (64, 64, 3)
    assert many[0].dtype == np.uint8
    for first, second in zip(few, many, strict=False):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(many[0], many[1])
    counts = np.bincount(np.concatenate([picture.ravel() for picture in many]), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-3


# -- intervals and p-values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["percentile", "BCa"])
@pytest.mark.parametrize(
    "sample", [draws(20), draws(0, 25, seed=1), np.random.default_rng(2).exponential(2, 40)]
)
def test_interval_matches_scipy(sample: np.ndarray, method: str) -> None:
    level = 1 - 2 * expanded_tail(len(sample), 0.95)
    options = {
        "method": method,
        "n_resamples": 20_000,
        "confidence_level": level,
        "rng": np.random.default_rng(5),
    }
    theirs = stats.bootstrap((sample,), np.mean, **options).confidence_interval
    ours = bootstrap_interval(sample, 20_000)
    error = sample.std(ddof=1) / math.sqrt(len(sample))
    np.testing.assert_allclose(
        ours, theirs, atol=(0.07 if method == "percentile" else 0.5) * error
    )  # BCa shifts for skewness


@pytest.mark.parametrize("count", [6, 12, 50])
def test_interval_of_normal_values_is_as_wide_as_students(count: int) -> None:
    sample = stats.norm.ppf((np.arange(count) + 0.5) / count)
    low, high = bootstrap_interval(sample, 40_000) or (math.nan, math.nan)
    students = stats.t.interval(0.95, count - 1, scale=stats.sem(sample))
    assert high - low == pytest.approx(students[1] - students[0], rel=0.04)


def test_interval_of_few_or_constant_values() -> None:
    assert bootstrap_interval([1.0] * 5) is None
    assert bootstrap_interval([]) is None
    assert bootstrap_interval([1.5] * 6) == (1.5, 1.5)
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval([1.0] * 6 + [math.nan])


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    intervals = [bootstrap_interval(generator.normal(1, 3, 50), 500) for _ in range(400)]
    assert 0.91 <= np.mean([low <= 1 <= high for low, high in intervals]) <= 0.975


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=6, max_size=20), st.floats(-10, 10))
def test_interval_grows_with_its_level_and_moves_with_the_values(values: list[float], shift: float) -> None:
    low, high = bootstrap_interval(values, 200)
    wide_low, wide_high = bootstrap_interval(values, 200, level=0.99)
    assert min(values) - 1e-9 <= wide_low <= low <= high <= wide_high <= max(values) + 1e-9
    np.testing.assert_allclose(
        bootstrap_interval(np.array(values) + shift, 200), (low + shift, high + shift), atol=1e-6
    )


def test_smallest_detectable_effect_is_the_normal_theory_s() -> None:
    exact = (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * 3.2 / math.sqrt(25)
    assert smallest_detectable_effect(3.2, 25) == pytest.approx(1.792)
    assert smallest_detectable_effect(3.2, 25) == pytest.approx(exact, rel=1e-3)


def test_sign_flip_p_by_hand_and_against_wilcoxon() -> None:
    # All 2^4 sign patterns of 1..4: |mean| reaches the observed sum 10 only for + + + + and - - - -.
    assert sign_flip_p([1, 2, 3, 4]) == pytest.approx(2 / 16)
    assert sign_flip_p([1, 2, 3, -4]) == pytest.approx(14 / 16)  # all but the two sums of 0, 1 + 4 = 2 + 3
    assert sign_flip_p([1.0] * 6) == pytest.approx(2 / 2**6)
    assert sign_flip_p([0.0] * 9) == 1.0
    assert sign_flip_p([3.0]) == 1.0
    values = draws(1.2, 40)
    assert sign_flip_p(values) == sign_flip_p(values)
    assert sign_flip_p(values) == pytest.approx(stats.wilcoxon(values).pvalue, abs=0.02)


def test_holm_by_hand() -> None:
    # sorted .01 .02 .03 .04 -> x4 x3 x2 x1 = .04 .06 .06 .04 -> running maximum .04 .06 .06 .06
    np.testing.assert_allclose(holm([0.02, 0.01, 0.04, 0.03]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1.0, 1.0])
    np.testing.assert_allclose(holm([0.03]), [0.03])
    assert holm([]).shape == (0,)
    for wrong in ([0.1, math.nan], [1.2], [[0.1]]):
        with pytest.raises(ValueError, match="p-values"):
            holm(wrong)


# -- tables --------------------------------------------------------------------------------------------------


def test_summary_by_hand() -> None:
    scores = make_scores({BASE: [10, 12, 20, 24], "r4": [1, 2, 3, 4]})
    table = {(row.arm, row.category): row for row in summary_table(scores)}
    assert list(table) == [
        (arm, category) for arm in (BASE, "r4") for category in ("normal", "abstract", "all")
    ]
    base = table[BASE, "normal"]
    assert (base.mean, base.std, base.count, base.num_prompts, base.num_seeds) == (
        11,
        pytest.approx(math.sqrt(2)),
        2,
        2,
        1,
    )
    assert table[BASE, "all"].mean == 16.5
    assert table[BASE, "all"].std == pytest.approx(np.std([10, 12, 20, 24], ddof=1))
    assert base.low is None
    assert base.high is None
    assert (table["r4", "all"].rank, table["r4", "all"].alpha, table["r4", "all"].lr) == (4, 8.0, 5e-4)


def test_summary_interval_is_over_prompts_not_pictures() -> None:
    values = draws(25, 10)
    one, three = (summary_table(make_scores({BASE: values}, seeds=n))[-1] for n in (1, 3))
    assert (one.low, one.high) == pytest.approx((three.low, three.high))
    assert (one.low, one.high) == pytest.approx(bootstrap_interval(values))
    assert three.count == 30
    assert three.num_seeds == 3
    assert three.std != one.std


def test_summary_of_one_picture_and_of_constant_scores() -> None:
    (row,) = [row for row in summary_table(make_scores({BASE: [20.0]})) if row.category == "all"]
    assert (row.mean, row.std, row.count, row.low) == (20.0, None, 1, None)
    row = summary_table(make_scores({BASE: [20.0] * 8}))[-1]
    assert (row.std, row.low, row.high) == (0.0, 20.0, 20.0)


def test_paired_difference_by_hand() -> None:
    base, ours = [20, 22, 24, 20, 22, 24, 30, 30], [19, 20, 25, 20, 21, 22, 27, 29]
    scores = make_scores({BASE: base, "r4": ours}, seeds=2)
    found = paired_differences(scores, "r4")
    differences = np.subtract(ours, base)
    assert found.difference == pytest.approx(-9 / 8)
    assert found.std == pytest.approx(differences.std(ddof=1))
    assert found.smallest_detectable == pytest.approx(2.8 * differences.std(ddof=1) / math.sqrt(8))
    assert (found.num_prompts, found.num_seeds, found.share_below, found.share_above) == (8, 2, 6 / 8, 1 / 8)
    assert [item.difference for item in found.per_prompt] == pytest.approx(differences)
    assert (found.low, found.high) == pytest.approx(bootstrap_interval(differences))
    assert found.is_shown
    assert found == paired_differences(scores, "r4")
    back = paired_differences(scores, BASE, "r4")
    assert back.difference == -found.difference
    assert back.share_above == found.share_below
    abstract = paired_differences(scores, "r4", category="abstract")
    assert abstract.difference == pytest.approx(-7 / 4)
    assert abstract.num_prompts == 4
    assert abstract.low is None
    assert [item.category for item in abstract.per_prompt] == ["abstract"] * 4


def test_paired_difference_of_one_prompt_and_of_equal_scores() -> None:
    one = paired_differences(make_scores({BASE: [20], "r4": [21]}), "r4")
    assert (one.difference, one.low, one.std, one.smallest_detectable, one.is_shown) == (
        1.0,
        None,
        None,
        None,
        False,
    )
    same = paired_differences(make_scores({BASE: [20.0] * 7, "r4": [20.0] * 7}), "r4")
    assert (same.low, same.high, same.std, same.share_below, same.share_above, same.is_shown) == (
        0,
        0,
        0,
        0,
        0,
        False,
    )


def test_unequal_prompts_or_seeds_and_unknown_names_are_refused() -> None:
    scores = Scores.from_rows(
        [
            *make_scores({BASE: [1, 2, 3], "r4": [1, 2, 3]}).rows,
            make_row("r8", 0, 1.0),
            make_row("r8", 0, 1.0, seed=7),
        ],
        SCORER,
    )
    with pytest.raises(RunError, match="r8 has no picture of abstract prompt 0, seed 0, which base has"):
        paired_differences(scores, "r8")
    with pytest.raises(RunError, match="r4 has no picture of normal prompt 0, seed 7, which r8 has"):
        paired_differences(
            Scores.from_rows(
                [r for r in scores.rows if r.prompt_index == 0 and r.category == "normal"], SCORER
            ),
            "r4",
            "r8",
        )
    with pytest.raises(
        RunError, match="'r99' has no scores in category 'all': scored there are base, r4, r8"
    ):
        paired_differences(scores, "r99")
    with pytest.raises(RunError, match="'r8' has no scores in category 'abstract'"):
        paired_differences(scores, "r8", category="abstract")


def test_planned_contrasts_are_adjusted_together() -> None:
    base = draws(26)
    scores = make_scores(
        {BASE: base, "r4": base + draws(0.1, std=1, seed=1), "r16": base - 1, "r64": base - 6}
    )
    contrasts = planned_contrasts(scores, resamples=2000)
    pairs = [(c.difference.arm, c.difference.against) for c in contrasts]
    assert pairs == [("r4", BASE), ("r16", BASE), ("r64", BASE), ("r16", "r4"), ("r64", "r16")]
    np.testing.assert_allclose([c.p_adjusted for c in contrasts], holm([c.p_value for c in contrasts]))
    assert contrasts[2].p_value == pytest.approx(1 / 2001, rel=1.1)
    assert planned_contrasts(make_scores({BASE: base})) == []
    assert [c.difference.against for c in planned_contrasts(make_scores({"r4": base, "r16": base - 1}))] == [
        "r4"
    ]


# -- wording -------------------------------------------------------------------------------------------------


def reworded(**values: Any) -> str:
    model = paired_differences(make_scores({BASE: draws(26), "r64": draws(20, seed=1)}), "r64")
    shown = {"difference": -5.9, "low": -6.5, "high": -5.4, "smallest_detectable": 1.8, "num_prompts": 50}
    return describe_difference(dataclasses.replace(model, **{**shown, **values}))


def test_wording_of_differences() -> None:
    assert (
        reworded()
        == "r64 scores 5.9 below base (95 % interval 5.4 to 6.5 below; 50 prompts, 1 training run)."
    )
    assert (
        reworded(difference=2.0, low=1.0, high=3.0)
        == "r64 scores 2.0 above base (95 % interval 1.0 to 3.0 above; 50 prompts, 1 training run)."
    )
    assert reworded(low=-1.0, high=0.4, difference=-0.3) == (
        "r64 against base: no difference shown; under 1.8 could not have been seen "
        "(mean difference -0.3, 95 % interval -1.0 to +0.4; 50 prompts, 1 training run)."
    )
    assert reworded(low=0.0, high=0.4, difference=0.2).startswith("r64 against base: no difference shown")
    assert "50 prompts x 4 seeds, 1 training run each" in reworded(against="r16", num_seeds=4)
    assert reworded(difference=0.02, low=0.01, high=0.031).startswith(
        "r64 scores 0.02 above base (95 % interval 0.01 to 0.03 above;"
    )
    assert reworded(low=None, high=None, num_prompts=1) == (
        "r64 scores 5.9 below base (1 prompt, 1 training run); no interval: it takes at least 6 prompts."
    )
    assert (
        reworded(share_below=0.0, share_above=0.0)
        == "r64 scores the same as base for every prompt (50 prompts, 1 training run)."
    )


# -- the verdict ---------------------------------------------------------------------------------------------

EASY = draws(26)


def study(**shifts: float) -> Scores:
    """The base and arms that lie `shift` from it, with a spread of 1 per prompt."""
    columns = {BASE: EASY}
    for n, (arm, shift) in enumerate(shifts.items()):
        noise = draws(0, std=1, seed=n + 10)
        columns[arm] = EASY + shift + noise - noise.mean()
    return make_scores(columns)


def test_highest_mean_of_the_arms_that_learned_the_style_is_kept() -> None:
    verdict = choose_arm(
        study(r4=-1, r16=-3, r64=-6), [probe("r4", 0.001), probe("r16", -0.01), probe("r64", -0.02)]
    )
    assert (verdict.keep, verdict.runner_up, verdict.headline) == ("r16", "r64", "Keep r16")
    assert verdict.rule == RULE
    assert verdict.style_measured
    assert verdict.against_base is not None
    assert verdict.against_base.difference == pytest.approx(-3)
    assert verdict.against_runner_up is not None
    assert verdict.against_runner_up.difference == pytest.approx(3)
    assert (verdict.num_prompts, verdict.num_seeds, verdict.num_training_seeds) == (50, 1, 1)
    assert verdict.reasons[0] == (
        "r4 was not shown to have learned the style: its held-out loss is 0.001 above the base's "
        "(95 % interval -0.001 to +0.003; 32 pictures, 1 training run)."
    )
    assert verdict.reasons[1].startswith("r16 learned the style: its held-out loss is 0.01 below the base's")
    assert "r16 has the highest mean CLIP similarity of the qualifying arms" in verdict.reasons[3]
    assert any(reason.startswith("r16 scores 3.0 below base (95 % interval") for reason in verdict.reasons)
    assert verdict.undecided == ("One training run per rank cannot separate rank from luck.",)


def test_lower_rank_is_kept_where_no_difference_is_shown() -> None:
    probes = [probe(arm, -0.01) for arm in ("r4", "r16", "r64")]
    verdict = choose_arm(study(r4=-2, r16=-0.15, r64=-0.1), probes)
    assert (verdict.keep, verdict.runner_up) == ("r16", "r64")
    assert any("So the lower rank is kept" in reason for reason in verdict.reasons)
    assert verdict.undecided[0].startswith("No difference shown between r16 and r64; under 0.")
    assert verdict.undecided[0].endswith(" could not have been seen.")
    assert choose_arm(study(r4=-2, r16=-0.1, r64=-0.15), probes).keep == "r16"  # ahead, and of lower rank
    assert choose_arm(study(r4=-0.2, r16=-0.15, r64=-0.1), probes).keep == "r4"  # the lowest of several
    assert choose_arm(study(r4=-2, r16=-3, r64=-0.1), probes).keep == "r64"


def test_nothing_is_kept_where_no_arm_learned_the_style() -> None:
    verdict = choose_arm(study(r4=2, r16=-1), [probe("r4", 0.0), probe("r16", math.nan)])
    assert (verdict.keep, verdict.runner_up, verdict.headline) == (None, None, "Keep the base")
    assert verdict.against_base is None
    assert verdict.against_runner_up is None
    assert "r16 did not learn the style: its held-out loss is not finite." in verdict.reasons
    assert verdict.reasons[-1].endswith("keep the base.")


def test_without_held_out_loss_the_rule_rests_on_clip_alone_and_says_so() -> None:
    others = [
        {"kind": "train", "step": 1, "arm": "r4", "loss": 1.0},
        probe("base", 0.0, epoch=0),
        probe("r4", -1, split="train"),
    ]
    verdict = choose_arm(study(r4=-1, r16=-3), others)
    assert (verdict.keep, verdict.style_measured, verdict.rule) == ("r4", False, RULE_WITHOUT_STYLE)
    assert verdict.undecided[0] == "Whether the arms learned the style: held-out loss was not measured."


def test_an_arm_without_its_own_record_does_not_qualify() -> None:
    verdict = choose_arm(study(r4=-1, r16=-3), [probe("r16", -0.01)])
    assert verdict.keep == "r16"
    assert verdict.runner_up is None
    assert "r4: held-out loss not measured." in verdict.reasons
    assert any("r16 is the only one of the qualifying arms" in reason for reason in verdict.reasons)


def test_failed_arms_are_named() -> None:
    verdict = choose_arm(study(r4=-1), [probe("r4", -0.01), probe("r64", math.nan)], failed=["r32"])
    assert verdict.keep == "r4"
    assert verdict.reasons[:2] == tuple(
        f"{arm} failed: it has no pictures, so it was not compared." for arm in ("r32", "r64")
    )
    nothing = choose_arm(study(), [probe("r4", -0.01)])
    assert nothing.keep is None
    assert "No arm has pictures: there is nothing to compare." in nothing.reasons
    assert nothing.num_training_seeds == 0
    assert choose_arm(Scores.from_rows([], SCORER), []).keep is None


def test_a_missing_base_is_said() -> None:
    scores = Scores.from_rows([row for row in study(r4=-1, r16=-3).rows if row.arm != BASE], SCORER)
    verdict = choose_arm(scores, [probe("r4", -0.01), probe("r16", -0.01)])
    assert verdict.keep == "r4"
    assert verdict.against_base is None
    assert "The base has no pictures: the difference to it was not measured." in verdict.reasons


def test_few_prompts_decide_nothing() -> None:
    scores = make_scores({BASE: [20, 21], "r4": [19, 20], "r16": [20, 20.5]})
    verdict = choose_arm(scores, [probe("r4", -0.01), probe("r16", -0.01)])
    assert verdict.keep == "r4"  # no difference to the lower rank was shown
    assert (
        "Whether there is a difference between r4 and r16: no interval from 2 prompts." in verdict.undecided
    )
    json.dumps(scores_as_dict(scores, verdict), allow_nan=False)


def test_training_seeds_are_counted_per_setting() -> None:
    first = study(r4=-1, r16=-3)
    again = [
        dataclasses.replace(row, arm=f"{row.arm}-s1", training_seed=1)
        for row in first.rows
        if row.arm != BASE
    ]
    both = Scores.from_rows([*first.rows, *again], SCORER)
    assert choose_arm(both, []).num_training_seeds == 2
    assert not any("luck" in sentence for sentence in choose_arm(both, []).undecided)
    lr = [dataclasses.replace(row, arm="r4-lr1", lr=1e-4) for row in first.rows if row.arm == "r4"]
    undecided = choose_arm(Scores.from_rows([*first.rows, *lr], SCORER), []).undecided
    assert "One training run per setting cannot separate setting from luck." in undecided
    assert (
        choose_arm(study(r4=-1), []).undecided[-1]
        == "One training run cannot say how another seed of the same setting would score."
    )


def test_style_is_read_from_the_last_held_out_record_of_all_bands() -> None:
    records = [
        probe("r4", -0.5, epoch=2), probe("r4", 0.3, epoch=3), probe("r4", -0.1, epoch=1),
        probe("r4", -9, epoch=9, band="0-250"), probe("r4", -9, epoch=9, split="train"), probe("r4", -9, epoch=9, conditional=False),
        probe("base", 0, epoch=0), {"kind": "train", "arm": "r8", "step": 1},
    ]  # fmt: skip
    styles = read_styles(records)
    assert list(styles) == ["r4"]
    assert styles["r4"].difference == 0.3
    assert not styles["r4"].is_learned
    assert not read_styles([probe("r4", -0.01, half=0.02)])["r4"].is_learned  # the interval reaches 0
    assert not read_styles([probe("r4", -0.01, difference_high=None)])["r4"].is_learned


def test_no_text_says_significant_or_best() -> None:
    scores = study(r4=-0.1, r16=0, r64=-6)
    probes = [probe("r4", -0.01), probe("r16", -0.01), probe("r64", 0.01)]
    text = scores_as_markdown(scores, choose_arm(scores, probes)) + json.dumps(
        scores_as_dict(scores, choose_arm(scores, probes))
    )
    assert "significant" not in text.lower()
    assert " best" not in text.lower()


# -- forms ---------------------------------------------------------------------------------------------------


def test_dict_form_is_json_with_the_verdict() -> None:
    scores = with_calibration(study(r4=-1, r16=-3))
    verdict = choose_arm(scores, [probe("r4", -0.01), probe("r16", -0.01)])
    values = json.loads(json.dumps(scores_as_dict(scores, verdict), allow_nan=False))
    assert values["verdict"]["keep"] == "r4"
    assert values["num_truncated"] == 2
    assert values["scorer"] == SCORER
    assert values["verdict"]["against_base"]["sentence"] == describe_difference(verdict.against_base)  # type: ignore[arg-type]
    assert "per_prompt" not in values["verdict"]["against_base"]
    assert {row["arm"] for row in values["summary"]} == {BASE, "r4", "r16", NOISE, SHUFFLED, REAL}
    assert [(c["arm"], c["against"]) for c in values["contrasts"]] == [
        ("r4", BASE),
        ("r16", BASE),
        ("r16", "r4"),
    ]
    assert scores_as_dict(scores)["verdict"] is None


def test_markdown_form_is_one_aligned_table() -> None:
    scores = with_calibration(study(r4=-1, r16=-3))
    lines = scores_as_markdown(scores).splitlines()
    assert len(lines) == 2 + 6
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("|")[1:5] == [
        part.ljust(len(cell))
        for part, cell in zip([" arm", " normal", " abstract", " all"], lines[0].split("|")[1:5], strict=True)
    ]
    assert "| -1.00 " in next(line for line in lines if line.startswith("| r4 "))
    text = scores_as_markdown(scores, choose_arm(scores, []))
    assert text.startswith("Keep r4.\n\n| arm")
    assert f"Rule: {RULE_WITHOUT_STYLE}" in text
    assert "Not decided:\n- " in text
