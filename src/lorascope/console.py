"""What the user sees while work is going on: a live bar on a terminal, a plain line every few seconds elsewhere.

Everything here goes to stderr; results go to stdout and are the command line's business.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_LINE_EVERY_S = 5.0
log = logging.getLogger("lorascope")


class Task:
    """Progress of one stage: `advance` it, with a short text of current figures."""

    def __init__(self, label: str, total: int, unit: str, completed: int, progress: Progress | None) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.completed, self._resumed_at = completed, completed
        self._progress = progress
        self._started = self._last_line = time.monotonic()
        self._task = progress.add_task(label, total=total, completed=completed, note="") if progress else None

    def set_total(self, total: int) -> None:
        """The number of units, once it is known."""
        self.total = total
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=total)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` units as done."""
        self.completed += count
        now = time.monotonic()
        rate = (self.completed - self._resumed_at) / max(now - self._started, 1e-9)
        note = f"{rate:.1f} {self.unit}/s  {note}".rstrip()
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self.completed, note=note)
        elif now - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line = now
            left = (self.total - self.completed) / max(rate, 1e-9)
            log.info("%s %d/%d  %s  %s left", self.label, self.completed, self.total, note, duration(left))


@contextmanager
def track(label: str, total: int, unit: str, completed: int = 0) -> Iterator[Task]:
    """Show the progress of a stage of `total` units, of which `completed` were done by an earlier run."""
    console = RichConsole(stderr=True)
    if not console.is_terminal or not log.isEnabledFor(logging.INFO):
        yield Task(label, total, unit, completed, None)
        return
    columns = (TextColumn("{task.description:<8}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
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
    """A number of bytes for people, in powers of 1024."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def configure_logging(level: int) -> None:
    """Send the package's log to stderr at `level`; the full log goes to the run folder (`log_to_file`)."""
    log.setLevel(logging.DEBUG)
    log.handlers.clear()
    log.propagate = False
    handler: logging.Handler
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append everything that is logged to `path`, with times in UTC."""
    handler = logging.FileHandler(path, encoding="utf-8")
    formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    handler.setLevel(logging.DEBUG)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
