"""The queue on disk: what is to be run, in which order, and how it ended."""

import json
import shlex
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lorascope.errors import StorageError
from lorascope.store import storage_errors
from lorascope.web.workspace import MissingError

State = Literal["queued", "running", "paused", "done", "failed", "cancelled"]
Wish = Literal["", "pause", "cancel"]
OPEN_STATES: tuple[State, ...] = ("queued", "running", "paused")

_SCHEMA = f"""\
CREATE TABLE IF NOT EXISTS jobs (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  kind TEXT NOT NULL,
  title TEXT NOT NULL,
  arguments TEXT NOT NULL,
  run TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN {get_args(State)}),
  wish TEXT NOT NULL DEFAULT '',
  place REAL NOT NULL,
  created REAL NOT NULL,
  started REAL,
  ended REAL,
  exit_code INTEGER,
  message TEXT NOT NULL DEFAULT ''
)"""


def in_shell(arguments: Sequence[str]) -> str:
    """Arguments of `lorascope` as the command that a shell takes."""
    return shlex.join(["lorascope", *arguments])


@dataclass(frozen=True)
class Job:
    """One command in the queue. `arguments` are those of `lorascope`; `run` is the name of its run folder, or
    empty; times are seconds since 1970.

    `wish` is what was asked of a running job. `message` says how it ended, in the command's own words.
    """

    id: int
    kind: str
    title: str
    arguments: tuple[str, ...]
    run: str
    state: State
    wish: Wish
    place: float
    created: float
    started: float | None
    ended: float | None
    exit_code: int | None
    message: str

    @property
    def command(self) -> str:
        """The command as a shell takes it, in the working folder."""
        return in_shell(self.arguments)

    @property
    def is_open(self) -> bool:
        """Whether it may still run."""
        return self.state in OPEN_STATES


class Queue:
    """Jobs in SQLite, in WAL mode, from any thread of one process.

    Raises `StorageError` where the file is damaged or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._lock = threading.RLock()  # one connection for all threads
        with self._errors():
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            with self._errors():
                self._connection.row_factory = sqlite3.Row
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute(_SCHEMA)
                if (found := self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                    raise sqlite3.DatabaseError(found)
            self.jobs()
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Say in one line what SQLite says: which file, why, what to do."""
        try:
            yield
        except sqlite3.OperationalError as error:  # full, read-only, no rights
            raise StorageError(
                f"{self._path}: the queue cannot be used ({error}): free space and check its rights; what "
                "runs goes on"
            ) from error
        except sqlite3.DatabaseError as error:
            raise StorageError(
                f"{self._path}: the queue is damaged ({error}): move it away; run folders are not touched"
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _read(self, where: str, *values: Any) -> list[Job]:
        with self._lock, self._errors():
            rows = self._connection.execute(f"SELECT * FROM jobs {where}", values).fetchall()
            try:
                return [_job(row) for row in rows]
            except (LookupError, TypeError, ValueError) as error:  # a table of something else, no JSON
                raise sqlite3.DatabaseError(str(error)) from error

    def add(self, kind: str, title: str, arguments: Sequence[str], run: str = "", first: bool = False) -> Job:
        """Put a command at the end of the queue, or before everything that waits."""
        with self._writing() as connection:
            ends = connection.execute("SELECT MIN(place), MAX(place) FROM jobs").fetchone()
            place = (ends[0] or 0) - 1 if first else (ends[1] or 0) + 1
            cursor = connection.execute(
                "INSERT INTO jobs (kind, title, arguments, run, state, place, created) "
                "VALUES (?, ?, ?, ?, 'queued', ?, ?)",
                (kind, title, json.dumps(list(arguments)), run, place, time.time()),
            )
            number = cursor.lastrowid
        assert number is not None
        return self.job(number)

    def job(self, number: int) -> Job:
        """The job of this number; raise `MissingError` where there is none."""
        found = self._read("WHERE id = ?", number) if abs(number) < 2**63 else []
        if not found:
            raise MissingError(f"job {number}: is not in the queue")
        return found[0]

    def jobs(self, *states: State) -> list[Job]:
        """Jobs in these states, or all, in the order in which they run."""
        marks = ", ".join("?" * len(states))
        return self._read(f"WHERE state IN ({marks}) ORDER BY place" if states else "ORDER BY place", *states)

    def last_of(self, run: str, kind: str = "study") -> Job | None:
        """The newest job of a run folder."""
        found = self._read("WHERE run = ? AND kind = ? ORDER BY id DESC LIMIT 1", run, kind)
        return found[0] if found else None

    def newest(self, kind: str = "study") -> dict[str, Job]:
        """The newest job of every run folder, by its name."""
        newest = "SELECT MAX(id) FROM jobs WHERE kind = ? GROUP BY run"
        return {job.run: job for job in self._read(f"WHERE id IN ({newest})", kind)}

    def recent(self, kind: str, limit: int = 20) -> list[Job]:
        """The newest jobs of a kind, newest first."""
        return self._read("WHERE kind = ? ORDER BY id DESC LIMIT ?", kind, limit)

    def change(self, number: int, **values: Any) -> Job:
        """Set columns of a job."""
        names = ", ".join(f"{name} = ?" for name in values)
        with self._writing() as connection:
            connection.execute(f"UPDATE jobs SET {names} WHERE id = ?", (*values.values(), number))
        return self.job(number)

    def move(self, number: int, earlier: bool) -> None:
        """Have a waiting job change places with the one before or after it."""
        with self._writing() as connection:
            waiting = self.jobs("queued")
            index = next((place for place, job in enumerate(waiting) if job.id == number), None)
            if index is None:
                return
            other = index - 1 if earlier else index + 1
            if 0 <= other < len(waiting):
                one, two = waiting[index], waiting[other]
                for job, place in ((one, two.place), (two, one.place)):
                    connection.execute("UPDATE jobs SET place = ? WHERE id = ?", (place, job.id))

    def forget(self, run: str) -> list[int]:
        """Remove the jobs of a run folder that is gone, and give their numbers."""
        with self._writing() as connection:
            gone = connection.execute(
                "DELETE FROM jobs WHERE run = ? AND state != 'running' RETURNING id", (run,)
            ).fetchall()
        return [row["id"] for row in gone]


def _job(row: sqlite3.Row) -> Job:
    values = {name: row[name] for name in row.keys()}  # noqa: SIM118  # iterating a Row gives its values
    return Job(**{**values, "arguments": tuple(json.loads(values["arguments"]))})
