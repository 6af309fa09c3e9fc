"""Kinds of adapter side by side: costs, who is near whom, and the scores the tables hold."""

from pathlib import Path
from typing import get_args

import pytest

from lorascope.arms import Kind
from lorascope.evaluation.front import trace_front
from lorascope.evaluation.sweep_rows import read_sweep
from lorascope.report.canvas import COLOURS
from lorascope.report.conditions import Condition, judge_conditions
from lorascope.report.evidence import NOT_MEASURED, Facts
from lorascope.report.kinds import (
    NAMES,
    KindCost,
    Span,
    build_kind_tables,
    candidates_near,
    costs_by_kind,
    kind_texts,
    near_groups,
    training_seconds,
)
from lorascope.report.page import build_report
from lorascope.report.tables import Table, build_arms_table
from lorascope.run_folder import RunDir
from lorascope.store import read_json, write_json
from synthetic_run import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run of three kinds in two ranks, LoRA and T-LoRA in one pass; to be read alone."""
    return make_run(
        tmp_path_factory.mktemp("runs") / "kinds",
        num_prompts=6,
        num_steps=8,
        side_px=16,
        kinds=("lora", "tlora", "dora"),
    )


@pytest.fixture
def to_change(tmp_path: Path) -> RunDir:
    """A trained run of two kinds that was neither scored nor diagnosed."""
    return make_run(
        tmp_path / "two-kinds", num_steps=8, stages=("train",), with_probes=False, kinds=("lora", "dora")
    )


def change(run: RunDir, arm: str, **values: object) -> None:
    path = run.adapters_dir / arm / "training.json"
    write_json(path, {**read_json(path), **values})


def rows_of(table: Table) -> list[dict[str, str]]:
    names = [column.name for column in table.columns]
    return [dict(zip(names, (cell.text for cell in row.cells), strict=True)) for row in table.rows]


def test_every_kind_has_a_name_and_a_colour() -> None:
    assert set(get_args(Kind)) <= set(NAMES)
    assert len(NAMES) <= len(COLOURS)


def test_costs_are_by_kind_and_rank(run: RunDir) -> None:
    facts = Facts(run)
    costs = costs_by_kind(facts)
    assert [(cost.kind, cost.rank) for cost in costs] == [
        *(("lora", 16), ("lora", 64), ("tlora", 16), ("tlora", 64), ("dora", 16), ("dora", 64)),
    ]
    own = facts.training["r64-dora"]
    assert (len(own["group"]), len(facts.training["r64"]["group"])) == (2, 4)
    step_s = own["run_time_s"] / 2 / 8  # two arms in its pass, eight steps
    assert costs[-1] == KindCost(
        kind="dora",
        rank=64,
        arms=("r64-dora",),
        parameters=Span(4_224_000, 4_224_000),
        step_s=Span(step_s, step_s),
        memory_bytes=Span(own["peak_memory_bytes"], own["peak_memory_bytes"]),
        file_bytes=Span(16_896_000, 16_896_000),
        beside=(),
    )
    assert costs[0].beside == ("tlora",) and costs[2].beside == ("lora",)
    base, first, *_ = rows_of(build_kind_tables(facts)[0])
    assert (base["kind"], base["parameters"], base["file"]) == ("base, U-Net", "12,600,000", "")
    assert (first["kind"], first["rank"], first["parameters"], first["file"]) == (
        *("LoRA", "16", "960,000", "3.84 MB"),
    )
    assert first["in one pass with"] == "T-LoRA"


def test_costs_of_arms_that_differ_go_from_the_lowest_to_the_highest(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "lrs",
        ranks=(16,),
        lrs=(2e-4, 5e-4),
        num_steps=8,
        stages=("train",),
        with_probes=False,
        kinds=("lora", "dora"),
    )
    change(run, "r16-lr0.0002", file_bytes=1_000_000, steps=16)
    change(run, "r16-lr0.0005", file_bytes=2_500_000)
    first = costs_by_kind(Facts(run))[0]
    assert first.arms == ("r16-lr0.0002", "r16-lr0.0005") and first.file_bytes == Span(1e6, 2.5e6)
    assert first.step_s is not None and first.step_s.high == 2 * first.step_s.low
    table = build_kind_tables(Facts(run))[0]
    assert rows_of(table)[1]["file"] == "1.00 MB to 2.50 MB"


def test_near_arms_are_of_several_kinds_and_an_arm_between_stands_in_two_groups() -> None:
    kinds = {"a": "lora", "b": "dora", "c": "lora", "d": "dora", "e": "lora", "f": "lora"}
    amounts = {"f": 1000.0, "e": 900.0, "d": 300.0, "c": 125.0, "b": 110.0, "a": 100.0}
    assert near_groups(amounts, kinds) == [("a", "b", "c")]
    assert near_groups({**amounts, "c": 130.0}, kinds) == [("a", "b"), ("b", "c")]
    assert near_groups({"a": 100.0, "b": 125.0}, kinds) == [("a", "b")]
    assert near_groups({"a": 100.0, "b": 125.1}, kinds) == []
    assert near_groups({"a": 100.0, "b": 140.0}, kinds, factor=1.5) == [("a", "b")]
    assert near_groups({}, {}) == []


def test_candidates_have_the_scores_of_the_rule_of_the_study(run: RunDir) -> None:
    facts = Facts(run)
    sizes = {arm: float(facts.training[arm]["file_bytes"]) for arm in facts.arms}
    found = candidates_near(facts, sizes)
    assert [(item.group, item.arm) for item in found] == [
        *((1, "r16"), (1, "r16-tlora"), (1, "r16-dora")),
        *((2, "r64"), (2, "r64-tlora"), (2, "r64-dora")),
    ]
    front = trace_front(read_sweep(run), facts.alike, facts.config.score.resamples)
    assert facts.verdict is not None and facts.diagnosis is not None
    for item in found:
        assert item.point is not None and item.point in front.of(item.arm)
        chosen = facts.diagnosis.arms[item.arm].signals.chosen
        assert item.counts == (chosen is not None)
        assert (item.point.epoch, item.point.strength) == (chosen or ("last", 1.0))
        assert item.loss == facts.heldout_losses[item.arm]
        assert item.effect == facts.effects[item.arm, "all"]
    (kept,) = [item for item in found if item.arm == facts.verdict.keep]
    assert kept.point == facts.verdict.point


def test_tables_at_equal_size_and_time_hold_scores_with_intervals(run: RunDir) -> None:
    facts = Facts(run)
    _, sizes, times = build_kind_tables(facts)
    assert "files are at most 1.25 times apart, in groups from small to large" in sizes.caption
    assert "one training run, which tells nothing of its kind in general" in sizes.caption
    assert [row.starts for row in sizes.rows] == [False, False, False, True, False, False]
    assert [row.cells[0].text for row in sizes.rows if row.marked] == [facts.verdict.keep]  # type: ignore[union-attr]
    first = rows_of(sizes)[0]
    point = candidates_near(facts, {"r16": 1.0, "r16-dora": 1.0})[0].point
    assert point is not None and point.retention.value is not None
    kept = [100 * value for value in (point.retention.value, point.retention.low, point.retention.high)]  # type: ignore[operator]
    assert first["prompts kept, %"] == "{:.1f} ({:.1f} to {:.1f})".format(*kept)
    assert first["strength"] == f"{point.strength:g}"
    loss = facts.heldout_losses["r16"]
    shown = f"{loss.difference:+.4f} ({loss.low:+.4f} to {loss.high:+.4f})"
    assert first["held-out loss"] == shown.replace("-", "\N{MINUS SIGN}")
    assert "group" not in rows_of(times)[0]  # all six are near each other
    assert {row["arm"]: row["pass"] for row in rows_of(times)}["r16-dora"] == "2"
    assert times.rows[0].cells[2].value == training_seconds(facts, "r16")
    assert "equal times follow from this division" in times.caption


def test_arms_that_are_not_near_are_told_in_a_sentence(to_change: RunDir) -> None:
    change(to_change, "r16-dora", file_bytes=9_000_000, run_time_s=900.0)
    change(to_change, "r64-dora", file_bytes=90_000_000, run_time_s=900.0)
    costs, sizes, times = build_kind_tables(Facts(to_change))
    assert len(costs.rows) == 5
    assert (sizes.columns, sizes.rows) == ((), ())
    assert sizes.caption == "No two arms of different kinds have files at most 1.25 times apart."
    assert times.caption == "No two arms of different kinds have training times at most 1.25 times apart."
    report = build_report(to_change)
    page = report.html_path.read_text(encoding="utf-8")
    assert f'">{sizes.caption}</p>' in page
    assert f"### At equal file size\n\n{sizes.caption}\n" in report.md_path.read_text(encoding="utf-8")


def test_a_run_that_was_not_scored_has_its_costs_and_says_what_is_missing(to_change: RunDir) -> None:
    facts = Facts(to_change)
    assert len(kind_texts(facts)) == 1
    _, sizes, _ = build_kind_tables(facts)
    row = rows_of(sizes)[0]
    assert (row["CLIP minus base"], row["held-out loss"]) == (NOT_MEASURED, NOT_MEASURED)
    assert "strength" not in row


def test_without_a_sweep_scores_of_full_strength_stand_in_the_tables(tmp_path: Path) -> None:
    run = make_run(tmp_path / "scored", num_prompts=6, num_steps=8, side_px=16, kinds=("lora", "dora"))
    for path in (run.sweep_parquet, run.diagnosis_json):
        path.unlink()
    facts = Facts(run)
    effect = facts.effects["r16", "all"]
    shown = f"{effect.difference:+.2f} ({effect.low:+.2f} to {effect.high:+.2f})"
    row = rows_of(build_kind_tables(facts)[1])[0]
    assert row["CLIP minus base"] == shown.replace("-", "\N{MINUS SIGN}")


def test_an_arm_of_which_no_point_counts_stands_at_full_strength(run: RunDir) -> None:
    facts = Facts(run)
    facts.config = facts.config.model_copy(
        update={"verdict": facts.config.verdict.model_copy(update={"max_prompt_loss": 0.0})}
    )
    rows = rows_of(build_kind_tables(facts)[1])
    assert "1, none counts" in {row["strength"] for row in rows}


def test_texts_say_how_many_training_seeds_there_are(run: RunDir, tmp_path: Path) -> None:
    first, second = kind_texts(Facts(run))
    assert first.startswith(
        "LoRA, T-LoRA and DoRA were trained on the same pictures. Each setting has one tr"
    )
    assert "not of kinds in general" in first and "In brackets are 95 % intervals." in second
    seeds = make_run(
        tmp_path / "seeds",
        ranks=(16,),
        training_seeds=(0, 1),
        num_steps=8,
        stages=("train",),
        with_probes=False,
        kinds=("lora", "dora"),
    )
    assert "Each setting has 2 training seeds at most" in kind_texts(Facts(seeds))[0]


def test_a_failed_arm_is_in_no_table_of_kinds(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "failed",
        num_steps=48,
        stages=("train",),
        failed=("r64-dora",),
        with_probes=False,
        kinds=("lora", "dora"),
    )
    assert [cost.arms for cost in costs_by_kind(Facts(run))] == [("r16",), ("r64",), ("r16-dora",)]


def test_full_fine_tuning_has_neither_rank_nor_gain(tmp_path: Path) -> None:
    kinds: tuple[Kind, ...] = ("lora", "full")
    run = make_run(
        tmp_path / "full", (16, 64), num_steps=8, stages=("train",), with_probes=False, kinds=kinds
    )
    facts = Facts(run)
    assert rows_of(build_kind_tables(facts)[0])[-1]["kind"] == "full fine-tuning"
    assert rows_of(build_kind_tables(facts)[0])[-1]["rank"] == "full"
    full = {row["arm"]: row for row in rows_of(build_arms_table(facts))}["full"]
    assert (full["rank"], full["alpha"], full["gain"]) == ("full", "full", "none")
    assert facts.with_rank == ("r16", "r64")
    assert "(r64)" in gain_condition(facts).text and "full" not in gain_condition(facts).text
    one = make_run(tmp_path / "one", (16,), num_steps=8, stages=("train",), with_probes=False, kinds=kinds)
    condition = gain_condition(Facts(one))
    assert (condition.state, condition.text) == (
        NOT_MEASURED,
        "Fewer than two arms that finished have a rank.",
    )


def gain_condition(facts: Facts) -> Condition:
    return next(item for item in judge_conditions(facts) if item.name == "Same strength of the update")


def test_a_study_of_one_kind_has_no_section_of_kinds(two_arm_run: RunDir) -> None:
    assert build_kind_tables(Facts(two_arm_run)) == ()


def test_the_section_stands_in_page_and_markdown(run: RunDir) -> None:
    report = build_report(run)
    page, markdown = (path.read_text(encoding="utf-8") for path in (report.html_path, report.md_path))
    assert '<section id="kinds"' in page and '<a href="#kinds">Kinds</a>' in page
    assert page.count('<tr class="start">') + page.count('<tr class="role start">') == 1
    for title in ("What each kind costs", "At equal file size", "At equal training time"):
        assert f"<h3>{title}</h3>" in page and f"\n### {title}\n" in markdown
    assert "\n## 11 Kinds side by side\n" in markdown and "\n## 12 Reproduce\n" in markdown
