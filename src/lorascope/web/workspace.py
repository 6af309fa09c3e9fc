"""The folder that the web app works in, and the folders on the machine that it may look into."""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lorascope.errors import ConfigError, LorascopeError, shown
from lorascope.store import storage_errors

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?")  # Windows drops dots at the end
STUDY_FILE = "study.toml"


class OutsideError(LorascopeError):
    """A path that a browser may not name."""


class MissingError(LorascopeError):
    """Something that a browser named and that is not there (any more)."""


@dataclass(frozen=True)
class Workspace:
    """Where runs, studies, uploaded pictures and adapter files lie, and which folders may be looked into.

    `folder` and `roots` are absolute, without links. Everything that the web app writes is below `folder`,
    but for captions, which lie beside their pictures.
    """

    folder: Path
    roots: tuple[Path, ...]

    @classmethod
    def open(cls, folder: Path, allowed: Iterable[Path] = ()) -> "Workspace":
        """The workspace in `folder`, which is made; raise `ConfigError` where a folder to allow is none."""
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()
        roots = [folder]
        for path in allowed:
            if not path.is_dir():
                raise ConfigError(f"--allow {path}: no such folder: name a folder with pictures")
            roots.append(path.resolve())
        return cls(folder, tuple(dict.fromkeys(roots)))

    @property
    def runs_dir(self) -> Path:
        """A run folder each."""
        return self.folder / "runs"

    @property
    def studies_dir(self) -> Path:
        """Study files that were planned in the browser."""
        return self.folder / "studies"

    @property
    def pictures_dir(self) -> Path:
        """A folder for each set of uploaded pictures."""
        return self.folder / "pictures"

    @property
    def files_dir(self) -> Path:
        """Adapter files that were dropped in the browser, and what was made of them."""
        return self.folder / "files"

    @property
    def state_dir(self) -> Path:
        """What the server keeps for itself: queue, jobs, token, thumbnails."""
        return self.folder / ".lorascope-web"

    def run_dir(self, name: str) -> Path:
        """The run folder of this name; raise `MissingError` where there is none."""
        path = self.runs_dir / require_name(name)
        if not _is_run(path):
            raise MissingError(f"no run {shown(name)} in {self.runs_dir}: it may have been deleted")
        return path

    def run_names(self) -> list[str]:
        """Names of all runs, the last changed first."""
        try:
            names = os.listdir(self.runs_dir)
        except OSError:
            return []
        runs = [self.runs_dir / name for name in names if _NAME.fullmatch(name)]
        found = [(_last_change(path), path.name) for path in runs if _is_run(path)]
        return [name for _, name in sorted(found, reverse=True)]

    def resolve(self, text: str) -> Path:
        """The file or folder that a browser named, absolute or relative to the workspace, with links
        followed.

        Raises `OutsideError` where it is not below an allowed folder, is hidden or is spelled in a way that
        another system reads otherwise, and `MissingError` where it is not there.
        """
        if text[:1] in ("/", "\\") and text[1:2] in ("/", "\\"):  # Windows would ask another machine
            raise OutsideError(f"{shown(text)}: is no path on this machine: name a folder by its path")
        try:
            path = (self.folder / text).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle; what no path can hold
            raise self._outside(text) from error
        # Looked at in this order, so that whether something outside is there is not said.
        if not any(_is_seen_below(root, path) for root in self.roots):
            raise self._outside(text)
        if not os.path.exists(path):
            raise MissingError(f"{shown(text)}: is not there: check the path")
        return path

    def shown_path(self, path: Path) -> str:
        """A path as pages show and name it: relative where it lies in the workspace."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else str(path)

    def _outside(self, text: str) -> OutsideError:
        return OutsideError(
            f"{shown(text)}: lies outside of the folders that may be looked into: start the server with "
            "`--allow FOLDER`"
        )


def _is_run(path: Path) -> bool:
    return os.path.isfile(f"{path}/{STUDY_FILE}") and not os.path.islink(path)


def _last_change(run: Path) -> int:
    """When a run last came further; it may be deleted meanwhile."""
    newest = 0
    for name in (STUDY_FILE, "manifest.json", "report.html"):
        with suppress(OSError):
            newest = max(newest, os.stat(f"{run}/{name}").st_mtime_ns)
    return newest


def _is_seen_below(root: Path, path: Path) -> bool:
    """Whether a path lies below a folder, and no part of it from there is hidden."""
    return path.is_relative_to(root) and not any(
        part.startswith(".") for part in path.relative_to(root).parts
    )


def require_name(name: str) -> str:
    """A name of a run, a study or a set of pictures, which is one part of a path; raise `MissingError` where
    it is none.
    """
    if not _NAME.fullmatch(name):
        raise MissingError(f"{shown(name)}: names have 1 to 64 letters, digits, dots, dashes and underscores")
    return name
