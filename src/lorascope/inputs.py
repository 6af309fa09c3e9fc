"""What a run folder was made from: its frozen configuration, and as digests what each stage depends on.

A stage that ended with the same inputs is skipped. A digest here that changes makes every earlier run folder
train again.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorascope.config import load_study
from lorascope.errors import ConfigError, StorageError
from lorascope.run_folder import RunDir
from lorascope.schema import StudyConfig
from lorascope.store import digest_json, write_text


def require_apart(run: RunDir, config: StudyConfig) -> None:
    """Raise `ConfigError` where the run folder lies in a folder that the study reads, or holds what it reads.

    Pictures that a run draws would be taken for data at the next start, and models for parts of the base.
    Links are followed.
    """
    folder = _resolved(run.path)
    keys = {
        "data.source": config.data.source,
        "base.model": config.base.model,
        "score.model": config.score.model,
        "score.style_model": config.score.style_model,
    }
    for key, value in keys.items():
        if value is None or value == "pocket" or not _exists(Path(value).expanduser()):
            continue
        read = _resolved(Path(value).expanduser())
        if folder.is_relative_to(read):
            place = "lies in"
        elif read.is_relative_to(folder):
            place = "holds"
        else:
            continue
        raise ConfigError(
            f"{run.path}: the run folder {place} {key} = {value!r}, which the study reads: choose "
            "another folder with --run-dir"
        )


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ConfigError(f"{path}: cannot be followed ({error}): check the path and its links") from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no path: what it is instead is told where it is read
        return False


def freeze(run: RunDir, config: StudyConfig) -> None:
    """Write `study.toml`, or raise `ConfigError` if the folder belongs to another configuration."""
    if not run.study_toml.exists():
        write_text(run.study_toml, config.to_toml())
        return
    frozen = load_study(run.study_toml, environment={})
    changed = list(_differences(frozen.model_dump(mode="json"), config.model_dump(mode="json")))
    if changed:
        key, old, new = changed[0]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ConfigError(
            f"{run.path}: made with another configuration: {key} was {old!r}, now {new!r}{more}: "
            "choose another folder with --run-dir, or delete this one"
        )


def _differences(old: Any, new: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The leaves in which two configurations differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{place}.{key}".lstrip("."))
    elif old != new:
        yield place, old, new


def require_same_data(run: RunDir, config: StudyConfig, fingerprint: str) -> None:
    """Raise `StorageError` where `data.json` was lost and the source does not give the same any more."""
    known = run.manifest()["stages"].get("data", {"inputs": None})
    if known["inputs"] == data_inputs(config) and known["fingerprint"] != fingerprint:
        raise StorageError(
            f"{run.data_json}: lost, and pictures or captions of {config.data.source!r} have changed since: "
            "put either back, or run in another folder"
        )


def data_inputs(config: StudyConfig) -> str:
    """Of the data stage."""
    return config.digest("data", "base")


def encode_inputs(fingerprint: str, base_digest: str) -> str:
    """Of the encode stage: the data set's fingerprint and the base's digest."""
    return digest_json([fingerprint, base_digest])


def train_inputs(config: StudyConfig, fingerprint: str, base_digest: str, device: str, precision: str) -> str:
    """Of the train stage; all later stages depend on it."""
    sections = config.digest("train", "arms", "adapter", "data")
    return digest_json([sections, fingerprint, base_digest, device, precision])


def sample_inputs(config: StudyConfig, trained: str) -> str:
    """Of the sample stage, `trained` being the digest of the train stage."""
    return digest_json([trained, config.digest("sample")])


def merge_inputs(config: StudyConfig, trained: str) -> str:
    """Of the comparison of merged with unmerged output."""
    return digest_json([trained, config.digest("sample"), "merge in fp32"])


def score_inputs(config: StudyConfig, trained: str) -> str:
    """Of the score stage."""
    return digest_json([trained, config.digest("sample", "score")])


def diagnose_inputs(config: StudyConfig, trained: str) -> str:
    """Of the diagnose stage."""
    return digest_json([trained, config.digest("sample", "score", "diagnose")])
