"""The original layout: the table equals diffusers' own converters on SD v1.5, and tiny models go there and
back bit-equal.
"""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)

from lorascope.base.ldm import (
    PREFIXES,
    build_component,
    canonical_name,
    check_tensors,
    from_diffusers,
    is_harmless,
    list_pairs,
    to_diffusers,
)
from lorascope.base.loading import Base
from lorascope.errors import BaseModelError

SD15 = resources.files("lorascope") / "base" / "sd15"


def read_configs(folder: Any) -> dict[str, dict[str, Any]]:
    return {component: json.loads((folder / component / "config.json").read_text()) for component in PREFIXES}


def test_the_table_equals_diffusers_converters_for_every_tensor_of_sd15() -> None:
    configs = read_configs(SD15)
    pairs = list_pairs(configs)
    state = {pair.ldm: torch.empty(pair.ldm_shape, device="meta") for pair in pairs}
    theirs = {
        "unet": convert_ldm_unet_checkpoint(dict(state), configs["unet"]),
        "vae": convert_ldm_vae_checkpoint(dict(state), configs["vae"]),
        "text_encoder": {
            name.removeprefix("text_model."): value
            for name, value in convert_ldm_clip_checkpoint(dict(state)).items()
        },
    }
    assert {component: len(tensors) for component, tensors in theirs.items()} == {
        "unet": 686,
        "vae": 248,
        "text_encoder": 196,
    }
    for component, tensors in theirs.items():
        ours = {pair.diffusers: pair for pair in pairs if pair.component == component}
        assert ours.keys() == tensors.keys()
        for name, tensor in tensors.items():
            squeezed = (
                component == "vae" and state[ours[name].ldm].ndim != tensor.ndim
            )  # diffusers' view of an attention's 1x1 conv
            assert squeezed or tensor is state[ours[name].ldm], name
            assert tuple(tensor.shape) == ours[name].shape
    assert len({pair.ldm for pair in pairs}) == len(pairs) == 1130
    assert sum(pair.shape != pair.ldm_shape for pair in pairs) == 8


def test_names_that_every_program_knows_are_there() -> None:
    shapes = {pair.ldm: pair.ldm_shape for pair in list_pairs(read_configs(SD15))}
    assert shapes["model.diffusion_model.output_blocks.11.0.skip_connection.weight"] == (320, 640, 1, 1)
    assert shapes["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] == (
        320,
        768,
    )
    assert shapes["model.diffusion_model.output_blocks.2.1.conv.weight"] == (1280, 1280, 3, 3)
    assert shapes["first_stage_model.decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert shapes["first_stage_model.encoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)
    assert shapes["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"] == (49408, 768)


@pytest.mark.parametrize("change", [{}, {"use_linear_projection": True}, {"layers_per_block": 2}])
def test_there_and_back_is_bit_equal(base: Base, pipeline_folder: Path, change: dict[str, Any]) -> None:
    configs = read_configs(pipeline_folder)
    configs["unet"].update(change)
    pairs = list_pairs(configs)
    states = {
        component: build_component(component, config).state_dict() for component, config in configs.items()
    }
    checkpoint = from_diffusers(states, pairs)
    check_tensors({name: tuple(tensor.shape) for name, tensor in checkpoint.items()}, pairs, "file")
    back = to_diffusers(checkpoint, pairs)
    for component, state in states.items():
        assert state.keys() == back[component].keys()
        assert all(torch.equal(tensor, back[component][name]) for name, tensor in state.items())


def test_harmless_extras_and_short_names_are_understood() -> None:
    assert (
        canonical_name("cond_stage_model.transformer.text_projection.weight")
        == "cond_stage_model.transformer.text_projection.weight"
    )
    for name in (
        "betas",
        "cond_stage_model.transformer.text_projection.weight",
        "model_ema.decay",
        "loss.logvar",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
    ):
        assert is_harmless(name)
    assert not is_harmless("model.diffusion_model.out.2.bias")
    short, full = (
        "cond_stage_model.transformer.final_layer_norm.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    )
    assert canonical_name(short) == canonical_name(full) == full
    assert canonical_name("cond_stage_model.model.ln_final.bias") == "cond_stage_model.model.ln_final.bias"


def test_missing_unexpected_and_misshapen_tensors_are_named(pipeline_folder: Path) -> None:
    pairs = list_pairs(read_configs(pipeline_folder))
    shapes = {pair.ldm: pair.ldm_shape for pair in pairs}
    check_tensors({**shapes, "betas": (1000,), "model_ema.decay": ()}, pairs, "file")
    name = "model.diffusion_model.out.2.bias"
    with pytest.raises(
        BaseModelError, match=f"file: lacks 1 tensors of Stable Diffusion v1, the first is '{name}'"
    ):
        check_tensors({key: shape for key, shape in shapes.items() if key != name}, pairs, "file")
    with pytest.raises(BaseModelError, match="has unknown 1 tensors .*'model.diffusion_model.extra'"):
        check_tensors({**shapes, "model.diffusion_model.extra": (1,)}, pairs, "file")
    with pytest.raises(BaseModelError, match=rf"{name} has shape \[3\], expected \[4\]"):
        check_tensors({**shapes, name: (3,)}, pairs, "file")


def test_architectures_without_a_name_in_the_layout_are_refused(pipeline_folder: Path) -> None:
    configs = read_configs(pipeline_folder)
    depths = [1] * len(configs["unet"]["block_out_channels"])
    with pytest.raises(BaseModelError, match="unet: has blocks of different depths"):
        list_pairs({**configs, "unet": {**configs["unet"], "layers_per_block": depths}})
    configs["unet"]["class_embed_type"] = "timestep"
    with pytest.raises(
        BaseModelError, match=r"class_embedding.linear_1.weight: has no name in the original layout"
    ):
        list_pairs(configs)
