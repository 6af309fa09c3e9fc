"""A base as one checkpoint file, written and read again."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bases import assert_same_models, load
from lorascope.base.loading import Base
from lorascope.base.saving import save_ldm
from lorascope.base.weights import read_header


def test_the_same_base_is_written_as_the_same_bytes(base: Base, checkpoint: Path, tmp_path: Path) -> None:
    save_ldm(base, tmp_path / "again.safetensors", torch.float32)
    assert (tmp_path / "again.safetensors").read_bytes() == checkpoint.read_bytes()


@pytest.mark.usefixtures("packaged")
def test_a_base_of_the_packages_configurations_needs_none_in_its_file(base: Base, tmp_path: Path) -> None:
    save_ldm(base, path := tmp_path / "plain.safetensors", torch.float32)
    assert read_header(path).metadata == {"format": "pt"}
    assert_same_models(base, load(path))
    other = dataclasses.replace(
        base, scheduler_config={**base.scheduler_config, "prediction_type": "v_prediction"}
    )
    save_ldm(other, path, torch.float32)
    assert list(json.loads(read_header(path).metadata["lorascope.configs"])) == [
        "scheduler/scheduler_config.json"
    ]
    assert load(path).prediction_type == "v_prediction"
