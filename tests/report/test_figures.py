"""The report's figures come in one order, and only those for which there are numbers."""

from lorascope.report.evidence import Facts
from lorascope.report.figures import build_figures
from lorascope.run_folder import RunDir


def test_figures_come_in_order(two_arm_run: RunDir) -> None:
    figures = build_figures(Facts(two_arm_run))
    expected = ["front", "effect", "scale", "loss", "probe-epochs", "probe-bands", "cost", "layers"]
    assert list(figures) == expected  # no gain: two arms lie on any curve
    assert all(figure.key == key for key, figure in figures.items())
