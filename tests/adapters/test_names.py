"""Names of modules: every program's spelling is read, and diffusers reads ours as we do."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

from adapter_files import KOHYA_ATTENTION, Tensors, pair, write
from lorascope.adapters.adapter import Adapter
from lorascope.adapters.files import load_adapter, save_adapter
from lorascope.adapters.modules import LoraModule
from lorascope.adapters.names import is_of_adapter, is_plain_path, kohya_name, parse_key
from lorascope.adapters.parsing import parse_adapter
from lorascope.base.layers import stable_diffusion_layers, stable_diffusion_norms
from lorascope.errors import AdapterError
from random_adapters import ATTENTION, plain_lora_modules


def small_tensors(paths: list[str]) -> Tensors:
    """kohya tensors of rank 1 for these modules, of one channel."""
    tensors = {}
    for path in paths:
        name = kohya_name(path)
        tensors |= {
            f"{name}.lora_down.weight": torch.ones(1, 1),
            f"{name}.lora_up.weight": torch.ones(1, 1),
            f"{name}.alpha": torch.tensor(2.0),
        }
    return tensors


def test_stable_diffusion_has_192_and_72_modules() -> None:
    paths = list(plain_lora_modules())
    assert sum(path.startswith("unet.") for path in paths) == 192
    assert sum(path.startswith("text_encoder.") for path in paths) == 72
    kinds = {
        part: sum(f".{part}" in path for path in paths)
        for part in ("attn1.", "attn2.", "ff.", "proj_in", "proj_out")
    }
    assert kinds == {"attn1.": 64, "attn2.": 64, "ff.": 32, "proj_in": 16, "proj_out": 16}
    assert kohya_name("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0") == (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    )
    assert kohya_name("unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj") == (
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"
    )


def test_every_name_comes_back_and_diffusers_reads_each_as_we_do() -> None:
    """Our names of all layers, LoCon's too, through our parser and through diffusers' converter of kohya
    files.
    """
    paths = list(stable_diffusion_layers())
    assert len(paths) == len({kohya_name(path) for path in paths})
    adapter = parse_adapter(small_tensors(paths), {})
    assert set(adapter.modules) == set(paths) and not adapter.leftover and not adapter.faults
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(small_tensors(paths))
    theirs = {
        name.replace(".processor.", ".").replace(".to_out_lora", ".to_out.0_lora").replace("_lora.", ".lora.")
        for name in converted
    }
    text = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out.0": "out_proj"}
    read = set()
    for name in theirs:
        path = name.split(".lora")[0]
        for short, full in text.items():
            if path.startswith("text_encoder."):
                path = path.removesuffix(f".to_{short}") + (
                    f".{full}" if path.endswith(f".to_{short}") else ""
                )
        read.add(path)
    assert read == set(paths)
    assert len(alphas) == len(paths)


def test_norms_have_names_too() -> None:
    """Of full differences, whose files may hold them; PEFT's without text_model."""
    for path in stable_diffusion_norms():
        assert parse_key(f"{kohya_name(path)}.w_norm") == ("kohya", path, "diff")
        rest = path.partition(".")[2].removeprefix("text_model.")
        assert parse_key(f"base_model.model.{rest}.diff_b") == ("peft", path, "diff_b")


def test_a_layer_without_a_kohya_name_is_refused(tmp_path: Path) -> None:
    adapter = Adapter(
        {"unet.class_embedding.linear_1": LoraModule(torch.ones(1, 2), torch.ones(2, 1), None)}, "peft", {}
    )
    with pytest.raises(
        AdapterError, match="no layer of a Stable Diffusion v1 model.*write peft or diffusers"
    ):
        save_adapter(adapter, tmp_path / "a.safetensors", "kohya")


@pytest.mark.parametrize(
    ("down", "up", "path", "layout"),
    [
        (
            f"{KOHYA_ATTENTION}_to_q.lora_down.weight",
            f"{KOHYA_ATTENTION}_to_q.lora_up.weight",
            f"unet.{ATTENTION}.to_q",
            "kohya",
        ),
        (
            f"{KOHYA_ATTENTION}_to_out.lora_down.weight",
            f"{KOHYA_ATTENTION}_to_out.lora_up.weight",
            f"unet.{ATTENTION}.to_out.0",
            "kohya",
        ),
        (
            f"unet.{ATTENTION}.to_q.lora_A.weight",
            f"unet.{ATTENTION}.to_q.lora_B.weight",
            f"unet.{ATTENTION}.to_q",
            "diffusers",
        ),
        (
            f"unet.{ATTENTION}.to_q.lora.down.weight",
            f"unet.{ATTENTION}.to_q.lora.up.weight",
            f"unet.{ATTENTION}.to_q",
            "diffusers lora.down/up",
        ),
        (
            f"{ATTENTION}.processor.to_out_lora.down.weight",
            f"{ATTENTION}.processor.to_out_lora.up.weight",
            f"unet.{ATTENTION}.to_out.0",
            "diffusers attention processors",
        ),
        (
            "text_encoder.text_model.encoder.layers.3.self_attn.to_q_lora.down.weight",
            "text_encoder.text_model.encoder.layers.3.self_attn.to_q_lora.up.weight",
            "text_encoder.text_model.encoder.layers.3.self_attn.q_proj",
            "diffusers lora.down/up",
        ),
        (
            "text_encoder.encoder.layers.3.mlp.fc1.lora_linear_layer.down.weight",
            "text_encoder.encoder.layers.3.mlp.fc1.lora_linear_layer.up.weight",
            "text_encoder.text_model.encoder.layers.3.mlp.fc1",
            "diffusers lora.down/up",
        ),
        (
            "lora_te1_text_model_encoder_layers_3_mlp_fc1.lora_down.weight",
            "lora_te1_text_model_encoder_layers_3_mlp_fc1.lora_up.weight",
            "text_encoder.text_model.encoder.layers.3.mlp.fc1",
            "kohya",
        ),
        (
            f"base_model.model.{ATTENTION}.to_q.lora_A.default.weight",
            f"base_model.model.{ATTENTION}.to_q.lora_B.default.weight",
            f"unet.{ATTENTION}.to_q",
            "peft",
        ),
    ],
)
def test_every_spelling_is_read(tmp_path: Path, down: str, up: str, path: str, layout: str) -> None:
    tensors = pair(down, up)
    adapter = load_adapter(write(tmp_path / "a.safetensors", tensors))
    assert list(adapter.modules) == [path] and adapter.layout == layout and not adapter.leftover
    module = adapter.modules[path]
    assert torch.equal(module.down, tensors[down]) and torch.equal(module.up, tensors[up])
    assert module.alpha is None and module.scale == 1.0


def test_diffusers_mixed_save_is_read_whole(tmp_path: Path) -> None:
    """Attention processors beside `lora.down/up` layers, of which diffusers 0.42 itself loads only a part."""
    tensors = {
        **pair(
            f"unet.{ATTENTION}.processor.to_q_lora.down.weight",
            f"unet.{ATTENTION}.processor.to_q_lora.up.weight",
        ),
        **pair(
            "unet.mid_block.attentions.0.proj_in.lora.down.weight",
            "unet.mid_block.attentions.0.proj_in.lora.up.weight",
        ),
    }
    adapter = load_adapter(write(tmp_path / "a.safetensors", tensors))
    assert set(adapter.modules) == {f"unet.{ATTENTION}.to_q", "unet.mid_block.attentions.0.proj_in"}
    assert adapter.layout == "diffusers attention processors + diffusers lora.down/up"
    assert adapter.modules["unet.mid_block.attentions.0.proj_in"].down.shape == (2, 6, 1, 1)


def test_text_encoder_names_of_transformers_5_get_the_names_that_files_have(tmp_path: Path) -> None:
    """huggingface/diffusers #13984: transformers 5 dropped `text_model` from module names, and keys made from
    them match nothing.
    """
    name = "text_encoder.encoder.layers.0.self_attn.q_proj"
    adapter = load_adapter(
        write(tmp_path / "a.safetensors", pair(f"{name}.lora_A.weight", f"{name}.lora_B.weight"))
    )
    save_adapter(adapter, tmp_path / "k.safetensors", "kohya", "fp32")
    assert (
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"
        in safetensors.torch.load_file(tmp_path / "k.safetensors")
    )


def test_a_key_names_a_module_and_one_of_its_tensors() -> None:
    assert parse_key(f"{KOHYA_ATTENTION}_to_q.alpha") == ("kohya", f"unet.{ATTENTION}.to_q", "alpha")
    assert parse_key(f"unet.{ATTENTION}.to_q.dora_scale") == (
        "diffusers",
        f"unet.{ATTENTION}.to_q",
        "dora_scale",
    )
    for ending, field in (
        ("hada_w1_a", "hada_w1_a"),
        ("lokr_t2", "lokr_t2"),
        ("diff_b", "diff_b"),
        ("w_norm", "diff"),
        ("b_norm", "diff_b"),
    ):
        for name, layout in (
            (f"{KOHYA_ATTENTION}_to_q", "kohya"),
            (KOHYA_ATTENTION.replace("lora_unet", "lycoris") + "_to_q", "kohya"),
            (f"base_model.model.{ATTENTION}.to_q", "peft"),
        ):
            assert parse_key(f"{name}.{ending}") == (layout, f"unet.{ATTENTION}.to_q", field)
    for key in (f"{KOHYA_ATTENTION}_to_q.bias", "lora_unet_nowhere.lora_up.weight", "a.lora_A.weight", ""):
        assert parse_key(key) is None
    assert is_of_adapter("a.lora_A.weight") and not is_of_adapter("a.weight")
    assert is_plain_path("a.b_1.0") and not any(map(is_plain_path, ("a..b", "a.*", "", "a.")))
