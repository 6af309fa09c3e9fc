"""Hashes of kohya files are those that the programs compute; a changed file is told by them."""

import hashlib
import json
from pathlib import Path

import safetensors.torch

from lorascope.adapters.files import save_adapter
from lorascope.adapters.hashes import check_hashes
from lorascope.base.layers import stable_diffusion_layers
from lorascope.base.weights import read_header
from random_adapters import random_adapter


def test_hashes_are_those_that_the_programs_compute(tmp_path: Path) -> None:
    """sd-scripts' definition, from the file: the legacy hash is taken where the header has the `ss_` metadata
    alone.
    """
    metadata = {"ss_v2": "False", "ss_output_name": "größe", "modelspec.title": "style", "note": "x" * 5000}
    paths = [path for path, shape in stable_diffusion_layers().items() if "attn1.to_q" in path]
    adapter = random_adapter(
        dict.fromkeys(paths, (320, 320)), rank=32
    )  # 1.3 MB: beyond where the legacy hash begins
    save_adapter(adapter, tmp_path / "a.safetensors", "kohya", "fp32", metadata)
    content = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    found = json.loads(content[8 : 8 + length])["__metadata__"]
    assert {key: found[key] for key in metadata} == metadata
    assert found["sshs_model_hash"] == hashlib.sha256(content[8 + length :]).hexdigest()
    assert found["modelspec.hash_sha256"] == "0x" + found["sshs_model_hash"]
    training = {key: value for key, value in found.items() if key.startswith("ss_")}
    plain = safetensors.torch.save(safetensors.torch.load_file(tmp_path / "a.safetensors"), training)
    assert len(plain) > 0x110000
    assert found["sshs_legacy_hash"] == hashlib.sha256(plain[0x100000:0x110000]).hexdigest()[:8]


def test_hashes_are_compared_with_the_bytes_of_the_file(tmp_path: Path) -> None:
    paths = [path for path, shape in stable_diffusion_layers().items() if "attn1.to_q" in path]
    for size, rank in (("small", 1), ("large", 32)):
        save_adapter(
            random_adapter(dict.fromkeys(paths, (320, 320)), rank=rank),
            path := tmp_path / f"{size}.safetensors",
            "kohya",
            "fp32",
            {"ss_v2": "False", "modelspec.title": size},
        )
        header = read_header(path)
        hashes = check_hashes(path, header.header_bytes, header.metadata)
        assert hashes == dict.fromkeys(
            ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"), "matches"
        )
        changed = check_hashes(path, header.header_bytes, {**header.metadata, "sshs_model_hash": "0" * 64})
        assert changed["sshs_model_hash"].startswith("does not match: the weights give ")
        assert check_hashes(path, 0, header.metadata) == check_hashes(path, header.header_bytes, {}) == {}
