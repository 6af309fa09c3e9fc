"""Locating a base: what is asked of the hub, and a clear line for a place that holds none."""

import os
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from bases import change_json, load
from lorascope.base.loading import load_base
from lorascope.base.location import is_hub_id, resolve_model
from lorascope.errors import BaseModelError, HubError
from lorascope.sections import BaseSection

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "no such file or folder"),
        ("/", "lacks unet"),
        ("name", "no such file or folder"),
        ("models/absent.safetensors", "no such file or folder"),
        (__file__, "a file of this kind holds no base"),
    ],
)
def test_places_that_hold_no_base_are_named(model: str, message: str) -> None:
    with pytest.raises(BaseModelError, match=message):
        load_base(BaseSection(model=model), CPU)


def test_a_file_is_no_model_folder() -> None:
    with pytest.raises(BaseModelError, match="score.model = .*is a file"):
        resolve_model(__file__, None, "scorer", ["*.json"], "score.model")


def test_a_hub_id_without_network_says_so() -> None:
    assert is_hub_id("owner/absent") and not is_hub_id("owner/file.ckpt") and not is_hub_id("pocket")
    with pytest.raises(HubError, match=r"base.model = 'owner/absent'.*HF_HUB_OFFLINE"):
        load_base(BaseSection(model="owner/absent"), CPU)


def test_only_what_is_loaded_is_asked_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, pipeline_folder: Path
) -> None:
    asked: list[str] = []

    def fetch(repo_id: str, *, kind: str, revision: str | None, patterns: list[str], what: str) -> Path:
        asked.extend(patterns)
        return pipeline_folder

    monkeypatch.setattr("lorascope.base.location.fetch_snapshot", fetch)
    load_base(BaseSection(model="owner/name"), CPU)
    loaded = [
        path.relative_to(pipeline_folder).as_posix() for path in pipeline_folder.rglob("*") if path.is_file()
    ]
    assert all(any(fnmatch(path, pattern) for pattern in asked) for path in loaded)
    for path in (
        *(
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "unet/diffusion_pytorch_model.non_ema.safetensors",
            "vae/diffusion_pytorch_model.bin",
        ),
        *(
            "v1-5-pruned.safetensors",
            "text_encoder/pytorch_model.bin",
            "safety_checker/model.safetensors",
            "unet/diffusion_flax_model.msgpack",
        ),
    ):
        assert not any(fnmatch(path, pattern) for pattern in asked), path
    assert any(
        fnmatch("unet/diffusion_pytorch_model-00001-of-00002.safetensors", pattern) for pattern in asked
    )


def test_folders_of_another_family_are_named(own_copy: Path) -> None:
    change_json(own_copy / "unet" / "config.json", in_channels=9)
    with pytest.raises(
        BaseModelError,
        match="is an inpainting model .its U-Net takes 9 channels.: give a base of Stable Diffusion v1",
    ):
        load(own_copy)
    change_json(own_copy / "model_index.json", _class_name="StableDiffusionXLPipeline")
    with pytest.raises(BaseModelError, match="is SDXL"):
        load(own_copy)


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors.index.json",
        "tokenizer/vocab.json",
        "scheduler/scheduler_config.json",
        "model_index.json",
    ],
)
def test_a_named_pipe_in_a_base_is_not_opened(own_copy: Path, name: str) -> None:
    (own_copy / name).unlink(missing_ok=True)
    os.mkfifo(own_copy / name)
    with pytest.raises(BaseModelError, match=f"{name}: is a named pipe, where a file is needed"):
        load(own_copy)


def test_a_named_pipe_as_the_base_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "base.safetensors")
    with pytest.raises(BaseModelError, match=r"base.safetensors: is a named pipe, where a file is needed"):
        load(path)


def test_a_path_that_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path, message in (
        (tmp_path / ("x" * 300) / "model", "cannot be read .File name too long.: check the path"),
        (tmp_path / "circle" / "model", "no such file or folder"),
    ):
        with pytest.raises(BaseModelError, match=message):
            load(path)
