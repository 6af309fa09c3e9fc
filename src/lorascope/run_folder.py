"""The run folder: its files, what those of JSON must hold, its log of records, and its lock."""

import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import lock_descriptor

from lorascope.errors import StorageError
from lorascope.shapes import Each, Maybe, Number, Shape, Text, find_fault
from lorascope.store import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    kept_digest,
    read_regular,
    read_table,
    remove_partials,
    require_regular,
    storage_errors,
    write_json,
    write_text,
)

_LOCK_WAIT_S = 2.0


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
        self.progress_json = path / "progress.json"
        self.scores_parquet = path / "scores.parquet"
        self.sweep_parquet = path / "sweep.parquet"
        self.diagnosis_json = path / "diagnosis.json"
        self.copying_json = path / "copying.json"
        self.features_safetensors = path / "features.safetensors"
        self.style_features_safetensors = path / "style_features.safetensors"
        self.merge_check_json = path / "merge_check.json"
        self.adapters_dir = path / "adapters"
        self.checkpoints_dir = path / "checkpoints"
        self.images_dir = path / "images"
        self.sweep_dir = path / "sweep"
        self.copying_dir = path / "copying"
        self.previews_dir = path / "previews"
        self.tries_dir = path / "tries"
        self.votes_jsonl = path / "votes.jsonl"
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
            remove_partials(self.path)
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
