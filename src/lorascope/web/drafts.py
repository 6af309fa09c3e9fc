"""Study files that are planned in the browser: `studies/NAME.toml`, saved at every change, right or wrong."""

import json
import threading
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from lorascope.config import parse_study
from lorascope.errors import ConfigError, StorageError
from lorascope.schema import StudyConfig
from lorascope.store import digest_bytes, read_regular, storage_errors, write_json, write_text
from lorascope.web.workspace import MissingError, Workspace, require_name

MAX_BYTES = 2**19
_SAVING = threading.Lock()


class StaleError(ConfigError):
    """A text that was written over an older one than there is now."""


@dataclass(frozen=True)
class Draft:
    """A study file as it is now. `version` changes with its text."""

    name: str
    path: Path
    text: str

    @property
    def version(self) -> str:
        """A short digest of the text."""
        return digest_bytes(self.text.encode())[:16]

    @property
    def argument(self) -> str:
        """The file as commands in the workspace name it."""
        return f"studies/{self.name}.toml"

    @property
    def config(self) -> StudyConfig:
        """The study; raise `ConfigError` with what is wrong in it."""
        return parse_study(self.text, self.argument)

    @property
    def table(self) -> dict[str, Any]:
        """What the file says; raise `ConfigError` where it is no TOML."""
        try:
            return tomllib.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self.argument}: not valid TOML: {error}") from error


@dataclass(frozen=True)
class Reason:
    """Why a value was chosen, beside the value that was."""

    key: str
    value: Any
    reason: str


def list_drafts(workspace: Workspace) -> list[tuple[str, float]]:
    """Names of all drafts and when they changed, the newest first."""
    if not workspace.studies_dir.is_dir():
        return []
    found = [
        (path.stem, path.stat().st_mtime)
        for path in workspace.studies_dir.glob("*.toml")
        if not path.name.startswith(".") and path.is_file() and not path.is_symlink()
    ]
    return sorted(found, key=lambda item: item[1], reverse=True)


def read_draft(workspace: Workspace, name: str) -> Draft:
    """A draft; raise `MissingError` where there is none of that name."""
    path = _path(workspace, name)
    if path.is_symlink() or not path.is_file():
        raise MissingError(f"no study {name!r} in {workspace.studies_dir}: it may have been deleted")
    content = read_regular(path, StorageError, MAX_BYTES)
    return Draft(name, path, content.decode("utf-8-sig", errors="replace"))


def save_draft(workspace: Workspace, name: str, text: str) -> Draft:
    """Write a draft, complete or not at all."""
    if len(text.encode()) > MAX_BYTES:
        raise ConfigError(f"{name}: more than {MAX_BYTES:,} bytes: no study file is as long as that")
    path = _path(workspace, name)
    write_text(path, text.replace("\r\n", "\n"))
    return read_draft(workspace, name)


def change_draft(
    workspace: Workspace, name: str, change: Callable[[Draft], str], version: str | None = None
) -> Draft:
    """Write what `change` makes of a draft, while nobody else changes it.

    Raises `StaleError` where `version` is given and is not that of the draft.
    """
    with _SAVING:
        draft = read_draft(workspace, name)
        if version is not None and version != draft.version:
            raise StaleError(
                f"{name}: was changed in another window meanwhile: copy what you wrote, then load the page "
                "again"
            )
        return save_draft(workspace, name, change(draft))


def new_draft(workspace: Workspace, wanted: str, text: str, reasons: tuple[Reason, ...] = ()) -> Draft:
    """A draft of this name, or of the first free one like it."""
    with _SAVING:
        name = free_name(wanted, lambda known: _path(workspace, known).exists())
        draft = save_draft(workspace, name, text)
    facts = [{"key": item.key, "value": item.value, "reason": item.reason} for item in reasons]
    write_json(_reasons_path(workspace, name), facts)
    return draft


def delete_draft(workspace: Workspace, name: str) -> None:
    """Remove a draft."""
    path = read_draft(workspace, name).path
    with storage_errors(path):
        path.unlink()
        _reasons_path(workspace, name).unlink(missing_ok=True)


def read_reasons(workspace: Workspace, name: str) -> list[Reason]:
    """Why its values were chosen, where a draft was made of answers."""
    try:
        facts = json.loads(_reasons_path(workspace, name).read_text(encoding="utf-8"))
        return [Reason(str(item["key"]), item["value"], str(item["reason"])) for item in facts]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def free_name(wanted: str, is_taken: Callable[[str], bool]) -> str:
    """`wanted`, or with the first number that makes it a name that is not taken."""
    require_name(wanted)
    name, number = wanted, 2
    while is_taken(name):
        name, number = f"{wanted[:58]}-{number}", number + 1
    return name


def _path(workspace: Workspace, name: str) -> Path:
    return workspace.studies_dir / f"{require_name(name)}.toml"


def _reasons_path(workspace: Workspace, name: str) -> Path:
    return workspace.studies_dir / f".{require_name(name)}.reasons.json"


def write_toml(table: Mapping[str, Any], reasons: Mapping[str, str] | None = None) -> str:
    """A study as TOML text, each value with the reason for its key, such as `arms.0.rank`, in a comment."""
    lines = _lines(table, "", "", reasons or {})
    return "\n".join(lines).strip() + "\n"


def _lines(table: Mapping[str, Any], header: str, prefix: str, reasons: Mapping[str, str]) -> list[str]:
    lines: list[str] = []
    inner = {key: value for key, value in table.items() if _is_table(value) or _is_tables(value)}
    for key, value in table.items():
        if key in inner:
            continue
        reason = reasons.get(f"{prefix}{key}")
        lines += [f"# {reason}"] if reason else []
        lines.append(f"{_bare(key)} = {_value(value)}")
    for key, value in inner.items():
        path = f"{header}.{_bare(key)}" if header else _bare(key)
        tables = [(f"[{path}]", value, f"{prefix}{key}.")]
        if _is_tables(value):
            tables = [(f"[[{path}]]", item, f"{prefix}{key}.{index}.") for index, item in enumerate(value)]
        for title, item, place in tables:
            lines += ["", title, *_lines(item, path, place, reasons)]
    return lines


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return tomli_w.dumps({"x": value}).strip().removeprefix("x = ")


def _bare(key: str) -> str:
    return tomli_w.dumps({key: 0}).partition(" = ")[0]
