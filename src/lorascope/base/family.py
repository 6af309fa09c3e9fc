"""What a model file or folder is, told from names, shapes and configurations alone.

The telling names are those that the families' own code gives its modules; `None` means: nothing speaks
against a text-to-image base of Stable Diffusion v1.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorascope.errors import StorageError
from lorascope.store import read_regular

WANTED = "give a base of Stable Diffusion v1, such as stable-diffusion-v1-5/stable-diffusion-v1-5"
_ADAPTER = "an adapter (LoRA or one of its kin), not a base"
_UNET = "model.diffusion_model."
_VARIANTS_BY_CHANNELS = {
    5: "a depth-to-image model (its U-Net takes 5 channels)",
    7: "an upscaler (its U-Net takes 7 channels)",
    8: "an instruct-pix2pix model (its U-Net takes 8 channels)",
    9: "an inpainting model (its U-Net takes 9 channels)",
}
_WIDTHS = {
    1024: "Stable Diffusion 2 (its U-Net attends to text of width 1024)",
    2048: "SDXL (its U-Net attends to text of width 2048)",
}
# In this order: the first family any of whose marks stands in a tensor's name.
_MARKS = (
    (
        _ADAPTER,
        (
            "lora_unet_",
            "lora_te",
            "lora_A.",
            "lora_B.",
            "lora_down.",
            "lora_up.",
            "lora.up.",
            "lycoris_",
            "hada_w1",
            "lokr_w1",
            "to_q_lora.",
        ),
    ),
    ("Flux", ("double_blocks.", "single_transformer_blocks.")),
    ("Stable Diffusion 3", ("joint_blocks.",)),
    (
        "a ControlNet, not a base",
        ("control_model.", "controlnet_cond_embedding.", "zero_convs.", "controlnet_down_blocks."),
    ),
    ("an AnimateDiff motion module, not a base", ("motion_modules.",)),
    ("SDXL", ("conditioner.embedders.", "label_emb.", "add_embedding.")),
    ("Stable Diffusion 2 (its text encoder is OpenCLIP)", ("cond_stage_model.model.",)),
)
_PIPELINES = {
    "StableDiffusionXL": "SDXL",
    "StableDiffusion3": "Stable Diffusion 3",
    "StableDiffusionInpaint": "an inpainting model",
    "StableDiffusionInstructPix2Pix": "an instruct-pix2pix model",
    "StableDiffusionUpscale": "an upscaler",
    "StableDiffusionLatentUpscale": "an upscaler",
    "StableDiffusionDepth2Img": "a depth-to-image model",
    "Flux": "Flux",
    "PixArt": "PixArt",
    "Kandinsky": "Kandinsky",
}
_COMPONENT_CLASSES = {
    "UNet2DConditionModel": "a U-Net alone",
    "AutoencoderKL": "an autoencoder (VAE) alone",
    "ControlNetModel": "a ControlNet, not a base",
}


def family_of_tensors(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What a checkpoint with tensors of these names and shapes is, where it is no base of Stable Diffusion
    v1.
    """
    for family, marks in _MARKS:
        if any(mark in name for name in shapes for mark in marks):
            return family
    if not _any(shapes, _UNET):
        return _part(shapes)
    if (
        (weight := shapes.get(_UNET + "input_blocks.0.0.weight"))
        and len(weight) == 4
        and weight[1] in _VARIANTS_BY_CHANNELS
    ):
        return _VARIANTS_BY_CHANNELS[weight[1]]
    widths = {
        shape[1]
        for name, shape in shapes.items()
        if name.startswith(_UNET) and name.endswith("attn2.to_k.weight") and len(shape) == 2
    }
    if known := widths & _WIDTHS.keys():
        return _WIDTHS[known.pop()]
    lacking = [
        what
        for what, prefix in (
            ("text encoder", "cond_stage_model."),
            ("autoencoder (VAE)", "first_stage_model."),
        )
        if not _any(shapes, prefix)
    ]
    return f"a checkpoint without {' and '.join(lacking)}" if lacking else None


def _any(names: Iterable[str], *starts: str) -> bool:
    return any(name.startswith(starts) for name in names)


def _part(names: Iterable[str]) -> str:
    """What a checkpoint without a U-Net in the original layout is."""
    if _any(names, "emb_params", "clip_l", "clip_g"):
        return "a textual inversion, not a base"
    if _any(names, "input_blocks.", "down_blocks.", "time_embedding.", "unet."):
        return "a U-Net alone"
    if _any(names, "model_ema."):
        return "a checkpoint with averaged (EMA) weights alone"
    if _any(names, "first_stage_model.", "encoder.conv_in", "encoder.down", "decoder.", "quant_conv."):
        return "an autoencoder (VAE) alone"
    if _any(names, "cond_stage_model.", "text_model.", "text_encoder", "transformer.text_model."):
        return "a text encoder alone"
    first = next(iter(names), None)
    return (
        f"no checkpoint of a known family (its first tensor is {first[:100]!r})"
        if first
        else "a file without tensors"
    )


def family_of_folder(folder: Path) -> str | None:
    """What a folder in the diffusers layout is, where it is no base of Stable Diffusion v1.

    Files that are missing or cannot be read are passed over here.
    """
    if (folder / "adapter_config.json").is_file():
        return _ADAPTER
    pipeline = str(_read(folder / "model_index.json").get("_class_name", ""))
    for start, family in _PIPELINES.items():
        if pipeline.startswith(start):
            return family
    own = _read(folder / "config.json")
    if (kind := str(own.get("_class_name"))) in _COMPONENT_CLASSES:
        return _COMPONENT_CLASSES[kind]
    if "model_type" in own:
        return f"a single model of type {str(own['model_type'])[:80]!r}"
    if (folder / "transformer").is_dir() and not (folder / "unet").exists():
        return (
            "a model with a transformer in place of the U-Net "
            f"({repr(pipeline[:80]) if pipeline else 'no model_index.json'})"
        )
    return family_of_unet(_read(folder / "unet" / "config.json"))


def family_of_unet(config: Mapping[str, Any]) -> str | None:
    """What a U-Net with this configuration belongs to, where it is not Stable Diffusion v1."""
    if config.get("addition_embed_type") is not None:
        return "SDXL (its U-Net has an added embedding)"
    for key, families in (("in_channels", _VARIANTS_BY_CHANNELS), ("cross_attention_dim", _WIDTHS)):
        if isinstance(value := config.get(key), int) and value in families:
            return families[value]
    if config.get("time_cond_proj_dim") is not None:
        return "a latent consistency model (its U-Net takes the guidance as input)"
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        return "a class-conditional or unCLIP model"
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(path))
    except (OSError, StorageError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
