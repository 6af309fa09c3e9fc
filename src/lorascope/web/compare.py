"""Pictures of a run side by side: prompts by arms, strengths or epochs, each beside the base's from the same
noise.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from PIL import Image

from lorascope.errors import StorageError
from lorascope.evaluation.scores import BASE, ScoreRow, Scores, read_scores
from lorascope.evaluation.sweep_rows import TRAINED, Sweep, SweepRow, read_sweep
from lorascope.run_folder import RunDir
from lorascope.schema import StudyConfig
from lorascope.web.runs import Runs

By = Literal["arms", "strengths", "epochs", "steps"]
WAYS: Mapping[By, str] = MappingProxyType(
    {
        "arms": "all arms at strength 1",
        "strengths": "strengths of one arm",
        "epochs": "epochs of one arm",
        "steps": "all arms at one epoch",
    }
)
MAX_COLUMNS = 8  # that are shown unasked, beside the base
_FILE = re.compile(r"(?P<category>.+)-(?P<index>\d{3,})-(?P<seed>\d+)\.png")
_EPOCH = re.compile(r"epoch-(\d{4,})")
_SHOWN_LETTERS = 2000

Place = tuple[str, int, int]  # category, prompt index, sampling seed


@dataclass(frozen=True)
class Choice:
    """What was asked for; what is not there is replaced by the nearest that is."""

    by: str = "arms"
    arm: str = ""
    seed: int | None = None
    epoch: int | None = None
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """A column of a grid. `name` stands in its head, `full` says it without the grid."""

    key: str
    name: str
    full: str


@dataclass(frozen=True)
class Cell:
    """A picture, relative to the run folder, and its CLIP score; `steps` are those of other epochs."""

    path: str
    score: float | None = None
    steps: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """What all columns drew of one prompt from one noise: cells by the key of their column."""

    place: Place
    prompt: str
    cells: Mapping[str, Cell]

    @property
    def key(self) -> str:
        """The place in one word."""
        return f"{self.place[0]}-{self.place[1]:03d}-{self.place[2]}"

    @property
    def note(self) -> str:
        """Category and seed."""
        return f"{self.place[0]}, seed {self.place[2]}"


@dataclass(frozen=True)
class Grid:
    """Prompts by columns, the base's first. `others` are columns that could be shown too."""

    by: By
    arm: str
    seed: int
    epoch: int
    ways: tuple[By, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: tuple[int, ...]
    columns: tuple[Column, ...]
    all_columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""

    def column(self, key: str) -> Column | None:
        """The column of this key."""
        return next((column for column in self.all_columns if column.key == key), None)

    def mean(self, key: str) -> float | None:
        """The mean score of a column; None where a picture of it has none."""
        scores = [row.cells[key].score for row in self.rows if key in row.cells]
        known = [score for score in scores if score is not None]
        return sum(known) / len(known) if known and len(known) == len(scores) else None


@dataclass(frozen=True)
class _Table:
    """Columns but the base's, and cells by place and key."""

    columns: tuple[Column, ...]
    cells: Mapping[Place, Mapping[str, Cell]]
    epochs: tuple[int, ...] = ()
    note: str = ""


class Pictures:
    """The pictures of a run, as its files are now."""

    def __init__(self, runs: Runs, name: str) -> None:
        self.run = RunDir(runs.workspace.run_dir(name))
        self.config: StudyConfig = runs.config(name)
        self.arms = tuple(arm.name for arm in self.config.expand_arms())
        self.faults: list[str] = []
        scores = runs.kept("scores", self.run.scores_parquet, self._read_scores)
        sweep = runs.kept("sweep", self.run.sweep_parquet, self._read_sweep)
        self._sweep: Sweep | None = sweep if isinstance(sweep, Sweep) else None
        self.faults += [text for text in (scores, sweep) if isinstance(text, str)]
        self._texts: dict[tuple[str, int], str] = {}
        self.scores: dict[str, float] = {}  # by picture
        # Other kinds of rows score the same pictures against other prompts.
        rows: list[ScoreRow | SweepRow] = []
        rows += [row for row in scores.rows if row.kind == "arm"] if isinstance(scores, Scores) else []
        rows += [row for row in (self._sweep.rows if self._sweep else ()) if row.kind == "point"]
        for row in rows:
            if row.image:
                self.scores[row.image] = row.clip_score
                self._texts[row.category, row.prompt_index] = row.prompt

    def _read_scores(self) -> Scores | str | None:
        return self._read(self.run.scores_parquet, lambda: read_scores(self.run))

    def _read_sweep(self) -> Sweep | str | None:
        return self._read(self.run.sweep_parquet, lambda: read_sweep(self.run))

    @staticmethod
    def _read(path: Path, read: Callable[[], Any]) -> Any:
        """What a file holds, None without one, or what is wrong with it."""
        if not path.exists():
            return None
        try:
            return read()
        except StorageError as error:
            return str(error)

    # -- the grid --------------------------------------------------------------------------------------------

    def grid(self, choice: Choice) -> Grid:
        """The grid that was asked for, or the nearest to it that there is."""
        tables = {way: self._table(way, choice) for way in get_args(By)}
        ways = tuple(way for way, table in tables.items() if table.columns and table.cells)
        by: By = next((way for way in ways if way == choice.by), ways[0] if ways else "arms")
        table = tables[by]
        seeds = tuple(sorted({place[2] for place in table.cells}))
        seed = choice.seed if choice.seed in seeds else next(iter(seeds), 0)
        assert seed is not None
        base = Column(BASE, BASE, BASE)
        columns = (base, *table.columns)
        wanted = [column for column in table.columns if column.key in choice.columns]
        places = [place for place in table.cells if place[2] == seed and BASE in table.cells[place]]
        return Grid(
            by=by,
            arm=self._arm(choice),
            seed=seed,
            epoch=self._epoch(choice, table.epochs),
            ways=ways,
            arms=self.arms,
            seeds=seeds,
            epochs=table.epochs,
            columns=(base, *(wanted or table.columns[:MAX_COLUMNS])),
            all_columns=columns,
            rows=tuple(
                Row(place, self._text(place, table.cells[place]), table.cells[place])
                for place in sorted(places, key=self._order)
            ),
            note=table.note,
        )

    def _table(self, by: By, choice: Choice) -> _Table:
        match by:
            case "arms":
                return self._of_arms()
            case "strengths":
                return self._of_strengths(self._arm(choice))
            case "epochs":
                return self._of_epochs(self._arm(choice))
            case "steps":
                return self._of_steps(choice)

    def _arm(self, choice: Choice) -> str:
        return choice.arm if choice.arm in self.arms else self.arms[0]

    def _epoch(self, choice: Choice, epochs: Sequence[int]) -> int:
        if choice.epoch is not None and choice.epoch in epochs:
            return choice.epoch
        return epochs[-1] if epochs else 0

    def _of_arms(self) -> _Table:
        cells: dict[Place, dict[str, Cell]] = {}
        for arm in (BASE, *self.arms):
            self._add(cells, arm, self._listed(self.run.images_dir / arm))
        drawn = {arm for row in cells.values() for arm in row}
        return _Table(tuple(Column(arm, arm, arm) for arm in self.arms if arm in drawn), cells)

    def _of_strengths(self, arm: str) -> _Table:
        rows = [row for row in self._sweep_rows() if row.arm in (BASE, arm)]
        epochs = {row.epoch for row in rows if row.arm == arm}
        epoch = "last" if "last" in epochs else "best"
        strengths = sorted({row.strength for row in rows if row.arm == arm and row.epoch == epoch})
        cells: dict[Place, dict[str, Cell]] = {}
        for row in rows:
            if row.arm == BASE or row.epoch == epoch:
                key = BASE if row.arm == BASE else f"s{row.strength:g}"
                cells.setdefault(row.place, {})[key] = Cell(row.image, row.clip_score)
        columns = tuple(Column(f"s{s:g}", f"strength {s:g}", f"{arm} at {s:g}") for s in strengths)
        return _Table(columns, cells, note=self._sweep_note())

    def _of_epochs(self, arm: str) -> _Table:
        """Previews by epoch, and what the sweep drew of the last and the best one where it drew alike."""
        cells: dict[Place, dict[str, Cell]] = {}
        self._add(cells, BASE, self._listed(self._preview_dir(BASE, 0)))
        epochs = self._preview_epochs(arm)
        for epoch in epochs:
            self._add(cells, f"e{epoch}", self._listed(self._preview_dir(arm, epoch)))
        columns = [Column(f"e{epoch}", f"epoch {epoch}", f"{arm} after epoch {epoch}") for epoch in epochs]
        section, sweep = self.config.sample, self.config.diagnose
        if epochs and (section.steps, section.scheduler) != (sweep.steps, sweep.scheduler):
            return _Table(tuple(columns), cells)
        found = set[str]()
        for row in self._sweep_rows():
            if row.arm == arm and row.strength == 1 and (row.place in cells or not epochs):
                cells.setdefault(row.place, {})[row.epoch] = Cell(row.image, row.clip_score)
                found.add(row.epoch)
            elif row.arm == BASE and not epochs:
                cells.setdefault(row.place, {})[BASE] = Cell(row.image, row.clip_score)
        for kind in ("best", "last"):
            if kind in found:
                columns.append(Column(kind, f"{kind} epoch", f"{arm}, {kind} epoch"))
        return _Table(tuple(columns), cells, note="" if epochs else self._sweep_note())

    def _of_steps(self, choice: Choice) -> _Table:
        """Every arm's previews at one epoch, with those of the others."""
        by_arm = {arm: self._preview_epochs(arm) for arm in self.arms}
        epochs = tuple(sorted({epoch for found in by_arm.values() for epoch in found}))
        shown = self._epoch(choice, epochs)
        cells: dict[Place, dict[str, Cell]] = {}
        self._add(cells, BASE, self._listed(self._preview_dir(BASE, 0)))
        for arm, found in by_arm.items():
            steps: dict[Place, dict[int, str]] = {}
            for epoch in found:
                for place, path in self._listed(self._preview_dir(arm, epoch)):
                    steps.setdefault(place, {})[epoch] = path
            for place, paths in steps.items():
                # An arm that ended earlier stays at its last epoch.
                at = max((epoch for epoch in paths if epoch <= shown), default=min(paths))
                cells.setdefault(place, {})[arm] = Cell(paths[at], None, paths)
        columns = tuple(Column(arm, arm, f"{arm} after epoch {shown}") for arm in self.arms if by_arm[arm])
        return _Table(columns, cells, epochs)

    # -- where pictures lie ----------------------------------------------------------------------------------

    def _preview_dir(self, arm: str, epoch: int) -> Path:
        return self.run.preview_path(arm, epoch, "")

    def _preview_epochs(self, arm: str) -> list[int]:
        folder = self.run.previews_dir / arm
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := _EPOCH.fullmatch(name)))

    def _listed(self, folder: Path) -> list[tuple[Place, str]]:
        """Pictures in a folder by what they show."""
        found = []
        with suppress(OSError):
            for path in folder.iterdir():
                if match := _FILE.fullmatch(path.name):
                    place = match["category"], int(match["index"]), int(match["seed"])
                    found.append((place, path.relative_to(self.run.path).as_posix()))
        return found

    def _add(
        self, cells: dict[Place, dict[str, Cell]], key: str, pictures: Iterable[tuple[Place, str]]
    ) -> None:
        for place, path in pictures:
            cells.setdefault(place, {})[key] = Cell(path, self.scores.get(path))

    def _sweep_rows(self) -> list[SweepRow]:
        """The sweep's pictures of adapters as trained, at the study's guidance."""
        guidance = self.config.sample.guidance
        return [
            row
            for row in (self._sweep.rows if self._sweep else ())
            if row.kind == "point"
            and (row.unconditional, row.weights, row.guidance) == ("own", TRAINED, guidance)
        ]

    def _sweep_note(self) -> str:
        section = self.config.diagnose
        return f"Drawn by the diagnose stage: {section.steps} steps of {section.scheduler}."

    def _text(self, place: Place, cells: Mapping[str, Cell]) -> str:
        """The prompt of a place: from the scores, or before them from a picture itself."""
        if place[:2] not in self._texts:
            text = ""
            with (
                suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError),
                Image.open(self.run.path / cells[BASE].path, formats=["PNG"]) as picture,
            ):
                text = str(picture.info.get("prompt", ""))[:_SHOWN_LETTERS]
            self._texts[place[:2]] = text or f"{place[0]} prompt {place[1]}"
        return self._texts[place[:2]]

    @staticmethod
    def _order(place: Place) -> tuple[int, str, int, int]:
        return {"normal": 0, "abstract": 1}.get(place[0], 2), *place
