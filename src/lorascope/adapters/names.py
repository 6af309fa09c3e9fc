"""What the keys of adapter files name: a module and which of its tensors, in each program's spelling."""

import re
from typing import NamedTuple

from lorascope.errors import AdapterError

# A key is a module's name followed by one of these endings.
_ENDINGS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_magnitude_vector": "dora_scale",
    ".lora_magnitude_vector.weight": "dora_scale",
    ".lora_magnitude_vector.default.weight": "dora_scale",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "diff",
    ".b_norm": "diff_b",
}
_ENDING = re.compile(
    "(" + "|".join(re.escape(ending) for ending in sorted(_ENDINGS, key=len, reverse=True)) + ")$"
)
# The layers of Stable Diffusion's U-Net and text encoder, whatever its size, as kohya writes them: dots
# become underscores. Built from the architecture, since an underscore alone does not say whether it stands
# for a dot.
_KOHYA_UNET = re.compile(
    r"(?P<block>(?:down|up)_blocks_\d+|mid_block)_"
    r"(?:attentions_(?P<attention>\d+)_(?:(?P<projection>proj_in|proj_out|norm)"
    r"|transformer_blocks_(?P<layer>\d+)_"
    r"(?:(?P<attn>attn[12])_to_(?P<to>q|k|v|out)(?:_0)?|ff_net_(?P<ff>0_proj|2)|(?P<norm>norm[123])))"
    r"|resnets_(?P<resnet>\d+)_(?P<part>conv1|conv2|conv_shortcut|time_emb_proj|norm[12])"
    r"|(?P<sampler>downsamplers|upsamplers)_0_conv)"
    r"|(?P<top>conv_in|conv_norm_out|conv_out|time_embedding_linear_[12])"
)
_KOHYA_TEXT = re.compile(
    r"text_model_(?:encoder_layers_(?P<layer>\d+)_"
    r"(?:self_attn_(?P<to>q|k|v|out)_proj|mlp_(?P<fc>fc[12])|(?P<norm>layer_norm[12]))"
    r"|(?P<top>final_layer_norm))"
)
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_UNET_CHILDREN = (
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "conv_in",
    "conv_norm_out",
    "conv_out",
    "time_embedding.",
    "class_embedding.",
    "add_embedding.",
)
_TEXT_CHILDREN = ("text_model.", "encoder.layers.", "final_layer_norm")


class Key(NamedTuple):
    """What a key of an adapter file names."""

    layout: str  # "kohya", "peft", "diffusers", "diffusers attention processors" or "diffusers lora.down/up"
    path: str  # of the module, see `lorascope.adapters.adapter`
    # "down", "up", "mid", "alpha" or "dora_scale"; of LoHa and LoKr as LyCORIS calls it, such as "hada_w1_a";
    # of full differences, norms' too, "diff" and "diff_b"
    field: str


def parse_key(key: str) -> Key | None:
    """What `key` names; None where it names no layer of Stable Diffusion, or none of an adapter's tensors."""
    ending = _ENDING.search(key)
    place = _place(key[: ending.start()]) if ending else None
    if ending is None or place is None:
        return None
    (layout, path), field = place, _ENDINGS[ending[0]]
    if (
        layout == "diffusers"
        and "lora_A" not in ending[0]
        and "lora_B" not in ending[0]
        and field in ("down", "up")
    ):
        layout = "diffusers attention processors" if ".processor." in key else "diffusers lora.down/up"
    return Key(layout, path, field)


def is_of_adapter(key: str) -> bool:
    """Whether a key ends as those of an adapter's tensors do, whatever module it names."""
    return _ENDING.search(key) is not None


def is_plain_path(name: str) -> bool:
    """Whether `name` is words joined by dots, as the path of a module is."""
    return _PLAIN_PATH.fullmatch(name) is not None


def kohya_name(path: str) -> str:
    """The name of a module in kohya files: `lora_unet_...` or `lora_te_...`, dots as underscores.

    Raises `AdapterError` for a layer that such files have no name for.
    """
    component, _, rest = path.partition(".")
    flat = rest.replace(".", "_")
    known = _unet_path(flat) if component == "unet" else _text_path(flat)
    if known != rest:
        raise AdapterError(
            f"{path!r}: no layer of a Stable Diffusion v1 model, so kohya files have no name for it: "
            "write peft or diffusers"
        )
    return f"lora_{'unet' if component == 'unet' else 'te'}_{flat}"


def _place(name: str) -> tuple[str, str] | None:
    """Layout and path of the module called `name` in a file, None for a name of no known layout."""
    for prefix, component, unflatten in (
        ("lora_unet_", "unet", _unet_path),
        ("lycoris_", "unet", _unet_path),
        ("lora_te_", "text_encoder", _text_path),
        ("lora_te1_", "text_encoder", _text_path),
    ):
        if name.startswith(prefix):
            path = unflatten(name.removeprefix(prefix))
            return None if path is None else ("kohya", f"{component}.{path}")
    layout, rest = (
        ("peft", name.removeprefix("base_model.model."))
        if name.startswith("base_model.model.")
        else ("diffusers", name)
    )
    if not _PLAIN_PATH.fullmatch(rest):
        return None
    if rest.startswith(("unet.", "text_encoder.")):
        component, _, rest = rest.partition(".")
    elif rest.startswith(_UNET_CHILDREN):
        component = "unet"
    elif rest.startswith(_TEXT_CHILDREN):
        component = "text_encoder"
    else:
        return None
    rest = re.sub(r"\.processor\.", ".", rest)
    if component == "text_encoder":
        rest = re.sub(
            r"\.self_attn\.to_(q|k|v|out)$", r".self_attn.\1_proj", rest.removeprefix("text_model.")
        )
        rest = f"text_model.{rest}"
    else:
        rest = re.sub(r"\.to_out$", ".to_out.0", rest)
    return layout, f"{component}.{rest}"


def _unet_path(flat: str) -> str | None:
    """The path of a U-Net layer by its kohya name, None where there is no such layer."""
    if (match := _KOHYA_UNET.fullmatch(flat)) is None:
        return None
    group = match.groupdict()
    if top := group["top"]:
        return str(top).replace("embedding_linear", "embedding.linear")
    block = re.sub(r"_(\d+)$", r".\1", group["block"])
    if group["sampler"]:
        return f"{block}.{group['sampler']}.0.conv"
    if group["resnet"]:
        return f"{block}.resnets.{group['resnet']}.{group['part']}"
    attention = f"{block}.attentions.{group['attention']}"
    if group["projection"]:
        return f"{attention}.{group['projection']}"
    layer = f"{attention}.transformer_blocks.{group['layer']}"
    if group["norm"]:
        return f"{layer}.{group['norm']}"
    if group["ff"]:
        return f"{layer}.ff.net.{group['ff'].replace('_', '.')}"
    return f"{layer}.{group['attn']}.to_{group['to']}" + (".0" if group["to"] == "out" else "")


def _text_path(flat: str) -> str | None:
    """The path of a text-encoder layer by its kohya name, None where there is no such layer."""
    if (match := _KOHYA_TEXT.fullmatch(flat)) is None:
        return None
    if match["top"]:
        return f"text_model.{match['top']}"
    name = f"mlp.{match['fc']}" if match["fc"] else match["norm"] or f"self_attn.{match['to']}_proj"
    return f"text_model.encoder.layers.{match['layer']}.{name}"
