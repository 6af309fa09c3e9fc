"""What names and shapes say of a file: the model, the layout, and the place of each module."""

import pytest

from lorascope.adapters.file_modules import FileModule, file_modules
from lorascope.adapters.recognition import (
    describe,
    describe_other,
    family_of_modules,
    layout_of,
    recognise_modules,
)
from lorascope.base.layers import Shape

KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
CROSS = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def lora(name: str, inputs: int, outputs: int, spelling: tuple[str, str] = KOHYA) -> dict[str, Shape]:
    return {name + spelling[0]: (2, inputs), name + spelling[1]: (outputs, 2)}


def modules_of(shapes: dict[str, Shape]) -> dict[str, FileModule]:
    return file_modules(shapes)[0]


@pytest.mark.parametrize(
    ("shapes", "family"),
    [
        (lora(f"lora_unet_{CROSS}", 768, 320), "Stable Diffusion v1"),
        (lora(f"lora_unet_{CROSS}", 1024, 320), "Stable Diffusion v2"),
        (lora(f"lora_unet_{CROSS}", 2048, 640), "SDXL"),
        (lora(f"lora_unet_{CROSS}", 4096, 640), "a model whose text has width 4096"),
        (lora("lora_te2_text_model_encoder_layers_0_mlp_fc1", 8, 8), "SDXL"),
        (lora("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, 768), "Stable Diffusion v1"),
        (lora("lora_unet_somewhere", 8, 8), None),
    ],
)
def test_the_model_is_told_by_the_width_of_its_text_or_by_names(
    shapes: dict[str, Shape], family: str | None
) -> None:
    assert family_of_modules(shapes, modules_of(shapes)) == family


@pytest.mark.parametrize(
    ("shapes", "layout"),
    [
        (lora(f"lora_unet_{CROSS}", 768, 320), "kohya"),
        (lora("unet.mid_block.attn", 8, 8), "kohya with dotted names"),
        (lora("unet.mid_block.attn", 8, 8, PEFT), "diffusers lora_A/B"),
        (lora("base_model.model.attn", 8, 8, PEFT), "PEFT"),
        ({"lycoris_x.diff": (8, 8)}, "LyCORIS"),
        ({"base_model.model.attn.diff": (8, 8)}, "PEFT"),
    ],
)
def test_the_layout_is_told_by_the_ends_of_the_keys(shapes: dict[str, Shape], layout: str) -> None:
    modules = modules_of(shapes)
    assert layout_of(modules, False) == layout
    assert layout_of(modules, True) == f"{layout} folder"


def test_modules_are_placed_where_any_name_tells() -> None:
    shapes = {
        **lora(f"lora_unet_{CROSS}", 768, 320),
        **lora("lora_te_text_model_encoder_layers_0_mlp_fc1", 768, 3072),
        **lora("lora_unet_elsewhere_conv", 8, 8),
    }
    shapes |= {"lora_unet_mid_block_attentions_0_norm.w_norm": (1280,), "lora_unet_norm2.w_norm": (8,)}
    cross, text, elsewhere, norm, other_norm = recognise_modules(modules_of(shapes)).values()
    assert (norm.path, norm.block) == ("unet.mid_block.attentions.0.norm", "norm")
    assert (other_norm.path, other_norm.block) == (None, "norm")
    assert cross.path == "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    assert (cross.block, cross.kind, cross.rank, cross.norm) == ("attention", "LoRA", 2, None)
    assert text.path == "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    assert text.block == "text encoder"
    assert (elsewhere.path, elsewhere.block) == (None, "convolution")


def test_an_adapter_and_what_is_none_are_described() -> None:
    shapes = lora(f"lora_unet_{CROSS}", 768, 320)
    modules = modules_of(shapes)
    facts = tuple(recognise_modules(modules).values())
    said = "LoRA for Stable Diffusion v1: U-Net"
    assert describe(modules, facts, "Stable Diffusion v1", is_folder=False) == said
    assert "whose layers in it are alike" in describe(modules, facts, None, is_folder=False)
    assert describe_other(shapes, has_parts=True).startswith("an incomplete adapter")
    assert describe_other({"<cat>": (768,)}, has_parts=False).startswith("a textual inversion")
