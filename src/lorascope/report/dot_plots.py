"""Plots of dots with their intervals: by arm, by band of timesteps, over the gain; scores and costs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorascope.report.canvas import (
    GRID,
    INK,
    MUTED,
    PAPER,
    SHADE,
    Drawing,
    Look,
    add_legend,
    canvas,
    finish,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_ROWS = 24  # arms of a plot; the tables hold all


@dataclass(frozen=True)
class Row:
    """One arm in one facet of a dot plot: its points, and the mean with its interval."""

    facet: str
    arm: str
    mean: float
    low: float | None = None
    high: float | None = None
    detectable: float | None = None
    points: tuple[float, ...] = ()


def draw_forest(
    rows: Sequence[Row], looks: Mapping[str, Look], xlabel: str, key: str = "effect", values: bool = True
) -> Drawing:
    """Differences from the base: a dot per prompt, mean and interval per arm, one facet below the other, 0 =
    base.
    """
    facets = list(dict.fromkeys(row.facet for row in rows))
    arms = list(dict.fromkeys(row.arm for row in rows))
    step_in = 0.34 if len(arms) <= 6 else 0.17
    with canvas(len(facets), 1, 0.42 + len(facets) * (0.3 + step_in * max(2, len(arms))), sharex=True) as (
        figure,
        grid,
    ):
        for axes, facet in zip(grid, facets, strict=True):
            axes.axvline(0, color=INK, linewidth=0.9)
            for row in (row for row in rows if row.facet == facet):
                place = arms.index(row.arm)
                _draw_forest_row(axes, row, place, looks[row.arm], wide=len(arms) <= 6)
                if values:
                    axes.annotate(
                        f"{row.mean:+.2f}".replace("-", "\N{MINUS SIGN}"),
                        (1.01, place),
                        xycoords=("axes fraction", "data"),
                        fontsize=7.8,
                        va="center",
                    )
            axes.set_title(facet)
            axes.set_yticks(range(len(arms)), arms)
            axes.set_ylim(len(arms) - 0.45, -0.55)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="y", visible=False)
        grid[-1].set_xlabel(xlabel)
        return finish(figure, key)


def _draw_forest_row(axes: "Axes", row: Row, place: int, look: Look, wide: bool) -> None:
    """One arm of `draw_forest`; in a wide row its dots are spread, so that they cover each other less."""
    named = look.colour != MUTED
    if row.detectable is not None:
        reach = row.detectable
        axes.barh(place, 2 * reach, left=-reach, height=0.82, color=SHADE, linewidth=0, zorder=0.5)
    heights = [place + (0.3 * math.sin(2.4 * i) if wide else 0.0) for i in range(len(row.points))]
    axes.scatter(row.points, heights, s=5, color=look.colour, alpha=0.5, linewidths=0, zorder=2)
    if row.low is not None and row.high is not None:
        axes.plot(
            [row.low, row.high],
            [place, place],
            color=look.colour,
            linewidth=2 if named else 1,
            solid_capstyle="butt",
            zorder=3,
        )
    axes.plot(
        row.mean,
        place,
        look.marker,
        color=look.colour,
        markersize=6 if named else 4,
        markeredgecolor=PAPER,
        markeredgewidth=0.8 if named else 0,
        zorder=4,
    )


def draw_scale(rows: Sequence[Row], looks: Mapping[str, Look], xlabel: str, key: str = "scale") -> Drawing:
    """Where scores lie on the scorer's axis: per source a mark per category at the mean, whiskers of one
    standard deviation.
    """
    arms = list(dict.fromkeys(row.arm for row in rows))
    facets = list(dict.fromkeys(row.facet for row in rows))
    with canvas(1, 1, 0.75 + 0.27 * len(arms)) as (figure, (axes,)):
        for row in rows:
            look = looks.get(row.arm, Look(MUTED, "o", "-"))
            lone = sum(other.arm == row.arm for other in rows) == 1
            place = arms.index(row.arm) + (0.0 if lone else 0.17 * (2 * facets.index(row.facet) - 1))
            marker = {"normal": "o", "abstract": "D"}.get(row.facet, "s")
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [place, place], color=look.colour, linewidth=0.9, alpha=0.75)
            fill = look.colour if row.facet != "abstract" else PAPER
            axes.plot(
                row.mean,
                place,
                marker,
                color=look.colour,
                markerfacecolor=fill,
                markersize=4.8 if marker != "D" else 4.2,
                markeredgewidth=1.1,
            )
        for facet in facets:
            marker = {"normal": "o", "abstract": "D"}.get(facet, "s")
            fill = INK if facet != "abstract" else PAPER
            axes.plot([], [], marker, color=INK, markerfacecolor=fill, markersize=4.4, label=facet)
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncol=len(facets),
            handletextpad=0.2,
            columnspacing=1.2,
            borderaxespad=0.1,
        )
        axes.set_yticks(range(len(arms)), arms)
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(xlabel)
        axes.xaxis.set_major_locator(whole_numbers(7))
        return finish(figure, key)


def draw_bands(
    rows: Mapping[str, Sequence[Row]], looks: Mapping[str, Look], xlabel: str, ylabel: str, key: str
) -> Drawing:
    """Differences from the base over ordered bands: facet -> rows whose `facet` is the band."""
    bands = list(dict.fromkeys(row.facet for group in rows.values() for row in group))
    arms = list(dict.fromkeys(row.arm for group in rows.values() for row in group))
    num_rows = math.ceil(len(arms) / 3)
    with canvas(len(rows), 1, 0.5 + 0.16 * num_rows + 1.3 * len(rows), sharex=True, sharey=True) as (
        figure,
        grid,
    ):
        for axes, (facet, group) in zip(grid, rows.items(), strict=True):
            axes.axhline(0, color=INK, linewidth=0.9)
            for row in group:
                look = looks[row.arm]
                place = bands.index(row.facet) + 0.6 * ((arms.index(row.arm) + 0.5) / len(arms) - 0.5)
                if row.low is not None and row.high is not None:
                    axes.plot([place, place], [row.low, row.high], color=look.colour, linewidth=1.6)
                axes.plot(
                    place,
                    row.mean,
                    look.marker,
                    color=look.colour,
                    markersize=5,
                    markeredgecolor=PAPER,
                    markeredgewidth=0.6,
                )
            axes.set_title(facet)
            axes.set_ylabel(ylabel)
            axes.set_xticks(range(len(bands)), bands)
            axes.grid(axis="x", visible=False)
        grid[-1].set_xlabel(xlabel)
        add_legend(figure, arms, looks, line=False)
        return finish(figure, key)


def draw_costs(
    costs: Mapping[str, Mapping[str, float]],
    reference: Mapping[str, Mapping[str, float]],
    looks: Mapping[str, Look],
    key: str = "cost",
) -> Drawing:
    """Panels of dots side by side, logarithmic: measure -> arm -> value; `reference` in the same units,
    hollow.
    """
    arms = list(dict.fromkeys(arm for values in costs.values() for arm in values))
    others = list(dict.fromkeys(arm for values in reference.values() for arm in values))
    step_in = 0.24 if len(arms) <= 6 else 0.16
    with canvas(1, len(costs), 0.62 + step_in * (len(arms) + len(others)), sharey=True) as (figure, grid):
        for axes, (measure, values) in zip(grid, costs.items(), strict=True):
            for arm, value in values.items():
                axes.plot(value, arms.index(arm), looks[arm].marker, color=looks[arm].colour, markersize=5)
            for arm, value in reference.get(measure, {}).items():
                axes.plot(
                    value, len(arms) + others.index(arm), "o", color=MUTED, fillstyle="none", markersize=4.6
                )
            shown = [*values.values(), *reference.get(measure, {}).values()]
            axes.set_xscale("log")
            low, high = min(shown) / 1.9, max(shown) * 1.9
            axes.set_xlim(low, high)
            ticks = _log_ticks(low, high)
            axes.set_xticks(ticks, [f"{tick:g}" if tick < 1e3 else f"{tick / 1000:g}k" for tick in ticks])
            axes.minorticks_off()
            axes.set_title(measure, fontsize=7.8)
            axes.set_yticks(range(len(arms) + len(others)), [*arms, *others])
            axes.set_ylim(len(arms) + len(others) - 0.4, -0.6)
            axes.tick_params(axis="y", length=0)
            if others:
                axes.axhline(len(arms) - 0.5, color=GRID, linewidth=0.8)
        return finish(figure, key)


def draw_gain(
    rows: Sequence[Row], gains: Mapping[str, float], looks: Mapping[str, Look], key: str = "gain"
) -> Drawing:
    """Differences from the base over the gain of the update, one facet below the other."""
    facets = list(dict.fromkeys(row.facet for row in rows))
    named = [arm for arm in dict.fromkeys(row.arm for row in rows) if looks[arm].colour != MUTED]
    with canvas(len(facets), 1, 0.5 + 0.16 * math.ceil(len(named) / 3) + 1.2 * len(facets), sharex=True) as (
        figure,
        grid,
    ):
        for axes, facet in zip(grid, facets, strict=True):
            axes.axhline(0, color=INK, linewidth=0.9)
            for row in (row for row in rows if row.facet == facet):
                look = looks[row.arm]
                if row.low is not None and row.high is not None:
                    axes.plot(
                        [gains[row.arm]] * 2, [row.low, row.high], color=look.colour, linewidth=0.9, alpha=0.7
                    )
                axes.plot(
                    gains[row.arm],
                    row.mean,
                    look.marker,
                    color=look.colour,
                    markersize=5 if look.colour != MUTED else 4,
                )
            axes.set_title(facet)
            axes.set_ylabel("points from base")
            axes.set_xscale("log")
            axes.minorticks_off()
        values = sorted(gains[row.arm] for row in rows)
        ticks = _log_ticks(values[0] / 1.2, values[-1] * 1.2)
        grid[-1].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        grid[-1].set_xlabel("gain of the update: lr × alpha / rank × √rank")
        add_legend(figure, named, looks, line=False)
        return finish(figure, key)


def _log_ticks(low: float, high: float) -> list[float]:
    """At most three round ticks between `low` and `high`, where there are any."""
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [
            step * 10.0**power
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for step in steps
        ]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 3:
            break
    return [float(f"{tick:.6g}") for tick in ticks]
