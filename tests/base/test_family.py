"""Families are told from the names, shapes and configurations that their files have."""

import json
import re
from pathlib import Path

import pytest

from lorascope.base.family import family_of_folder, family_of_tensors, family_of_unet

UNET = "model.diffusion_model."
SD1 = {
    f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
}


def test_a_stable_diffusion_1_checkpoint_passes() -> None:
    assert family_of_tensors(SD1) is None


def test_widths_and_channels_tell_the_variants_apart() -> None:
    conv, key = list(SD1)[:2]
    for channels, family in (
        (9, "inpainting"),
        (8, "instruct-pix2pix"),
        (7, "upscaler"),
        (5, "depth-to-image"),
    ):
        assert family in str(family_of_tensors({**SD1, conv: (320, channels, 3, 3)}))
    assert "Stable Diffusion 2" in str(family_of_tensors({**SD1, key: (320, 1024)}))
    assert "SDXL" in str(family_of_tensors({**SD1, key: (320, 2048)}))


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "an adapter"),
        ("base_model.model.mid_block.attentions.0.proj_in.lora_A.weight", "an adapter"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.up.weight", "an adapter"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a", "an adapter"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", "SDXL"),
        ("model.diffusion_model.label_emb.0.0.weight", "SDXL"),
        ("cond_stage_model.model.ln_final.weight", "Stable Diffusion 2"),
        ("down_blocks.0.motion_modules.0.norm.weight", "AnimateDiff"),
        ("emb_params", "a textual inversion"),
        ("input_blocks.0.0.weight", "a U-Net alone"),
        ("down_blocks.0.resnets.0.conv1.weight", "a U-Net alone"),
        ("model_ema.diffusion_modelout2bias", "averaged .EMA. weights alone"),
        ("first_stage_model.encoder.conv_in.weight", "an autoencoder .VAE. alone"),
        ("decoder.conv_in.weight", "an autoencoder .VAE. alone"),
        ("text_model.final_layer_norm.weight", "a text encoder alone"),
        ("layer.weight", "no checkpoint of a known family .its first tensor is 'layer.weight'"),
        (f"{UNET}out.2.bias", "a checkpoint without text encoder and autoencoder"),
    ],
)
def test_telling_names(name: str, family: str) -> None:
    assert re.search(family, str(family_of_tensors({name: (1,)})))


def test_what_is_missing_is_said() -> None:
    assert family_of_tensors({}) == "a file without tensors"
    for prefix, what in (("cond_stage_model", "text encoder"), ("first_stage_model", "autoencoder (VAE)")):
        assert (
            family_of_tensors({name: shape for name, shape in SD1.items() if not name.startswith(prefix)})
            == f"a checkpoint without {what}"
        )


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"in_channels": 4, "cross_attention_dim": 768}, None),
        ({"in_channels": 9}, "an inpainting model"),
        ({"cross_attention_dim": 1024}, "Stable Diffusion 2"),
        ({"cross_attention_dim": [1024]}, None),
        ({"addition_embed_type": "text_time"}, "SDXL"),
        ({"time_cond_proj_dim": 256}, "a latent consistency model"),
        ({"class_embed_type": "projection"}, "unCLIP"),
    ],
)
def test_unet_configurations(config: dict[str, object], family: str | None) -> None:
    assert family_of_unet(config) is None if family is None else family in str(family_of_unet(config))


@pytest.mark.parametrize(
    ("files", "family"),
    [
        (
            {
                "model_index.json": {"_class_name": "StableDiffusionPipeline"},
                "unet/config.json": {"in_channels": 4},
            },
            None,
        ),
        (
            {
                "model_index.json": {"_class_name": "StableDiffusionPipeline"},
                "unet/config.json": {"in_channels": 9},
            },
            "an inpainting model",
        ),
        ({"model_index.json": {"_class_name": "StableDiffusionXLPipeline"}}, "SDXL"),
        ({"model_index.json": {"_class_name": "FluxPipeline"}}, "Flux"),
        (
            {"model_index.json": {"_class_name": "SanaPipeline"}, "transformer/config.json": {}},
            "a transformer in place of the U-Net",
        ),
        ({"config.json": {"_class_name": "UNet2DConditionModel"}}, "a U-Net alone"),
        ({"config.json": {"_class_name": "ControlNetModel"}}, "a ControlNet"),
        ({"config.json": {"model_type": "clip"}}, "a single model of type 'clip'"),
        ({"adapter_config.json": {"peft_type": "LORA"}}, "an adapter"),
        ({"model_index.json": [], "config.json": 1}, None),
    ],
)
def test_folders(tmp_path: Path, files: dict[str, object], family: str | None) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    found = family_of_folder(tmp_path)
    assert found is None if family is None else family in str(found)


def test_unreadable_configurations_are_left_to_the_loader(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    assert family_of_folder(tmp_path) is None
