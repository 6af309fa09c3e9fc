"""The front in the report holds every point, and tells what it does not draw."""

from dataclasses import replace
from pathlib import Path

from lorascope.evaluation.sweep_rows import read_sweep, write_sweep
from lorascope.report.canvas import COLOURS
from lorascope.report.evidence import Facts
from lorascope.report.figures import build_figures
from lorascope.run_folder import RunDir
from synthetic_run import make_run


def test_the_front_figure_holds_every_point_and_marks_the_kept_one(two_arm_run: RunDir) -> None:
    facts = Facts(two_arm_run)
    figure, front = build_figures(facts)["front"], facts.front
    assert front is not None
    for row, point in zip(figure.table.rows, front.points, strict=True):
        assert [cell.text for cell in row.cells[:2]] == [point.arm, point.epoch]
        shares = [100 * value for value in (point.retention.value, point.retention.low)]  # type: ignore[operator]
        assert [cell.value for cell in row.cells[2:5]] == [point.strength, *shares]
        assert [cell.value for cell in row.cells[6:9]] == [
            point.style.value,
            point.style.low,
            point.style.high,
        ]
        assert row.marked == ((point.arm, point.strength) == ("r16", 0.75))
    assert "r16: at 0.25 " in figure.alt and "r64: at 0.25 " in figure.alt
    assert "price: at most 10 % lost" in figure.drawing.page_svg
    assert "Open marks" not in figure.description and "study's own is 10 %" in figure.description


def test_adapters_of_the_best_epoch_are_open_marks(copied: RunDir) -> None:
    sweep = read_sweep(copied)
    best = [replace(row, epoch="best") for row in sweep.rows if (row.arm, row.strength) == ("r64", 0.5)]
    lost = [replace(row, clip_score=0.0) if row.arm == "r64" else row for row in sweep.rows]
    write_sweep(copied, replace(sweep, rows=(*lost, *best)))
    figure = build_figures(Facts(copied))["front"]
    assert "Open marks are of the adapter with the lowest held-out loss." in figure.description
    assert "Marks under \N{MINUS SIGN}20 % are not drawn; the table has them." in figure.description
    assert "best" in [row.cells[1].text for row in figure.table.rows]


def test_several_kinds_are_the_series_of_the_front_figure(tmp_path: Path) -> None:
    run = make_run(tmp_path / "kinds", num_prompts=6, num_steps=8, side_px=16, kinds=("lora", "dora"))
    figure = build_figures(Facts(run))["front"]
    svg = figure.drawing.file_svg.decode()
    assert (
        all(f">{word}</text>" in svg for word in ("LoRA", "DoRA", "r16", "r64-dora")) and "T-LoRA" not in svg
    )
    # DoRA has its own colour, whichever kinds are beside it.
    assert [colour for colour in COLOURS if colour in svg] == [COLOURS[0], COLOURS[2]]
    assert "Here colour and shape are the arm's kind" in figure.description
    assert "r64-dora (DoRA): at 0.25 " in figure.alt
    kind = [column.name for column in figure.table.columns].index("kind")
    assert {(row.cells[0].text, row.cells[kind].text) for row in figure.table.rows} == {
        *(("r16", "LoRA"), ("r64", "LoRA"), ("r16-dora", "DoRA"), ("r64-dora", "DoRA")),
    }


def test_of_many_arms_of_several_kinds_the_detailed_ones_are_named(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "many",
        ranks=(16,),
        lrs=(1e-4, 2e-4, 5e-4, 1e-3),
        num_prompts=6,
        num_steps=8,
        side_px=16,
        kinds=("lora", "dora"),
    )
    facts = Facts(run)
    figure = build_figures(facts)["front"]
    svg = figure.drawing.file_svg.decode()
    named = {arm for arm in facts.arms if f">{arm}</text>" in svg}
    assert named == set(facts.detailed) and len(facts.arms) == 8
    assert "Named and thick are r16-" in figure.description and "Colours only for" not in figure.description


def test_a_study_of_one_kind_has_no_series(two_arm_run: RunDir) -> None:
    figure = build_figures(Facts(two_arm_run))["front"]
    assert "kind" not in figure.description + figure.alt
    assert "kind" not in [column.name for column in figure.table.columns]
