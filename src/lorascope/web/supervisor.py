"""Starts what waits in the queue, one command at a time, follows it, and takes up what was running before.

The commands are processes of their own, with a keeper around each (`keeper`), in a session of their own: they
go on when the browser or the server goes. Files in the job's folder say how they are.
"""

import json
import shutil
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
from lorascope.web.keeper import command_line
from lorascope.web.queue import Job, Queue, State
from lorascope.web.workspace import Workspace

_POLL_S = 0.25
_LOG_TAIL_BYTES = 64_000
_GRACE_S = 30.0  # for a keeper that an earlier server started to write down that it did
_KILLED = -9  # Windows has no name for it
_GONE = (
    "stopped without an end, as when the machine goes down or a process is killed; it goes on from its last "
    "checkpoint"
)


class Supervisor:
    """Runs the queue in a thread. `trouble` says in one line why it does not go on, such as a full disk."""

    def __init__(self, workspace: Workspace, queue: Queue) -> None:
        self.workspace, self.queue = workspace, queue
        self.trouble = ""
        # What a request asks for and a look at the queue never overlap: a job is cancelled or started.
        self._lock = threading.RLock()
        self._keepers: dict[int, subprocess.Popen[bytes]] = {}
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
        with self._lock:
            job = self.queue.job(number)
            if job.state == "running":
                self._ask_to_stop(self.queue.change(number, wish=wish))
            elif job.is_open and job.state != state:
                self.queue.change(number, state=state, ended=time.time(), message="")

    def resume(self, number: int) -> None:
        """Put a paused, failed or cancelled command back into the queue: the same command goes on."""
        with self._lock:
            if self.queue.job(number).state not in ("queued", "running"):
                self.queue.change(number, state="queued", wish="", ended=None, exit_code=None, message="")
        self._wake.set()

    def forget(self, run: str) -> None:
        """Forget the commands of a run folder that is gone, and what they said."""
        with self._lock:
            for number in self.queue.forget(run):
                shutil.rmtree(self.job_dir(number), ignore_errors=True)

    # -- the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.look()
                self.trouble = ""
            except Exception as error:  # the queue goes on at the next look
                if str(error) != self.trouble:
                    log.warning("queue    %s", error)
                self.trouble = str(error)
            self._wake.wait(_POLL_S)
            self._wake.clear()

    def look(self) -> None:
        """One look at the queue: settle what ended, start what is next."""
        with self._lock:
            for job in self.queue.jobs("running"):
                self._settle(job)
            if not self.queue.jobs("running") and (waiting := self.queue.jobs("queued")):
                self._start(waiting[0])

    def _start(self, job: Job) -> None:
        folder = self.job_dir(job.id)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("started.json", "result.json", "asked", "output"):
            (folder / name).unlink(missing_ok=True)
        arguments = list(job.arguments)
        write_json(folder / "job.json", {"arguments": arguments, "cwd": str(self.workspace.folder)})
        # Noted as running first: a server that ends between the two finds a job without a process, not a
        # process that nobody knows.
        self.queue.change(job.id, state="running", started=time.time(), ended=None, wish="", message="")
        try:
            with (folder / "log").open("ab") as keeper_log:
                self._keepers[job.id] = subprocess.Popen(
                    [sys.executable, "-P", *_keeper_words(folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=keeper_log,
                    stderr=keeper_log,
                    start_new_session=True,
                    creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),  # Windows: no Ctrl-C of ours
                )
        except OSError as error:
            message = f"could not be started: {error}"
            self.queue.change(job.id, state="failed", ended=time.time(), message=message)

    def _settle(self, job: Job) -> None:
        """Take note of how a running job ended, if it did."""
        folder = self.job_dir(job.id)
        started = _read(folder / "started.json")
        # Whether it lives is asked before what it wrote last is read.
        lives = _lives(started, job, folder) if started else self._is_starting(job)
        result = _read(folder / "result.json") or {}
        if isinstance(result.get("exit_code"), int):
            self._note_end(job, result["exit_code"], float(result.get("ended") or time.time()))
        elif not lives:
            self._note_gone(job)
        else:
            if job.wish:  # it had not started when it was asked, or another server was
                self._ask_to_stop(job)
            return
        if (keeper := self._keepers.pop(job.id, None)) is not None:
            keeper.wait()  # at its very end; unasked, it would stay a zombie

    def _is_starting(self, job: Job) -> bool:
        """Whether a keeper may still be about to write down that it started."""
        if (keeper := self._keepers.get(job.id)) is not None:
            return keeper.poll() is None
        return abs(time.time() - (job.started or 0)) < _GRACE_S

    def _note_end(self, job: Job, exit_code: int, ended: float) -> None:
        if exit_code == _KILLED:
            self._note_gone(job)
            return
        state: State = "done" if exit_code == EXIT_DONE else "failed"
        # Asked to stop before it could listen, a command ends by the signal; Windows has a code for it.
        if exit_code in (EXIT_INTERRUPTED, -signal.SIGTERM, signal.SIGTERM):
            state = "cancelled" if job.wish == "cancel" else "paused"
        message = "" if state == "done" else self.last_line(job.id) or f"ended with exit code {exit_code}"
        self.queue.change(job.id, state=state, exit_code=exit_code, ended=ended, message=message, wish="")

    def _note_gone(self, job: Job) -> None:
        state: State = "cancelled" if job.wish == "cancel" else "paused"
        self.queue.change(job.id, state=state, ended=time.time(), message=_GONE, wish="")

    def _ask_to_stop(self, job: Job) -> None:
        """Ask the command to stop, once: the first time it ends its step, a second time it would not."""
        folder = self.job_dir(job.id)
        started, asked = _read(folder / "started.json"), folder / "asked"
        if started and not asked.exists() and _is(started.get("command"), _command_words(job)):
            asked.touch()
            with suppress(psutil.Error):
                psutil.Process(started["command"]).send_signal(signal.SIGTERM)

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


def _keeper_words(folder: Path) -> list[str]:
    return ["-m", "lorascope.web.keeper", str(folder)]


def _command_words(job: Job) -> list[str]:
    return command_line(list(job.arguments))[1:]


def _lives(started: dict[str, Any], job: Job, folder: Path) -> bool:
    """Whether the command of a job or its keeper still runs."""
    return _is(started.get("keeper"), _keeper_words(folder)) or _is(
        started.get("command"), _command_words(job)
    )


def _is(number: Any, words: list[str]) -> bool:
    """Whether the process of this number was started with these words, and is not another one that was given
    the number since. (When it was started is no sign: clocks are set.)
    """
    try:
        process = psutil.Process(int(number))
        return process.status() != psutil.STATUS_ZOMBIE and process.cmdline()[-len(words) :] == words
    except (psutil.Error, OSError, TypeError, ValueError):
        return False
