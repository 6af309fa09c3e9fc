"""Plots of curves over steps and the like, with bands around them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorascope.report.canvas import INK, MUTED, Drawing, Look, add_legend, canvas, finish, whole_numbers


@dataclass(frozen=True)
class Line:
    """One curve of a line plot, with a band around it where `low` and `high` are given."""

    facet: str
    arm: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    faint: bool = False


def draw_lines(
    lines: Sequence[Line],
    looks: Mapping[str, Look],
    xlabel: str,
    ylabels: Mapping[str, str],
    key: str,
    heights: Sequence[float] = (),
    zero: Sequence[str] = (),
) -> Drawing:
    """Curves over training, one facet below the other; facets in `zero` get a line at 0, the base."""
    facets = list(dict.fromkeys(line.facet for line in lines))
    ratios = list(heights or [1.0] * len(facets))
    named = [arm for arm in dict.fromkeys(line.arm for line in lines) if looks[arm].colour != MUTED]
    num_rows = math.ceil(len(named) / 3)
    with canvas(len(facets), 1, 0.5 + 0.16 * num_rows + 1.35 * sum(ratios), sharex=True, ratios=ratios) as (
        figure,
        grid,
    ):
        for axes, facet in zip(grid, facets, strict=True):
            if facet in zero:
                axes.axhline(0, color=INK, linewidth=0.9)
            for line in (line for line in lines if line.facet == facet):
                look = looks[line.arm]
                if line.low:
                    axes.fill_between(line.x, line.low, line.high, color=look.colour, alpha=0.16, linewidth=0)
                every = max(1, len(line.x) // 6)
                axes.plot(
                    line.x,
                    line.y,
                    color=look.colour,
                    linestyle=look.dash,
                    marker=look.marker if look.colour != MUTED else "",
                    markersize=3.4,
                    markevery=every,
                    linewidth=1.3 if look.colour != MUTED else 0.5,
                    alpha=0.5 if line.faint else 1,
                    fillstyle="none" if line.faint else "full",
                )
            axes.set_title(facet)
            axes.set_ylabel(ylabels[facet])
        grid[-1].set_xlabel(xlabel)
        grid[-1].xaxis.set_major_locator(whole_numbers(6))
        add_legend(figure, named, looks)
        return finish(figure, key)
