"""Tasks done side by side, each worker a process of its own, which the parent starts, hears and ends.

A worker is a fresh interpreter: a forked one cannot use CUDA, and libraries take their number of threads when
they are loaded. It is told in lines of JSON on its standard input and answers in such lines on its standard
output. It ends at once when its input ends in the middle of a task, since then the parent is gone, and until
then it holds the lock that it inherited.
"""

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, TypeVar

from lorascope import errors
from lorascope.console import Tally, log
from lorascope.errors import LorascopeError

_TELL_EVERY_S = 0.1
_START = """\
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.path[:] = {path!r}
from {module} import {name}
{name}()
"""

T = TypeVar("T")


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_worker(num_workers: int) -> int:
    """Threads for each of so many processes on a CPU: what OMP_NUM_THREADS says, or an equal share of the
    cores.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(asked) if asked.isdigit() and int(asked) else max(1, num_cores() // num_workers)


def worker_environments(device_type: str, num_workers: int) -> list[dict[str, str]]:
    """What so many workers find in their environment: a GPU each, or on a CPU their number of threads."""
    if device_type == "cuda":
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")  # numbers, UUIDs or names of MIG parts
        visible = [name.strip() for name in named if name.strip()]
        return [
            {"CUDA_VISIBLE_DEVICES": visible[index] if visible else str(index)}
            for index in range(num_workers)
        ]
    threads = str(threads_per_worker(num_workers))
    return [{"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} for _ in range(num_workers)]


@contextmanager
def deferred_signals() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C or SIGTERM only sets a flag, so that a step ends whole; a second one acts at
    once.
    """
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received.is_set
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        if received.is_set():
            raise KeyboardInterrupt
        received.set()

    for number in previous:
        signal.signal(number, note)
    try:
        yield received.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# -- in the parent -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What came of a task: what the worker returned, or how the worker died over it."""

    value: Any = None
    death: str | None = None


def run_side_by_side(
    tasks: deque[T],
    tell: Callable[[T], tuple[str, Any]],
    entry: str,
    setup: Any,
    environments: Sequence[Mapping[str, str]],
    inherited: Sequence[int],
    tally: Tally,
) -> Generator[tuple[T, Answer], None, None]:
    """Have tasks done by one worker for each of `environments`; yield each task with its answer as it ends.

    More tasks may be put into `tasks` meanwhile. `tell` gives a task's label for the log and its content as
    JSON. A worker calls `entry`, a function by its full name that calls `serve`, gets `setup` (JSON) first,
    and inherits the file descriptors `inherited`. What workers log is logged here after the label, and what
    they count is counted by `tally`.

    The first Ctrl-C or SIGTERM stops every worker at the end of its step and then raises `KeyboardInterrupt`.
    So does an error of one worker, which is raised here afterwards: a `LorascopeError` as it was, anything
    else as `RuntimeError`.
    """
    crew = _Crew(entry, setup, environments, inherited)
    problem: BaseException | None = None
    with deferred_signals() as interrupted:
        try:
            while True:
                if problem is None and interrupted():
                    problem = KeyboardInterrupt()
                if problem is None:
                    crew.give_out(tasks, tell)
                else:
                    crew.stop()
                if crew.is_idle:
                    break
                if (heard := crew.hear()) is None:
                    continue
                worker, message = heard
                task = worker.task
                if not message.keys() & {"advance", "skip", "log"}:
                    worker.task = None
                match message:
                    case {"advance": [count, note]}:
                        tally.advance(count, note)
                    case {"skip": count}:
                        tally.skip(count)
                    case {"log": [level, text]}:
                        worker.log(level, text)
                    case {"answer": value} if task is not None:
                        yield task, Answer(value)
                    case {"end": death}:
                        crew.dismiss(worker)
                        if task is not None and problem is None:
                            yield task, Answer(death=death)
                    case {"stopped": _}:
                        problem = problem or KeyboardInterrupt()
                    case {"error": [kind, text]}:
                        problem = problem or getattr(errors, kind)(text)
                    case {"fault": [text, trace]}:
                        log.debug("%s", trace)
                        problem = problem or RuntimeError(text)
            if problem is not None:
                raise problem
        finally:
            crew.end()


class _Crew:
    """The workers that are there: at most one for each environment, started when there is a task for it."""

    def __init__(
        self,
        entry: str,
        setup: Any,
        environments: Sequence[Mapping[str, str]],
        inherited: Sequence[int],
    ) -> None:
        self._entry, self._setup, self._inherited = entry, setup, inherited
        self._environments = environments
        self._workers: list[_Worker | None] = [None] * len(environments)
        self._heard: queue.SimpleQueue[tuple[_Worker, Any]] = queue.SimpleQueue()

    @property
    def _present(self) -> list["_Worker"]:
        return [worker for worker in self._workers if worker is not None]

    @property
    def is_idle(self) -> bool:
        """Whether no worker is at a task."""
        return all(worker.task is None for worker in self._present)

    def give_out(self, tasks: deque[T], tell: Callable[[T], tuple[str, Any]]) -> None:
        """Have every worker without a task begin with one, as long as there are any."""
        for index, worker in enumerate(self._workers):
            if tasks and (worker is None or worker.task is None):
                worker = self._workers[index] = worker or self._start(index)
                worker.give(tasks.popleft(), tell)

    def _start(self, index: int) -> "_Worker":
        return _Worker(self._entry, self._setup, self._environments[index], self._inherited, self._heard)

    def stop(self) -> None:
        """Have every worker leave its task after the step it is at."""
        for worker in self._present:
            worker.stop()

    def hear(self) -> "tuple[_Worker, Any] | None":
        """What a worker says next; None where none says anything for a moment."""
        try:
            return self._heard.get(timeout=0.2)
        except queue.Empty:
            return None

    def dismiss(self, worker: "_Worker") -> None:
        """Make room for another in the place of a worker that has ended."""
        self._workers[self._workers.index(worker)] = None

    def end(self) -> None:
        """End all workers and log their last words, which came on another line than the last answer."""
        left = self._present
        for worker in left:
            worker.end()
        for worker in left:
            worker.wait()
        while not self._heard.empty():
            worker, message = self._heard.get()
            if "log" in message:
                worker.log(*message["log"])


class _Worker:
    """A worker process as its parent sees it; `task` is what it is at, if anything."""

    def __init__(
        self,
        entry: str,
        setup: Any,
        environment: Mapping[str, str],
        inherited: Sequence[int],
        heard: "queue.SimpleQueue[Any]",
    ) -> None:
        module, _, name = entry.rpartition(".")
        self.task: Any = None
        self.label = ""
        self._is_stopping = False
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START.format(path=sys.path, module=module, name=name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **environment},
            # Elsewhere a worker holds no lock, but ends within a moment of its parent.
            pass_fds=inherited if os.name == "posix" else (),
            encoding="utf-8",
            errors="replace",
        )
        self._listener = threading.Thread(target=self._hear, args=(heard,), daemon=True)
        self._listener.start()
        self._send(setup)

    def give(self, task: Any, tell: Callable[[Any], tuple[str, Any]]) -> None:
        """Have it begin with a task."""
        self.task = task
        self.label, content = tell(task)
        self._send({"task": content})

    def log(self, level: int, text: str) -> None:
        """Log what it said."""
        log.log(level, "[%s] %s", self.label, text)

    def stop(self) -> None:
        """Have it leave its task after the step it is at, and take no other."""
        if not self._is_stopping:
            self._is_stopping = True
            self._send("stop")

    def end(self) -> None:
        """End the process: at once if it is at a task."""
        if self.task is not None:
            self._process.kill()
        with suppress(OSError):
            self._input.close()

    def wait(self) -> None:
        """Wait until the process has ended."""
        self._process.wait()
        self._listener.join()

    @property
    def _input(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _send(self, message: Any) -> None:
        with suppress(OSError):  # that it is gone will be heard
            self._input.write(json.dumps(message) + "\n")
            self._input.flush()

    def _hear(self, heard: "queue.SimpleQueue[Any]") -> None:
        """Pass on what it says until it ends, and then that."""
        assert self._process.stdout is not None and self._process.stderr is not None
        errors = threading.Thread(target=self._hear_errors, args=(self._process.stderr, heard), daemon=True)
        errors.start()
        with self._process.stdout as answers:
            for line in answers:
                heard.put((self, json.loads(line)))
        code = self._process.wait()
        errors.join(timeout=5)  # a process that a library left behind may hold it open
        self.end()
        death = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        heard.put((self, {"end": death}))

    def _hear_errors(self, stream: IO[str], heard: "queue.SimpleQueue[Any]") -> None:
        with stream:
            for line in stream:
                heard.put((self, {"log": [logging.INFO, line.rstrip()]}))


# -- in a worker ---------------------------------------------------------------------------------------------


class Link:
    """A worker's line to its parent: a `Tally`, and whether the parent wants it to stop."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self._told_s = time.monotonic()
        self._untold = 0
        self._stop = threading.Event()
        self._is_busy = False
        self._lock = threading.Lock()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` units as done; the parent hears of them a few times a second."""
        self._untold += count
        if time.monotonic() - self._told_s >= _TELL_EVERY_S:
            self._tell_count(note)

    def skip(self, count: int) -> None:
        """Count `count` units as done by an earlier run."""
        self.send({"skip": count})

    def is_stopped(self) -> bool:
        """Whether the task is to be left."""
        return self._stop.is_set()

    def send(self, message: Mapping[str, Any]) -> None:
        """Say something to the parent."""
        with self._lock:
            self._answers.write(json.dumps(message) + "\n")
            self._answers.flush()

    def answer(self, message: Mapping[str, Any]) -> None:
        """Say how a task ended."""
        self._tell_count("")
        self._is_busy = False
        self.send(message)

    def _tell_count(self, note: str) -> None:
        if self._untold:
            self.send({"advance": [self._untold, note]})
            self._told_s, self._untold = time.monotonic(), 0

    def listen(self, tasks: "queue.SimpleQueue[Any]") -> None:
        """Put tasks into the queue as they come, and at the end None; with a task open, the end of the input
        ends the process.
        """
        for line in sys.stdin:
            message = json.loads(line)
            if message == "stop":
                self._stop.set()
            else:
                self._is_busy = True
                tasks.put(message["task"])
        if self._is_busy:
            os._exit(1)  # everything is written whole or not at all
        tasks.put(None)


class _ToParent(logging.Handler):
    def __init__(self, link: Link) -> None:
        super().__init__()
        self.link = link

    def emit(self, record: logging.LogRecord) -> None:
        self.link.send({"log": [record.levelno, self.format(record).strip()]})


def serve(start: Callable[[Any], Callable[[Any, Link], Any]]) -> None:
    """Be a worker: `start` the parent's setup once, and do tasks by what that gives, until there are no more.

    A task's function takes its content and the link to the parent and returns the answer (JSON).
    `KeyboardInterrupt` out of it says that it was left for being stopped. Nothing but answers goes to the
    standard output from here on.
    """
    link = Link(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    for logger in (log, logging.getLogger("py.warnings")):
        logger.handlers[:] = [_ToParent(link)]
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
    logging.captureWarnings(True)
    setup = json.loads(sys.stdin.readline())
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=link.listen, args=(tasks,), daemon=True).start()
    work = None
    while (task := tasks.get()) is not None:
        try:
            work = work or start(setup)
            if link.is_stopped():
                raise KeyboardInterrupt
            message = {"answer": work(task, link)}
        except KeyboardInterrupt:
            message = {"stopped": True}
        except LorascopeError as error:
            message = {"error": [type(error).__name__, str(error)]}
        except Exception as error:
            message = {"fault": [f"{type(error).__name__}: {error}", traceback.format_exc()]}
        link.answer(message)
