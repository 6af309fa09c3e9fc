"""Figures of an adapter's update by layer, summed up by arm and by block, and laid out as a heat map.

All of it is plain numbers, so that a report can read it back from JSON without torch.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Block = Literal["text", "down", "mid", "up", "other"]
BLOCKS: tuple[Block, ...] = ("text", "down", "mid", "up", "other")
Quantity = Literal["norm_ratio", "spectral_ratio", "stable_rank", "rank_95", "intruder_share"]


@dataclass(frozen=True)
class LayerFigures:
    """One adapted layer: its update dW = scale * B A beside the base's weight W."""

    layer: str  # component and path, as in adapter files
    rank: int  # of the factors
    norm_ratio: float | None  # Frobenius norm of dW over that of W, from 0; None where W is zero
    spectral_ratio: float | None  # the same of spectral norms
    stable_rank: float  # (Frobenius norm / spectral norm)^2 of dW, in [1, rank]; 0 where dW is zero
    rank_95: int  # the least number of singular values with 95 % of their squares; 0 where dW is zero
    num_directions: int  # the leading left singular vectors of W + dW that were looked at
    num_intruders: int  # those among them that no left singular vector of W resembles

    @property
    def intruder_share(self) -> float:
        """Intruders among the directions, in [0, 1]; 0 where there are none."""
        return self.num_intruders / self.num_directions if self.num_directions else 0.0


@dataclass(frozen=True)
class Spread:
    """How one quantity is distributed over layers."""

    lower_quartile: float
    median: float
    upper_quartile: float
    greatest: float
    greatest_layer: str


@dataclass(frozen=True)
class Summary:
    """The layers of an arm, or of one of its blocks, in a few numbers; `dataclasses.asdict` makes it JSON."""

    num_layers: int
    norm_ratio: Spread | None  # None where no layer's base weight has a norm
    spectral_ratio: Spread | None
    stable_rank: Spread
    rank_95: Spread
    num_intruders: int
    intruder_share: float  # intruders among all directions of all layers, in [0, 1]
    layers_with_intruders: int


def summarise(figures: Sequence[LayerFigures]) -> Summary:
    """Medians, quartiles and the greatest value over one or more layers.

    Quartiles are interpolated between the two nearest layers. The first of equally great layers is named.
    """
    if not figures:
        raise ValueError("no layers to sum up")
    directions = sum(figure.num_directions for figure in figures)
    intruders = sum(figure.num_intruders for figure in figures)
    stable_rank, rank_95 = _spread(figures, "stable_rank"), _spread(figures, "rank_95")
    assert stable_rank is not None and rank_95 is not None
    return Summary(
        num_layers=len(figures),
        norm_ratio=_spread(figures, "norm_ratio"),
        spectral_ratio=_spread(figures, "spectral_ratio"),
        stable_rank=stable_rank,
        rank_95=rank_95,
        num_intruders=intruders,
        intruder_share=intruders / directions if directions else 0.0,
        layers_with_intruders=sum(figure.num_intruders > 0 for figure in figures),
    )


def _spread(figures: Sequence[LayerFigures], quantity: Quantity) -> Spread | None:
    known = [
        (float(value), figure.layer) for figure in figures if (value := getattr(figure, quantity)) is not None
    ]
    if not known:
        return None
    low, median, high = np.quantile([value for value, _ in known], [0.25, 0.5, 0.75])
    greatest, layer = max(known, key=lambda item: item[0])
    return Spread(float(low), float(median), float(high), greatest, layer)


def by_block(figures: Iterable[LayerFigures]) -> dict[Block, Summary]:
    """A summary of each block that has layers, in the order of `BLOCKS`."""
    parts: dict[Block, list[LayerFigures]] = {block: [] for block in BLOCKS}
    for figure in figures:
        parts[block_of(figure.layer)].append(figure)
    return {block: summarise(part) for block, part in parts.items() if part}


def block_of(layer: str) -> Block:
    """The part of the model that a layer lies in; `other` is what stands around the U-Net's blocks."""
    component, _, path = layer.partition(".")
    if component == "text_encoder":
        return "text"
    for block in ("down", "mid", "up"):
        if path.startswith((f"{block}_block.", f"{block}_blocks.")):
            return block
    return "other"


@dataclass(frozen=True)
class HeatMap:
    """One quantity of an arm, a cell a layer."""

    rows: tuple[str, ...]  # places in the model, in the order of `BLOCKS`, such as `down 0.1`
    columns: tuple[str, ...]  # kinds of layers, such as `attn1.to_q`
    values: tuple[tuple[float | None, ...], ...]  # by row; None where there is no such layer, or no value


_PLACES = (  # of a row: a pattern of paths and the row's name
    (r"unet\.(down|up)_blocks\.(\d+)\.(?:attentions|resnets)\.(\d+)\.(.+)", r"\1 \2.\3"),
    (r"unet\.(down|up)_blocks\.(\d+)\.(.+)", r"\1 \2"),
    (r"unet\.(mid)_block\.(?:attentions|resnets)\.(\d+)\.(.+)", r"\1 \2"),
    (r"text_encoder\.(?:(text)_model\.)?encoder\.layers\.(\d+)\.(.+)", r"text \2"),
)  # fmt: skip


def place_of(layer: str) -> tuple[str, str]:
    """The row and the column of a layer in a heat map, such as (`up 1.2`, `attn2.to_k`)."""
    for pattern, row in _PLACES:
        if match := re.fullmatch(pattern, layer):
            column = match.groups()[-1].removeprefix("transformer_blocks.0.")
            return match.expand(row), column
    return "other", layer.partition(".")[2]


def heat_map(figures: Sequence[LayerFigures], quantity: Quantity) -> HeatMap:
    """One quantity by place and kind of layer. Columns stand in the order in which they first occur."""
    cells = {place_of(figure.layer): getattr(figure, quantity) for figure in figures}
    blocks = {place_of(figure.layer)[0]: BLOCKS.index(block_of(figure.layer)) for figure in figures}
    rows = sorted(blocks, key=lambda row: (blocks[row], [int(number) for number in re.findall(r"\d+", row)]))
    columns = tuple(dict.fromkeys(column for _, column in cells))
    values = tuple(
        tuple(None if (value := cells.get((row, column))) is None else float(value) for column in columns)
        for row in rows
    )
    return HeatMap(tuple(rows), columns, values)
