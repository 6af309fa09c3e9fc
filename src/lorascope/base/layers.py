"""The layers of Stable Diffusion v1: their paths and shapes, and the names of the original layout (LDM) for
the U-Net's.

A path is the layer's name in diffusers' models, the component in front: `unet.conv_in`,
`text_encoder.text_model.encoder.layers.0.mlp.fc1`. Nothing here needs torch or weights.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from lorascope.errors import BaseModelError

Shape = tuple[int, ...]
Layers = Mapping[str, Shape]  # weight shape by path

_CHANNELS = (320, 640, 1280, 1280)  # of Stable Diffusion v1.5's U-Net
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


@cache
def stable_diffusion_layers(
    channels: Shape = _CHANNELS, text_width: int = 768, text_hidden: int = 3072
) -> Layers:
    """The Linear and convolution layers of Stable Diffusion v1.5, 282 in the U-Net and 72 in the text
    encoder.

    `channels` are the U-Net's widths, `text_width` and `text_hidden` the text encoder's and its MLP's: other
    numbers give a smaller model of the same names.
    """
    layers: dict[str, Shape] = {}

    def resnet(path: str, inside: int, outside: int) -> None:
        layers[f"{path}.conv1"] = (outside, inside, 3, 3)
        layers[f"{path}.time_emb_proj"] = (outside, 4 * channels[0])
        layers[f"{path}.conv2"] = (outside, outside, 3, 3)
        if inside != outside:
            layers[f"{path}.conv_shortcut"] = (outside, inside, 1, 1)

    def attention(path: str, width: int) -> None:
        layers[f"{path}.proj_in"] = layers[f"{path}.proj_out"] = (width, width, 1, 1)
        block = f"{path}.transformer_blocks.0"
        for name, context in (("attn1", width), ("attn2", text_width)):
            layers[f"{block}.{name}.to_q"] = layers[f"{block}.{name}.to_out.0"] = (width, width)
            layers[f"{block}.{name}.to_k"] = layers[f"{block}.{name}.to_v"] = (width, context)
        layers[f"{block}.ff.net.0.proj"] = (8 * width, width)
        layers[f"{block}.ff.net.2"] = (width, 4 * width)

    first, last = channels[0], channels[-1]
    layers["unet.conv_in"] = (first, 4, 3, 3)
    layers["unet.time_embedding.linear_1"] = (4 * first, first)
    layers["unet.time_embedding.linear_2"] = (4 * first, 4 * first)
    skips = [first]
    for block, width in enumerate(channels):
        for index in range(2):
            resnet(f"unet.down_blocks.{block}.resnets.{index}", skips[-1], width)
            if block < 3:
                attention(f"unet.down_blocks.{block}.attentions.{index}", width)
            skips.append(width)
        if block < 3:
            layers[f"unet.down_blocks.{block}.downsamplers.0.conv"] = (width, width, 3, 3)
            skips.append(width)
    resnet("unet.mid_block.resnets.0", last, last)
    attention("unet.mid_block.attentions.0", last)
    resnet("unet.mid_block.resnets.1", last, last)
    inside = last
    for block, width in enumerate(reversed(channels)):
        for index in range(3):
            resnet(f"unet.up_blocks.{block}.resnets.{index}", inside + skips.pop(), width)
            if block > 0:
                attention(f"unet.up_blocks.{block}.attentions.{index}", width)
            inside = width
        if block < 3:
            layers[f"unet.up_blocks.{block}.upsamplers.0.conv"] = (width, width, 3, 3)
    layers["unet.conv_out"] = (4, first, 3, 3)
    for index in range(12):
        path = f"text_encoder.text_model.encoder.layers.{index}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            layers[f"{path}.self_attn.{name}"] = (text_width, text_width)
        layers[f"{path}.mlp.fc1"] = (text_hidden, text_width)
        layers[f"{path}.mlp.fc2"] = (text_width, text_hidden)
    return layers


@cache
def stable_diffusion_norms() -> Layers:
    """The normalising layers of Stable Diffusion v1.5, 61 group norms and 48 layer norms in the U-Net and 25
    layer norms in the text encoder: the shape of their weights and biases, (channels,).
    """
    norms: dict[str, Shape] = {}
    for path, shape in stable_diffusion_layers().items():
        layer, _, name = path.rpartition(".")
        match name:
            case "conv1":
                norms[f"{layer}.norm1"] = shape[1:2]
            case "conv2":
                norms[f"{layer}.norm2"] = shape[:1]
            case "proj_in":
                norms[f"{layer}.norm"] = shape[:1]
                norms |= {f"{layer}.transformer_blocks.0.norm{number}": shape[:1] for number in (1, 2, 3)}
            case "conv_out":
                norms["unet.conv_norm_out"] = shape[1:2]
            case "fc2":
                parent = layer.removesuffix(".mlp")
                norms |= {f"{parent}.layer_norm{number}": shape[:1] for number in (1, 2)}
                norms["text_encoder.text_model.final_layer_norm"] = shape[:1]
    return norms


def unet_names(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Module paths in a U-Net of this configuration, in diffusers and in the original layout.

    Input and output blocks are counted through, one for each resnet or downsampler.
    """
    yield from (("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"))
    yield from (("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"))
    num_layers, num_blocks = config["layers_per_block"], len(config["block_out_channels"])
    for block in range(num_blocks):
        index = 1 + block * (num_layers + 1)
        for layer in range(num_layers):
            yield from _resnet(f"down_blocks.{block}.resnets.{layer}", f"input_blocks.{index + layer}.0")
            yield f"down_blocks.{block}.attentions.{layer}", f"input_blocks.{index + layer}.1"
        yield f"down_blocks.{block}.downsamplers.0.conv", f"input_blocks.{index + num_layers}.0.op"
    yield from _resnet("mid_block.resnets.0", "middle_block.0")
    yield "mid_block.attentions.0", "middle_block.1"
    yield from _resnet("mid_block.resnets.1", "middle_block.2")
    for block, kind in enumerate(config["up_block_types"]):
        index = block * (num_layers + 1)
        for layer in range(num_layers + 1):
            yield from _resnet(f"up_blocks.{block}.resnets.{layer}", f"output_blocks.{index + layer}.0")
            yield f"up_blocks.{block}.attentions.{layer}", f"output_blocks.{index + layer}.1"
        upsampler = 2 if "Attn" in kind else 1  # it stands after the attention, where there is one
        yield f"up_blocks.{block}.upsamplers.0.conv", f"output_blocks.{index + num_layers}.{upsampler}.conv"


def _resnet(diffusers: str, ldm: str) -> Iterator[tuple[str, str]]:
    for ours, theirs in _UNET_RESNET.items():
        yield f"{diffusers}.{ours}", f"{ldm}.{theirs}"


def renamed(name: str, table: Mapping[str, str]) -> str:
    """`name` with the longest module path that stands in `table` replaced; raises `BaseModelError` if none
    does.
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (ldm := table.get(".".join(parts[:length]))) is not None:
            return ".".join((ldm, *parts[length:]))
    raise BaseModelError(
        f"{name}: has no name in the original layout: give a base of Stable Diffusion v1's architecture"
    )


@cache
def _sd15_names() -> Mapping[str, str]:
    kinds = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    return dict(unet_names({"layers_per_block": 2, "block_out_channels": _CHANNELS, "up_block_types": kinds}))


def ldm_path(path: str) -> str:
    """The original (LDM) name of a layer of Stable Diffusion v1.5's U-Net that diffusers calls `path`.

    `down_blocks.0.resnets.0.conv1` is `input_blocks.1.0.in_layers.2`.
    """
    return renamed(path, _sd15_names())
