"""The front in the report holds every point, and tells what it does not draw."""

from dataclasses import replace

from lorascope.evaluation.sweep_rows import read_sweep, write_sweep
from lorascope.report.evidence import Facts
from lorascope.report.figures import build_figures
from lorascope.run_folder import RunDir


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
