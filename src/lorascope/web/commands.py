"""Commands of a few seconds that a page waits for: `lorascope` as a child process, and what was said of the
file that it wrote.

The server itself loads no weights. What a command said is kept beside the queue, so that the page of a file
can tell later how it was made.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lorascope.errors import EXIT_DONE, LorascopeError
from lorascope.store import digest_json, write_json
from lorascope.web.queue import in_shell
from lorascope.web.workspace import Workspace

_AT_ONCE = threading.BoundedSemaphore(2)  # each loads torch
_LIMIT_S = 180.0
_NOTE = "note: "


class CommandError(LorascopeError):
    """A command that refused; the message is its own line."""


@dataclass(frozen=True)
class Ran:
    """A command that ended: its arguments, exit code and stdout, the lines of its stderr."""

    arguments: tuple[str, ...]
    exit_code: int
    output: str
    said: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command as a shell takes it, in the working folder."""
        return in_shell(self.arguments)


@dataclass(frozen=True)
class Made:
    """How a file was made: the command, what it noted, when it ended (seconds since 1970)."""

    command: str
    summary: tuple[str, ...]
    notes: tuple[str, ...]
    ended: float


def as_argument(workspace: Workspace, path: Path) -> str:
    """A path as a command in the working folder takes it: never one that reads as an option."""
    text = workspace.shown_path(path)
    return f"./{text}" if text.startswith("-") else text


def run_command(
    workspace: Workspace,
    arguments: Sequence[str],
    fine: Sequence[int] = (EXIT_DONE,),
    limit_s: float = _LIMIT_S,
) -> Ran:
    """Run a command in the working folder to its end.

    Raises `CommandError` with the command's line where it ends with an exit code that is not in `fine`, and
    where it takes longer than `limit_s`.
    """
    # PYTHONSAFEPATH: what lies in the working folder is no module of ours.
    environment = {**os.environ, "NO_COLOR": "1", "PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8"}
    environment.pop("LORASCOPE_DEBUG", None)
    try:
        with _AT_ONCE:
            done = subprocess.run(
                [sys.executable, "-m", "lorascope", *arguments],
                cwd=workspace.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=limit_s,
                check=False,
            )
    except subprocess.TimeoutExpired as error:
        raise CommandError(
            f"`{in_shell(arguments)}` took longer than {limit_s:g} seconds: run it in a terminal"
        ) from error
    said = tuple(line for line in done.stderr.decode(errors="replace").splitlines() if line.strip())
    if done.returncode not in fine:
        raise CommandError(said[-1].removeprefix("lorascope: ") if said else f"exit code {done.returncode}")
    return Ran(tuple(arguments), done.returncode, done.stdout.decode(errors="replace"), said)


def make_file(workspace: Workspace, arguments: Sequence[str], out: Path) -> Made:
    """Run a command that writes `out`, and keep what it said of it; raises as `run_command`."""
    ran = run_command(workspace, arguments)
    return keep_made(workspace, out, arguments, ran.said, time.time())


def keep_made(
    workspace: Workspace, out: Path, arguments: Sequence[str], said: Sequence[str], ended: float
) -> Made:
    """Keep how a file was made."""
    found = (line.removeprefix(_NOTE) for line in said if line.startswith(_NOTE))
    notes = tuple(f"{note[:1].upper()}{note[1:]}." for note in found)
    summary = tuple(line for line in said if not line.startswith(_NOTE))
    made = Made(in_shell(arguments), summary, notes, ended)
    write_json(_record(workspace, out), asdict(made))
    return made


def how_made(workspace: Workspace, out: Path) -> Made | None:
    """How a file was made, None where no command of a page made it or it changed since."""
    try:
        facts = json.loads(_record(workspace, out).read_text(encoding="utf-8"))
        made = Made(facts["command"], tuple(facts["summary"]), tuple(facts["notes"]), float(facts["ended"]))
        return made if out.lstat().st_mtime <= made.ended + 1 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget_made(workspace: Workspace, out: Path) -> None:
    """Remove what is kept of a file that is gone."""
    _record(workspace, out).unlink(missing_ok=True)


def _record(workspace: Workspace, out: Path) -> Path:
    return workspace.state_dir / "made" / f"{digest_json(workspace.shown_path(out))[:32]}.json"
