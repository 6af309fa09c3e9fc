"""The rows of a sweep over strengths: what every arm draws at several of them, and `sweep.parquet`.

A point is an arm's adapter of one epoch at one strength, under one guidance scale. The base is a point too.
Interventions are points as well: the base's unconditional branch, and adapters edited after training.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa

from lorascope.errors import RunError
from lorascope.evaluation.row_files import read_rows, write_rows
from lorascope.evaluation.scores import BASE
from lorascope.run_folder import RunDir

Epoch = Literal["last", "best"]
Unconditional = Literal["own", "base"]
Kind = Literal["point", "shuffled"]
Slot = tuple[str, Epoch, str]  # an arm's adapter: of which epoch, with which weights
TRAINED = "trained"
SCALED_INTRUDERS = "scaled intruders"
_CUT = "cut to r"

_OPTIONAL = ("alpha", "lr", "training_seed", "style")
_SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string()),
        pa.field("arm", pa.string()),
        pa.field("rank", pa.int32()),
        pa.field("alpha", pa.float64()),
        pa.field("lr", pa.float64()),
        pa.field("training_seed", pa.int64()),
        pa.field("epoch", pa.string()),
        pa.field("strength", pa.float64()),
        pa.field("guidance", pa.float64()),
        pa.field("unconditional", pa.string()),
        pa.field("category", pa.string()),
        pa.field("prompt_index", pa.int32()),
        pa.field("prompt", pa.string()),
        pa.field("seed", pa.int64()),
        pa.field("clip_score", pa.float64()),
        pa.field("style", pa.float64()),
        pa.field("image", pa.string()),
        pa.field("image_digest", pa.string()),
        pa.field("weights", pa.string()),
    ]
)
_LATER = {"weights": TRAINED}  # columns that files of earlier versions lack, and what their rows have there


def cut_to(rank: int) -> str:
    """The weights of an adapter cut to a rank."""
    return f"{_CUT}{rank}"


def rank_of_cut(weights: str) -> int | None:
    """The rank that weights were cut to; None for others."""
    rank = weights.removeprefix(_CUT)
    return int(rank) if weights.startswith(_CUT) and rank.isdecimal() else None


@dataclass(frozen=True)
class Point:
    """What draws: an arm's adapter after its last epoch, or after the one with the lowest held-out loss.

    `strength` is the factor on the adapter, 0 for the base. `unconditional` says whose prediction for the
    empty caption guidance starts from. `weights` are the adapter's as trained, `TRAINED`, or edited:
    `SCALED_INTRUDERS`, or `cut_to` a rank.
    """

    arm: str
    epoch: Epoch = "last"
    strength: float = 1.0
    guidance: float = 7.5
    unconditional: Unconditional = "own"
    weights: str = TRAINED

    @property
    def slot(self) -> Slot:
        """The adapter that draws."""
        return self.arm, self.epoch, self.weights

    @property
    def folder(self) -> str:
        """Name of its pictures' folder within the arm's."""
        swapped = "-base" if self.unconditional == "base" else ""
        edited = "" if self.weights == TRAINED else f"-{self.weights.replace(' ', '-')}"
        return f"{self.epoch}-s{self.strength:.2f}-g{self.guidance:g}{swapped}{edited}"

    @property
    def is_intervention(self) -> bool:
        """Whether it was drawn otherwise than the arm is used, to see what that changes."""
        return self.unconditional != "own" or self.weights != TRAINED


@dataclass(frozen=True)
class SweepRow:
    """One picture of a point. `seed` is the sampling seed; `clip_score` is 100 x cosine with its prompt.

    `style` is its position between the base's drawings, 0, and real pictures of the style, 1; None where
    that was not measured. Rows of kind `shuffled` are the base's pictures against other prompts: what a
    picture scores that shows nothing of its prompt.
    """

    kind: Kind
    arm: str
    rank: int
    alpha: float | None
    lr: float | None
    training_seed: int | None
    epoch: Epoch
    strength: float
    guidance: float
    unconditional: Unconditional
    category: str
    prompt_index: int
    prompt: str
    seed: int
    clip_score: float
    style: float | None
    image: str
    image_digest: str
    weights: str = TRAINED

    @property
    def point(self) -> Point:
        """The point it was drawn at."""
        return Point(self.arm, self.epoch, self.strength, self.guidance, self.unconditional, self.weights)

    @property
    def place(self) -> tuple[str, int, int]:
        """What it shows: category, prompt index and sampling seed."""
        return self.category, self.prompt_index, self.seed


@dataclass(frozen=True)
class StyleFacts:
    """How style was measured: `auc` is how well the base's drawings can be told from the style's pictures.

    `reason` says why positions were not measured, and is None where they were. `layer` is the hidden layer
    of the image tower, the scorer's or that of `model`; `controls` are the positions of what should not count
    as style.
    """

    auc: float | None = None
    layer: int | None = None
    num_real: int = 0
    reason: str | None = "no style was measured"
    controls: Mapping[str, float] = field(default_factory=dict)
    model: str | None = None


@dataclass(frozen=True)
class Discrepancy:
    """Unbiased squared MMD of pictures to the real ones, in the kernel's unit, and its one-sided permutation
    p-value.
    """

    value: float
    p: float


@dataclass(frozen=True)
class Sweep:
    """All rows in their fixed order, what scored them, and how style was measured.

    `discrepancies` are by `name_of` a point.
    """

    rows: tuple[SweepRow, ...]
    scorer: Mapping[str, Any]
    style: StyleFacts = StyleFacts()
    discrepancies: Mapping[str, Discrepancy] = field(default_factory=dict)

    @property
    def points(self) -> tuple[Point, ...]:
        """Every point once, the base's first, in the rows' order."""
        return tuple(dict.fromkeys(row.point for row in self.rows if row.kind == "point"))

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms without the base."""
        return tuple(dict.fromkeys(point.arm for point in self.points if point.arm != BASE))

    def of(self, point: Point) -> tuple[SweepRow, ...]:
        """The pictures of a point; empty where it was not drawn."""
        return tuple(row for row in self.rows if row.kind == "point" and row.point == point)

    @property
    def shuffled(self) -> tuple[SweepRow, ...]:
        """The base's pictures against other prompts."""
        return tuple(row for row in self.rows if row.kind == "shuffled")


def name_of(point: Point) -> str:
    """A point's name in facts: the arm and the folder of its pictures."""
    return f"{point.arm}/{point.folder}"


def order_rows(rows: Iterable[SweepRow]) -> tuple[SweepRow, ...]:
    """Rows in their fixed order; raise `RunError` for a score that is not finite or a row that stands twice.

    The base comes first, then arms by rank, alpha, lr and training seed, each by epoch, guidance and
    strength, then prompts.
    """
    ordered = sorted(rows, key=_order)
    seen = set()
    for row in ordered:
        place = row.kind, row.point, row.place
        if not math.isfinite(row.clip_score) or (row.style is not None and not math.isfinite(row.style)):
            raise RunError(f"{row.image}: its score is not finite: delete the picture and diagnose again")
        if place in seen:
            raise RunError(f"{row.image}: stands twice in the sweep: diagnose this run again")
        seen.add(place)
    return tuple(ordered)


def _order(row: SweepRow) -> tuple[Any, ...]:
    settings = tuple(-1 if value is None else value for value in (row.alpha, row.lr, row.training_seed))
    model = (row.kind != "point", row.arm != BASE, row.rank, *settings, row.arm)
    edit = row.weights != TRAINED, row.weights
    point = (row.epoch != "last", row.unconditional != "own", *edit, row.guidance, row.strength)
    category = {"normal": 0, "abstract": 1}.get(row.category, 2), row.category
    return *model, *point, *category, row.prompt_index, row.seed


def write_sweep(run: RunDir, sweep: Sweep) -> None:
    """Write `sweep.parquet` with a digest of what it holds; equal sweeps give equal bytes."""
    facts = {
        "scorer": dict(sweep.scorer),
        "style": asdict(sweep.style),
        "discrepancies": {name: asdict(value) for name, value in sweep.discrepancies.items()},
    }
    write_rows(run.sweep_parquet, _SCHEMA, [asdict(row) for row in order_rows(sweep.rows)], facts)


def read_sweep(run: RunDir) -> Sweep:
    """Read `sweep.parquet`; raise `StorageError` if it is missing, damaged to a bit or has other columns.

    Rows of files without the column `weights` are of adapters as trained.
    """
    rows, facts = read_rows(run.sweep_parquet, _SCHEMA, _OPTIONAL, "diagnose this run", _fault, _LATER)
    return Sweep(
        order_rows(SweepRow(**row) for row in rows),
        facts["scorer"],
        StyleFacts(**facts["style"]),
        {name: Discrepancy(**value) for name, value in facts["discrepancies"].items()},
    )


def _fault(facts: Mapping[str, Any]) -> str | None:
    """What is wrong with the facts beside the rows."""
    for key in ("scorer", "style", "discrepancies"):
        if not isinstance(facts.get(key), dict):
            return f"no {key}"
    return None


def prompt_means(
    rows: Sequence[SweepRow], quantity: Literal["clip_score", "style"]
) -> dict[tuple[str, int], float]:
    """A quantity of each (category, prompt index), averaged over sampling seeds, in the rows' order.

    Prompts with a row that has none are left out.
    """
    values: dict[tuple[str, int], list[float | None]] = {}
    for row in rows:
        values.setdefault((row.category, row.prompt_index), []).append(getattr(row, quantity))
    return {
        place: sum(value for value in found if value is not None) / len(found)
        for place, found in values.items()
        if None not in found
    }
