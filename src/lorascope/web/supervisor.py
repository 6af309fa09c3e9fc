"""Starts what waits in the queue, one command at a time, follows it, and takes up what was running before.

The commands are processes of their own, with a keeper around each (`keeper`), in a session of their own: they
go on when the browser or the server goes. Files in the job's folder say how they are.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from lorascope.console import log
from lorascope.errors import EXIT_DONE, EXIT_INTERRUPTED
from lorascope.store import write_json
from lorascope.web.queue import Job, Queue, State
from lorascope.web.workspace import Workspace

_POLL_S = 0.25
_LOG_TAIL_BYTES = 64_000
_GRACE_S = 5.0  # for a keeper to write down what it started
_GONE = (
    "stopped without an end, as when the machine goes down or a process is killed; it goes on from its last "
    "checkpoint"
)


class Supervisor:
    """Runs the queue in a thread."""

    def __init__(self, workspace: Workspace, queue: Queue) -> None:
        self.workspace, self.queue = workspace, queue
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="queue", daemon=True)

    def start(self) -> None:
        """Begin to run the queue."""
        self._thread.start()

    def stop(self) -> None:
        """Stop looking after the queue; what runs goes on, and is taken up by the next server."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def job_dir(self, number: int) -> Path:
        """The folder of a job's files."""
        return self.workspace.state_dir / "jobs" / str(number)

    # -- what a user asks for --------------------------------------------------------------------------------

    def enqueue(self, kind: str, title: str, arguments: list[str], run: str = "", first: bool = False) -> Job:
        """Put a command into the queue."""
        job = self.queue.add(kind, title, arguments, run, first)
        self._wake.set()
        return job

    def pause(self, number: int) -> None:
        """Have a running command stop after its step, with a checkpoint; a waiting one waits on."""
        self._end(number, "pause", "paused")

    def cancel(self, number: int) -> None:
        """As `pause`, but it is not meant to go on; its folder stays."""
        self._end(number, "cancel", "cancelled")

    def _end(self, number: int, wish: str, state: State) -> None:
        job = self.queue.job(number)
        if job.state == "running":
            self.queue.change(number, wish=wish)
            self._signal(number)
        elif job.is_open:
            self.queue.change(number, state=state, ended=time.time())

    def resume(self, number: int) -> None:
        """Put a paused, failed or cancelled command back into the queue: the same command goes on."""
        job = self.queue.job(number)
        if job.state not in ("queued", "running"):
            self.queue.change(number, state="queued", wish="", ended=None, exit_code=None, message="")
            self._wake.set()

    # -- the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.look()
            except Exception as error:  # the queue goes on at the next look
                log.warning("queue    %s", error)
            self._wake.wait(_POLL_S)
            self._wake.clear()

    def look(self) -> None:
        """One look at the queue: settle what ended, start what is next."""
        running = self.queue.jobs("running")
        for job in running:
            self._settle(job)
        if not self.queue.jobs("running") and (waiting := self.queue.jobs("queued")):
            self._start(waiting[0])

    def _start(self, job: Job) -> None:
        folder = self.job_dir(job.id)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("started.json", "result.json", "output"):
            (folder / name).unlink(missing_ok=True)
        arguments = list(job.arguments)
        write_json(folder / "job.json", {"arguments": arguments, "cwd": str(self.workspace.folder)})
        # Noted as running first: a server that ends between the two finds a job without a process, not a
        # process that nobody knows.
        self.queue.change(job.id, state="running", started=time.time(), ended=None, wish="", message="")
        with (folder / "log").open("ab") as keeper_log:
            keeper = subprocess.Popen(
                [sys.executable, "-m", "lorascope.web.keeper", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=keeper_log,
                stderr=keeper_log,
                start_new_session=True,
            )
        # Reaped by whoever is its parent: this thread as long as the server runs.
        threading.Thread(target=keeper.wait, daemon=True).start()

    def _settle(self, job: Job) -> None:
        """Take note of how a running job ended, if it did."""
        folder = self.job_dir(job.id)
        result = _read(folder / "result.json")
        if result is not None:
            self._note_end(job, int(result["exit_code"]), float(result["ended"]))
            return
        started = _read(folder / "started.json")
        if started is None:
            if time.time() - (job.started or 0) > _GRACE_S:
                self._note_gone(job)
        elif not _lives(started, "keeper") and not _lives(started, "command"):
            if _read(folder / "result.json") is None:  # it may have been written meanwhile
                self._note_gone(job)
        elif job.wish:  # also where the server that was asked is not the one that runs now
            self._signal(job.id)

    def _note_end(self, job: Job, exit_code: int, ended: float) -> None:
        state: State = "done" if exit_code == EXIT_DONE else "failed"
        if exit_code in (EXIT_INTERRUPTED, -signal.SIGTERM):
            state = "cancelled" if job.wish == "cancel" else "paused"
        elif exit_code == -signal.SIGKILL:
            self._note_gone(job)
            return
        message = "" if state == "done" else self.last_line(job.id)
        self.queue.change(job.id, state=state, exit_code=exit_code, ended=ended, message=message, wish="")

    def _note_gone(self, job: Job) -> None:
        state: State = "cancelled" if job.wish == "cancel" else "paused"
        self.queue.change(job.id, state=state, ended=time.time(), message=_GONE, wish="")

    def _signal(self, number: int) -> None:
        """Ask the command to stop; once it was, a step may take a while, and it is not asked again."""
        folder = self.job_dir(number)
        started = _read(folder / "started.json")
        if started is None or ((folder / "asked").exists() and _same(folder, started)):
            return
        for who in ("keeper", "command"):
            if _lives(started, who):
                with suppress(psutil.Error):
                    psutil.Process(started[who]).send_signal(signal.SIGTERM)
                break
        (folder / "asked").write_text(str(started["keeper_born"]))

    # -- what it said ----------------------------------------------------------------------------------------

    def log_tail(self, number: int, num_lines: int = 200) -> list[str]:
        """The last lines that a command wrote on stderr."""
        try:
            with (self.job_dir(number) / "log").open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - _LOG_TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        return text.splitlines()[-num_lines:]

    def last_line(self, number: int) -> str:
        """The last line that a command wrote on stderr: its error where it failed."""
        lines = [line for line in self.log_tail(number) if line.strip()]
        return lines[-1].removeprefix("lorascope: ") if lines else ""

    def output(self, number: int, max_bytes: int = 4_000_000) -> str:
        """What a command wrote on stdout."""
        try:
            with (self.job_dir(number) / "output").open("rb") as file:
                return file.read(max_bytes).decode(errors="replace")
        except OSError:
            return ""


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object that a keeper wrote, None where it is not there or not whole."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _same(folder: Path, started: dict[str, Any]) -> bool:
    """Whether the process that was asked to stop is the one that runs."""
    with suppress(OSError):
        return (folder / "asked").read_text() == str(started["keeper_born"])
    return False


def _lives(started: dict[str, Any], who: str) -> bool:
    """Whether a process still runs, and is not another one of the same number."""
    try:
        process = psutil.Process(int(started[who]))
        same = abs(process.create_time() - float(started[f"{who}_born"])) < 1
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False
