"""Configurations and tokenizer of a base: a clear line where they do not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTokenizer

from bases import change_json, load, rewrite
from lorascope.base.configs import SD15_DIR, load_tokenizer, read_configs
from lorascope.errors import BaseModelError
from lorascope.sections import BaseSection


def test_parts_that_do_not_belong_together_are_refused(own_copy: Path) -> None:
    config = own_copy / "unet" / "config.json"
    change_json(config, in_channels=6)
    with pytest.raises(BaseModelError, match="the U-Net takes 6 channels and the VAE gives 4"):
        load(own_copy)
    change_json(config, in_channels=4, cross_attention_dim=768)
    with pytest.raises(BaseModelError, match="attends to text of width 768 and the text encoder gives 32"):
        load(own_copy)
    change_json(config, cross_attention_dim=32)
    vocabulary = own_copy / "tokenizer" / "tokenizer.json"
    sound = vocabulary.read_text()
    vocabulary.write_text(sound.replace('"a": 64', '"a": 100000'))
    assert vocabulary.read_text() != sound
    with pytest.raises(
        BaseModelError,
        match="has 514 tokens up to number 100000 and the text encoder knows 514: parts of two",
    ):
        load(own_copy)
    vocabulary.write_text(sound)
    change_json(own_copy / "tokenizer" / "tokenizer_config.json", model_max_length=10**30)
    with pytest.raises(
        BaseModelError,
        match="model_max_length is 10+ and the text encoder has 77 positions: parts of two bases",
    ):
        load(own_copy)


def test_whole_models_that_do_not_work_together_are_refused(own_copy: Path, pipeline_folder: Path) -> None:
    """Each part by itself is sound: configuration and weights agree."""
    config = json.loads((pipeline_folder / "unet" / "config.json").read_text())
    vae = json.loads((pipeline_folder / "vae" / "config.json").read_text())
    for part, model, message in (
        (
            "unet",
            UNet2DConditionModel.from_config({**config, "out_channels": 8}),
            r"\(latents of \[4.* noise of \[8",
        ),
        (
            "unet",
            UNet2DConditionModel.from_config({**config, "cross_attention_dim": [32, 48]}),
            r"32, 48\] and",
        ),
        (
            "vae",
            AutoencoderKL.from_config({**vae, "latent_channels": 16}),
            "takes 4 channels and the VAE gives 16",
        ),
        ("vae", AutoencoderKL.from_config({**vae, "in_channels": 1}), r"do not work together \("),
        ("vae", AutoencoderKL.from_config({**vae, "out_channels": 1}), r"and pixels of \[1, 256"),
    ):
        shutil.rmtree(own_copy / part)
        model.save_pretrained(own_copy / part)
        with pytest.raises(BaseModelError, match=message):
            read_configs(BaseSection(model=str(own_copy)))
        with pytest.raises(BaseModelError, match=message):
            load(own_copy)
        shutil.rmtree(own_copy / part)
        shutil.copytree(pipeline_folder / part, own_copy / part)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("unet", {"block_out_channels": [320_000, 320_000]}),
        ("vae", {"block_out_channels": [8, 8, 160_000]}),
        ("text_encoder", {"intermediate_size": 10**9}),
        ("text_encoder", {"vocab_size": 10**9}),
    ],
)
def test_a_configuration_of_another_size_than_the_weights_is_refused_before_anything_is_built(
    own_copy: Path, part: str, change: dict[str, Any]
) -> None:
    change_json(own_copy / part / "config.json", **change)
    with pytest.raises(
        BaseModelError, match=f"/{part}: .* has shape .* by the configuration it is .*two models"
    ):
        read_configs(BaseSection(model=str(own_copy)))


def test_a_configuration_of_more_layers_than_the_weights_hold_is_refused(own_copy: Path) -> None:
    change_json(own_copy / "text_encoder" / "config.json", num_hidden_layers=64)
    with pytest.raises(
        BaseModelError, match=r"text_encoder: its configuration means [\d,]+ weights, its files hold"
    ):
        read_configs(BaseSection(model=str(own_copy)))
    change_json(own_copy / "unet" / "config.json", layers_per_block=60, transformer_layers_per_block=60)
    with pytest.raises(BaseModelError, match="unet: means 7,200 layers, at most 256 are built"):
        read_configs(BaseSection(model=str(own_copy)))


def test_a_scaling_factor_that_no_vae_has_is_refused(own_copy: Path) -> None:
    for value in (None, 0, -1, "1", 1e7, float("nan")):
        change_json(own_copy / "vae" / "config.json", scaling_factor=value)
        with pytest.raises(BaseModelError, match="scaling_factor = .* of the VAE: must be a number above 0"):
            load(own_copy)


def test_configurations_of_a_boundless_model_are_refused(own_copy: Path) -> None:
    config = own_copy / "unet" / "config.json"
    for value in (10**9, 0, [10**9], [1] * 99, "2"):
        change_json(config, layers_per_block=value)
        with pytest.raises(BaseModelError, match="unet: 'layers_per_block' = .*must be at most 64"):
            load(own_copy)
    change_json(config, layers_per_block=1, down_block_types=["DownBlock2D"] * 100)
    with pytest.raises(BaseModelError, match="unet: 'down_block_types' = .*must be at most 64"):
        load(own_copy)
    config.write_text("[]")
    with pytest.raises(BaseModelError, match="cannot be read .it is not an object"):
        load(own_copy)


def test_the_tokenizer_loads_alone(pipeline_folder: Path) -> None:
    tokenizer = load_tokenizer(BaseSection(model=str(pipeline_folder)))
    assert tokenizer.model_max_length == 77 and len(tokenizer("ab").input_ids) == 4


def test_the_tokenizer_of_the_package_is_clips() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(SD15_DIR / "tokenizer", local_files_only=True)
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert tokenizer("A photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("", padding="max_length").input_ids == [49406] + [49407] * 76


@pytest.mark.parametrize(
    ("embedded", "message"),
    [
        ("[]", "damaged"),
        ("{", "damaged"),
        ('{"../../evil.json": "{}"}', "'../../evil.json' is no configuration"),
        ('{"unet/sub/config.json": "{}"}', "is no configuration"),
        ('{"unet/config.json": 1}', "is no configuration"),
        ('{"unet/config.json": "{"}', "cannot be read"),
        ('{"unet/config.json": "{\\"layers_per_block\\": 1000000000}"}', "must be at most 64"),
        (
            '{"unet/config.json": "{\\"in_channels\\": 4, \\"cross_attention_dim\\": 768, '
            '\\"norm_num_groups\\": 7}"}',
            "unet: no model can be built",
        ),
        ('{"scheduler/other.json": "{}"}', "scheduler_config.json: cannot be read"),
    ],
)
def test_hostile_configurations_in_a_checkpoint_are_refused(
    checkpoint: Path, embedded: str, message: str
) -> None:
    rewrite(checkpoint, lambda tensors: None, **{"lorascope.configs": embedded})
    with pytest.raises(BaseModelError, match=message):
        load(checkpoint)
