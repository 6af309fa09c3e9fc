"""The file of scores, and its tables against numbers worked out by hand."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorascope.errors import RunError, StorageError
from lorascope.evaluation.scores import (
    BASE,
    NOISE,
    REAL,
    SHUFFLED,
    Scores,
    paired_differences,
    planned_contrasts,
    read_scores,
    summary_table,
    write_scores,
)
from lorascope.evaluation.statistics import bootstrap_interval, holm
from lorascope.run_folder import RunDir
from synthetic_scores import SCORER, draws, make_row, make_scores, with_calibration


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
        "rank": pa.int32(),
        "prompt_index": pa.int32(),
        "seed": pa.int64(),
        "clip_score": pa.float64(),
        "training_seed": pa.int64(),
    }
    facts = json.loads(schema.metadata[b"lorascope"])
    assert len(facts.pop("digest")) == 64
    assert facts == {"scorer": SCORER, "num_truncated": 2}
    assert [row.arm for row in scores.rows] == [BASE] * 6 + ["r16"] * 6 + [NOISE] * 3 + [SHUFFLED] * 3 + [
        REAL
    ] * 3
    base, calibration = scores.of(BASE)[0], scores.of(REAL)[0]
    assert (base.rank, base.alpha, base.lr, base.training_seed) == (0, None, None, None)
    assert (calibration.rank, calibration.training_seed) == (None, None)


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


def rewrite(run: RunDir, change: Callable[[pa.Table], pa.Table] = lambda table: table, **facts: Any) -> None:
    """Write the file of scores again with other rows or facts; None takes a fact out."""
    table = pq.ParquetFile(run.scores_parquet).read()
    known = json.loads(table.schema.metadata[b"lorascope"])
    kept = {key: value for key, value in {**known, **facts}.items() if value is not None}
    table = change(table).replace_schema_metadata({"lorascope": json.dumps(kept)})
    pq.write_table(table, run.scores_parquet)


def set_first(name: str, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = [value, *table[name].to_pylist()[1:]]
        field = table.schema.field(name)
        return table.set_column(table.schema.get_field_index(name), field, [pa.array(values, field.type)])

    return change


def test_scores_of_0_1_0_without_a_digest_are_read(tmp_path: Path) -> None:
    run, scores = RunDir(tmp_path), make_scores({BASE: [10, 12], "r4": [1, 2]})
    write_scores(run, scores)
    rewrite(run, digest=None, num_truncated=None)
    assert read_scores(run).rows == scores.rows


@pytest.mark.parametrize(
    ("change", "facts", "reason"),
    [
        (set_first("clip_score", 99.0), {}, "its content is not what was written, by its digest"),
        (set_first("prompt", "other"), {}, "its content is not what was written, by its digest"),
        (lambda table: table, {"num_truncated": 7}, "its content is not what was written, by its digest"),
        (set_first("clip_score", None), {"digest": None}, "a row without clip_score"),
        (set_first("arm", None), {"digest": None}, "a row without arm"),
        (lambda table: table, {"scorer": [1]}, "no scorer"),
        (lambda table: table, {"num_truncated": "1"}, "`num_truncated` is no number"),
    ],
)
def test_scores_that_were_changed_are_refused(
    change: Callable[[pa.Table], pa.Table], facts: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    run = RunDir(tmp_path)
    write_scores(run, make_scores({BASE: [10, 12], "r4": [1, 2]}))
    rewrite(run, change, **facts)
    with pytest.raises(StorageError) as error:
        read_scores(run)
    assert str(error.value) == f"{run.scores_parquet}: damaged ({reason}): delete it and score this run again"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_the_place_of_the_scores_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "scores.parquet")
    with pytest.raises(StorageError, match=r"scores\.parquet: is a named pipe, where a file is needed"):
        read_scores(RunDir(tmp_path))


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
