"""The hashes that kohya files carry of themselves: made for ours, compared in others'."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

_HASHED_BYTES = 4 * 2**30  # larger files are not read through to check a hash


def kohya_hashes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """`metadata` with the three hashes of a kohya file, each over the bytes that its programs hash.

    `sshs_model_hash`: SHA-256 of what follows the header. `sshs_legacy_hash`: the first 8 digits of that of
    the 0x10000 bytes at 0x100000, in a file whose header has the `ss_` metadata alone; so sd-scripts defines
    both (its `precalculate_safetensors_hashes`), and of smaller files the latter is the hash of nothing.
    `modelspec.hash_sha256`: the first again, with `0x` in front (ModelSpec 1.0.0).
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = safetensors.torch.save(dict(tensors), training)
    start = 8 + int.from_bytes(content[:8], "little")
    model_hash = hashlib.sha256(memoryview(content)[start:]).hexdigest()
    legacy_hash = hashlib.sha256(memoryview(content)[0x100000:0x110000]).hexdigest()[:8]
    return {
        **metadata,
        "sshs_model_hash": model_hash,
        "sshs_legacy_hash": legacy_hash,
        "modelspec.hash_sha256": f"0x{model_hash}",
    }


def check_hashes(path: Path, data_start: int, metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes in a file's metadata against those of its bytes: "matches", "does not match ..." or why it
    was not checked, by name.

    `data_start` is where a safetensors file's data begin, 0 for a file of another kind, which has no hashes.
    """
    stated = {
        key: metadata[key]
        for key in ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
        if key in metadata
    }
    if not stated or not data_start:
        return {}
    if path.stat().st_size > _HASHED_BYTES:
        return dict.fromkeys(stated, "not checked: the file is too large")
    whole = _digest(path, data_start)
    start = 0x100000 - _header_length(path, data_start, metadata)
    legacy = _digest(path, data_start + start, 0x10000)[:8] if start >= 0 else None
    actual = {"sshs_model_hash": whole, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{whole}"}
    return {key: _compared(value, actual[key]) for key, value in stated.items()}


def _compared(stated: str, actual: str | None) -> str:
    if actual is None:
        return "not checked: the header is too long"
    return (
        "matches"
        if stated.lower().removeprefix("0x") == actual.removeprefix("0x")
        else f"does not match: the weights give {actual[:18]}"
    )


def _digest(path: Path, start: int, length: int | None = None) -> str:
    digest, left = hashlib.sha256(), length if length is not None else path.stat().st_size
    with path.open("rb") as file:
        file.seek(start)
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def _header_length(path: Path, data_start: int, metadata: Mapping[str, str]) -> int:
    """Bytes before the data in a file whose metadata are the `ss_` keys alone: sd-scripts hashes that one."""
    with path.open("rb") as file:
        header = json.loads(file.read(data_start)[8:])
    header["__metadata__"] = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + length + -length % 8
