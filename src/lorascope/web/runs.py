"""What a run folder says of itself at a glance: state, stages, progress, the picture to show, the verdict."""

import math
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import lock_descriptor

from lorascope.config import load_study
from lorascope.errors import LorascopeError, StorageError
from lorascope.evaluation.scores import BASE
from lorascope.run_folder import RunDir
from lorascope.schema import StudyConfig
from lorascope.store import read_json
from lorascope.web.queue import Job, Queue
from lorascope.web.workspace import STUDY_FILE, MissingError, Workspace

RunState = Literal["waiting", "running", "paused", "done", "failed", "cancelled", "unfinished"]
STAGES = ("data", "encode", "train", "sample", "merge_check", "score", "diagnose", "report")
STAGE_WORDS = {
    "data": "look at the pictures",
    "encode": "encode them",
    "train": "train the arms",
    "sample": "draw the prompts",
    "merge_check": "compare merged weights",
    "score": "score the pictures",
    "diagnose": "find out why",
    "report": "write the report",
}
# A card changes with these alone, while nobody works in the folder; whatever a run does, its log grows.
_SHOWN = (STUDY_FILE, "manifest.json", "diagnosis.json", "lorascope.log")
_STATE_OF_JOB: dict[str, RunState] = {
    "queued": "waiting",
    "running": "running",
    "paused": "paused",
    "done": "done",
    "failed": "failed",
    "cancelled": "cancelled",
}


@dataclass(frozen=True)
class Progress:
    """How far the stage under way is."""

    stage: str
    done: int
    total: int
    unit: str
    rate: float
    left_s: float | None
    note: str

    @property
    def percent(self) -> int:
        """Whole percent of the stage."""
        return min(100, 100 * self.done // self.total) if self.total > 0 else 0


@dataclass(frozen=True)
class Stage:
    """A stage of a run. `seconds` is None where it has not ended."""

    name: str
    words: str
    seconds: float | None
    is_under_way: bool


@dataclass(frozen=True)
class RunCard:
    """A run at a glance. `picture` is relative to the run folder; `job` is its newest in the queue; `keep` is
    that of `diagnosis.json`.

    `is_elsewhere` says that a process works in the folder that this queue did not start.
    """

    name: str
    state: RunState
    arms: tuple[str, ...]
    base: str
    source: str
    stages: tuple[Stage, ...]
    progress: Progress | None
    headline: str
    picture: str | None
    message: str
    job: Job | None
    is_elsewhere: bool
    started: float
    failed_arms: dict[str, str]
    keep: dict[str, Any] | None = None


class Runs:
    """Cards of runs, kept as long as their files do not change."""

    def __init__(self, workspace: Workspace, queue: Queue) -> None:
        self.workspace, self.queue = workspace, queue
        self._kept: dict[tuple[str, Path], tuple[object, Any]] = {}
        self._cards: dict[str, tuple[object, RunCard]] = {}
        self._probing, self._listing = threading.Lock(), threading.Lock()

    def config(self, name: str) -> StudyConfig:
        """The frozen configuration of a run."""
        path = self.workspace.run_dir(name) / STUDY_FILE
        config: StudyConfig = self.kept("config", path, lambda: load_study(path, environment={}))
        return config

    def kept(self, what: str, path: Path, make: Callable[[], Any]) -> Any:
        """What `make` gives, made anew once the file at `path` changed. Two threads may both make it."""
        stamp = _stamp(path)
        found = self._kept.get((what, path))
        if found is None or found[0] != stamp:
            found = self._kept[what, path] = stamp, make()
        return found[1]

    def cards(self) -> list[RunCard]:
        """All runs, the last changed first; one whose files are damaged says so."""
        cards = []
        with self._listing:  # who asks second finds what the first one made
            jobs = self.queue.newest()
            for name in self.workspace.run_names():
                with suppress(MissingError):  # deleted meanwhile
                    cards.append(self._card(name, jobs.get(name)))
        return cards

    def card(self, name: str) -> RunCard:
        """A run at a glance; raise `MissingError` where there is none."""
        return self._card(name, self.queue.last_of(name))

    def _card(self, name: str, job: Job | None) -> RunCard:
        folder = self.workspace.run_dir(name)
        is_worked_in = self._is_locked(folder)
        known = (job, is_worked_in, [_stamp(f"{folder}/{file}") for file in _SHOWN])
        found = self._cards.get(name)
        if is_worked_in or found is None or found[0] != known:
            found = self._cards[name] = known, self._make_card(name, folder, job, is_worked_in)
        return found[1]

    def _make_card(self, name: str, folder: Path, job: Job | None, is_worked_in: bool) -> RunCard:
        run = RunDir(folder)
        try:
            config = self.config(name)
            manifest = self.kept("manifest", run.manifest_json, run.manifest)
        except LorascopeError as error:
            return RunCard(name, "failed", (), "", "", (), None, "", None, str(error), job, False, 0.0, {})
        arms: tuple[str, ...] = self.kept("arms", run.study_toml, lambda: _arms(config))
        finished = manifest["stages"]
        progress = read_progress(run) if is_worked_in else None
        state = self._state(job, is_worked_in, "report" in finished)
        keep = self.kept("keep", run.diagnosis_json, lambda: _keep(run))
        failed = self.kept("failed", run.log_path, lambda: _failed_arms(run, arms))
        return RunCard(
            name=name,
            state=state,
            arms=arms,
            base=config.base.model,
            source=config.data.source,
            stages=_stages(finished, progress if state == "running" else None),
            progress=progress if state == "running" else None,
            headline=_headline(keep, "diagnose" in finished),
            picture=self.kept("picture", run.log_path, lambda: _picture(run, keep, arms)),
            message=job.message if job and state in ("paused", "failed", "cancelled") else "",
            job=job,
            is_elsewhere=is_worked_in and (job is None or job.state != "running"),
            started=self.kept("started", run.study_toml, lambda: _changed(run.study_toml)),
            failed_arms=failed,
            keep=keep,
        )

    def _state(self, job: Job | None, is_worked_in: bool, is_reported: bool) -> RunState:
        if is_worked_in:
            return "running"
        if job is not None and (job.state != "done" or is_reported):
            return _STATE_OF_JOB[job.state]
        return "done" if is_reported else "unfinished"

    def _is_locked(self, folder: Path) -> bool:
        """Whether a process works in the run folder."""
        # One at a time: for the moment of asking, this process holds the lock itself.
        with self._probing, suppress(OSError), open(f"{folder}/.lock", "r+b") as file:
            return not lock_descriptor(file.fileno(), blocking=False)
        return False


def read_progress(run: RunDir) -> Progress | None:
    """How far the stage under way is; None where nothing is said of it."""
    try:
        facts = read_json(run.progress_json)
        return Progress(
            str(facts["stage"]),
            int(facts["done"]),
            int(facts["total"]),
            str(facts["unit"]),
            _finite(facts["rate"]) or 0.0,
            _finite(facts["left_s"]),
            str(facts["note"]),
        )
    except (StorageError, ValueError, LookupError, TypeError, OverflowError):
        return None


def _stamp(path: Path | str) -> tuple[int, int, int]:
    """What is another one once a file has changed."""
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return status.st_mtime_ns, status.st_size, status.st_ino


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _arms(config: StudyConfig) -> tuple[str, ...]:
    return tuple(arm.name for arm in config.expand_arms())


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _stages(finished: dict[str, Any], progress: Progress | None) -> tuple[Stage, ...]:
    under_way = progress.stage if progress else None
    return tuple(
        Stage(
            name,
            STAGE_WORDS[name],
            _finite(finished[name]["seconds"]) or 0.0 if name in finished and name != under_way else None,
            name == under_way,
        )
        for name in STAGES
    )


def _keep(run: RunDir) -> dict[str, Any] | None:
    with suppress(StorageError):
        record = read_json(run.diagnosis_json)
        keep = record.get("keep") if isinstance(record, dict) else None
        return keep if isinstance(keep, dict) and isinstance(keep.get("arm"), str) else None
    return None


def _headline(keep: dict[str, Any] | None, is_diagnosed: bool) -> str:
    if keep is not None:
        strength = _finite(keep.get("strength"))
        return f"Keep {keep['arm']}" + (f" at {strength:g}" if strength is not None else "")
    return "No arm is kept" if is_diagnosed else ""


def _failed_arms(run: RunDir, arms: tuple[str, ...]) -> dict[str, str]:
    failed = {}
    for arm in arms:
        with suppress(LorascopeError, OSError):
            if (run.adapters_dir / arm / "training.json").exists() and (reason := run.failure(arm)):
                failed[arm] = reason
    return failed


def _picture(run: RunDir, keep: dict[str, Any] | None, arms: tuple[str, ...]) -> str | None:
    """A picture that stands for the run: of the kept arm, else of any."""
    kept = keep["arm"] if keep else None
    for arm in (*sorted(arms, key=lambda arm: arm != kept), BASE):
        for path in sorted((run.images_dir / arm).glob("*.png"))[:1]:
            return path.relative_to(run.path).as_posix()
    for path in sorted(run.previews_dir.glob("*/*/*.png"))[-1:]:
        return path.relative_to(run.path).as_posix()
    return None
