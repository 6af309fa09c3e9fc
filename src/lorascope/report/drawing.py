"""The report's figures: matplotlib drawings as SVG that follows the page's light or dark ink, and as PNG.

A figure is drawn 3.6 inches wide, so that on a phone its letters are as large as the text. Every arm has a
colour (Okabe and Ito) and, as a second cue, a marker and a dash. Equal inputs give equal bytes.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from lorascope.diagnosis.layers import HeatMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

WIDTH_IN = 3.6
MAX_ROWS = 24  # rows of a dot plot; the tables hold all arms
FRONT_FLOOR = -20.0  # percent of prompt fidelity; below 0 a picture fits other prompts better than its own
MAX_LINES = 6  # arms with a colour of their own in a line plot

# Stand-ins that `_finish` replaces by the page's own colours.
INK, MUTED, GRID, SHADE, PAPER = "#0f0e0d", "#6b6a69", "#d9d8d7", "#e9e8e7", "#fefdfc"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_PAGE_COLOURS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    SHADE: "var(--shade)",
    PAPER: "var(--paper)",
    **{colour: f"var(--series-{index})" for index, colour in enumerate(_COLOURS)},  # lighter in the dark
}
_PLAIN_COLOURS = {INK: "currentColor", PAPER: "#ffffff"}

_MOVABLE = "price-"  # parts of a drawing whose names start so can be moved by the page's script

_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1.2)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (8, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
)

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lorascope",
    "font.family": "DejaVu Sans",
    "font.size": 8.2,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 8.2,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.2,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7.8,
    "ytick.labelsize": 7.8,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.frameon": False,
    "legend.fontsize": 7.8,
    "legend.handlelength": 2.6,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.02,
}


class Drawing(NamedTuple):
    """One figure in three forms."""

    page_svg: str  # for the page: inherits ink, has no id in common with other figures
    file_svg: bytes  # to stand alone
    png: bytes


@dataclass(frozen=True)
class Look:
    """Colour, marker and dash of one arm."""

    colour: str
    marker: str
    dash: Any


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


@dataclass(frozen=True)
class Mark:
    """One arm at one strength on the plane of two measures; `is_open` for an adapter of another epoch.

    `x_reach` and `y_reach` are ends of intervals, drawn where they are given.
    """

    arm: str
    strength: float
    x: float
    y: float
    is_open: bool = False
    x_reach: tuple[float, float] | None = None
    y_reach: tuple[float, float] | None = None


def looks_of(arms: Sequence[str], detailed: Sequence[str] = ()) -> dict[str, Look]:
    """A look for each of a few arms; of more than `MAX_LINES` only the `detailed` ones have their own, the
    rest are grey.
    """
    looks = {"base": Look(MUTED, "o", "-"), **{arm: Look(MUTED, "o", "-") for arm in arms}}
    for index, arm in enumerate(arms if len(arms) <= MAX_LINES else detailed):
        looks[arm] = Look(_COLOURS[index], _MARKERS[index], _DASHES[index])
    return looks


def draw_forest(
    rows: Sequence[Row], looks: Mapping[str, Look], xlabel: str, key: str = "effect", values: bool = True
) -> Drawing:
    """Differences from the base: a dot per prompt, mean and interval per arm, one facet below the other, 0 =
    base.
    """
    facets = list(dict.fromkeys(row.facet for row in rows))
    arms = list(dict.fromkeys(row.arm for row in rows))
    step_in = 0.34 if len(arms) <= 6 else 0.17
    with _canvas(len(facets), 1, 0.42 + len(facets) * (0.3 + step_in * max(2, len(arms))), sharex=True) as (
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
        return _finish(figure, key)


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
    with _canvas(1, 1, 0.75 + 0.27 * len(arms)) as (figure, (axes,)):
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
        axes.xaxis.set_major_locator(_whole_numbers(7))
        return _finish(figure, key)


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
    with _canvas(len(facets), 1, 0.5 + 0.16 * num_rows + 1.35 * sum(ratios), sharex=True, ratios=ratios) as (
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
        grid[-1].xaxis.set_major_locator(_whole_numbers(6))
        _add_legend(figure, named, looks)
        return _finish(figure, key)


def draw_bands(
    rows: Mapping[str, Sequence[Row]], looks: Mapping[str, Look], xlabel: str, ylabel: str, key: str
) -> Drawing:
    """Differences from the base over ordered bands: facet -> rows whose `facet` is the band."""
    bands = list(dict.fromkeys(row.facet for group in rows.values() for row in group))
    arms = list(dict.fromkeys(row.arm for group in rows.values() for row in group))
    num_rows = math.ceil(len(arms) / 3)
    with _canvas(len(rows), 1, 0.5 + 0.16 * num_rows + 1.3 * len(rows), sharex=True, sharey=True) as (
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
        _add_legend(figure, arms, looks, line=False)
        return _finish(figure, key)


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
    with _canvas(1, len(costs), 0.62 + step_in * (len(arms) + len(others)), sharey=True) as (figure, grid):
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
        return _finish(figure, key)


def draw_gain(
    rows: Sequence[Row], gains: Mapping[str, float], looks: Mapping[str, Look], key: str = "gain"
) -> Drawing:
    """Differences from the base over the gain of the update, one facet below the other."""
    facets = list(dict.fromkeys(row.facet for row in rows))
    named = [arm for arm in dict.fromkeys(row.arm for row in rows) if looks[arm].colour != MUTED]
    with _canvas(len(facets), 1, 0.5 + 0.16 * math.ceil(len(named) / 3) + 1.2 * len(facets), sharex=True) as (
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
        _add_legend(figure, named, looks, line=False)
        return _finish(figure, key)


def draw_front(
    marks: Sequence[Mark],
    looks: Mapping[str, Look],
    origin: tuple[float, float],
    least: float,
    xlabel: str,
    ylabel: str,
    key: str = "front",
) -> Drawing:
    """Two measures against each other: a line an arm over strengths, from `origin`, the base.

    Measures on the y axis are in percent. The area from `least` upwards is shaded, and what lies below
    `FRONT_FLOOR` is left out. Marks with intervals have a ring. On the page, line, area and label of the
    price keep their ids, and the plot says between which percents its y axis runs, so that a script can move
    them.
    """
    named = [arm for arm in dict.fromkeys(mark.arm for mark in marks) if looks[arm].colour != MUTED]
    with _canvas(1, 1, 3.0 + 0.16 * math.ceil(len(named) / 3)) as (figure, (axes,)):
        for arm in sorted(dict.fromkeys(mark.arm for mark in marks), key=named.__contains__):
            _draw_path(axes, [mark for mark in marks if mark.arm == arm], looks[arm], origin)
        axes.plot(*origin, "P", color=INK, markersize=6.5, zorder=5)
        axes.annotate("base", origin, xytext=(6, 4), textcoords="offset points", fontsize=7.8)
        low, high = axes.get_ylim()
        high = max(high, least)
        low = min(low, least - 0.08 * (high - least))  # room for the label
        low = max(low, min(FRONT_FLOOR, least - 0.08 * (high - least)))
        area = axes.axhspan(least, high, color=SHADE, linewidth=0, zorder=0.3, clip_on=False)
        line = axes.axhline(least, color=INK, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1, clip_on=False)
        label = axes.annotate(
            f"price: at most {100 - least:g} % lost",
            (0.99, least),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3),
            textcoords="offset points",
            fontsize=7.8,
            ha="right",
            va="top",
        )
        for part, name in ((area, "area"), (line, "line"), (label, "label")):
            part.set_gid(f"{_MOVABLE}{name}")
        axes.set_ylim(low, high)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        _add_legend(figure, named, looks)
        return _finish(figure, key, low=low, least=least, high=high)


def _draw_path(axes: "Axes", marks: Sequence[Mark], look: Look, origin: tuple[float, float]) -> None:
    """One arm of `draw_front`: the filled marks on a line from the origin, the open ones beside it."""
    named = look.colour != MUTED
    filled = sorted((mark for mark in marks if not mark.is_open), key=lambda mark: mark.strength)
    path = [origin, *((mark.x, mark.y) for mark in filled)]
    axes.plot(
        *zip(*path, strict=True),
        color=look.colour,
        linestyle=look.dash if named else "-",
        linewidth=1.2 if named else 0.5,
        zorder=2,
    )
    for mark in marks:
        for reach, is_across in ((mark.x_reach, True), (mark.y_reach, False)):
            if reach is not None:
                across = (reach, (mark.y, mark.y)) if is_across else ((mark.x, mark.x), reach)
                axes.plot(*across, color=look.colour, linewidth=1.8, solid_capstyle="butt", zorder=3)
        if mark.x_reach or mark.y_reach:
            axes.plot(mark.x, mark.y, "o", color=INK, fillstyle="none", markersize=11, zorder=5)
        axes.plot(
            mark.x,
            mark.y,
            look.marker,
            color=look.colour,
            markerfacecolor=PAPER if mark.is_open else look.colour,
            markersize=(3 + 2.5 * min(mark.strength, 1.5)) * (1 if named else 0.6),
            markeredgewidth=1.1 if mark.is_open else 0.5,
            zorder=4 if named else 2.5,
        )


def draw_heat(maps: Mapping[str, HeatMap], greatest: float, key: str = "layers") -> Drawing:
    """Heat maps side by side, one an arm, on one scale from 0 to `greatest` > 0; a cell without a value stays
    empty. One hue, the stronger the larger, so that it reads on light and dark paper alike.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Patch, Rectangle

    widest = max(len(heat.columns) for heat in maps.values())
    tallest = max(len(heat.rows) for heat in maps.values())
    longest = max(map(len, maps))
    across = min(len(maps), 4 if widest <= 8 else 2 if widest <= 16 else 1, max(1, 54 // longest))
    shares = len({heat.rows for heat in maps.values()}) == 1
    down = math.ceil(len(maps) / across)

    def shade(value: float) -> Any:
        return to_rgba(_COLOURS[0], 0.06 + 0.94 * min(1.0, value / greatest))

    with _canvas(down, across, 0.4 + down * (1.1 + 0.125 * tallest), sharey=shares) as (figure, grid):
        for axes in grid[len(maps) :]:
            axes.set_visible(False)
        for axes, (arm, heat) in zip(grid, maps.items(), strict=False):
            cells = []
            for y, values in enumerate(heat.values):
                for x, value in enumerate(values):
                    if value is not None:
                        cells.append(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, facecolor=shade(value)))
            axes.add_collection(PatchCollection(cells, match_original=True, clip_on=False))
            axes.set_title(arm, fontsize=7.8)
            axes.set_xlim(-0.5, len(heat.columns) - 0.5)
            axes.set_ylim(len(heat.rows) - 0.5, -0.5)
            axes.set_xticks(range(len(heat.columns)), heat.columns, rotation=90, fontsize=6.4)
            axes.set_yticks(range(len(heat.rows)), heat.rows, fontsize=6.4)
            axes.tick_params(length=0)
            axes.grid(visible=False)
        steps = [greatest * part for part in (0.25, 0.5, 1.0)]
        figure.legend(
            handles=[Patch(facecolor=shade(value), label=f"{value:.2g}") for value in steps],
            loc="outside upper left",
            ncol=len(steps),
            handlelength=1.2,
            columnspacing=1.2,
            borderaxespad=0.1,
        )
        return _finish(figure, key)


def _whole_numbers(count: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, integer=True)


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


def _add_legend(figure: "Canvas", arms: Sequence[str], looks: Mapping[str, Look], line: bool = True) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=looks[arm].colour,
            linestyle=looks[arm].dash if line else "",
            marker=looks[arm].marker,
            markersize=4,
            label=arm,
        )
        for arm in arms
    ]
    if handles:
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncol=3,
            columnspacing=1.2,
            handletextpad=0.5,
            borderaxespad=0.1,
        )


class _canvas:
    """A figure of the report's style and its axes, closed on leaving."""

    def __init__(
        self, rows: int, columns: int, height_in: float, ratios: Sequence[float] | None = None, **options: Any
    ) -> None:
        self.rows, self.columns, self.height_in, self.ratios, self.options = (
            rows,
            columns,
            height_in,
            ratios,
            options,
        )

    def __enter__(self) -> "tuple[Canvas, list[Axes]]":
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.context = matplotlib.rc_context(cast(Any, _STYLE))
        self.context.__enter__()
        figure = Figure(figsize=(WIDTH_IN, self.height_in))
        FigureCanvasAgg(figure)
        grid = figure.subplots(
            self.rows, self.columns, squeeze=False, height_ratios=self.ratios, **self.options
        )
        return figure, list(grid.flat)

    def __exit__(self, *exception: Any) -> None:
        self.context.__exit__(*exception)


def _finish(figure: "Canvas", key: str, **data: float) -> Drawing:
    """Render to SVG and PNG, without dates, and hand ink and ids over to the page, with `data` for its
    script.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    for axes in figure.axes:
        axes.patch.set_facecolor("none")
    figure.patch.set_facecolor("none")
    drawn, pixels = io.BytesIO(), io.BytesIO()
    # Not by `savefig`, which draws everything once more to find its size.
    undated = {"Date": None, "Creator": None, "Format": None, "Type": None}
    FigureCanvasSVG(figure).print_svg(drawn, metadata=undated)  # type: ignore[no-untyped-call]
    figure.set_layout_engine("none")  # the layout stands
    figure.patch.set_facecolor("white")
    figure.dpi = 200
    FigureCanvasAgg(figure).print_png(pixels, metadata={"Software": None})  # type: ignore[no-untyped-call]
    svg = drawn.getvalue().decode()
    file_svg, page_svg = svg, svg[svg.index("<svg") :]
    for stand_in, colour in _PLAIN_COLOURS.items():
        file_svg = file_svg.replace(stand_in, colour)
    for stand_in, colour in _PAGE_COLOURS.items():
        page_svg = page_svg.replace(stand_in, colour)
    page_svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", page_svg, flags=re.DOTALL)
    page_svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", page_svg, flags=re.DOTALL)
    # Only what is referred to keeps its id.
    page_svg = re.sub(rf'<g id="(?!{_MOVABLE})[^"]*"', "<g", page_svg)
    page_svg = re.sub(r'\bid="', f'id="{key}-', page_svg)
    page_svg = page_svg.replace('xlink:href="#', f'href="#{key}-').replace("url(#", f"url(#{key}-")
    page_svg = page_svg.replace("font-family: 'DejaVu Sans'; ", "")
    view = re.search(r'viewBox="[^"]*"', page_svg)
    numbers = "".join(f' data-{name}="{value:.6g}"' for name, value in data.items())
    head = f'<svg class="plot" {view.group(0) if view else ""}{numbers} aria-hidden="true" focusable="false">'
    page_svg = head + page_svg[page_svg.index(">") + 1 :]
    return Drawing(re.sub(r"\n\s*", "\n", page_svg), file_svg.encode(), pixels.getvalue())
