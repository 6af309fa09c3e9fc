"""Processes of their own for tests, which may be killed.

They are forked from one that has imported lorascope: importing it anew takes seconds.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lorascope.study", "lorascope.cli.app", "conftest"])


class Forked:
    """A process that calls `function(*arguments)`, a function of a module, and exits with what that returns.

    None is 0. Its standard output and error go to files. Within `with` it runs; after it, it has ended.
    """

    def __init__(
        self,
        function: Callable[..., int | None],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._process: ForkServerProcess = _CONTEXT.Process(
            target=_begin,
            args=(self._folder.name, {**os.environ, **(environment or {})}, function, arguments),
        )

    def __enter__(self) -> "Forked":
        self._process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._process.join()
        self.stdout, self.stderr = (self._said(name) for name in ("stdout", "stderr"))
        self._folder.cleanup()

    @property
    def exit_code(self) -> int | None:
        """Minus the signal that ended it, if one did; None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._process.kill()
        self._process.join()

    def _said(self, name: str) -> str:
        path = Path(self._folder.name, name)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def run_forked(
    function: Callable[..., int | None], *arguments: Any, environment: Mapping[str, str] | None = None
) -> Forked:
    """The process of `function(*arguments)` when it has ended."""
    with Forked(function, *arguments, environment=environment) as process:
        pass
    return process


def _begin(
    folder: str, environment: dict[str, str], function: Callable[..., int | None], arguments: tuple[Any, ...]
) -> NoReturn:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # as in the process that compares with it
    sys.exit(function(*arguments))
