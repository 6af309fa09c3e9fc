"""Rows of a sweep: their order, their file, means over prompts."""

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorascope.errors import RunError, StorageError
from lorascope.evaluation.row_files import write_rows
from lorascope.evaluation.sweep_rows import (
    SCALED_INTRUDERS,
    TRAINED,
    Discrepancy,
    Point,
    StyleFacts,
    Sweep,
    SweepRow,
    cut_to,
    name_of,
    order_rows,
    prompt_means,
    rank_of_cut,
    read_sweep,
    write_sweep,
)
from lorascope.run_folder import RunDir

ROW = SweepRow(
    kind="point",
    arm="r4",
    rank=4,
    alpha=8.0,
    lr=1e-3,
    training_seed=0,
    epoch="last",
    strength=0.5,
    guidance=7.5,
    unconditional="own",
    category="normal",
    prompt_index=0,
    prompt="a cat",
    seed=0,
    clip_score=30.0,
    style=0.25,
    image="sweep/r4/last-s0.50-g7.5/normal-000-0.png",
    image_digest="0" * 64,
)
BASE_ROW = dataclasses.replace(ROW, arm="base", rank=0, alpha=None, lr=None, training_seed=None, strength=0.0)
SWEEP = Sweep(
    (
        BASE_ROW,
        dataclasses.replace(ROW, strength=0.25),
        ROW,
        dataclasses.replace(ROW, prompt_index=1, style=None),
        dataclasses.replace(ROW, guidance=1.0, strength=1.0),
        dataclasses.replace(ROW, weights=cut_to(2)),
        dataclasses.replace(BASE_ROW, kind="shuffled", clip_score=2.0),
    ),
    {"model": "tiny"},
    StyleFacts(0.9, 2, 12, None, {"white": 0.1}),
    {"r4/last-s0.50-g7.5": Discrepancy(0.1, 0.5)},
)


def test_points_name_the_folders_of_their_pictures() -> None:
    assert Point("r4", "best", 0.5, 7.5).folder == "best-s0.50-g7.5"
    assert Point("r4", guidance=1.0, unconditional="base").folder == "last-s1.00-g1-base"
    assert Point("r4", weights=SCALED_INTRUDERS).folder == "last-s1.00-g7.5-scaled-intruders"
    assert Point("r4", weights=cut_to(2)).folder == "last-s1.00-g7.5-cut-to-r2"
    assert name_of(ROW.point) == "r4/last-s0.50-g7.5"
    assert [rank_of_cut(weights) for weights in (cut_to(16), TRAINED, "cut to rx")] == [16, None, None]


def test_interventions_are_told_from_what_an_arm_is_used_as() -> None:
    swapped, edited = Point("r4", unconditional="base"), Point("r4", weights=SCALED_INTRUDERS)
    assert swapped.is_intervention and edited.is_intervention
    assert not Point("r4", "best", 0.5, 1.0).is_intervention


def test_a_sweep_is_read_as_it_was_written_in_its_order(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_sweep(run, dataclasses.replace(SWEEP, rows=SWEEP.rows[::-1]))
    read = read_sweep(run)
    assert read == dataclasses.replace(SWEEP, rows=order_rows(SWEEP.rows))
    assert read.arms == ("r4",) and read.points[0].arm == "base" and len(read.points) == 5
    assert [row.kind for row in read.rows][-1] == "shuffled" and read.shuffled == (SWEEP.rows[-1],)
    assert [row.prompt_index for row in read.of(ROW.point)] == [0, 1]
    content = run.sweep_parquet.read_bytes()
    write_sweep(run, read)
    assert run.sweep_parquet.read_bytes() == content


@pytest.mark.parametrize("change", [{"clip_score": float("nan")}, {"style": float("inf")}])
def test_a_score_that_is_not_finite_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(RunError, match=r"normal-000-0.png: its score is not finite: delete the picture"):
        order_rows([dataclasses.replace(ROW, **change)])


def test_a_row_that_stands_twice_is_refused() -> None:
    with pytest.raises(RunError, match=r"stands twice in the sweep: diagnose this run again"):
        order_rows([ROW, ROW])


def test_a_missing_or_damaged_file_is_told(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(StorageError, match=r"sweep.parquet: not there: diagnose this run first"):
        read_sweep(run)
    write_sweep(run, SWEEP)
    table = pq.read_table(run.sweep_parquet)
    column = table.schema.get_field_index("clip_score")
    scores = pa.array([value + 1 for value in table["clip_score"].to_pylist()], pa.float64())
    pq.write_table(table.set_column(column, table.schema.field(column), scores), run.sweep_parquet)
    with pytest.raises(StorageError, match=r"damaged \(its content is not what was written, by its digest\)"):
        read_sweep(run)
    pq.write_table(table.replace_schema_metadata({"lorascope": '{"scorer": {}}'}), run.sweep_parquet)
    with pytest.raises(StorageError, match=r"damaged \(no style\): delete it and diagnose this run again"):
        read_sweep(run)


def test_a_file_without_weights_holds_adapters_as_trained(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    trained = [row for row in SWEEP.rows if row.weights == TRAINED]
    write_sweep(run, SWEEP)
    schema = pq.read_schema(run.sweep_parquet)
    earlier = schema.remove(schema.get_field_index("weights"))
    rows = [dataclasses.asdict(row) for row in trained]
    for row in rows:
        del row["weights"]
    facts = {"scorer": dict(SWEEP.scorer), "style": dataclasses.asdict(SWEEP.style), "discrepancies": {}}
    write_rows(run.sweep_parquet, earlier, rows, facts)
    assert read_sweep(run).rows == order_rows(trained)


def test_prompt_means_leave_out_what_has_no_value() -> None:
    rows = [ROW, dataclasses.replace(ROW, seed=1, clip_score=20.0, style=0.75), SWEEP.rows[3]]
    assert prompt_means(rows, "clip_score") == {("normal", 0): 25.0, ("normal", 1): 30.0}
    assert prompt_means(rows, "style") == {("normal", 0): 0.5}
