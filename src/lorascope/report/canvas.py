"""What every plot stands on: style, looks of arms, legend, and the way to SVG and PNG.

The page's SVG follows its light or dark ink. A figure is drawn 3.6 inches wide, so that on a phone its
letters are as large as the text. Every arm has a colour (Okabe and Ito) and, as a second cue, a marker and a
dash. Equal inputs give equal bytes.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

WIDTH_IN = 3.6
MAX_LINES = 6  # arms with a colour of their own

# Stand-ins that `finish` replaces by the page's own colours.
INK, MUTED, GRID, SHADE, PAPER = "#0f0e0d", "#6b6a69", "#d9d8d7", "#e9e8e7", "#fefdfc"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_PAGE_COLOURS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    SHADE: "var(--shade)",
    PAPER: "var(--paper)",
    **{colour: f"var(--series-{index})" for index, colour in enumerate(COLOURS)},  # lighter in the dark
}
_PLAIN_COLOURS = {INK: "currentColor", PAPER: "#ffffff"}

MOVABLE = "price-"  # parts of a drawing whose names start so can be moved by the page's script

_MARKERS = ("o", "s", "^", "D", "v", "P")
_SERIES_MARKERS = (*_MARKERS[:5], "*")  # the base's own is P
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


def looks_of(arms: Sequence[str], detailed: Sequence[str] = ()) -> dict[str, Look]:
    """A look for each of a few arms; of more than `MAX_LINES` only the `detailed` ones have their own, the
    rest are grey.
    """
    looks = {"base": Look(MUTED, "o", "-"), **{arm: Look(MUTED, "o", "-") for arm in arms}}
    for index, arm in enumerate(arms if len(arms) <= MAX_LINES else detailed):
        looks[arm] = Look(COLOURS[index], _MARKERS[index], _DASHES[index])
    return looks


def looks_by_series(
    series: Mapping[str, str], order: Sequence[str]
) -> tuple[dict[str, Look], dict[str, Look]]:
    """A look for each arm by the series it belongs to, and one for each series there is.

    `order` has all series there can be, at most as many as there are colours: each has its own colour and
    marker, whichever are there, and its arms differ by their dash.
    """
    own = {name: Look(COLOURS[index], _SERIES_MARKERS[index], "-") for index, name in enumerate(order)}
    looks, places = {}, dict.fromkeys(order, 0)
    for arm, name in series.items():
        looks[arm] = replace(own[name], dash=_DASHES[places[name] % len(_DASHES)])
        places[name] += 1
    return looks, {name: own[name] for name in order if places[name]}


@contextmanager
def canvas(
    rows: int, columns: int, height_in: float, ratios: Sequence[float] | None = None, **options: Any
) -> "Iterator[tuple[Canvas, list[Axes]]]":
    """A figure of the report's style and its axes, row by row; to be drawn on and finished before leaving."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(cast(Any, _STYLE)):
        figure = Figure(figsize=(WIDTH_IN, height_in))
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False, height_ratios=ratios, **options)
        yield figure, list(grid.flat)


def fitting_columns(labels: Sequence[str]) -> int:
    """How many columns of a legend fit beside each other, at most three."""
    width = 34 + 4.7 * max(map(len, labels), default=0)  # points of a handle and its letters
    return max(1, min(3, int(72 * WIDTH_IN / width)))


def add_legend(
    figure: "Canvas", arms: Sequence[str], looks: Mapping[str, Look], line: bool = True, columns: int = 3
) -> None:
    """Above the plots, the arms by colour, marker and, with `line`, dash."""
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
            ncol=columns,
            columnspacing=1.2,
            handletextpad=0.5,
            borderaxespad=0.1,
        )


def add_series_legend(axes: "Axes", series: Mapping[str, Look]) -> None:
    """Between plot and arms, what colours and markers stand for, three a row."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=look.colour, linestyle="", marker=look.marker, markersize=5.5, label=name)
        for name, look in series.items()
    ]
    axes.legend(
        handles=[handle for column in range(3) for handle in handles[column::3]],  # they go down the columns
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncol=3,
        handlelength=1,
        handletextpad=0.4,
        columnspacing=1.4,
        borderaxespad=0.1,
    )


def whole_numbers(count: int) -> Any:
    """Ticks at whole numbers alone, about so many."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, integer=True)


def finish(figure: "Canvas", key: str, **data: float) -> Drawing:
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
    page_svg = re.sub(rf'<g id="(?!{MOVABLE})[^"]*"', "<g", page_svg)
    page_svg = re.sub(r'\bid="', f'id="{key}-', page_svg)
    page_svg = page_svg.replace('xlink:href="#', f'href="#{key}-').replace("url(#", f"url(#{key}-")
    page_svg = page_svg.replace("font-family: 'DejaVu Sans'; ", "")
    view = re.search(r'viewBox="[^"]*"', page_svg)
    numbers = "".join(f' data-{name}="{value:.6g}"' for name, value in data.items())
    head = f'<svg class="plot" {view.group(0) if view else ""}{numbers} aria-hidden="true" focusable="false">'
    page_svg = head + page_svg[page_svg.index(">") + 1 :]
    return Drawing(re.sub(r"\n\s*", "\n", page_svg), file_svg.encode(), pixels.getvalue())
