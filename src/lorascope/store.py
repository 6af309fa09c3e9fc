"""Everything about files: atomic writes, careful reads, and digests.

A file appears under its name complete or not at all: it is written beside its target, flushed to disk, and
renamed.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

from lorascope.errors import LorascopeError, StorageError
from lorascope.shapes import Shape, find_fault

_PARTIAL = ".partial"
_REPLACE_WAIT_S = 2.0
_IS_POSIX = os.name == "posix"
_OTHER_FOLDER = (
    "choose another folder (--run-dir for a run, XDG_CACHE_HOME for the cache, HF_HOME for downloads)"
)
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free space and run the same command again",
    errno.EROFS: f"the file system is read-only: {_OTHER_FOLDER}",
    errno.EACCES: f"permission denied: {_OTHER_FOLDER}",
    errno.EPERM: f"permission denied: {_OTHER_FOLDER}",
    errno.ENOTDIR: f"a part of this path is a file: {_OTHER_FOLDER}",
    errno.EEXIST: f"a file stands where a folder is needed: {_OTHER_FOLDER}",
    errno.EISDIR: f"a folder stands where a file is needed: {_OTHER_FOLDER}",
}

_KEPT_FROM_BYTES = 2**23  # smaller files are digested in a few milliseconds
_SETTLED_NS = 2 * 10**9

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # the files of a PEFT folder
PEFT_RANK, PEFT_ALPHA = 8, 8  # what a PEFT configuration means that does not state them


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn operating-system errors on writing `path` into a one-line `StorageError` with the remedy."""
    try:
        yield
    except OSError as error:
        raise _storage_error(path, error.errno, str(error)) from error
    except Exception as error:
        # Writers in Rust, such as safetensors, raise errors of their own that only name the system's number.
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise _storage_error(path, int(number[1]), str(error)) from error


def _storage_error(path: Path, number: int | None, message: str) -> StorageError:
    reason = _REMEDIES.get(number, os.strerror(number)) if number else message
    return StorageError(f"{path}: cannot be written: {reason}")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed.

    Raises `StorageError` where the disk is full or the place cannot be written; `path` then keeps what it
    held.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(
            f".{path.stem}-{secrets.token_hex(4)}{_PARTIAL}{path.suffix}"
        )  # writers go by the suffix
        try:
            partial.touch(exist_ok=False)
            mode = (
                partial.stat().st_mode
            )  # as the user's umask has it; some writers put a private file in its place
            yield partial
            with partial.open("r+b") as file:  # Windows flushes only what is open for writing
                os.fsync(file.fileno())
            partial.chmod(mode)
            _replace(partial, path)
            _sync_directory(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def _replace(partial: Path, path: Path) -> None:
    """Rename over `path`. Windows refuses that while anyone reads it, such as a virus scanner: this waits for
    it.
    """
    give_up = time.monotonic() + _REPLACE_WAIT_S
    while True:
        try:
            partial.replace(path)
            return
        except PermissionError:
            if _IS_POSIX or time.monotonic() >= give_up:
                raise
        time.sleep(0.05)


def _sync_directory(directory: Path) -> None:
    if not _IS_POSIX:  # Windows opens no folders
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot; the file itself is on disk
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left half written below a folder that no other process writes into."""
    for partial in folder.rglob(f".*{_PARTIAL}*"):
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with atomic_path(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically, as indented JSON; a NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def require_regular(path: Path, error: type[LorascopeError] = StorageError) -> os.stat_result:
    """The status of a regular file, or of the one a link leads to.

    Raises `error`, one line, where anything else stands there, since opening a named pipe waits for ever and
    a device may have no end, and where the system does not let it be looked at. Where nothing is,
    `FileNotFoundError` stays.
    """
    with _reading(path, error):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "no file")
        raise error(f"{path}: is {kind}, where a file is needed: name a file, or put one in its place")
    return status


def open_regular(path: Path, error: type[LorascopeError] = StorageError) -> BufferedReader:
    """Open a regular file for reading bytes; raises as `require_regular`."""
    require_regular(path, error)
    with _reading(path, error):
        return path.open("rb")


def read_regular(
    path: Path, error: type[LorascopeError] = StorageError, limit_bytes: int | None = None
) -> bytes:
    """The content of a regular file; raises as `require_regular`, and `error` where it is larger than the
    limit.
    """
    size = require_regular(path, error).st_size
    if limit_bytes is not None and size > limit_bytes:
        raise error(f"{path}: has {size:,} bytes, at most {limit_bytes:,} are read: name the right file")
    with _reading(path, error):
        return path.read_bytes()


@contextmanager
def _reading(path: Path, error: type[LorascopeError]) -> Iterator[None]:
    """Turn what the system says on reading `path` into one line, but for a missing file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as cause:  # ValueError: a name with a null byte
        raise _unreadable(path, cause, error) from cause


@contextmanager
def access_errors(error: type[LorascopeError]) -> Iterator[None]:
    """Turn what the system says of a place that it does not let be looked at, such as a folder without
    rights, into `error`, one line. A decorator too.
    """
    try:
        yield
    except OSError as cause:
        if cause.filename is None:
            raise
        raise _unreadable(os.fsdecode(cause.filename), cause, error) from cause


def _unreadable(path: Path | str, cause: OSError | ValueError, error: type[LorascopeError]) -> LorascopeError:
    reason = getattr(cause, "strerror", None) or cause
    shown = str(path) if len(str(path)) <= 300 else f"{str(path)[:297]}..."
    return error(f"{shown}: cannot be read ({reason}): check the path and its permissions")


def read_json(path: Path) -> Any:
    """Read JSON from `path`; raise `StorageError` if it is missing, damaged or no file."""
    try:
        return json.loads(read_regular(path).decode())
    except FileNotFoundError as error:
        raise StorageError(f"{path}: not there: run the stage that writes it first") from error
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: damaged ({error}): delete it and run the same command again") from error


def read_table(path: Path, shape: Mapping[str, Shape]) -> dict[str, Any]:
    """As `read_json`, of an object of this shape; anything else is damage too."""
    table = read_json(path)
    if not isinstance(table, dict):
        reason: str | None = "not a JSON object"
    else:
        reason = find_fault(table, shape)
    if reason:
        raise StorageError(f"{path}: damaged ({reason}): delete it and run the same command again")
    return cast("dict[str, Any]", table)


def export_name(name: str, layout: str) -> str:
    """What an adapter or merged model called `name` is called as a file or folder of this format, in a run
    folder or elsewhere.
    """
    endings = {"kohya": ".safetensors", "peft": "-peft", "diffusers": "-diffusers.safetensors"}
    return name + {**endings, "merged-diffusers": "-merged", "merged-ldm": "-merged.safetensors"}[layout]


def user_cache_path(name: str) -> Path:
    """`$XDG_CACHE_HOME/lorascope/<name>`, or `~/.cache/lorascope/<name>`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorascope" / name


def digest_bytes(*parts: bytes) -> str:
    """SHA-256 of the parts, each preceded by its length, as 64 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of `value` as canonical JSON: the order of keys is of no account, that of lists is; 1 and 1.0
    differ.
    """
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kept_digest(path: Path) -> str:
    """As `digest_file`; of a large file that has not changed since an earlier call, the digest that was kept
    then.

    It is known by place, size, inode and the times of change of content and inode. A file that changed in the
    last seconds may change again within the clock's tick, so its digest is not kept.
    """
    status, place = require_regular(path), path.resolve()
    if status.st_size < _KEPT_FROM_BYTES:
        return digest_file(path)
    entry = user_cache_path("digests") / f"{digest_bytes(os.fsencode(place))[:32]}.json"
    stamp = [status.st_size, status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    with suppress(StorageError, KeyError, TypeError):
        if (known := read_json(entry))["stamp"] == stamp:
            return str(known["digest"])
    digest = digest_file(path)
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS:
        with suppress(StorageError):  # a cache that cannot be written costs time, nothing else
            write_json(entry, {"stamp": stamp, "digest": digest})
    return digest


def digest_folder(
    directory: Path,
    patterns: Iterable[str] = ("*.safetensors", "*.json", "*.txt"),
    digest: Callable[[Path], str] = digest_file,
) -> str:
    """SHA-256 over names and contents of the matching files below `directory`."""
    paths = sorted({path for pattern in patterns for path in directory.rglob(pattern) if path.is_file()})
    return digest_json([[path.relative_to(directory).as_posix(), digest(path)] for path in paths])
