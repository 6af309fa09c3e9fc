"""Loading a base: the real loader, and a clear line for everything that is not one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from lorascope.base import Base, choose_device, load_base, load_tokenizer, resolve_model
from lorascope.config import BaseSection
from lorascope.errors import BaseModelError

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
    assert torch.equal(base.alphas_cumprod, DDIMScheduler.from_pretrained(pipeline_folder / "scheduler").alphas_cumprod)


def test_the_digest_follows_the_weights(own_copy: Path) -> None:
    before = load(own_copy)
    before.unet.conv_in.bias.data += 1
    before.unet.save_pretrained(own_copy / "unet")
    assert load(own_copy).digest != before.digest


def test_text_states_equal_the_pipelines(base: Base) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(base.folder, safety_checker=None)
    theirs, empty = pipeline.encode_prompt("a cat", CPU, 1, True)
    ours = base.encode_text(["a cat", ""])
    torch.testing.assert_close(ours, torch.cat([theirs, empty]), rtol=1e-5, atol=1e-6)


def test_pixels_go_through_the_vae_and_back(base: Base) -> None:
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = base.encode_pixels(pixels)
    assert mean.shape == std.shape == (2, 4, 8, 8) and (std > 0).all()
    decoded = base.decode_latents(mean)
    expected = base.vae.decode(mean).sample
    assert decoded.dtype == torch.uint8 and decoded.shape == (2, 32, 32, 3)
    assert ((decoded.permute(0, 3, 1, 2) / 127.5 - 1) - expected.clamp(-1, 1)).abs().max() < 0.005


def test_the_pocket_base_loads_offline_and_diffusers_loads_it_too() -> None:
    base = load_base(BaseSection(), CPU)
    assert 8e6 < base.describe()["parameters"]["unet"] < 17e6
    assert StableDiffusionPipeline.from_pretrained(base.folder, safety_checker=None, local_files_only=True).unet.config.in_channels == 4


@pytest.mark.parametrize(
    ("model", "message"),
    [("./nowhere", "no such folder"), ("/", "lacks unet"), ("name", "no such folder"), (__file__, "is a file")],
)
def test_places_that_hold_no_base_are_named(model: str, message: str) -> None:
    with pytest.raises(BaseModelError, match=message):
        load_base(BaseSection(model=model), CPU)


def test_a_hub_id_without_network_says_so() -> None:
    with pytest.raises(BaseModelError, match="owner/absent.*cannot be reached"):
        resolve_model("owner/absent", None, "base", ["*.json"])


def test_a_damaged_part_is_named(own_copy: Path) -> None:
    weights = own_copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BaseModelError, match=r"unet: cannot be loaded as UNet2DConditionModel"):
        load(own_copy)


def test_pickled_weights_are_refused(own_copy: Path) -> None:
    base = load(own_copy)
    (own_copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(base.unet.state_dict(), own_copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(BaseModelError, match="unet: cannot be loaded"):
        load(own_copy)


def test_an_inpainting_unet_is_refused(own_copy: Path) -> None:
    from diffusers import UNet2DConditionModel

    config = json.loads((own_copy / "unet" / "config.json").read_text())
    UNet2DConditionModel.from_config({**config, "in_channels": 9}).save_pretrained(own_copy / "unet")
    with pytest.raises(BaseModelError, match="takes 9 channels and the VAE gives 4"):
        load(own_copy)


def test_unknown_or_broken_schedules_are_refused(own_copy: Path) -> None:
    path = own_copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "sample"}))
    with pytest.raises(BaseModelError, match="prediction_type = 'sample': must be one of epsilon, v_prediction"):
        load(own_copy)
    path.write_text("{")
    with pytest.raises(BaseModelError, match="cannot be read"):
        load(own_copy)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BaseModelError, match="torch sees no GPU"):
        choose_device("cuda")
    assert choose_device("auto") == CPU


def test_the_tokenizer_loads_alone(pipeline_folder: Path) -> None:
    tokenizer = load_tokenizer(BaseSection(model=str(pipeline_folder)))
    assert tokenizer.model_max_length == 77 and len(tokenizer("ab").input_ids) == 4
