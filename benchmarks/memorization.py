"""What finished studies memorized: a table, and a figure of copies against rank by kind, passes and set size.

Command:  python -m benchmarks.memorization runs/pocket-memorization ... --out build/memorization
Result:   build/memorization/memorization.md and memorization.png

The runs are of preset `pocket-memorization` or `memorization`, of any set size: their prompts are the
captions of training and held-out pictures. A drawing is a copy where its nearest training picture is less
than a third as far away as the second nearest (Gu et al. 2023, arXiv 2310.02664); the same share against as
many held-out pictures says how often that happens by chance.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lorascope.arms import Arm
from lorascope.console import say
from lorascope.data.pictures import open_picture
from lorascope.diagnosis.record import read_diagnosis
from lorascope.diagnosis.signals import Signal
from lorascope.errors import ConfigError, LorascopeError
from lorascope.evaluation.copying import copy_ratio
from lorascope.evaluation.scores import BASE
from lorascope.evaluation.sweep_rows import Point, Sweep, read_sweep
from lorascope.run_folder import RunDir
from lorascope.store import read_regular, write_text
from lorascope.study import Study

Pixels = NDArray[np.uint8]
_MARKS = {"lora": "o", "tlora": "s", "dora": "D", "loha": "^", "lokr": "v", "full": "*"}


@dataclass(frozen=True)
class Row:
    """One arm of one run, or the base."""

    num_pictures: int  # of the training set
    arm: Arm | None
    passes: int  # over the training set
    copies: float  # of drawings of training captions, the share that copies a training picture
    by_chance: float  # the share that "copies" one of as many held-out pictures
    of_heldout: float  # of drawings of held-out captions, the share that copies a training picture
    member_auc: Signal | None
    likeness: Signal | None
    retention: float | None


def read_rows(path: Path) -> list[Row]:
    """The base and the arms of a run; raises as reading a run folder does."""
    study, run = Study.open(path), RunDir(path)
    sweep, found, data = read_sweep(run), read_diagnosis(run).arms, study.dataset
    training = np.stack([data.load_pixels(example) for example in data.train])
    heldout = np.stack([data.load_pixels(example) for example in data.heldout[: len(training)]])
    guidance, repeats = sweep.points[0].guidance, study.config.data.repeats
    rows = []
    for name in (BASE, *found):
        point = Point(BASE, "last", 0.0, guidance) if name == BASE else Point(name, "last", 1.0, guidance)
        drawn = {category: _drawn(run, sweep, point, category) for category in ("trained", "heldout")}
        signals = None if name == BASE else found[name].signals
        rows.append(
            Row(
                num_pictures=len(training),
                arm=signals.arm if signals else None,
                passes=signals.arm.epochs * repeats if signals else 0,
                copies=copy_ratio(drawn["trained"], training).share,
                by_chance=copy_ratio(drawn["trained"], heldout).share,
                of_heldout=copy_ratio(drawn["heldout"], training).share,
                member_auc=signals.member_auc if signals else None,
                likeness=signals.likeness if signals else None,
                retention=signals.full.retention.value if signals else None,
            )
        )
    return rows


def _drawn(run: RunDir, sweep: Sweep, point: Point, category: str) -> Pixels:
    rows = [row for row in sweep.of(point) if row.category == category]
    if not rows:
        raise ConfigError(
            f"{run.path}: no drawings of {category} captions: run a preset on memorization, or one with "
            'sample.prompts = "captions"'
        )
    return np.stack([_pixels(run.path / row.image) for row in rows])


def _pixels(path: Path) -> Pixels:
    return np.asarray(open_picture(read_regular(path)).convert("RGB"))


def as_markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = [
        "| pictures | passes | arm | copies, of training captions | by chance | copies, of held-out captions "
        "| member AUC | likeness | prompts kept |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row.num_pictures:,}",
            str(row.passes),
            _named(row.arm),
            *(f"{100 * share:.0f} %" for share in (row.copies, row.by_chance, row.of_heldout)),
            _told(row.member_auc),
            _told(row.likeness),
            "" if row.retention is None else f"{100 * row.retention:.0f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _named(arm: Arm | None) -> str:
    if arm is None:
        return "the base"
    return "full" if arm.kind == "full" else f"{arm.kind} r{arm.rank}"


def _told(signal: Signal | None) -> str:
    if signal is None or signal.value is None:
        return ""
    if signal.low is None or signal.high is None:
        return f"{signal.value:.2f}"
    return f"{signal.value:.2f} ({signal.low:.2f} to {signal.high:.2f})"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Copies and member AUC against rank: a colour for each number of passes over a set, a mark for each
    kind.
    """
    groups = sorted({(row.num_pictures, row.passes) for row in rows if row.arm})
    ranks = sorted({row.arm.rank for row in rows if row.arm and row.arm.kind == "lora"})
    places = {rank: place for place, rank in enumerate(ranks)}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for number, group in enumerate(groups):
        own = [row for row in rows if row.arm and (row.num_pictures, row.passes) == group]
        for axis, measure in zip(axes, (_copies, _auc), strict=True):
            line = [row for row in own if row.arm and row.arm.kind == "lora"]
            line.sort(key=lambda row: row.arm.rank if row.arm else 0)
            axis.plot(
                [places[row.arm.rank] for row in line if row.arm],
                [measure(row) for row in line],
                color=f"C{number}",
                marker="o",
                label=f"{group[0]} pictures, {group[1]} passes",
            )
            for row in own:
                if row.arm and row.arm.kind != "lora":
                    place = len(ranks) if row.arm.kind == "full" else places.get(row.arm.rank, 0)
                    axis.plot(
                        [place],
                        [measure(row)],
                        color=f"C{number}",
                        marker=_MARKS[row.arm.kind],
                        markersize=9,
                        linestyle="",
                    )
    for axis, title in zip(axes, ("copies, % of drawings of training captions", "member AUC"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(ranks) + 1), [*(f"r{rank}" for rank in ranks), "full"])
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[1].plot([], [], color="grey", marker="s", linestyle="", label="T-LoRA")
    axes[1].plot([], [], color="grey", marker="*", linestyle="", label="full fine-tuning")
    axes[1].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _copies(row: Row) -> float:
    return 100 * row.copies


def _auc(row: Row) -> float:
    return row.member_auc.value if row.member_auc and row.member_auc.value is not None else float("nan")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the runs and write table and figure."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.memorization",
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    args = parser.parse_args(arguments)
    try:
        rows = [row for path in args.runs for row in read_rows(path)]
    except LorascopeError as error:
        print(f"memorization: {error}", file=sys.stderr)
        return error.exit_code
    write_text(args.out / "memorization.md", as_markdown(rows))
    draw(rows, args.out / "memorization.png")
    say(as_markdown(rows), args.out / "memorization.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
