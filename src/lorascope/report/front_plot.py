"""The plot of two measures against each other: prompts kept and style gained, strength by strength."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorascope.report.canvas import (
    INK,
    MOVABLE,
    MUTED,
    PAPER,
    SHADE,
    Drawing,
    Look,
    add_legend,
    add_series_legend,
    canvas,
    finish,
    fitting_columns,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FRONT_FLOOR = -20.0  # percent of prompt fidelity; below 0 a picture fits other prompts better than its own


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


def draw_front(
    marks: Sequence[Mark],
    looks: Mapping[str, Look],
    origin: tuple[float, float],
    least: float,
    xlabel: str,
    ylabel: str,
    key: str = "front",
    series: Mapping[str, Look] | None = None,
    named: Sequence[str] = (),
) -> Drawing:
    """Two measures against each other: a line an arm over strengths, from `origin`, the base.

    Measures on the y axis are in percent. The area from `least` upwards is shaded, and what lies below
    `FRONT_FLOOR` is left out. Marks with intervals have a ring. On the page, line, area and label of the
    price keep their ids, and the plot says between which percents its y axis runs, so that a script can move
    them. The legend has the `series` that colours stand for, where there are some, and the arms that are
    `named`: by default all that aren't grey. The others are drawn thin.
    """
    arms = list(dict.fromkeys(mark.arm for mark in marks))
    named = named or [arm for arm in arms if looks[arm].colour != MUTED]
    columns = fitting_columns(named) if series else 3
    num_rows = math.ceil(len(named) / columns) + math.ceil(len(series or ()) / 3)
    with canvas(1, 1, 3.0 + 0.16 * num_rows) as (figure, (axes,)):
        for arm in sorted(arms, key=named.__contains__):
            own = [mark for mark in marks if mark.arm == arm]
            _draw_path(axes, own, looks[arm], origin, arm in named)
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
            part.set_gid(f"{MOVABLE}{name}")
        axes.set_ylim(low, high)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        add_legend(figure, named, looks, columns=columns)
        if series:
            add_series_legend(axes, series)
        return finish(figure, key, low=low, least=least, high=high)


def _draw_path(
    axes: "Axes", marks: Sequence[Mark], look: Look, origin: tuple[float, float], named: bool
) -> None:
    """One arm of `draw_front`: the filled marks on a line from the origin, the open ones beside it."""
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
