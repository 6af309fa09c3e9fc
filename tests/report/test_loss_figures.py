"""Figures of losses hold the numbers of the metrics; curves are smoothed and thinned."""

from lorascope.report.evidence import Facts
from lorascope.report.figures import build_figures
from lorascope.report.loss_figures import smooth, thin
from lorascope.run_folder import JsonLines, RunDir


def test_the_table_by_timestep_holds_the_numbers_of_the_probes(two_arm_run: RunDir) -> None:
    figure = build_figures(Facts(two_arm_run))["probe-bands"]
    records = [
        r
        for r in JsonLines(two_arm_run.metrics_jsonl).read()
        if r["kind"] == "probe" and r["arm"] == "r16" and r["step"] == 80
    ]
    for row in figure.table.rows:
        conditional = row.cells[1].text == "with caption"
        if row.cells[0].text == "r16":
            (record,) = [
                r
                for r in records
                if r["split"] == "heldout"
                and r["band"] == row.cells[2].text
                and r["conditional"] == conditional
            ]
            assert [cell.value for cell in row.cells[3:]] == [
                record[key] for key in ("loss", "difference", "difference_low", "difference_high")
            ]


def test_smooth_is_a_centred_mean() -> None:
    assert smooth([1.0, 2.0, 3.0, 4.0], 1) == [1.0, 2.0, 3.0, 4.0]
    assert smooth([0.0, 3.0, 6.0], 3) == [1.5, 3.0, 4.5]
    x, y = thin(range(1000), range(1000))
    assert len(x) == 160
    assert (x[0], x[-1]) == (0, 999)
    assert x == y
