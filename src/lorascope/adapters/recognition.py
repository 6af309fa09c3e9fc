"""What a file is, from names and shapes alone: its model, its layout, and the place of each module."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorascope.adapters.file_modules import FileModule, num_elements
from lorascope.adapters.foreign import foreign_kind
from lorascope.base.family import family_of_tensors
from lorascope.base.layers import Shape, stable_diffusion_layers, stable_diffusion_norms

# An update whose elements have a smaller root mean square is near zero: fp16 numbers of 0.02, the size of the
# base's weights at their initialization (1/sqrt(3 in)), lie 1.5e-5 apart, so a merge in half precision rounds
# such an update away.
NEAR_ZERO_RMS = 1e-6
STABLE_DIFFUSION_1 = "Stable Diffusion v1"
_FAMILY_BY_WIDTH = {768: STABLE_DIFFUSION_1, 1024: "Stable Diffusion v2", 2048: "SDXL"}
FAMILIES = tuple(_FAMILY_BY_WIDTH.values())
_SPELLINGS = {  # the layout of a file by its modules' names and the ends of their keys
    ".lora_down.weight": "kohya",
    "_lora.down.weight": "diffusers attention processors",
    ".lora_A.weight": "PEFT",
    ".lora_A": "PEFT",
    ".lora_A.default.weight": "PEFT",
    ".lora.down.weight": "diffusers lora.down/up",
    ".lora_linear_layer.down.weight": "diffusers text encoder",
}


@dataclass(frozen=True)
class ModuleFacts:
    """One adapted layer of a file: what names and shapes say, and figures, None where not measured."""

    name: str  # in the file
    path: str | None  # in Stable Diffusion v1.5, if it has such a layer
    kind: str  # LoRA, LoHa, LoKr, ...
    block: str  # attention, feed-forward, projection, convolution, time embedding, norm, text encoder, other
    rank: int | None = None
    alpha: float | None = None
    scale: float | None = None  # alpha / rank; 1 without alpha
    norm: float | None = None  # Frobenius norm of the update
    rms: float | None = None  # of the elements of the update
    rank_used: int | None = None  # singular values that hold 95 % of the energy
    is_dora: bool = False
    is_zero: bool = False
    num_not_finite: int = 0  # values that are NaN or infinite
    fault: str | None = None  # why it could not be measured

    @property
    def is_near_zero(self) -> bool:
        """Whether the update would vanish in half precision, all zeros included."""
        return self.is_zero or (self.rms is not None and self.rms < NEAR_ZERO_RMS)


def describe_other(shapes: Mapping[str, Shape], has_parts: bool) -> str:
    """What a file without a whole adapter is."""
    if has_parts:
        return "an incomplete adapter: no module has both of its factors"
    if any(key.startswith("<") and key.endswith(">") for key in shapes):
        return "a textual inversion embedding, not an adapter"
    family = family_of_tensors(shapes)
    what = "a full checkpoint of Stable Diffusion v1" if family is None else family
    return what.removesuffix(", not a base").removesuffix(", not an adapter") + ", not an adapter"


def family_of_modules(shapes: Mapping[str, Shape], modules: Mapping[str, FileModule]) -> str | None:
    """The model an adapter fits: by the width of the text its cross-attention reads, else by names that only
    one family has.
    """
    widths: Counter[int] = Counter()
    for module in modules.values():
        if re.search(r"attn2[._](processor\.)?to_[kv]$", module.name) and (width := _inputs(module)):
            widths[width] += 1
    if re.search(r"^lora_te[23]_|^text_encoder_[23]\.", "\n".join(modules), re.MULTILINE):
        return "SDXL"
    if widths:
        width = widths.most_common(1)[0][0]
        return _FAMILY_BY_WIDTH.get(width, f"a model whose text has width {width}")
    kind = foreign_kind(shapes)
    if kind and kind.startswith("an adapter for "):
        return kind.removeprefix("an adapter for ")
    text = {
        _inputs(module)
        for module in modules.values()
        if re.search(r"_self_attn_q_proj$|\.self_attn\.q_proj$", module.name)
    }
    return next((_FAMILY_BY_WIDTH.get(width or 0) for width in text), None) if len(text) == 1 else None


def _inputs(module: FileModule) -> int | None:
    if module.factors:
        return num_elements(module.factors[0][1:])
    shape = module.parts.get(".hada_w1_b") or module.parts.get(".diff")
    return shape[1] if shape and len(shape) > 1 else None


def describe(
    found: Mapping[str, FileModule], modules: Sequence[ModuleFacts], family: str | None, is_folder: bool
) -> str:
    """An adapter in words: its kinds, the model it is for, and the parts of the model that it changes."""
    kinds = [kind for kind, _ in Counter(module.kind for module in modules).most_common()]
    if kinds[0] == "LoRA" and any(module.block == "convolution" for module in modules):
        kinds[0] = "LoCon (LoRA with convolutions)"
    if any(module.is_dora for module in modules):
        kinds[0] = f"DoRA ({kinds[0]} with magnitudes)"
    text = sum(_is_text(name) for name in found)
    parts = " + ".join(
        part for part, count in (("U-Net", len(found) - text), ("text encoder", text)) if count
    )
    if is_folder:
        parts = "one model" if all(module.path is None for module in modules) else parts
    layers = {**stable_diffusion_layers(), **stable_diffusion_norms()}
    fitting = all(
        module.path and found[module.name].fits(layers[module.path], strict=False) for module in modules
    )
    unknown = (
        "Stable Diffusion v1 or v2, whose layers in it are alike"
        if fitting
        else "a model that the file does not show"
    )
    made_for = f"for {family or unknown}"
    return f"{' and '.join(kinds)} {made_for}: {parts}"


def _is_text(name: str) -> bool:
    return (
        name.startswith(("lora_te", "text_encoder", "text_model"))
        or ".text_model." in name
        or "self_attn" in name
    )


def layout_of(modules: Mapping[str, FileModule], is_folder: bool) -> str:
    """The program whose way of naming the keys follow, such as kohya, and whether it is a PEFT folder."""
    names: Counter[str] = Counter()
    for module in modules.values():
        spelled = (
            _SPELLINGS[module.spelling[0]]
            if module.spelling
            else "kohya"
            if module.name.startswith("lora_")
            else "PEFT"
            if module.name.startswith("base_model.model.")
            else "LyCORIS"
        )
        if spelled == "PEFT" and module.name.startswith(("unet.", "text_encoder.")):
            spelled = "diffusers lora_A/B"
        elif spelled == "kohya" and "." in module.name:
            spelled = "kohya with dotted names"
        names[spelled] += 1
    layout = " + ".join(name for name, _ in names.most_common())
    return f"{layout} folder" if is_folder else layout


def recognise_modules(modules: Mapping[str, FileModule]) -> dict[str, ModuleFacts]:
    """What names and shapes say of every module, by its name; nothing is measured yet."""
    paths = _paths(modules)
    return {
        name: ModuleFacts(
            name,
            paths.get(name),
            str(module.kind),
            _block(paths.get(name), name),
            rank=module.factors[0][0] if module.factors and module.factors[0] else None,
            is_dora=module.is_dora,
        )
        for name, module in modules.items()
    }


def _paths(modules: Mapping[str, FileModule]) -> dict[str, str]:
    """The layers of Stable Diffusion v1.5 that the modules are meant for, as far as any name tells."""
    layers = {**stable_diffusion_layers(), **stable_diffusion_norms()}
    flat = {re.sub(r"^unet_", "", path.replace(".", "_")): path for path in layers}
    paths = {}
    for name in modules:
        short = re.sub(
            r"^(lora_unet_|lora_te1?_|lycoris_|unet\.|base_model\.model\.|text_encoder\.)",
            "",
            name.replace(".processor.", "."),
        )
        key = short.replace(".", "_")
        for candidate in (key, f"{key}_0", f"text_encoder_{key}", f"text_encoder_text_model_{key}"):
            if candidate in flat:
                paths[name] = flat[candidate]
                break
    return paths


def _block(path: str | None, name: str) -> str:
    where = path or name
    if path is None and _is_text(name):
        return "text encoder"
    if where.startswith("text_encoder."):
        return "text encoder"
    for block, pattern in (
        ("norm", r"norm\d?(_out)?$"),
        ("attention", r"attn[12][._]"),
        ("feed-forward", r"[._]ff[._]net"),
        ("projection", r"proj_(in|out)$"),
        ("time embedding", r"time_emb|emb_layers|label_emb"),
        ("convolution", r"conv|in_layers|out_layers|skip_connection|samplers|_op$|input_blocks_0_0$"),
    ):
        if re.search(pattern, where):
            return block
    return "other"
