"""Heat maps of the layers, side by side."""

import math
from collections.abc import Mapping
from typing import Any

from lorascope.diagnosis.layers import HeatMap
from lorascope.report.canvas import COLOURS, Drawing, canvas, finish


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
        return to_rgba(COLOURS[0], 0.06 + 0.94 * min(1.0, value / greatest))

    with canvas(down, across, 0.4 + down * (1.1 + 0.125 * tallest), sharey=shares) as (figure, grid):
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
        return finish(figure, key)
