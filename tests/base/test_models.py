"""Models from a folder's weights and a checkpoint file's: a clear line for what is damaged."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from bases import assert_same_models, change_weights, load, rewrite
from lorascope.base.ldm import from_diffusers, list_pairs
from lorascope.base.loading import Base, load_base
from lorascope.base.models import load_folder
from lorascope.base.saving import save_ldm
from lorascope.base.weights import load_tensors, read_header, save_tensors
from lorascope.errors import BaseModelError, WeightsError
from lorascope.sections import BaseSection

CPU = torch.device("cpu")


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
        load_folder(own_copy, torch.float32)
    (own_copy / "unet" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(BaseModelError, match="it has no weights"):
        load_folder(own_copy, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_smaller_dtypes_are_read_as_float32(base: Base, tmp_path: Path, dtype: torch.dtype) -> None:
    save_ldm(base, path := tmp_path / "half.safetensors", dtype)
    other = load(path)
    for ours, theirs in zip(base.vae.parameters(), other.vae.parameters(), strict=True):
        assert theirs.dtype == torch.float32 and torch.equal(ours.to(dtype).float(), theirs)


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
    own = json.dumps({"scheduler/scheduler_config.json": json.dumps({"prediction_type": "v_prediction"})})
    carried = json.loads(read_header(checkpoint).metadata["lorascope.configs"]) | json.loads(own)
    whole = checkpoint.read_bytes()
    rewrite(checkpoint, lambda tensors: None, **{"lorascope.configs": json.dumps(carried)})
    assert load(checkpoint).prediction_type == "v_prediction", "its configuration says so"
    checkpoint.write_bytes(whole)
    rewrite(checkpoint, lambda tensors: tensors.pop("v_pred"), **{"modelspec.prediction_type": "v"})
    with pytest.raises(BaseModelError, match="says that it predicts v"):
        load(checkpoint)


def test_a_checkpoint_of_other_shapes_than_sd15_and_without_configurations_is_refused(
    checkpoint: Path,
) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_tensors(checkpoint).items()}
    save_tensors(checkpoint, tensors, {})
    with pytest.raises(BaseModelError, match="lacks .* tensors of Stable Diffusion v1"):
        load(checkpoint)
