"""All figures of the report, in their order."""

from lorascope.report.adapter_figures import cost_figure, layers_figure
from lorascope.report.canvas import looks_of
from lorascope.report.evidence import Facts
from lorascope.report.figure import Figure
from lorascope.report.front_figure import front_figure
from lorascope.report.loss_figures import bands_figure, epochs_figure, loss_figure
from lorascope.report.score_figures import effect_figure, gain_figure, scale_figure


def build_figures(facts: Facts) -> dict[str, Figure]:
    """All figures for which the run folder has numbers, by key."""
    looks = looks_of(list(facts.settings), facts.detailed)
    drawn = (
        front_figure(facts, looks),
        effect_figure(facts, looks),
        gain_figure(facts, looks),
        scale_figure(facts, looks),
        loss_figure(facts, looks),
        epochs_figure(facts, looks),
        bands_figure(facts, looks),
        cost_figure(facts, looks),
        layers_figure(facts),
    )
    return {figure.key: figure for figure in drawn if figure is not None}
