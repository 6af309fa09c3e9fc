"""Figures of scores hold the numbers that `score` gives."""

from lorascope.evaluation.scores import paired_differences, read_scores
from lorascope.report.evidence import Facts
from lorascope.report.figures import build_figures
from lorascope.run_folder import RunDir


def test_the_table_of_differences_holds_the_numbers_of_score(two_arm_run: RunDir) -> None:
    figure = build_figures(Facts(two_arm_run))["effect"]
    for row in figure.table.rows:
        effect = paired_differences(
            read_scores(two_arm_run), row.cells[0].text, category=row.cells[1].text, resamples=500
        )
        assert [cell.value for cell in row.cells[2:]] == [
            effect.num_prompts,
            effect.difference,
            effect.low,
            effect.high,
            effect.smallest_detectable,
            effect.share_above,
        ]
