"""The folder that the web app works in, and the folders on the machine that it may look into."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lorascope.errors import ConfigError, LorascopeError, shown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
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
        if path.is_symlink() or not (path / STUDY_FILE).is_file():
            raise MissingError(f"no run {shown(name)} in {self.runs_dir}: it may have been deleted")
        return path

    def run_names(self) -> list[str]:
        """Names of all runs, the last changed first."""
        if not self.runs_dir.is_dir():
            return []
        found = [
            (max((path / name).stat().st_mtime_ns for name in _marks(path)), path.name)
            for path in self.runs_dir.iterdir()
            if _NAME.fullmatch(path.name) and not path.is_symlink() and (path / STUDY_FILE).is_file()
        ]
        return [name for _, name in sorted(found, reverse=True)]

    def resolve(self, text: str) -> Path:
        """The file or folder that a browser named, absolute or relative to the workspace, with links
        followed.

        Raises `OutsideError` where it is not below an allowed folder, is hidden or is spelled in a way that
        another system reads otherwise, and `MissingError` where it is not there.
        """
        if "\0" in text or text.startswith(
            ("\\\\", "//")
        ):  # Windows would ask another machine for the latter
            raise OutsideError(f"{shown(text)}: is no path on this machine: name a folder by its path")
        try:
            path = (self.folder / text).resolve(strict=True)
        except (OSError, RuntimeError) as error:
            # Whether something outside is there is not said.
            if self._root_of((self.folder / text).resolve()) is None:
                raise self._outside(text) from error
            raise MissingError(f"{shown(text)}: is not there: check the path") from error
        root = self._root_of(path)
        if root is None or any(part.startswith(".") for part in path.relative_to(root).parts):
            raise self._outside(text)
        return path

    def shown_path(self, path: Path) -> str:
        """A path as pages show and name it: relative where it lies in the workspace."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else str(path)

    def _root_of(self, path: Path) -> Path | None:
        return next((root for root in self.roots if path.is_relative_to(root)), None)

    def _outside(self, text: str) -> OutsideError:
        return OutsideError(
            f"{shown(text)}: lies outside of the folders that may be looked into: start the server with "
            "`--allow FOLDER`"
        )


def _marks(run: Path) -> Iterator[str]:
    """Files that change as a run goes on."""
    return (name for name in (STUDY_FILE, "manifest.json", "report.html") if (run / name).exists())


def require_name(name: str) -> str:
    """A name of a run, a study or a set of pictures, which is one part of a path; raise `MissingError` where
    it is none.
    """
    if not _NAME.fullmatch(name):
        raise MissingError(f"{shown(name)}: names have 1 to 64 letters, digits, dots, dashes and underscores")
    return name
