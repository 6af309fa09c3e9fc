"""Everything about files: atomic writes, digests, and the layout of a run folder.

A file appears under its name complete or not at all: it is written beside its target, flushed to disk, and
renamed.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, cast

from filelock import lock_descriptor

from lorascope.errors import LorascopeError, StorageError
from lorascope.shapes import Each, Maybe, Number, Shape, Text, find_fault

_PARTIAL = ".partial"
_LOCK_WAIT_S = 2.0
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
        found = self._length()
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
        content = read_regular(self.path) if self._length() else b""
        if content and not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)
        return self.path.open("ab")

    def _length(self) -> int:
        """Bytes on disk, 0 without a file."""
        try:
            return require_regular(self.path).st_size
        except FileNotFoundError:
            return 0

    def sync(self) -> int:
        """Flush to disk and return the length in bytes, to be stored in a checkpoint for `rewind`."""
        if self._file is None:
            return self._length()
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

    def read(self, fault: Callable[[dict[str, Any]], str | None] = lambda _: None) -> list[dict[str, Any]]:
        """All complete records; a last line cut short by a crash is left out, damage elsewhere is a
        `StorageError`, and so is a record in which `fault` finds one.
        """
        records = []
        for number, line in enumerate(
            (read_regular(self.path) if self._length() else b"").split(b"\n")[:-1], 1
        ):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise self._damaged(number, str(error)) from error
            if not isinstance(record, dict):
                raise self._damaged(number, "not a JSON object")
            if reason := fault(record):
                raise self._damaged(number, reason)
            records.append(record)
        return records

    def _damaged(self, number: int, reason: str) -> StorageError:
        return StorageError(
            f"{self.path}: line {number} is damaged ({reason}): delete that line, or run again in an "
            "empty folder"
        )


_FIGURES = {
    "train": ("loss", "lr"),
    "probe": ("loss", "difference", "difference_low", "difference_high", "count"),
}


def _fault(record: Mapping[str, Any], arms: Collection[str]) -> str | None:
    """What is wrong with a record of `metrics.jsonl`."""
    kind, arm = record.get("kind"), record.get("arm")
    if not isinstance(kind, str) or kind not in _FIGURES:
        return f"of no kind in {', '.join(_FIGURES)}"
    if arm not in arms:
        return f"arm {str(arm)[:80]!r} is not of this study"
    wrong = [
        key for key in ("step", "epoch", *_FIGURES[kind]) if not isinstance(record.get(key), int | float)
    ]
    if kind == "probe":
        wrong += [key for key in ("split", "band") if not isinstance(record.get(key), str)]
        wrong += [] if isinstance(record.get("conditional"), bool) else ["conditional"]
    return f"no {wrong[0]}, or not of its type" if wrong else None


# What is read of the JSON files; they hold more.
_EXAMPLES = [{"id": str, "caption": str, "digest": str, "repeats?": int, "width_px?": int, "height_px?": int}]
_DATA: Shape = {
    "source": str,
    "resolution_px": int,
    "num_rows": int,
    "num_train": int,
    "refused": [{"id": str, "reason": str}],
    "treated": [{"id": str, "treatment": str}],
    "duplicates": [{"ids": [str]}],
    "remarks?": [str],
    "train": _EXAMPLES,
    "heldout": _EXAMPLES,
    "fingerprint": str,
}
_TRAINING: Shape = {
    "failed": Text,
    "steps?": int,
    "epochs?": Number,
    "parameters?": int,
    "group?": [str],
    "side_by_side?": int,
    "run_time_s?": Number,
    "peak_memory_bytes?": int,
    "peak_memory_kind?": str,
    "file_bytes?": int,
    "final_loss?": Number,
    "best?": Maybe({"epoch": Number}),
    "digests?": Each(str),
}
_MERGES = Each({"relative_error": Number, "tolerance": Number, "ok": bool})
_MANIFEST: Shape = {
    "stages?": Each({"inputs": Text, "seconds": Number}),
    "versions?": Each(Text),
    "device?": {"memory_bytes?": int | None},
    "base?": {"model?": str, "digest?": str, "prediction_type?": str},
    "adapter?": {},
    "command?": str,
    "started?": str,
    "finished?": str,
}


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
        self.sweep_parquet = path / "sweep.parquet"
        self.diagnosis_json = path / "diagnosis.json"
        self.features_safetensors = path / "features.safetensors"
        self.merge_check_json = path / "merge_check.json"
        self.adapters_dir = path / "adapters"
        self.checkpoints_dir = path / "checkpoints"
        self.images_dir = path / "images"
        self.sweep_dir = path / "sweep"
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

    def image_path(self, arm: str, file_name: str) -> Path:
        """Where a picture of the sample stage lies; the base's too, as of an arm called `base`."""
        return self.images_dir / arm / file_name

    def failure(self, arm: str) -> str | None:
        """Why a trained arm stopped before its end; None where it did not."""
        failure: str | None = self.training(arm)["failed"]
        return failure

    def training(self, arm: str, *keys: str) -> dict[str, Any]:
        """What is known of an arm's training once it has ended, at least these keys."""
        path = self.adapters_dir / arm / "training.json"
        try:
            return read_table(path, {**_TRAINING, **{key: _TRAINING[f"{key}?"] for key in keys}})
        except StorageError as error:
            if "train" not in self.manifest()["stages"]:
                raise
            # the train stage would be skipped, and must not write over adapters that were drawn and scored
            raise StorageError(
                f"{path}: lost or damaged after training: put the file back from a copy, or train again in "
                "another run folder"
            ) from error

    def adapter_digests(self, arm: str) -> dict[str, str]:
        """SHA-256 of every file of the arm's adapters by its name in their folder, those in `best/` too."""
        folder = self.adapters_dir / arm
        paths = sorted(path for name in (PEFT_WEIGHTS, PEFT_CONFIG) for path in folder.rglob(name))
        return {path.relative_to(folder).as_posix(): kept_digest(path) for path in paths}

    def require_unchanged(self, arm: str) -> None:
        """Raise `StorageError` where an adapter of the arm is not what its training wrote."""
        known, found = self.training(arm).get("digests", {}), self.adapter_digests(arm)
        for name, digest in known.items():  # versions before wrote none
            if found.get(name) != digest:
                state = "was changed or cut" if name in found else "was removed"
                raise StorageError(
                    f"{self.adapters_dir / arm / name}: {state} after training: put the file back from a "
                    "copy, or train again in another run folder"
                )

    def merges(self, arms: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What the merge check found of each arm, empty before it; raises `StorageError` where the file is
        damaged or names an arm that is not one of `arms`.
        """
        if not self.merge_check_json.exists():
            return {}
        results, known = read_table(self.merge_check_json, {}), set(arms)
        reason = find_fault(results, _MERGES)
        if strangers := [arm for arm in results if arm not in known]:
            reason = f"arm {strangers[0][:80]!r} is not of this study"
        if reason:
            raise StorageError(
                f"{self.merge_check_json}: damaged ({reason}): delete it and run the same command again"
            )
        return results

    def data(self) -> dict[str, Any]:
        """The content of `data.json`; raises `StorageError` where it is missing or damaged."""
        return read_table(self.data_json, _DATA)

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
        names = ("base", *arms)

        def fault(record: dict[str, Any]) -> str | None:
            return _fault(record, names)

        if self.metrics_jsonl.exists():
            return JsonLines(self.metrics_jsonl).read(fault)
        parts = [record for arm in names for record in JsonLines(self.metrics_part(arm)).read(fault)]
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
        known = read_table(self.manifest_json, _MANIFEST) if self.manifest_json.exists() else {}
        return {"stages": {}, **known}

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
            lock_path = self.path / ".lock"
            if lock_path.exists():
                require_regular(lock_path)
            file = lock_path.open("a")
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
        while not lock_descriptor(file.fileno(), blocking=False):
            if time.monotonic() >= give_up:
                raise StorageError(
                    f"{self.path}: another lorascope process is working in this run folder: wait "
                    "for it, or name another with --run-dir"
                )
            time.sleep(0.05)
