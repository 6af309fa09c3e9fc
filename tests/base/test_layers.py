"""The layers of Stable Diffusion v1.5: paths and shapes against the models' own classes, names against a few
well known ones.
"""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from lorascope.base.layers import ldm_path, stable_diffusion_layers
from lorascope.errors import BaseModelError


def test_the_layers_are_those_of_stable_diffusion() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12))
    parts = {"unet.": unet, "text_encoder.text_model.": text}
    expected = {
        prefix + name.removeprefix("text_model."): tuple(module.weight.shape)
        for prefix, part in parts.items()
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    assert dict(stable_diffusion_layers()) == expected


@pytest.mark.parametrize(
    ("path", "original"),
    [
        ("conv_in", "input_blocks.0.0"),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks.8.1.proj_in"),
        ("down_blocks.1.downsamplers.0.conv", "input_blocks.6.0.op"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        ("up_blocks.3.resnets.2.conv_shortcut", "output_blocks.11.0.skip_connection"),
    ],
)
def test_names_of_the_original_model(path: str, original: str) -> None:
    assert ldm_path(path) == original


def test_a_layer_without_an_original_name_is_refused() -> None:
    with pytest.raises(BaseModelError, match="has no name in the original layout"):
        ldm_path("add_embedding.linear_1")
