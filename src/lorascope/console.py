"""What the user sees while work is going on: a live bar on a terminal, a plain line every few seconds
elsewhere.

Everything here goes to stderr; results go to stdout and are the command line's business. Rich leaves colours
off under `NO_COLOR`.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from lorascope.store import require_regular, storage_errors

PLAIN_LINE_EVERY_S = 5.0
_PROGRESS_EVERY_S = 1.0
_UNBROKEN = 10_000  # columns of a table in a file, more than its longest line has
log = logging.getLogger("lorascope")

# What moves a terminal's cursor, colours it or turns the order of letters round, and halves of letters,
# which it cannot show: control characters but tab and line feed, marks of direction, separators of lines,
# surrogates.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def plain(text: object) -> str:
    """A text as it may go to a terminal: what would steer it is shown as in Python, `\\x1b` for an escape."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def say(*values: object, sep: str = "\n", end: str = "\n", file: TextIO | None = None) -> None:
    """Print results on stdout, or what is said about them on `file`, as `plain` text: what is in names,
    captions and metadata of others' files never reaches a terminal as it is.
    """
    print(plain(sep.join(map(str, values))), end=end, file=file)


def cell(value: object, style: str = "") -> Text:
    """A table's cell as `plain` text, whose square brackets are no markup."""
    return Text(plain(value), style)


def say_tables(*tables: Table) -> None:
    """Print tables of `cell`s on stdout: on a terminal as wide as it is, elsewhere without a broken line or
    a colour.
    """
    on_terminal = sys.stdout.isatty()
    # FORCE_COLOR makes Rich call everything a terminal, but a bug report is no place for colours.
    console = RichConsole(force_terminal=on_terminal, width=None if on_terminal else _UNBROKEN)
    with console.capture() as capture:
        console.print(*tables)
    lines = [line.rstrip() for line in capture.get().splitlines()]  # Rich fills columns up with blanks
    print("\n".join(lines).rstrip())


class Tally(Protocol):
    """What counts the units of a stage as they are done."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` units as done, with a short text of current figures."""

    def skip(self, count: int) -> None:
        """Count `count` units as done by an earlier run."""


_progress_files: list[Path] = []


@contextmanager
def progress_to_file(path: Path) -> Iterator[None]:
    """Keep in `path` how far the stage under way is, for whoever looks on; it goes when the work ends."""
    _progress_files.append(path)
    try:
        yield
    finally:
        _progress_files.remove(path)
        for left in (path, _partial(path)):
            with suppress(OSError):
                left.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


class Task:
    """Progress of one stage: `advance` it, with a short text of current figures."""

    def __init__(self, label: str, total: int, unit: str, completed: int, progress: Progress | None) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.completed = completed
        self._progress = progress
        self._started = self._last_line = time.monotonic()
        self._paced_from: tuple[float, int] | None = (
            None  # when, and with how much done, the rate starts to count
        )
        self._has_lines = False
        self._next_write = 0.0
        self._task = progress.add_task(label, total=total, completed=completed, note="") if progress else None
        self._write()

    def set_total(self, total: int) -> None:
        """The number of units, once it is known."""
        self.total = total
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=total)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` units as done. The rate counts from the first call on, since what comes before is
        set-up.
        """
        self.completed += count
        now = time.monotonic()
        since, done = self._paced_from = self._paced_from or (now, self.completed)
        rate = (self.completed - done) / (now - since) if now > since else 0.0
        self._write(rate, plain(note))
        note = plain(f"{rate:.1f} {self.unit}/s  " * (rate > 0) + note).rstrip()
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self.completed, note=note)
        elif now - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line, self._has_lines = now, True
            left = (
                f"  {duration((self.total - self.completed) / rate)} left"
                if rate > 0 and self.completed < self.total
                else ""
            )
            log.info("%s", f"{self.label:<8} {self.completed}/{self.total}  {note}{left}".rstrip())

    def _write(self, rate: float = 0.0, note: str = "") -> None:
        """Put what there is to say into the progress files, once a second at most. They need not outlive a
        machine that goes down, and a full disk is met where there is more to write.
        """
        now = time.monotonic()
        if not _progress_files or now < self._next_write:
            return
        self._next_write = now + _PROGRESS_EVERY_S
        left = (self.total - self.completed) / rate if rate > 0 else None
        facts = {
            "stage": self.label,
            "done": self.completed,
            "total": self.total,
            "unit": self.unit,
            "rate": round(rate, 3),
            "left_s": None if left is None else round(left, 1),
            "note": note,
        }
        for path in _progress_files:
            partial = _partial(path)
            with suppress(OSError):
                partial.write_text(json.dumps(facts), encoding="utf-8")
                partial.replace(path)

    def skip(self, count: int) -> None:
        """Count `count` units as done by an earlier run: they are no part of the rate."""
        self.completed += count
        if self._paced_from is not None:
            self._paced_from = (self._paced_from[0], self._paced_from[1] + count)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self.completed)

    def finish(self) -> None:
        """Close the plain lines of a stage, if it was long enough to have any, with its full count and
        time.
        """
        if self._has_lines:
            log.info(
                "%-8s %d/%d  in %s",
                self.label,
                self.completed,
                self.total,
                duration(time.monotonic() - self._started),
            )


@contextmanager
def track(label: str, total: int, unit: str, completed: int = 0) -> Iterator[Task]:
    """Show the progress of a stage of `total` units, of which `completed` were done by an earlier run."""
    console = RichConsole(stderr=True)
    # FORCE_COLOR makes Rich call everything a terminal, but a log file is no place for a bar.
    if not sys.stderr.isatty() or console.is_dumb_terminal or not _shows(logging.INFO):
        task = Task(label, total, unit, completed, None)
        yield task
        task.finish()
        return
    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Task(label, total, unit, completed, progress)


def duration(seconds: float) -> str:
    """A length of time for people: `48 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(num_bytes: float) -> str:
    """A number of bytes for people, in powers of 1024: `512 bytes`, `16.0 MiB`."""
    if num_bytes < 1024:
        return f"{num_bytes:.0f} bytes"
    for unit in ("KiB", "MiB"):
        num_bytes /= 1024
        if round(num_bytes, 1) < 1024:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1024:.1f} GiB"


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


class _Stderr(logging.Handler):
    """Writes to what `sys.stderr` is at that moment: while a bar is shown, Rich puts lines above it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


class _LogFile(logging.FileHandler):
    """A log file that cannot be written, for a full disk say, must not bury the error that ends the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def configure_logging(level: int) -> None:
    """Send the package's log to stderr at `level`; the full log goes to the run folder (`log_to_file`)."""
    handler = _Stderr()
    handler.setLevel(level)
    handler.setFormatter(_Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG)
    log.propagate = False


def _shows(level: int) -> bool:
    """Whether the user sees messages of this level on stderr."""
    return any(isinstance(handler, _Stderr) and handler.level <= level for handler in log.handlers)


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append everything that is logged to `path`, with times in UTC; raise `StorageError` if it cannot be
    opened.
    """
    with storage_errors(path):
        if path.exists():
            require_regular(path)
        handler = _LogFile(path, encoding="utf-8")
    formatter = _Formatter("%(asctime)sZ %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    log.addHandler(handler)
    level = log.level
    if not log.isEnabledFor(logging.INFO):  # a library user who set no level still gets the run's log
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()
