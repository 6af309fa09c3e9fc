"""Loading a base: the real loader, and a clear line for everything that is not one."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTokenizer

import lorascope
from lorascope.adapters.bank import AdapterBank, Slice, count_parameters, resolve_targets
from lorascope.base.attention import barred_kernels, set_kernels
from lorascope.base.ldm import from_diffusers, list_pairs
from lorascope.base.loading import (
    Base,
    _random_weights,
    _tried,
    build_random_base,
    choose_device,
    is_hub_id,
    load_base,
    load_tokenizer,
    read_configs,
    resolve_model,
    save_ldm,
)
from lorascope.base.weights import load_tensors, read_header, save_tensors
from lorascope.config import load_study
from lorascope.data.encoding import Encoded
from lorascope.errors import BaseModelError, HubError, WeightsError
from lorascope.evaluation.prompts import Prompt
from lorascope.evaluation.sampling import Job, draw_pictures, latent_shape_of
from lorascope.schema import REFERENCE_TARGETS, Arm, BaseSection, SampleSection, TrainSection
from lorascope.store import digest_file
from lorascope.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def own_copy(pipeline_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline_folder, tmp_path / "copy"))


def load(folder: Path) -> Base:
    return load_base(BaseSection(model=str(folder)), CPU)


def test_a_base_is_frozen_and_described(base: Base, pipeline_folder: Path) -> None:
    for module in (base.unet, base.vae, base.text_encoder):
        assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())
    facts = base.describe()
    assert facts["parameters"]["unet"] == sum(p.numel() for p in base.unet.parameters())
    assert (facts["prediction_type"], facts["dtype"], base.latent_factor) == ("epsilon", "float32", 4)
    assert torch.equal(
        base.alphas_cumprod, DDIMScheduler.from_pretrained(pipeline_folder / "scheduler").alphas_cumprod
    )


def test_the_digest_follows_the_weights(own_copy: Path) -> None:
    before = load(own_copy)
    before.unet.conv_in.bias.data += 1
    before.unet.save_pretrained(own_copy / "unet")
    assert load(own_copy).digest != before.digest


def test_text_states_equal_the_pipelines(exact_base: Base) -> None:
    base = exact_base
    pipeline = StableDiffusionPipeline.from_pretrained(base.folder, safety_checker=None)
    pipeline.text_encoder.double()
    theirs, empty = pipeline.encode_prompt("a cat", CPU, 1, True)
    ours = base.encode_text(["a cat", ""])
    # one rounding from float64 to fp32
    torch.testing.assert_close(ours, torch.cat([theirs, empty]).float(), rtol=1e-6, atol=1e-7)


def test_pixels_go_through_the_vae_and_back(base: Base) -> None:
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = base.encode_pixels(pixels)
    assert mean.shape == std.shape == (2, 4, 8, 8) and (std > 0).all()
    decoded = base.decode_latents(mean)
    expected = base.vae.decode(mean).sample
    torch.testing.assert_close(decoded, expected)


def test_the_pocket_base_loads_offline_and_diffusers_loads_it_too() -> None:
    base = load_base(BaseSection(), CPU)
    assert 8e6 < base.describe()["parameters"]["unet"] < 17e6
    assert (
        StableDiffusionPipeline.from_pretrained(
            base.folder, safety_checker=None, local_files_only=True
        ).unet.config.in_channels
        == 4
    )


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

    monkeypatch.setattr("lorascope.base.loading.fetch_snapshot", fetch)
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


# -- folders that are damaged, mixed up or of another family -------------------------------------------------


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = dict(safetensors.torch.load_file(path))
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def test_a_damaged_part_is_named(own_copy: Path) -> None:
    weights = own_copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"unet/diffusion_pytorch_model.safetensors: truncated"):
        load(own_copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_tensors_missing_unexpected_misshapen_or_not_finite_are_named(own_copy: Path, part: str) -> None:
    weights = (
        own_copy
        / part
        / ("model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors")
    )
    whole = weights.read_bytes()
    name = sorted(name for name in safetensors.torch.load_file(weights) if name.endswith("weight"))[0]
    for change, message in (
        (lambda tensors: tensors.pop(name), r"lacks 1 tensors of the \w+, the first is"),
        (
            lambda tensors: tensors.update(extra=torch.ones(1)),
            r"has unknown 1 tensors of the \w+, the first is 'extra'",
        ),
        (lambda tensors: tensors.update({name: torch.ones(1)}), r"has shape \[1\], by the configuration it"),
        (
            lambda tensors: tensors[name].view(-1)[:3].fill_(float("nan")),
            r"has 3 of [\d,]+ values that are NaN or infinite",
        ),
    ):
        change_weights(weights, change)
        with pytest.raises((BaseModelError, WeightsError), match=f"{part}.*{message}"):
            load(own_copy)
        weights.write_bytes(whole)
    load(own_copy)


def test_the_old_names_of_the_vaes_attention_are_understood(own_copy: Path) -> None:
    """As the hub's SD v1.5 has them."""
    weights = own_copy / "vae" / "diffusion_pytorch_model.safetensors"
    expected = load(own_copy).vae.state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for new, name in old.items():
            for key in [key for key in tensors if f".{new}." in key]:
                tensors[key.replace(new, name)] = tensors.pop(key)

    change_weights(weights, rename)
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in load(own_copy).vae.state_dict().items()
    )


def test_the_old_names_of_the_text_encoder_are_understood(own_copy: Path) -> None:
    """As the hub's SD v1.5 has them: with a prefix, and with a buffer of positions."""
    expected = load(own_copy).encode_text(["a cat"])

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors["text_model." + name.removeprefix("text_model.")] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    change_weights(own_copy / "text_encoder" / "model.safetensors", rename)
    assert torch.equal(load(own_copy).encode_text(["a cat"]), expected)


def test_pickled_weights_are_refused(own_copy: Path) -> None:
    base = load(own_copy)
    (own_copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(base.unet.state_dict(), own_copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(
        BaseModelError,
        match=r"unet: lacks diffusion_pytorch_model.safetensors \(it has diffusion_pytorch_model.bin\)",
    ):
        load(own_copy)
    (own_copy / "unet" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(BaseModelError, match="it has no weights"):
        load(own_copy)


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


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        (
            "vae/config.json",
            "scaling_factor",
            None,
            "scaling_factor = None of the VAE: must be a number above 0",
        ),
        (
            "scheduler/scheduler_config.json",
            "num_train_timesteps",
            10**12,
            "num_train_timesteps = 10+ of the scheduler: must be",
        ),
        ("scheduler/scheduler_config.json", "beta_start", "low", "gives no noise schedule"),
        (
            "scheduler/scheduler_config.json",
            "trained_betas",
            [0.1, 0.2],
            "give no schedule of 1000 finite steps",
        ),
    ],
)
def test_numbers_that_no_base_has_are_refused(
    own_copy: Path, file: str, key: str, value: object, message: str
) -> None:
    change_json(own_copy / file, **{key: value})
    with pytest.raises(BaseModelError, match=message):
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


def test_the_study_file_can_say_what_the_base_predicts(base: Base, pipeline_folder: Path) -> None:
    section = BaseSection(model=str(pipeline_folder), prediction_type="v_prediction")
    other = load_base(section, CPU)
    assert (base.prediction_type, other.prediction_type) == (
        "epsilon",
        "v_prediction",
    ) and other.digest == base.digest


def test_unknown_or_broken_schedules_are_refused(own_copy: Path) -> None:
    path = own_copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "sample"}))
    with pytest.raises(
        BaseModelError, match="prediction_type = 'sample': must be one of epsilon, v_prediction"
    ):
        load(own_copy)
    path.write_text("{")
    with pytest.raises(BaseModelError, match="cannot be read"):
        load(own_copy)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BaseModelError, match="torch sees no GPU"):
        choose_device("cuda")
    assert choose_device("auto") == CPU


def test_an_apple_gpu_is_tried_before_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here trying it fails, as on a system whose torch lacks what is needed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(
        BaseModelError, match=r'device = "mps": does not work here \(.*\): use device = "cpu"'
    ):
        choose_device("mps")
    with caplog.at_level("WARNING", "lorascope"):
        assert choose_device("auto") == CPU
    assert "the Apple GPU is left aside" in caplog.text
    assert _tried(CPU) == CPU, "what is tried is nothing that a device may refuse"


def test_the_tokenizer_loads_alone(pipeline_folder: Path) -> None:
    tokenizer = load_tokenizer(BaseSection(model=str(pipeline_folder)))
    assert tokenizer.model_max_length == 77 and len(tokenizer("ab").input_ids) == 4


# -- one checkpoint file -------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(base: Base, tmp_path: Path) -> Path:
    save_ldm(base, tmp_path / "base.safetensors", torch.float32)
    return tmp_path / "base.safetensors"


def assert_same_models(one: Base, two: Base) -> None:
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(one, part).state_dict(), getattr(two, part).state_dict()
        assert ours.keys() == theirs.keys() and all(
            torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
        )


def test_a_checkpoint_file_gives_the_same_base_as_the_folder(base: Base, checkpoint: Path) -> None:
    other = load(checkpoint)
    assert_same_models(base, other)
    assert torch.equal(base.encode_text(["a cat", ""]), other.encode_text(["a cat", ""]))
    assert (
        torch.equal(base.alphas_cumprod, other.alphas_cumprod)
        and read_configs(BaseSection(model=str(checkpoint))) == base.configs
    )
    facts = other.describe()
    assert (facts["model"], facts["source"], facts["digest"]) == (
        "base.safetensors",
        "checkpoint file",
        digest_file(checkpoint),
    )
    assert other.folder is None and base.describe()["source"] == "diffusers folder"
    assert len(load_tokenizer(BaseSection(model=str(checkpoint)))) == 514


def test_diffusers_reads_a_pipeline_saved_from_a_checkpoint_file(
    base: Base, checkpoint: Path, tmp_path: Path
) -> None:
    other = load(checkpoint)
    other.build_pipeline().save_pretrained(tmp_path / "pipeline")
    assert_same_models(base, load(tmp_path / "pipeline"))
    for name, kind in (
        ("EulerDiscreteScheduler", "EulerDiscreteScheduler"),
        ("StableDiffusionPipeline", "PNDMScheduler"),
    ):
        named = replace(base, scheduler_config={**base.scheduler_config, "_class_name": name})
        assert (
            type(named.build_pipeline().scheduler).__name__ == kind
        )  # the base's own, where that is a scheduler
    assert (
        StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", safety_checker=None)
        .tokenizer("a")
        .input_ids
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_smaller_dtypes_are_read_as_float32(base: Base, tmp_path: Path, dtype: torch.dtype) -> None:
    save_ldm(base, path := tmp_path / "half.safetensors", dtype)
    other = load(path)
    for ours, theirs in zip(base.vae.parameters(), other.vae.parameters(), strict=True):
        assert theirs.dtype == torch.float32 and torch.equal(ours.to(dtype).float(), theirs)


def test_the_same_base_is_written_as_the_same_bytes(base: Base, checkpoint: Path, tmp_path: Path) -> None:
    save_ldm(base, tmp_path / "again.safetensors", torch.float32)
    assert (tmp_path / "again.safetensors").read_bytes() == checkpoint.read_bytes()


def rewrite(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object], **metadata: str) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_tensors(checkpoint).items()}
    kept = read_header(checkpoint).metadata
    change(tensors)
    save_tensors(checkpoint, tensors, {**kept, **metadata})


def test_what_original_files_carry_besides_is_ignored(base: Base, checkpoint: Path) -> None:
    short = "cond_stage_model.transformer."

    def extend(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update(
            {
                "betas": torch.ones(9),
                "model_ema.decay": torch.tensor(float("nan")),
                "loss.logvar": torch.ones(1),
            }
        )
        tensors[f"{short}text_model.embeddings.position_ids"] = torch.arange(77)[None]
        for name in [name for name in tensors if name.startswith(f"{short}text_model.")]:
            tensors[short + name.removeprefix(f"{short}text_model.")] = tensors.pop(name)

    rewrite(checkpoint, extend)
    assert_same_models(base, load(checkpoint))


@pytest.fixture
def packaged(monkeypatch: pytest.MonkeyPatch, pipeline_folder: Path) -> None:
    """The tiny base's configurations in place of SD v1.5's in the package."""
    monkeypatch.setattr("lorascope.base.loading.SD15_DIR", pipeline_folder)


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


@pytest.mark.usefixtures("packaged")
def test_a_pickled_checkpoint_is_read_through_the_weights_only_loader(base: Base, tmp_path: Path) -> None:
    states = {
        component: getattr(base, component).state_dict() for component in ("unet", "vae", "text_encoder")
    }
    weights = from_diffusers(states, list_pairs(base.configs))
    torch.save({"state_dict": weights, "epoch": 1}, path := tmp_path / "base.ckpt")
    assert_same_models(base, load(path))
    torch.save({"state_dict": weights, "callbacks": {"best": Path("a")}}, path)
    with pytest.raises(
        WeightsError, match=r"base.ckpt: the pickle asks for pathlib.PosixPath.*nothing was run"
    ):
        load(path)
    torch.save(
        {name: tensor for name, tensor in weights.items() if name.startswith("model.diffusion_model.")}, path
    )
    with pytest.raises(
        BaseModelError, match=r"base.ckpt: is a checkpoint without text encoder and autoencoder"
    ):
        load(path)


def test_broken_checkpoints_are_refused(checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    name = "model.diffusion_model.out.2.bias"
    for change, message in (
        (lambda tensors: tensors.pop(name), f"lacks 1 tensors of Stable Diffusion v1, the first is '{name}'"),
        (
            lambda tensors: tensors.update(extra=torch.ones(1)),
            "has unknown 1 tensors of Stable Diffusion v1, the first is 'extra'",
        ),
        (lambda tensors: tensors.update({name: torch.ones(3)}), rf"{name} has shape \[3\], expected \[4\]"),
        (
            lambda tensors: tensors[name].fill_(float("inf")),
            f".{name}. has 4 of 4 values that are NaN or infinite",
        ),
        (
            lambda tensors: tensors.update({name: torch.ones(4, dtype=torch.int8)}),
            f"{name} holds torch.int8, not floating-point",
        ),
    ):
        rewrite(checkpoint, change)
        with pytest.raises((BaseModelError, WeightsError), match=message):
            load(checkpoint)
        checkpoint.write_bytes(whole)
    checkpoint.write_bytes(whole[:-7])
    with pytest.raises(WeightsError, match="outside the file"):
        load(checkpoint)


def test_a_checkpoint_that_predicts_v_must_be_said_to(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update(v_pred=torch.ones(0)))
    with pytest.raises(
        BaseModelError, match=r'says that it predicts v: set base.prediction_type = "v_prediction"'
    ):
        load(checkpoint)
    assert (
        load_base(BaseSection(model=str(checkpoint), prediction_type="v_prediction"), CPU).prediction_type
        == "v_prediction"
    )
    rewrite(checkpoint, lambda tensors: tensors.pop("v_pred"), **{"modelspec.prediction_type": "v"})
    with pytest.raises(BaseModelError, match="says that it predicts v"):
        load(checkpoint)


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


def test_a_checkpoint_of_other_shapes_than_sd15_and_without_configurations_is_refused(
    checkpoint: Path,
) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_tensors(checkpoint).items()}
    save_tensors(checkpoint, tensors, {})
    with pytest.raises(BaseModelError, match="lacks .* tensors of Stable Diffusion v1"):
        load(checkpoint)


# -- Stable Diffusion v1.5 in full size ----------------------------------------------------------------------


def test_only_known_configurations_can_be_built() -> None:
    with pytest.raises(BaseModelError, match="random base 'sdxl': only 'sd15'"):
        build_random_base("sdxl", CPU)


def test_the_tokenizer_of_the_package_is_clips() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(
        Path(lorascope.__file__).parent / "base" / "sd15" / "tokenizer", local_files_only=True
    )
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert tokenizer("A photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("", padding="max_length").input_ids == [49406] + [49407] * 76


@pytest.mark.parametrize(
    ("preset", "modules", "sizes"),
    [("paper", 160, (22.83, 91.31)), ("paper-as-run", 128 + 16, (15.97, 63.89))],
)
def test_the_reference_study_adapts_what_the_arithmetic_says(
    preset: str, modules: int, sizes: tuple[float, float]
) -> None:
    config = load_study(preset=preset, environment={})
    folder = Path(lorascope.__file__).parent / "base" / "sd15"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((folder / "unet" / "config.json").read_text()))
    targets = resolve_targets(unet, config.adapter.targets)
    counts = [count_parameters(targets, arm) for arm in config.expand_arms()]
    assert len(targets) == modules
    assert [round(4 * count / 2**20, 2) for count in counts] == list(sizes)
    if preset == "paper":
        assert counts == [5_984_256, 23_937_024]


def test_random_weights_are_a_function_of_the_seed() -> None:
    generators = [np.random.Generator(np.random.SFC64([seed, 1])) for seed in (0, 0, 1)]
    first, again, other = (_random_weights("a.weight", (8, 4, 2), generator) for generator in generators)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.float32 and 0.9 * 8**-0.5 < first.abs().max() <= 8**-0.5


def test_sd15_in_full_size_trains_and_samples_one_step_at_64_px() -> None:
    """With random weights, in 5 GB."""
    base = build_random_base("sd15", CPU)
    # The dimensions of the published model.
    assert base.describe()["parameters"] == {
        "unet": 859_520_964,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
    }
    assert (base.prediction_type, base.latent_factor, base.vae.config.scaling_factor) == (
        "epsilon",
        8,
        0.18215,
    )
    assert base.alphas_cumprod[[0, -1]].tolist() == pytest.approx([0.99915, 0.0046599], rel=1e-4)
    arms = [Arm(name="r16", rank=16, alpha=32, lr=1e-4, seed=0)]
    bank = AdapterBank(base.components, resolve_targets(base.unet, REFERENCE_TARGETS), arms).attach()
    assert bank.parameters.shape == (1, 5_984_256)
    posterior = torch.stack(
        base.encode_pixels(torch.rand(1, 3, 64, 64) * 2 - 1), dim=1
    ).clone()  # (picture, mean and std, c, h, w)
    states = base.encode_text(["", "a cat"]).clone()
    encoded = Encoded((posterior,), ("a cat",), ("picture",), (1,), torch.tensor([1]), states)
    [record] = Trainer(base, bank, encoded, TrainSection(epochs=1, batch_size=1)).run()
    assert record.step == 1 and not record.failed[0] and record.grad_norms[0] > 0
    job = Job(Prompt("normal", 0, "a cat"), seed=0)
    pictures, latents = draw_pictures(
        base, bank, [Slice(0)], [job], latent_shape_of(base, 64), SampleSection(steps=1)
    )
    assert pictures.shape == (1, 1, 64, 64, 3) and latents.isfinite().all()
    bank.detach()


def test_a_base_in_fp32_has_the_same_weights_widened(pipeline_folder: Path, base: Base) -> None:
    half = load_base(BaseSection(model=str(pipeline_folder)), torch.device("cpu"), "bf16")
    set_kernels(half.unet, {}, {"flash"})
    wide = half.in_fp32()
    assert barred_kernels(wide.unet) == {"flash"}
    for narrow, widened in zip(half.unet.parameters(), wide.unet.parameters(), strict=True):
        assert (narrow.dtype, widened.dtype) == (torch.bfloat16, torch.float32) and torch.equal(
            narrow.float(), widened
        )
    assert wide.vae is half.vae and base.in_fp32() is base
