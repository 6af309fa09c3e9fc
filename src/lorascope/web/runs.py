"""What a run folder says of itself at a glance: state, stages, progress, the picture to show, the verdict."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import lock_descriptor

from lorascope.config import load_study
from lorascope.errors import LorascopeError
from lorascope.evaluation.scores import BASE
from lorascope.run_folder import RunDir
from lorascope.schema import StudyConfig
from lorascope.web.queue import Job, Queue
from lorascope.web.workspace import Workspace

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
        self._configs: dict[Path, tuple[int, StudyConfig]] = {}
        self._kept: dict[tuple[str, Path], tuple[int, Any]] = {}

    def config(self, name: str) -> StudyConfig:
        """The frozen configuration of a run."""
        path = self.workspace.run_dir(name) / "study.toml"
        stamp = path.stat().st_mtime_ns
        if path not in self._configs or self._configs[path][0] != stamp:
            self._configs[path] = stamp, load_study(path, environment={})
        return self._configs[path][1]

    def kept(self, what: str, path: Path, make: Callable[[], Any]) -> Any:
        """What `make` gives, made anew once the file at `path` changed."""
        stamp = path.stat().st_mtime_ns if path.exists() else 0
        if (what, path) not in self._kept or self._kept[what, path][0] != stamp:
            self._kept[what, path] = stamp, make()
        return self._kept[what, path][1]

    def cards(self) -> list[RunCard]:
        """All runs, the last changed first; one whose files are damaged says so."""
        return [self.card(name) for name in self.workspace.run_names()]

    def card(self, name: str) -> RunCard:
        """A run at a glance; raise `MissingError` where there is none."""
        folder = self.workspace.run_dir(name)
        run, job = RunDir(folder), self.queue.last_of(name)
        try:
            config = self.config(name)
            manifest = self.kept("manifest", run.manifest_json, run.manifest)
        except LorascopeError as error:
            return RunCard(name, "failed", (), "", "", (), None, "", None, str(error), job, False, 0.0, {})
        arms = tuple(arm.name for arm in config.expand_arms())
        finished = manifest["stages"]
        is_worked_in = _is_locked(folder)
        progress = read_progress(run) if is_worked_in else None
        state = self._state(job, is_worked_in, "report" in finished)
        keep = self.kept("keep", run.diagnosis_json, lambda: _keep(run))
        failed = self.kept("failed", run.manifest_json, lambda: _failed_arms(run, arms))
        return RunCard(
            name=name,
            state=state,
            arms=arms,
            base=config.base.model,
            source=config.data.source,
            stages=_stages(finished, progress if state == "running" else None),
            progress=progress if state == "running" else None,
            headline=_headline(keep, "diagnose" in finished),
            picture=self.kept("picture", run.manifest_json, lambda: _picture(run, keep, arms)),
            message=job.message if job and state in ("paused", "failed", "cancelled") else "",
            job=job,
            is_elsewhere=is_worked_in and (job is None or job.state != "running"),
            started=run.study_toml.stat().st_mtime,
            failed_arms=failed,
            keep=keep,
        )

    def _state(self, job: Job | None, is_worked_in: bool, is_reported: bool) -> RunState:
        if is_worked_in:
            return "running"
        if job is not None and (job.state != "done" or is_reported):
            return _STATE_OF_JOB[job.state]
        return "done" if is_reported else "unfinished"


def read_progress(run: RunDir) -> Progress | None:
    """How far the stage under way is; None where nothing is said of it."""
    try:
        facts = json.loads(run.progress_json.read_text(encoding="utf-8"))
        return Progress(
            str(facts["stage"]),
            int(facts["done"]),
            int(facts["total"]),
            str(facts["unit"]),
            float(facts["rate"]),
            None if facts["left_s"] is None else float(facts["left_s"]),
            str(facts["note"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_locked(folder: Path) -> bool:
    """Whether a process works in the run folder."""
    try:
        with (folder / ".lock").open("a") as file:
            return not lock_descriptor(file.fileno(), blocking=False)
    except OSError:
        return False


def _stages(finished: dict[str, Any], progress: Progress | None) -> tuple[Stage, ...]:
    under_way = progress.stage if progress else None
    return tuple(
        Stage(
            name,
            STAGE_WORDS[name],
            float(finished[name]["seconds"]) if name in finished and name != under_way else None,
            name == under_way,
        )
        for name in STAGES
    )


def _keep(run: RunDir) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        record = json.loads(run.diagnosis_json.read_text(encoding="utf-8"))
        keep = record.get("keep") if isinstance(record, dict) else None
        return keep if isinstance(keep, dict) else None
    return None


def _headline(keep: dict[str, Any] | None, is_diagnosed: bool) -> str:
    if keep is not None:
        return f"Keep {keep.get('arm')} at {float(keep.get('strength', 1)):g}"
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
    wanted = [str(keep["arm"])] if keep and "arm" in keep else []
    for arm in (*wanted, *arms, BASE):
        for path in sorted((run.images_dir / arm).glob("*.png"))[:1]:
            return path.relative_to(run.path).as_posix()
    for path in sorted(run.previews_dir.glob("*/*/*.png"))[-1:]:
        return path.relative_to(run.path).as_posix()
    return None
