"""The adapter files of a workspace: how one comes in, which there are, which may leave, deleting."""

import io
import re
import secrets
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lorascope.errors import ConfigError, StorageError, shown
from lorascope.store import PEFT_CONFIG, PEFT_WEIGHTS, storage_errors
from lorascope.web.workspace import OutsideError, Workspace

SUFFIX = ".safetensors"
MAX_FILES = 2000
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
_MARKS = (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    f"unet/{PEFT_WEIGHTS}",
    f"text_encoder/{PEFT_WEIGHTS}",
    "model_index.json",
)
_CHUNK_BYTES = 2**20
_STALE_S = 86_400
_DEPTH = 3  # files/<run>/<folder>/
_RESERVE_BYTES = 2**26  # left free for the queue
_naming = threading.Lock()


@dataclass(frozen=True)
class StoredFile:
    """A file, or a folder that is one adapter or model. `path` is as pages name it."""

    path: str
    name: str
    num_bytes: int
    changed: float
    is_folder: bool


def require_adapter(path: Path) -> Path:
    """`path` if it may hold an adapter: a safetensors file, or a PEFT or model folder.

    Raises `ConfigError` for a pickle, which can run code of its maker, and for anything else.
    """
    if path.is_dir() and is_adapter_folder(path):
        return path
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        raise ConfigError(
            f"{shown(path.name)}: is a pickle, which can run code when it is opened: get it as {SUFFIX}"
        )
    if suffix != SUFFIX or (path.exists() and not path.is_file()):
        raise ConfigError(f"{shown(path.name)}: is no {SUFFIX} file and no PEFT folder: name one of these")
    return path


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder is one adapter, or one model, by its files."""
    return any((path / mark).is_file() for mark in _MARKS)


def plain_stem(text: str) -> str:
    """A name that may stand in a path, from one that anybody gave."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("._-")[:80] or "adapter"


def stem_of(path: Path) -> str:
    """The name of a file without its ending, or of a folder."""
    return plain_stem(path.name[: -len(SUFFIX)] if path.suffix.lower() == SUFFIX else path.name)


# -- coming in -----------------------------------------------------------------------------------------------


@dataclass
class Incoming:
    """An upload under way. `path` is where it lies once it is complete."""

    file: BinaryIO
    path: Path | None = None


@contextmanager
def incoming(workspace: Workspace, name: str, num_bytes: int = 0) -> Iterator[Incoming]:
    """A file to write an upload called `name` into; at the end it lies complete in `files/`, under a name
    that nothing had before. On an error nothing is left of it.

    Raises `ConfigError` for what is no safetensors file by its name, and `StorageError` where `num_bytes` do
    not fit on the disk.
    """
    given = Path(name.replace("\\", "/").rpartition("/")[2][-200:])
    require_adapter(Path(given.name))
    folder = workspace.state_dir / "uploads"
    with storage_errors(workspace.files_dir):
        workspace.files_dir.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        if num_bytes > (free := shutil.disk_usage(folder).free - _RESERVE_BYTES):
            raise StorageError(
                f"{given.name}: has {num_bytes:,} bytes, and {max(0, free):,} are free: free space and send "
                "it again"
            )
        _remove_stale(folder)
        partial = folder / secrets.token_hex(8)
        try:
            with partial.open("xb") as file:
                upload = Incoming(file)
                yield upload
            with _naming:
                upload.path = _free_path(workspace.files_dir, plain_stem(given.stem))
                partial.replace(upload.path)
        finally:
            partial.unlink(missing_ok=True)


def _free_path(folder: Path, stem: str) -> Path:
    names = [f"{stem}{SUFFIX}", *(f"{stem}-{number}{SUFFIX}" for number in range(2, 10_000))]
    return next(folder / name for name in names if not (folder / name).exists())


def _remove_stale(folder: Path) -> None:
    """Remove what a server that was killed left half received."""
    for path in folder.iterdir():
        if path.is_file() and time.time() - path.stat().st_mtime > _STALE_S:
            path.unlink(missing_ok=True)


# -- what there is -------------------------------------------------------------------------------------------


def stored_files(workspace: Workspace) -> list[StoredFile]:
    """Everything in `files/` that is an adapter or a model, the newest first, at most `MAX_FILES`."""
    found: list[StoredFile] = []
    for path in _walk(workspace.files_dir, _DEPTH):
        is_folder = path.is_dir()
        status = path.lstat()
        num_bytes = sum(member.lstat().st_size for member in _members(path)) if is_folder else status.st_size
        shown_path = workspace.shown_path(path)
        name = path.relative_to(workspace.files_dir).as_posix()
        found.append(StoredFile(shown_path, name, num_bytes, status.st_mtime, is_folder))
        if len(found) >= MAX_FILES:
            break
    return sorted(found, key=lambda item: -item.changed)


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    if not folder.is_dir() or depth == 0:
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_symlink():
            continue
        if path.is_dir():
            if is_adapter_folder(path):
                yield path
            else:
                yield from _walk(path, depth - 1)
        elif path.suffix.lower() == SUFFIX and path.is_file():
            yield path


def _members(folder: Path) -> list[Path]:
    """The files of an adapter or model folder; links are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if not path.is_symlink() and path.is_file() and path.resolve().is_relative_to(folder)
    )


# -- going out -----------------------------------------------------------------------------------------------


def sendable(workspace: Workspace, text: str) -> Path:
    """The adapter that a browser may take: below `files/`, or of an arm's folder in a run.

    Raises `OutsideError` for anything else, a folder of several among it, and `MissingError` where there is
    none.
    """
    path = workspace.resolve(text)
    if not _may_leave(workspace, path):
        raise OutsideError(
            f"{shown(text)}: is no file that can be downloaded: adapters in files/ and of runs can"
        )
    return path


def _may_leave(workspace: Workspace, path: Path) -> bool:
    is_file = path.is_file() and path.suffix.lower() == SUFFIX
    if not is_file and not (path.is_dir() and is_adapter_folder(path)):
        return False
    if path.is_relative_to(workspace.files_dir):
        return path != workspace.files_dir
    if not path.is_relative_to(workspace.runs_dir):
        return False
    parts = path.relative_to(workspace.runs_dir).parts
    return len(parts) >= 3 and parts[1] == "adapters"


def zipped(folder: Path) -> Iterator[bytes]:
    """A folder as a ZIP file, piece by piece and not compressed, since weights are not made smaller by it."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for path in _members(folder):
            info = zipfile.ZipInfo.from_file(path, f"{folder.name}/{path.relative_to(folder).as_posix()}")
            with path.open("rb") as source, archive.open(info, "w", force_zip64=True) as member:
                while chunk := source.read(_CHUNK_BYTES):
                    member.write(chunk)
                    yield sink.taken()
    yield sink.taken()


class _Sink(io.RawIOBase):
    """What a ZIP file is written into: keeps what was not taken yet, and cannot seek."""

    def __init__(self) -> None:
        super().__init__()
        self._kept = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, content: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        self._kept += content
        return len(content)

    def taken(self) -> bytes:
        content = bytes(self._kept)
        self._kept.clear()
        return content


def own_file(workspace: Workspace, text: str) -> Path:
    """A file or folder of `files/`, which may be deleted; raise as `sendable`."""
    path = sendable(workspace, text)
    if not path.is_relative_to(workspace.files_dir):
        raise OutsideError(f"{shown(text)}: lies not in files/: delete it where it lies")
    return path


def delete_file(path: Path) -> None:
    """Delete a file or an adapter folder, and the folder around it where it is empty then."""
    with storage_errors(path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def size_of(path: Path) -> int:
    """Bytes of a file or of the files in a folder."""
    return sum(member.stat().st_size for member in _members(path)) if path.is_dir() else path.stat().st_size
