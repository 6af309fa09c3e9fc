"""What `lorascope data check` says of a set, kept for its page: refusals, duplicates, a verdict."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lorascope.errors import EXIT_DONE, EXIT_INPUT, ConfigError, DataError, StorageError
from lorascope.shapes import Maybe, Number
from lorascope.store import digest_bytes, read_table, write_json
from lorascope.web.commands import run_command
from lorascope.web.workspace import Workspace

_LIMIT_S = 600.0
_KEPT = {"when": Number, "arguments": [str], "found": dict}
_FOUND = {
    "would_start": bool,
    "problem": Maybe(str),
    "num_rows": int,
    "num_usable": int,
    "num_train": Maybe(int),
    "num_heldout": Maybe(int),
    "buckets": [{"width_px": int, "height_px": int, "num_pictures": int}],
    "remarks": [str],
    "refused": [{"id": str, "reason": str}],
    "treated": [{"id": str, "treatment": str}],
    "duplicates": Maybe([{"kind": str, "ids": [str], "action": str}]),
    "tags": [list],
}

_under_way: set[Path] = set()
_lock = threading.Lock()


@dataclass(frozen=True)
class Check:
    """What was found, when, and by which command."""

    KINDS: ClassVar = ("refused", "duplicate", "treated")

    when: float
    arguments: list[str]
    found: dict[str, Any]
    notes: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """By picture: kind (`refused`, `duplicate`, `treated`) and words of what is to be said of it."""


def command(folder: Path, resolution_px: int, buckets: bool) -> list[str]:
    """The command that checks a set."""
    more = ["--buckets"] if buckets else []
    return ["data", "check", str(folder), "--resolution", str(resolution_px), *more, "--json"]


def run_check(workspace: Workspace, folder: Path, arguments: list[str]) -> Check:
    """Run the check in a process of its own, and keep what it finds.

    Raises `DataError` with the command's own words where the set cannot be looked at, `ConfigError` where
    that is going on already, and `CommandError` where it takes too long; what was seen until then is not
    looked at again.
    """
    with _alone(folder):
        ran = run_command(workspace, arguments, fine=(EXIT_DONE, EXIT_INPUT), limit_s=_LIMIT_S)
    try:
        found = json.loads(ran.output)
    except ValueError as error:
        raise DataError(
            ran.said[-1].removeprefix("lorascope: ") if ran.said else "nothing was said"
        ) from error
    found = {key: found[key] for key in _FOUND}
    write_json(_path(workspace, folder), {"when": time.time(), "arguments": arguments, "found": found})
    kept = last_check(workspace, folder)
    assert kept is not None
    return kept


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with _lock:
        if folder in _under_way:
            raise ConfigError(f"{folder.name}: is being checked already: wait for it")
        _under_way.add(folder)
    try:
        yield
    finally:
        with _lock:
            _under_way.discard(folder)


def last_check(workspace: Workspace, folder: Path) -> Check | None:
    """What the last check of a set found; None without one."""
    try:
        kept = read_table(_path(workspace, folder), {**_KEPT, "found": _FOUND})
    except StorageError:
        return None
    return Check(kept["when"], kept["arguments"], kept["found"], _notes(kept["found"]))


def _notes(found: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    notes: dict[str, list[tuple[str, str]]] = {}
    for entry in found["refused"]:
        notes.setdefault(entry["id"], []).append(("refused", entry["reason"]))
    for group in found["duplicates"] or ():
        words = "the same picture as" if group["kind"] == "exact" else "much like"
        for name in group["ids"]:
            others = [other for other in group["ids"] if other != name]
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            text = f"{words} {', '.join(others[:3])}{more}: {group['action']}"
            notes.setdefault(name, []).append(("duplicate", text))
    for entry in found["treated"]:
        notes.setdefault(entry["id"], []).append(("treated", entry["treatment"]))
    return notes


def _path(workspace: Workspace, folder: Path) -> Path:
    name = digest_bytes(str(folder).encode(errors="surrogateescape"))[:32]
    return workspace.state_dir / "checks" / f"{name}.json"
