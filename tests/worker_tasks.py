"""Tasks for the tests of `lorascope.machine.workers`, which its worker processes import."""

import os
import signal
import time
import warnings
from collections import deque
from pathlib import Path
from typing import Any

from lorascope.console import log
from lorascope.errors import ConfigError, StorageError
from lorascope.machine.workers import Link, run_side_by_side, serve

TWO = [{"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "2"}]


class Counted:
    """A tally that only keeps what it is told."""

    def __init__(self) -> None:
        self.done = self.skipped = 0

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count

    def skip(self, count: int) -> None:
        self.skipped += count


def start(setup: dict[str, Any]) -> Any:
    """A task is a list: a word and what it needs."""
    if setup.get("broken"):
        raise ConfigError("this setup is broken")

    def work(task: list[Any], link: Link) -> Any:
        match task:
            case ["echo", value]:
                return [setup["name"], value, os.environ["OMP_NUM_THREADS"]]
            case ["count", steps]:
                link.skip(2)
                for step in range(steps):
                    link.advance(1, f"step {step}")
            case ["say", text]:
                print("no answer")
                log.info("train    %s", text)
                warnings.warn(f"beware of {text}", stacklevel=1)
                os.write(2, b"a word of a library\n")
            case ["refuse"]:
                raise StorageError("the disk is full")
            case ["fault"]:
                raise ZeroDivisionError("by zero")
            case ["die", path]:
                if not Path(path).exists():
                    Path(path).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return "alive"
            case ["leave"]:
                os._exit(7)
            case ["write", path]:
                step = 0
                while not link.is_stopped():
                    step += 1
                    Path(path).write_text(str(step))
                    time.sleep(0.01)
                Path(path).write_text("stopped")
                raise KeyboardInterrupt
        return None

    return work


def be_worker() -> None:
    """What a worker process calls."""
    serve(start)


def run(
    tasks: list[Any], tally: Any, environments: list[dict[str, str]], inherited: list[int], **setup: Any
) -> list[Any]:
    """All tasks with their answers, in the order in which they end."""
    entry = "worker_tasks.be_worker"
    setup = {"name": "w", **setup}
    return list(
        run_side_by_side(
            deque(tasks), lambda task: (task[0], task), entry, setup, environments, inherited, tally
        )
    )
