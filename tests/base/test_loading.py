"""Loading a base: the real loader, and what a base gives."""

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from bases import assert_same_models, load
from lorascope.base.attention import barred_kernels, set_kernels
from lorascope.base.configs import load_tokenizer, read_configs
from lorascope.base.loading import Base, load_base
from lorascope.sections import BaseSection
from lorascope.store import digest_file

CPU = torch.device("cpu")


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


def test_the_study_file_can_say_what_the_base_predicts(base: Base, pipeline_folder: Path) -> None:
    section = BaseSection(model=str(pipeline_folder), prediction_type="v_prediction")
    other = load_base(section, CPU)
    assert (base.prediction_type, other.prediction_type) == (
        "epsilon",
        "v_prediction",
    ) and other.digest == base.digest


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
    named = replace(base, scheduler_config={**base.scheduler_config, "_class_name": "EulerDiscreteScheduler"})
    assert type(named.build_pipeline().scheduler).__name__ == "EulerDiscreteScheduler"
    assert (
        StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", safety_checker=None)
        .tokenizer("a")
        .input_ids
    )


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
