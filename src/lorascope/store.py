"""Everything about files: atomic writes, digests, and the layout of a run folder.

A file appears under its name complete or not at all: it is written beside its target, flushed to disk, and
renamed.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lorascope.errors import StorageError

_PARTIAL = ".partial"
_LOCK_WAIT_S = 2.0
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
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.chmod(mode)
            partial.replace(path)
            _sync_directory(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot; the file itself is on disk
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def read_json(path: Path) -> Any:
    """Read JSON from `path`; raise `StorageError` if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StorageError(f"{path}: not there: run the stage that writes it first") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: damaged ({error}): delete it and run the same command again") from error
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be read ({error.strerror}): check the path and its permissions"
        ) from error


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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kept_digest(path: Path) -> str:
    """As `digest_file`; of a large file that has not changed since an earlier call, the digest that was kept
    then.

    It is known by place, size, inode and the times of change of content and inode. A file that changed in the
    last seconds may change again within the clock's tick, so its digest is not kept.
    """
    stat, place = path.stat(), path.resolve()
    if stat.st_size < _KEPT_FROM_BYTES:
        return digest_file(path)
    entry = user_cache_path("digests") / f"{digest_bytes(os.fsencode(place))[:32]}.json"
    stamp = [stat.st_size, stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    with suppress(StorageError, KeyError, TypeError):
        if (known := read_json(entry))["stamp"] == stamp:
            return str(known["digest"])
    digest = digest_file(path)
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS:
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


class JsonLines:
    """An append-only log of records, one JSON object a line, that a resumed run can cut back to a known
    length.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def rewind(self, length_bytes: int) -> None:
        """Drop everything after the first `length_bytes` bytes: records of steps that will be done again.

        Raises `StorageError` if there are fewer: the records of steps that will not be done again are lost.
        """
        self.close()
        found = self.path.stat().st_size if self.path.exists() else 0
        if found < length_bytes:
            raise StorageError(
                f"{self.path}: has {found} bytes, but {length_bytes} were written before the "
                "checkpoint: start again in an empty run folder"
            )
        if found > length_bytes:
            with storage_errors(self.path):
                os.truncate(self.path, length_bytes)

    def append(self, record: dict[str, Any]) -> None:
        """Append one record; it reaches the disk at the next `sync`."""
        with storage_errors(self.path):
            if self._file is None:
                self._file = self._open()
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

    def _open(self) -> IO[bytes]:
        """Open for appending, after the last complete line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(self.path, content.rfind(b"\n") + 1)
        return self.path.open("ab")

    def sync(self) -> int:
        """Flush to disk and return the length in bytes, to be stored in a checkpoint for `rewind`."""
        if self._file is None:
            return self.path.stat().st_size if self.path.exists() else 0
        with storage_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Flush and close; a later `append` opens the file again."""
        file, self._file = self._file, None
        if file is not None:
            with storage_errors(self.path):
                file.close()

    def read(self) -> list[dict[str, Any]]:
        """All complete records; a last line cut short by a crash is left out, damage elsewhere is a
        `StorageError`.
        """
        if not self.path.exists():
            return []
        records = []
        for number, line in enumerate(self.path.read_bytes().split(b"\n")[:-1], 1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise StorageError(
                    f"{self.path}: line {number} is damaged ({error}): delete that line, or run again "
                    "in an empty folder"
                ) from error
        return records


class RunDir:
    """Paths and manifest of one run folder. ARCHITECTURE.md lists what each file holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.study_toml = path / "study.toml"
        self.manifest_json = path / "manifest.json"
        self.data_json = path / "data.json"
        self.groups_json = path / "groups.json"
        self.metrics_jsonl = path / "metrics.jsonl"
        self.metrics_dir = path / "metrics"
        self.scores_parquet = path / "scores.parquet"
        self.features_safetensors = path / "features.safetensors"
        self.merge_check_json = path / "merge_check.json"
        self.adapters_dir = path / "adapters"
        self.checkpoints_dir = path / "checkpoints"
        self.images_dir = path / "images"
        self.previews_dir = path / "previews"
        self.figures_dir = path / "figures"
        self.report_html = path / "report.html"
        self.report_md = path / "report.md"
        self.log_path = path / "lorascope.log"
        self.lock_descriptor: int | None = (
            None  # of the file that `lock` holds; a process that inherits it holds the folder too
        )

    def preview_path(self, arm: str, epoch: int, file_name: str) -> Path:
        """Where a picture drawn during training lies."""
        return self.previews_dir / arm / f"epoch-{epoch:04d}" / file_name

    def metrics_part(self, arm: str) -> Path:
        """Where an arm's records lie while training is unfinished; those of the base too, as of an arm called
        `base`.
        """
        return self.metrics_dir / f"{arm}.jsonl"

    def read_metrics(self, arms: Iterable[str]) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`, or while training is unfinished those there are of the base and
        `arms`, in its order.

        That is by step, and within a step first training, then probes, each in the order of `arms`.
        """
        if self.metrics_jsonl.exists():
            return JsonLines(self.metrics_jsonl).read()
        parts = [record for arm in ("base", *arms) for record in JsonLines(self.metrics_part(arm)).read()]
        return sorted(parts, key=lambda record: (record["step"], record["kind"] != "train"))

    def join_metrics(self, arms: Iterable[str]) -> None:
        """Make `metrics.jsonl` of the records of all arms, whose training is finished, and remove the
        parts.
        """
        if not self.metrics_jsonl.exists():
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in self.read_metrics(arms)]
            write_text(self.metrics_jsonl, "".join(lines))
        shutil.rmtree(self.metrics_dir, ignore_errors=True)

    def manifest(self) -> dict[str, Any]:
        """The manifest, empty before the first stage."""
        return {"stages": {}, **(read_json(self.manifest_json) if self.manifest_json.exists() else {})}

    def is_finished(self, stage: str, inputs: str) -> bool:
        """Whether `stage` ended with the inputs of this digest."""
        entry = self.manifest()["stages"].get(stage)
        return entry is not None and entry["inputs"] == inputs

    def finish(self, stage: str, inputs: str, seconds: float, **facts: Any) -> None:
        """Record that `stage` ended: digest of its inputs, time taken in seconds, and further facts."""
        manifest = self.manifest()
        manifest["stages"][stage] = {"inputs": inputs, "seconds": round(seconds, 3), **facts}
        write_json(self.manifest_json, manifest)

    def describe(self, **facts: Any) -> None:
        """Set top-level facts of the manifest: versions, commit, device, times; writes nothing where they
        stand there already.
        """
        known = self.manifest()
        if json.loads(json.dumps({**known, **facts})) != known:
            write_json(self.manifest_json, {**known, **facts})

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; raise `StorageError` if another process holds it.

        The system lets go of it when the process ends, however it ends, and all that inherited
        `lock_descriptor` from it: those end within a moment, which is waited for. What a killed process left
        half written is removed.
        """
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("w")
        with file:
            with storage_errors(self.path):
                self._take(file)
            for partial in self.path.rglob(f".*{_PARTIAL}*"):
                partial.unlink(missing_ok=True)
            self.lock_descriptor = file.fileno()
            try:
                yield
            finally:
                self.lock_descriptor = None

    def _take(self, file: IO[str]) -> None:
        """Lock the open lock file."""
        give_up = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() >= give_up:
                    raise StorageError(
                        f"{self.path}: another lorascope process is working in this run folder: wait "
                        "for it, or name another with --run-dir"
                    ) from error
            time.sleep(0.05)
