"""What a file is that is no adapter for Stable Diffusion v1 of a kind that is read."""

import re
from collections.abc import Mapping

from lorascope.adapters.names import is_of_adapter

_OTHER_KINDS = (  # a pattern in some key, and what a file with it is
    (r"\.on_input$", "an IA3 adapter (LyCORIS)"),
    (r"\.oft_(blocks|diag)", "an OFT adapter (LyCORIS)"),
    (r"\.[ab][12]\.weight$", "a GLoRA adapter (LyCORIS)"),
    (r"^lora_controlnet|^control_model\.|controlnet_cond_embedding", "a ControlNet or Control-LoRA"),
    (r"(^|[._])(double_blocks|single_blocks|single_transformer_blocks)[._]", "an adapter for Flux"),
    (r"(^|[._])joint_blocks[._]|^transformer\.transformer_blocks\.", "an adapter for Stable Diffusion 3"),
    (
        r"^lora_te[23]_|^text_encoder_[23]\.|^lora_unet_(input_blocks|output_blocks|middle_block)_",
        "an adapter for SDXL",
    ),
    (
        r"^model\.diffusion_model\.|^first_stage_model\.|^cond_stage_model\.|^conditioner\.",
        "a full checkpoint, not an adapter",
    ),
    (r"^(emb_params|string_to_param|clip_[lg]$)|^<.*>$", "a textual inversion embedding"),
)  # fmt: skip
_READS_TEXT = re.compile(
    r"attn2[._](processor\.)?to_[kv](_lora)?\.(lora_down|lora_A|lora\.down|down|hada_w1_b|diff$)"
    r"|^lora_te1?_.*_self_attn_q_proj\.lora_down"
)
_WIDTHS = {1024: "an adapter for Stable Diffusion 2.x", 2048: "an adapter for SDXL"}  # of the text states


def foreign_kind(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What a file is if not LoRA, LoHa, LoKr or full differences for Stable Diffusion v1, in words such as
    "an adapter for SDXL"; None if it may be one of them.

    `shapes` are a file's tensors by key; no weights are needed, so a header is enough.
    """
    for pattern, kind in _OTHER_KINDS:
        if any(re.search(pattern, key) for key in shapes):
            return kind
    for key, shape in shapes.items():
        if _READS_TEXT.search(key) and len(shape) > 1 and shape[1] in _WIDTHS:
            return _WIDTHS[shape[1]]
    if not any(is_of_adapter(key) for key in shapes):
        return "weights without an adapter's matrices: part of a model, or a file of another kind"
    return None
