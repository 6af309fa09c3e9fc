"""Files that are no adapter of a kind that is read are named and refused."""

from pathlib import Path

import pytest
import torch

from adapter_files import KOHYA_ATTENTION, write
from lorascope.adapters.files import load_adapter
from lorascope.adapters.foreign import foreign_kind
from lorascope.errors import AdapterError
from random_adapters import ATTENTION


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({f"{KOHYA_ATTENTION}_to_q.on_input": (1,)}, "an IA3 adapter (LyCORIS)"),
        ({f"{KOHYA_ATTENTION}_to_q.oft_blocks": (2, 2, 2)}, "an OFT adapter (LyCORIS)"),
        ({f"{KOHYA_ATTENTION}_to_q.a1.weight": (2, 2)}, "a GLoRA adapter (LyCORIS)"),
        ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (2, 2)}, "an adapter for SDXL"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 2)}, "an adapter for SDXL"),
        (
            {f"{KOHYA_ATTENTION}_to_q.lora_down.weight".replace("attn1_to_q", "attn2_to_k"): (2, 2048)},
            "an adapter for SDXL",
        ),
        *(
            (
                {f"{KOHYA_ATTENTION}_to_k.{ending}".replace("attn1", "attn2"): (2, width)},
                f"an adapter for {model}",
            )
            for ending in ("hada_w1_b", "diff")
            for width, model in ((2048, "SDXL"), (1024, "Stable Diffusion 2.x"))
        ),
        (
            {f"unet.{ATTENTION}.to_k.lora_A.weight".replace("attn1", "attn2"): (2, 1024)},
            "an adapter for Stable Diffusion 2.x",
        ),
        (
            {"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (2, 1024)},
            "an adapter for Stable Diffusion 2.x",
        ),
        ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (2, 2)}, "an adapter for Flux"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (2, 2)}, "an adapter for Flux"),
        ({"lora_unet_joint_blocks_0_x.lora_down.weight": (2, 2)}, "an adapter for Stable Diffusion 3"),
        (
            {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
            "a full checkpoint, not an adapter",
        ),
        ({"emb_params": (4, 768)}, "a textual inversion embedding"),
        ({"control_model.input_hint_block.0.weight": (2, 2)}, "a ControlNet or Control-LoRA"),
        (
            {"conv_in.weight": (320, 4, 3, 3)},
            "weights without an adapter's matrices: part of a model, or a file of another kind",
        ),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path: Path, keys: dict[str, tuple[int, ...]], kind: str) -> None:
    assert foreign_kind(keys) == kind
    tensors = {key: torch.zeros(shape) for key, shape in keys.items()}
    with pytest.raises(AdapterError, match=f"is {kind}".replace("(", r"\(").replace(")", r"\)")):
        load_adapter(write(tmp_path / "a.safetensors", tensors))
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(
        AdapterError, match="only LoRA, LoHa, LoKr and full differences for Stable Diffusion v1"
    ):
        load_adapter(tmp_path / "a.pt")
