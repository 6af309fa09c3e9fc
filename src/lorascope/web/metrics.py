"""The curves of a run while it trains: read as they grow, and made short for a page."""

import itertools
import json
import math
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorascope.errors import StorageError
from lorascope.evaluation.scores import BASE
from lorascope.run_folder import RunDir
from lorascope.store import open_regular

MAX_POINTS = 100  # of a line: single steps jump too much to be compared by eye
_NUM_COMPARED = 64  # bytes: about half a record, with its loss

Points = list[tuple[float, float]]


@dataclass
class Curves:
    """What an arm's records say: training loss by step, and held-out loss minus the base's by epoch."""

    loss: Points = field(default_factory=list)
    heldout: Points = field(default_factory=list)
    step: int = 0
    epoch: float = 0.0


class MetricsReader:
    """Reads what was added to the records of a run since the last look."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._read: dict[Path, tuple[int, bytes]] = {}  # how far, and the last bytes before that
        self._arms: dict[str, Curves] = {}
        self._lock = threading.Lock()  # several browsers may look at one run

    def update(self) -> dict[str, Curves]:
        """The curves of every arm as they are now."""
        with self._lock:
            run = self._run
            joined = run.metrics_jsonl.exists()
            files = [run.metrics_jsonl] if joined else sorted(run.metrics_dir.glob("*.jsonl"))
            if set(self._read) - set(files) or not all(map(self._read_on, files)):
                self._read, self._arms = {}, {}
                for path in files:
                    self._read_on(path)
            return dict(self._arms)  # of its own, while another thread goes on here

    def _read_on(self, path: Path) -> bool:
        """Take what was added to a file; whether it goes on from what was read before. It does not where it
        is another one, or was cut back by a run that goes on from a checkpoint.
        """
        start, before = self._read.get(path, (0, b""))
        try:
            with open_regular(path) as file:
                file.seek(start - len(before))
                content = file.read()
        except (OSError, StorageError):
            return not start
        if not content.startswith(before):
            return False
        added = content[len(before) : content.rfind(b"\n") + 1]
        self._read[path] = start + len(added), (before + added)[-_NUM_COMPARED:]
        for line in added.split(b"\n"):
            # What is damaged is said by the report, which reads with more care.
            with suppress(ValueError, LookupError, TypeError, OverflowError, RecursionError):
                self._take(json.loads(line))
        return True

    def _take(self, record: dict[str, Any]) -> None:
        arm = str(record["arm"])
        if arm == BASE:
            return
        curves = self._arms.setdefault(arm, Curves())
        if record["kind"] == "train":
            curves.step, curves.epoch = int(record["step"]), float(record["epoch"])
            points, x, y = curves.loss, float(curves.step), record["loss"]
        elif record["split"] == "heldout" and record["band"] == "all" and record["conditional"]:
            points, x, y = curves.heldout, float(record["epoch"]), record["difference"]
        else:
            return
        if y is not None and math.isfinite(x):  # a diverged arm's loss is no number
            points.append((x, float(y)))


def shortened(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> Points:
    """At most `most` points for many: the mean of each of as many stretches of equal count; from three on,
    the first and the last stay as they are.
    """
    if len(points) <= most:
        return list(points)
    if most < 3:
        return _means(points, most)
    return [points[0], *_means(points[1:-1], most - 2), points[-1]]


def _means(points: Sequence[tuple[float, float]], most: int) -> Points:
    edges = [round(index * len(points) / most) for index in range(most + 1)]
    stretches = [points[start:end] for start, end in itertools.pairwise(edges)]
    return [
        ((stretch[0][0] + stretch[-1][0]) / 2, sum(value for _, value in stretch) / len(stretch))
        for stretch in stretches
    ]


@dataclass(frozen=True)
class Line:
    """A line of a chart: `points` as SVG has them; `index` gives its colour and dashes."""

    name: str
    index: int
    points: str
    last: float


@dataclass(frozen=True)
class Chart:
    """A small chart to be drawn by a template: 480 x 200 units, the plot from (44, 10) to (470, 172).

    `x_ticks` and `y_ticks` are places in units and their labels.
    """

    title: str
    x_name: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    zero: float | None  # where 0 lies, if it lies within
    alt: str


_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 470.0, 10.0, 172.0


def draw_chart(title: str, x_name: str, series: dict[str, Points], order: Sequence[str]) -> Chart | None:
    """A chart of several series; None where there is nothing to draw. Colours go by the place in `order`."""
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    drawn = {name: shortened(points) for name, points in finite.items() if points}
    if not drawn:
        return None
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(ys), max(ys)
    x_high += x_high == x_low
    margin = (y_high - y_low) * 0.06 or abs(y_high) * 0.1 or 1.0
    y_low, y_high = y_low - margin, y_high + margin

    def x_place(x: float) -> float:
        return round(_LEFT + (x - x_low) / (x_high - x_low) * (_RIGHT - _LEFT), 1)

    def y_place(y: float) -> float:
        return round(_BOTTOM - (y - y_low) / (y_high - y_low) * (_BOTTOM - _TOP), 1)

    lines = tuple(
        Line(
            name,
            (order.index(name) if name in order else 0) % 6,
            " ".join(f"{x_place(x)},{y_place(y)}" for x, y in drawn[name]),
            drawn[name][-1][1],
        )
        for name in sorted(drawn, key=lambda name: order.index(name) if name in order else len(order))
    )
    last = ", ".join(f"{line.name} {line.last:.4f}" for line in lines)
    return Chart(
        title,
        x_name,
        lines,
        tuple((x_place(x), f"{x:g}") for x in (x_low, x_high)),
        tuple((y_place(y), f"{y:.3g}") for y in (y_low + margin, y_high - margin)),
        y_place(0) if y_low < 0 < y_high else None,
        f"{title} by {x_name}; last: {last}.",
    )
