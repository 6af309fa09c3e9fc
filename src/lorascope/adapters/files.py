"""Adapter files of other programs, read into one form and written from it.

Layouts: `kohya` (WebUI, Forge, ComfyUI, sd-scripts), `peft` (a folder), `diffusers` (one file for
`load_lora_weights`). Modules are named by their path in diffusers' models, the component in front:
`unet.down_blocks.0.attentions.0.proj_in`, `text_encoder.text_model.encoder.layers.0.mlp.fc1`. Text-encoder
paths keep `text_model.`, as all files do, though transformers 5 dropped it from the names of live modules.
Dimensions: r rank, in and out the channels of the adapted layer, kh and kw a convolution's kernel.
"""

import collections
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

from lorascope.base.layers import stable_diffusion_layers
from lorascope.base.weights import load_tensors, read_header, require_finite, save_tensors
from lorascope.errors import AdapterError, first_line
from lorascope.store import PEFT_ALPHA, PEFT_CONFIG, PEFT_WEIGHTS, read_regular, write_json

Layout = Literal["kohya", "peft", "diffusers"]
_CONFIG_LIMIT = 10_000_000  # bytes of an adapter_config.json
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoraModule:
    """One adapted layer: its update is up @ down * scale, scale = alpha / rank, or 1 where the file gives no
    alpha.
    """

    down: torch.Tensor  # [r, in], or [r, in, kh, kw] of a convolution
    up: torch.Tensor  # [out, r], or [out, r, 1, 1]
    alpha: float | None
    mid: torch.Tensor | None = None  # LoCon's Tucker core, [r, r, kh, kw]; down is then [r, in, 1, 1]
    dora_scale: torch.Tensor | None = (
        None  # DoRA's norms of the adapted weight, [out, 1(, 1, 1)], or [1, in(, 1, 1)] of old LyCORIS
    )

    @property
    def rank(self) -> int:
        """r, as the tensors have it."""
        return self.down.shape[0]

    @property
    def effective_alpha(self) -> float:
        """alpha, or the rank where the file gives none."""
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """The factor on up @ down."""
        return self.effective_alpha / self.rank

    def full_down(self) -> torch.Tensor:
        """`down` with the Tucker core folded in: [r, in] or [r, in, kh, kw]; the update is up @ full_down *
        scale.
        """
        if self.mid is None:
            return self.down
        return torch.einsum("abhw,bi->aihw", self.mid.float(), self.down.float().flatten(1)).to(
            self.down.dtype
        )

    def update(self) -> torch.Tensor:
        """What is added to the layer's weight: float32 [out, in] or [out, in, kh, kw]. DoRA's normalisation
        is left out.
        """
        down = replace(self, down=self.down.float()).full_down()
        return (self.up.float().flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:]) * self.scale

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight it adapts: (out, in) or (out, in, kh, kw)."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by field name."""
        return {
            name: value
            for name in ("down", "up", "mid", "dora_scale")
            if (value := getattr(self, name)) is not None
        }

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> "LoraModule":
        """The same module with tensors of another dtype, as `tensors` names them."""
        return LoraModule(
            tensors["down"], tensors["up"], self.alpha, tensors.get("mid"), tensors.get("dora_scale")
        )


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, whatever file it came from."""

    modules: dict[str, LoraModule]  # by path, see the head of this file
    # what the file was: "kohya", "peft", "diffusers", "diffusers lora.down/up", or several joined by " + "
    layout: str
    metadata: dict[str, str]  # of the safetensors header
    leftover: tuple[str, ...] = ()  # keys that belong to no module
    faults: tuple[str, ...] = ()  # what is wrong with it, a sentence each; `load_adapter` raises the first
    notes: tuple[str, ...] = ()  # what else of it a user should know, a sentence each

    def components(self) -> dict[str, dict[str, LoraModule]]:
        """The modules of `unet` and `text_encoder`, by path within the component; a component without modules
        is left out.
        """
        parts: dict[str, dict[str, LoraModule]] = {}
        for path, module in self.modules.items():
            component, _, rest = path.partition(".")
            parts.setdefault(component, {})[rest] = module
        return parts


# -- names ---------------------------------------------------------------------------------------------------

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
}
_ENDING = re.compile(
    "(" + "|".join(re.escape(ending) for ending in sorted(_ENDINGS, key=len, reverse=True)) + ")$"
)

# The layers of Stable Diffusion's U-Net and text encoder, whatever its size, as kohya writes them: dots
# become underscores. Built from the architecture, since an underscore alone does not say whether it stands
# for a dot.
_KOHYA_UNET = re.compile(
    r"(?P<block>(?:down|up)_blocks_\d+|mid_block)_"
    r"(?:attentions_(?P<attention>\d+)_(?:(?P<projection>proj_in|proj_out)|transformer_blocks_(?P<layer>\d+)_"
    r"(?:(?P<attn>attn[12])_to_(?P<to>q|k|v|out)(?:_0)?|ff_net_(?P<ff>0_proj|2)))"
    r"|resnets_(?P<resnet>\d+)_(?P<part>conv1|conv2|conv_shortcut|time_emb_proj)"
    r"|(?P<sampler>downsamplers|upsamplers)_0_conv)"
    r"|(?P<top>conv_in|conv_out|time_embedding_linear_[12])"
)
_KOHYA_TEXT = re.compile(
    r"text_model_encoder_layers_(?P<layer>\d+)_(?:self_attn_(?P<to>q|k|v|out)_proj|mlp_(?P<fc>fc[12]))"
)
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_UNET_CHILDREN = (
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "conv_in",
    "conv_out",
    "time_embedding.",
    "class_embedding.",
    "add_embedding.",
)
_TEXT_CHILDREN = ("text_model.", "encoder.layers.")
_CONVOLUTIONS = ("proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "conv", "conv_in", "conv_out")


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
    if group["ff"]:
        return f"{layer}.ff.net.{group['ff'].replace('_', '.')}"
    return f"{layer}.{group['attn']}.to_{group['to']}" + (".0" if group["to"] == "out" else "")


def _text_path(flat: str) -> str | None:
    """The path of a text-encoder layer by its kohya name, None where there is no such layer."""
    if (match := _KOHYA_TEXT.fullmatch(flat)) is None:
        return None
    name = f"mlp.{match['fc']}" if match["fc"] else f"self_attn.{match['to']}_proj"
    return f"text_model.encoder.layers.{match['layer']}.{name}"


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


def misfits(adapter: Adapter) -> list[str]:
    """The paths of modules that Stable Diffusion v1.5 does not have, or has in another shape."""
    shapes = stable_diffusion_layers()
    return [path for path, module in adapter.modules.items() if shapes.get(path) != module.weight_shape]


# -- what else a file may be ---------------------------------------------------------------------------------

_OTHER_KINDS = (  # a pattern in some key, and what a file with it is
    (r"\.hada_w[12]_", "a LoHa adapter (LyCORIS)"),
    (r"\.lokr_w[12]", "a LoKr adapter (LyCORIS)"),
    (r"\.on_input$", "an IA3 adapter (LyCORIS)"),
    (r"\.oft_(blocks|diag)", "an OFT adapter (LyCORIS)"),
    (r"\.diff(_b)?$|\.w_norm$|\.b_norm$", "an adapter of full weight differences (LyCORIS)"),
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
    r"attn2[._](processor\.)?to_[kv](_lora)?\.(lora_down|lora_A|lora\.down|down)"
    r"|^lora_te1?_.*_self_attn_q_proj\.lora_down"
)
_WIDTHS = {1024: "an adapter for Stable Diffusion 2.x", 2048: "an adapter for SDXL"}  # of the text states


def foreign_kind(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What a file is if not a LoRA for Stable Diffusion v1, in words such as "an adapter for SDXL"; None if
    it may be one.

    `shapes` are a file's tensors by key; no weights are needed, so a header is enough.
    """
    for pattern, kind in _OTHER_KINDS:
        if any(re.search(pattern, key) for key in shapes):
            return kind
    for key, shape in shapes.items():
        if _READS_TEXT.search(key) and len(shape) > 1 and shape[1] in _WIDTHS:
            return _WIDTHS[shape[1]]
    if not any(_ENDING.search(key) for key in shapes):
        return "weights without LoRA's pairs of matrices: part of a model, or a file of another kind"
    return None


# -- reading -------------------------------------------------------------------------------------------------


def parse_adapter(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    peft_config: Mapping[str, Any] | None = None,
) -> Adapter:
    """The adapter that tensors and metadata of one file make up; never raises on what it meets.

    What belongs to no module stands in `leftover`, what is wrong in `faults`. alpha comes from an alpha
    tensor, else from `peft_config` or the file's `lora_adapter_metadata` (PEFT's configuration: rank and
    alpha patterns; with rsLoRA, whose scale is alpha / sqrt(r), alpha is multiplied by sqrt(r) to be in our
    terms), else it is None.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    names: dict[tuple[str, str], str] = {}
    layouts: dict[str, None] = {}
    leftover, faults = [], []
    for key in sorted(tensors):
        ending = _ENDING.search(key)
        place = _place(key[: ending.start()]) if ending else None
        if ending is None or place is None:
            leftover.append(key)
            continue
        (layout, path), field = place, _ENDINGS[ending[0]]
        if (
            layout == "diffusers"
            and "lora_A" not in ending[0]
            and "lora_B" not in ending[0]
            and field in ("down", "up")
        ):
            layout = "diffusers attention processors" if ".processor." in key else "diffusers lora.down/up"
        layouts[layout] = None
        if other := names.get((path, field)):
            faults.append(f"two modules of one name: {other[:200]!r} and {key[:200]!r} are both {path[:200]}")
            continue
        names[path, field] = key
        parts.setdefault(path, {})[field] = tensors[key]
    configs = _peft_configs(metadata, peft_config, faults)
    modules = {}
    for path, found in parts.items():
        if fault := _module_fault(path, found):
            faults.append(fault)
            leftover.extend(names[path, field] for field in found)
        else:
            modules[path] = _module(path, found, configs.get(path.partition(".")[0]))
    faults += _rank_faults(modules, configs)
    notes = configuration_notes(tensors, metadata, peft_config)
    return Adapter(
        modules, " + ".join(layouts), dict(metadata), tuple(sorted(leftover)), tuple(faults), tuple(notes)
    )


def _rank_faults(
    modules: Mapping[str, LoraModule], configs: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Ranks that a PEFT configuration states and the tensors do not have, which PEFT refuses too: the scale
    alpha / rank would be a guess.
    """
    for path, module in modules.items():
        component, _, name = path.partition(".")
        config = configs.get(component, {})
        rank = _by_pattern(config.get("rank_pattern") or {}, name, config.get("r", module.rank))
        if rank != module.rank:
            yield (
                f"{path}: its configuration states rank {repr(rank)[:80]}, its tensors have rank "
                f"{module.rank}: correct r or rank_pattern"
            )


def configuration_notes(
    keys: Iterable[str], metadata: Mapping[str, str], peft_config: Mapping[str, Any] | None
) -> list[str]:
    """What a PEFT configuration promises that a file with these keys does not hold, a sentence each."""
    paths, magnitudes, biases = set(), False, False
    for key in keys:
        if (ending := _ENDING.search(key)) and (place := _place(key[: ending.start()])):
            paths.add(place[1])
            magnitudes |= _ENDINGS[ending[0]] == "dora_scale"
        biases |= key.endswith(".bias")
    notes = []
    for component, config in _peft_configs(metadata, peft_config, []).items():
        own = [path.partition(".")[2] for path in paths if path.startswith(f"{component}.")]
        if not own:
            continue
        if config.get("use_dora") and not magnitudes:
            notes.append(
                "use_dora is set but there are no magnitudes: it is taken for plain LoRA, "
                "and PEFT takes the base's own"
            )
        if config.get("bias") not in (None, "none") and not biases:
            notes.append(
                f"bias = {repr(config['bias'])[:80]} but there are no biases: those trained with it are lost"
            )
        for key in ("rank_pattern", "alpha_pattern"):
            names = [name for name in map(_literal, config.get(key) or {}) if name is not None]
            if lost := [name for name in names if not any(_ends_with(path, name) for path in own)]:
                notes.append(
                    f"{key} names {len(lost)} modules that the file does not have, such as {lost[0][:200]}"
                )
    return notes


def _module_fault(path: str, found: Mapping[str, torch.Tensor]) -> str | None:
    """What keeps the tensors of one module from being an adapter, or None."""
    if other := [field for field, tensor in found.items() if not _is_number(field, tensor.dtype)]:
        return (
            f"{path}: {other[0]} holds {str(found[other[0]].dtype).removeprefix('torch.')}, not "
            "floating-point weights"
        )
    if missing := [field for field in ("down", "up") if field not in found]:
        return (
            f"{path}: has {', '.join(sorted(found))} without {' and '.join(missing)}: the file is incomplete"
        )
    down, up, alpha = found["down"], found["up"], found.get("alpha")
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or 0 in (*down.shape, *up.shape):
        return (
            f"{path}: down is {list(down.shape)} and up is {list(up.shape)}: expected [r, in(, kh, kw)] and "
            "[out, r(, 1, 1)]"
        )
    mid = found.get("mid")
    if mid is not None and (mid.ndim != 4 or 0 in mid.shape or down.shape[2:].numel() != 1):
        return (
            f"{path}: the core lora_mid is {list(mid.shape)} and down {list(down.shape)}: expected [r, r, "
            "kh, kw] and [r, in, 1, 1]"
        )
    inner = down.shape[0] if mid is None else mid.shape[0]
    if (
        up.shape[1] != inner
        or up.shape[2:].numel() != 1
        or (mid is not None and mid.shape[1] != down.shape[0])
    ):
        core = "" if mid is None else f" with a core {list(mid.shape)}"
        return (
            f"{path}: down {list(down.shape)} and up {list(up.shape)}{core} do not fit together: their "
            "ranks must be equal"
        )
    if alpha is not None and (alpha.numel() != 1 or not alpha.float().isfinite().all()):
        return f"{path}: alpha must be one finite number, is of shape {list(alpha.shape)}"
    magnitudes = found.get("dora_scale")
    if magnitudes is not None and (
        magnitudes.numel() != max(magnitudes.shape, default=1)
        or magnitudes.numel() not in (up.shape[0], down.shape[1])
    ):
        expected = f"{up.shape[0]} outputs or {down.shape[1]} inputs"
        return f"{path}: dora_scale is {list(magnitudes.shape)}: expected one number for each of {expected}"
    return None


def _is_number(field: str, dtype: torch.dtype) -> bool:
    """Whether a field may be of this dtype: floating-point, and alpha, which programs read by `item()`, an
    integer.
    """
    return dtype.is_floating_point or (field == "alpha" and not dtype.is_complex and dtype != torch.bool)


def _module(path: str, found: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None) -> LoraModule:
    """One module from its tensors, with the dimensions that its layer has: 4 for a convolution, 2 for a
    Linear.
    """
    down, up, dora_scale = found["down"], found["up"], found.get("dora_scale")
    is_convolution = path.rpartition(".")[2] in _CONVOLUTIONS or down.shape[2:].numel() > 1
    if is_convolution and down.ndim == 2:
        down = down[..., None, None]
    if is_convolution and up.ndim == 2:
        up = up[..., None, None]
    if not is_convolution:
        down, up = down.flatten(1), up.flatten(1)
    if dora_scale is not None and (dora_scale.ndim < 2 or dora_scale.shape[:2] == (1, up.shape[0])):
        dora_scale = dora_scale.reshape(-1, *[1] * (down.ndim - 1))  # PEFT's [out] or [1, out, 1, 1]
    alpha = (
        float(found["alpha"].item())
        if "alpha" in found
        else _alpha_of(config, path.partition(".")[2], down.shape[0])
    )
    return LoraModule(down, up, alpha, found.get("mid"), dora_scale)


def _alpha_of(config: Mapping[str, Any] | None, path: str, rank: int) -> float | None:
    """alpha of a module under a PEFT configuration, in terms of scale = alpha / rank."""
    if not config:
        return None
    alpha = _by_pattern(config.get("alpha_pattern") or {}, path, config.get("lora_alpha", PEFT_ALPHA))
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def _by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's own rule: the value of the first pattern that is the path, or its end after a dot."""
    named = ((_literal(key), value) for key, value in patterns.items())
    return next((value for name, value in named if name and _ends_with(path, name)), default)


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _literal(pattern: str) -> str | None:
    """The module name that a pattern of PEFT means; None for a real regular expression, which is not run on a
    stranger's word.
    """
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    return name if _PLAIN_PATH.fullmatch(name) else None


def _peft_configs(
    metadata: Mapping[str, str], peft_config: Mapping[str, Any] | None, faults: list[str]
) -> dict[str, dict[str, Any]]:
    """PEFT's configuration by component, from a folder's file or from the header; a damaged one is a
    fault.
    """
    if peft_config is not None:
        configs = {component: dict(peft_config) for component in ("unet", "text_encoder")}
    else:
        text = metadata.get("lora_adapter_metadata")
        try:
            packed = json.loads(text) if text else {}
        except (ValueError, RecursionError):
            packed = None
        if not isinstance(packed, dict):
            faults.append(
                "lora_adapter_metadata is not a JSON object, so alpha is unknown: save the adapter again"
            )
            packed = {}
        configs = {}
        for key, value in packed.items():
            for prefix, component in (
                ("unet.", "unet"),
                ("text_encoder.", "text_encoder"),
                ("base_model.model.", "unet"),
            ):
                if key.startswith(prefix):
                    configs.setdefault(component, {})[key.removeprefix(prefix)] = value
    return {component: config for component, config in configs.items() if _is_usable(config, faults)}


def _is_usable(config: Mapping[str, Any], faults: list[str]) -> bool:
    """Whether a PEFT configuration says what its tensors mean; adds a fault where it does not."""
    kind, init = config.get("peft_type", "LORA"), config.get("init_lora_weights", True)
    pattern, ranks = config.get("alpha_pattern") or {}, config.get("rank_pattern") or {}
    if kind != "LORA":
        faults.append(f"peft_type = {repr(kind)[:80]}: only LORA can be converted")
    elif isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        # These subtract the adapter's first state from the base, so the file means something only on that
        # changed base.
        faults.append(
            f"init_lora_weights = {init[:80]!r} changes the base's weights: "
            "save it again with PEFT's path_initial_model_for_weight_conversion"
        )
    elif not isinstance(pattern, dict) or any(_literal(name) is None for name in pattern):
        faults.append(
            "alpha_pattern must map plain module names to numbers: regular expressions are not read"
        )
    elif not isinstance(ranks, dict):
        faults.append(f"rank_pattern is {repr(ranks)[:80]}: must map module names to numbers")
    elif not all(map(_is_finite_number, (config.get("lora_alpha", 0), *pattern.values()))):
        faults.append(
            f"lora_alpha = {repr(config.get('lora_alpha'))[:80]} or a value of alpha_pattern is not a "
            "finite number"
        )
    else:
        return True
    return False


def _is_finite_number(value: object) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an int beyond the largest float
        return False


def load_adapter(path: Path | str) -> Adapter:
    """The adapter in a file, or in a PEFT folder (or a folder of one for `unet` and one for `text_encoder`),
    on the CPU.

    Modules need not be Stable Diffusion v1.5's. Keys that belong to no module stand in `leftover`: tell the
    user. Raises `AdapterError` for a file of another kind, naming it, and for faults such as half pairs,
    ranks that disagree or one module under two names; `WeightsError` for damaged files and for NaN.
    """
    path = Path(path)
    if path.is_dir() and not (path / PEFT_WEIGHTS).is_file():
        parts = [
            load_adapter(path / part)
            for part in ("unet", "text_encoder")
            if (path / part / PEFT_WEIGHTS).is_file()
        ]
        if not parts:
            raise AdapterError(f"{path}: holds no {PEFT_WEIGHTS}: name an adapter file or a PEFT folder")
        modules = {name: module for part in parts for name, module in part.modules.items()}
        leftover = tuple(key for part in parts for key in part.leftover)
        return Adapter(
            modules, "peft", {}, leftover, notes=tuple(note for part in parts for note in part.notes)
        )
    weights = path / PEFT_WEIGHTS if path.is_dir() else path
    if weights.suffix.lower() == ".safetensors":
        header = read_header(weights)
        shapes, metadata = {name: info.shape for name, info in header.tensors.items()}, header.metadata
        if kind := foreign_kind(shapes):
            raise AdapterError(f"{path}: is {kind}: only LoRA for Stable Diffusion v1 can be read")
        tensors = load_tensors(weights)
    else:
        tensors, metadata = load_tensors(weights), {}
        if kind := foreign_kind({name: tuple(tensor.shape) for name, tensor in tensors.items()}):
            raise AdapterError(f"{path}: is {kind}: only LoRA for Stable Diffusion v1 can be read")
    require_finite(tensors, weights)
    config = _read_peft_config(weights)
    if path.is_dir() and config is None and "lora_adapter_metadata" not in metadata:
        raise AdapterError(
            f"{path}: has no {PEFT_CONFIG}, so alpha is unknown: put it there, or name {PEFT_WEIGHTS} itself "
            "to take the strength 1"
        )
    adapter = parse_adapter(tensors, metadata, config)
    if adapter.faults:
        more = f" (and {len(adapter.faults) - 1} more)" if len(adapter.faults) > 1 else ""
        raise AdapterError(f"{path}: {adapter.faults[0]}{more}")
    if not adapter.modules:
        raise AdapterError(
            f"{path}: none of its {len(tensors)} keys names a module, the first is "
            f"{adapter.leftover[0][:200]!r}"
        )
    return adapter


def _read_peft_config(weights: Path) -> dict[str, Any] | None:
    """PEFT's configuration beside its weights; None for a file that is no part of a PEFT folder."""
    path = weights.with_name(PEFT_CONFIG)
    if weights.name != PEFT_WEIGHTS or not path.exists():
        return None
    try:
        config = json.loads(read_regular(path, AdapterError, _CONFIG_LIMIT))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"{path}: cannot be read ({first_line(error)}): without it alpha is unknown"
        ) from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: must be a JSON object, is a {type(config).__name__}")
    return config


# -- writing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """An adapter file or folder that was written."""

    path: Path
    num_bytes: int
    rounding: float  # relative l2 error of the weights by the file's dtype; 0 where nothing was rounded
    notes: tuple[str, ...]  # what the reader of the file should know, a sentence each


def save_adapter(
    adapter: Adapter,
    path: Path,
    layout: Layout,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16",
    metadata: Mapping[str, str] | None = None,
) -> Written:
    """Write an adapter atomically: `kohya` and `diffusers` as one file, `peft` as a folder.

    alpha is kept exactly: a float32 tensor a module in `kohya` (the rank where there was none), PEFT's
    configuration with patterns in the other two, since diffusers refuses a file that has both. Convolutions
    are written with four dimensions. A Tucker core is folded into `down` where the layout has none. An
    adapter with text-encoder modules becomes a `peft` folder of two, `unet/` and `text_encoder/`. `metadata`
    goes into the header of `kohya` and `diffusers` files; the hashes of WebUI and the ModelSpec standard are
    added to `kohya`. Raises `AdapterError` for what the layout cannot hold and for weights beyond the range
    of `dtype`.
    """
    notes = list(adapter.notes)
    if adapter.leftover:
        notes.append(
            f"{len(adapter.leftover)} keys belong to no module and are left out, the first is "
            f"{adapter.leftover[0][:200]!r}"
        )
    modules, rounding = _rounded(adapter.modules, dtype)
    if rounding.num_lost > rounding.num_values / 1000:
        notes.append(
            f"{rounding.num_lost:,} of {rounding.num_values:,} weights are below the range of {dtype} "
            "and became 0"
        )
    if layout != "kohya" and any(module.mid is not None for module in modules.values()):
        notes.append(
            f"{layout} has no Tucker core: it was multiplied into the down matrices, which is the same "
            "update in more bytes"
        )
        modules = {
            name: replace(module, down=module.full_down().contiguous(), mid=None)
            for name, module in modules.items()
        }
    rounded = replace(adapter, modules=modules)
    match layout:
        case "kohya":
            tensors = _kohya_tensors(rounded, notes)
            save_tensors(path, tensors, kohya_hashes(tensors, metadata or {}))
            num_bytes = path.stat().st_size
        case "diffusers":
            num_bytes = _save_diffusers(rounded, path, metadata or {}, notes)
        case "peft":
            num_bytes = _save_peft(rounded, path, notes)
    return Written(path, num_bytes, rounding.relative_error, tuple(notes))


@dataclass(frozen=True)
class _Rounding:
    relative_error: float
    num_lost: int  # weights that became 0
    num_values: int


def _rounded(modules: Mapping[str, LoraModule], dtype: str) -> tuple[dict[str, LoraModule], _Rounding]:
    """The modules in `dtype`, and what that cost; raise `AdapterError` for weights that become infinite."""
    target, result = DTYPES[dtype], {}
    error = norm = 0.0
    lost = count = 0
    for path, module in modules.items():
        tensors = {name: tensor.to(target) for name, tensor in module.tensors().items()}
        for name, tensor in module.tensors().items():
            exact, written = tensor.double(), tensors[name].double()
            if not written.isfinite().all():
                raise AdapterError(
                    f"{path}: {name} has values up to {float(exact.abs().max()):.3g}, beyond {dtype}'s "
                    f"{torch.finfo(target).max:.6g}: write bf16 or fp32"
                )
            error += float((written - exact).square().sum())
            norm += float(exact.square().sum())
            lost += int(((written == 0) & (exact != 0)).sum())
            count += tensor.numel()
        result[path] = module.with_tensors(tensors)
        if dtype == "fp16" and (peak := _peak(module)) > torch.finfo(target).max:
            raise AdapterError(
                f"{path}: up @ down reaches {peak:.3g}, beyond fp16's {torch.finfo(target).max:.6g}, so "
                "programs that multiply in fp16 draw black pictures: write bf16 or fp32, "
                "or train it with a lower learning rate"
            )
    return result, _Rounding(math.sqrt(error / norm) if norm else 0.0, lost, count)


def _peak(module: LoraModule) -> float:
    """The largest absolute value of up @ down before its scale, as programs multiply them; an upper bound of
    it where that is within fp16 already.
    """
    up, down = module.up.float().flatten(1), replace(module, down=module.down.float()).full_down().flatten(1)
    bound = float(torch.linalg.vector_norm(up, dim=1).max() * torch.linalg.vector_norm(down, dim=0).max())
    if bound <= torch.finfo(torch.float16).max:
        return bound  # by Cauchy and Schwarz
    return float((up @ down).abs().max())


def _kohya_tensors(adapter: Adapter, notes: list[str]) -> dict[str, torch.Tensor]:
    """Tensors under kohya's names, module by module in the adapter's order."""
    tensors = {}
    endings = {
        "down": "lora_down.weight",
        "up": "lora_up.weight",
        "mid": "lora_mid.weight",
        "dora_scale": "dora_scale",
    }
    for path, module in adapter.modules.items():
        name = kohya_name(path)
        for field, tensor in module.tensors().items():
            tensors[f"{name}.{endings[field]}"] = tensor.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(module.effective_alpha, dtype=torch.float32)
    if any(module.mid is not None for module in adapter.modules.values()):
        notes.append(
            "diffusers refuses files with a Tucker core (lora_mid); WebUI, Forge and ComfyUI read it"
        )
    if any(module.dora_scale is not None for module in adapter.modules.values()):
        notes.append(
            "DoRA: diffusers drops dora_scale and so draws something else; WebUI, Forge and ComfyUI read it"
        )
    text = [path for path in adapter.modules if path.startswith("text_encoder.")]
    if text and not any(
        path.endswith(("out_proj", "fc1", "fc2")) for path in text
    ):  # by these alone it knows the kind of file (0.42)
        notes.append(
            "diffusers refuses kohya files whose text-encoder modules are q, k and v alone: give it "
            "the diffusers file"
        )
    elif len({module.effective_alpha for module in adapter.modules.values()}) > 1:
        # Its converter names the exceptions by the old attention processors, which match no module (0.42).
        notes.append(
            "alpha differs between modules, which diffusers misreads in kohya files: give it the "
            "diffusers file"
        )
    return tensors


def kohya_hashes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """`metadata` with the three hashes of a kohya file, each over the bytes that its programs hash.

    `sshs_model_hash`: SHA-256 of what follows the header. `sshs_legacy_hash`: the first 8 digits of that of
    the 0x10000 bytes at 0x100000, in a file whose header has the `ss_` metadata alone; so sd-scripts defines
    both (its `precalculate_safetensors_hashes`), and of smaller files the latter is the hash of nothing.
    `modelspec.hash_sha256`: the first again, with `0x` in front (ModelSpec 1.0.0).
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = safetensors.torch.save(dict(tensors), training)
    start = 8 + int.from_bytes(content[:8], "little")
    model_hash = hashlib.sha256(memoryview(content)[start:]).hexdigest()
    legacy_hash = hashlib.sha256(memoryview(content)[0x100000:0x110000]).hexdigest()[:8]
    return {
        **metadata,
        "sshs_model_hash": model_hash,
        "sshs_legacy_hash": legacy_hash,
        "modelspec.hash_sha256": f"0x{model_hash}",
    }


def _peft_options(modules: Mapping[str, LoraModule]) -> dict[str, Any]:
    """PEFT's configuration of one component's modules: the commonest rank and alpha, and patterns for the
    others.
    """
    # Without `text_model.` the names are ends of the live names of every transformers version; PEFT matches
    # ends.
    named = {path.removeprefix("text_model."): module for path, module in modules.items()}
    rank = collections.Counter(module.rank for module in named.values()).most_common(1)[0][0]
    alpha = collections.Counter(module.effective_alpha for module in named.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {path: module.rank for path, module in named.items() if module.rank != rank},
        "alpha_pattern": {
            path: _number(module.effective_alpha)
            for path, module in named.items()
            if module.effective_alpha != alpha
        },
        "target_modules": sorted(named),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": any(module.dora_scale is not None for module in named.values()),
        "init_lora_weights": True,
    }


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _save_diffusers(adapter: Adapter, path: Path, metadata: Mapping[str, str], notes: list[str]) -> int:
    """One file for diffusers' `load_lora_weights`."""
    if any(module.dora_scale is not None for module in adapter.modules.values()):
        raise AdapterError(
            "DoRA: diffusers drops dora_scale from files and so would draw something else: write kohya "
            "or peft"
        )
    tensors: dict[str, torch.Tensor] = {}
    options: dict[str, Any] = {}
    for component, modules in adapter.components().items():
        options |= {f"{component}.{key}": value for key, value in _peft_options(modules).items()}
        for name, module in modules.items():
            tensors[f"{component}.{name}.lora_A.weight"] = module.down.contiguous()
            tensors[f"{component}.{name}.lora_B.weight"] = module.up.contiguous()
    if any(module.effective_alpha != module.rank for module in adapter.modules.values()):
        notes.append(
            "alpha is not the rank: diffusers reads it from this file's header, other programs do not: "
            "give them the kohya file"
        )
    text = adapter.components().get("text_encoder", {})
    if text and not any(
        ".self_attn." in name for name in text
    ):  # by these alone it knows the kind of file (0.42)
        notes.append(
            "diffusers refuses its own files whose text-encoder modules are mlp layers alone: give it "
            "the kohya file"
        )
    save_tensors(
        path,
        tensors,
        {**metadata, "format": "pt", "lora_adapter_metadata": json.dumps(options, sort_keys=True)},
    )
    return path.stat().st_size


def _save_peft(adapter: Adapter, folder: Path, notes: list[str]) -> int:
    """A PEFT folder of the U-Net's adapter, or one a component."""
    components = adapter.components()
    if set(components) != {"unet"}:
        notes.append(
            "PEFT adapts one model a folder: the components are in folders of their own, unet/ and "
            "text_encoder/, the latter under the names of transformers 5"
        )
    total = 0
    for component, modules in components.items():
        target = folder if set(components) == {"unet"} else folder / component
        with_dora = [module.dora_scale is not None for module in modules.values()]
        if any(with_dora) and not all(with_dora):
            raise AdapterError(
                f"{component}: {sum(with_dora)} of {len(with_dora)} modules are DoRA, PEFT needs all or "
                "none: write kohya"
            )
        tensors = {}
        for name, module in modules.items():
            # PEFT goes by the live names of transformers 5
            key = f"base_model.model.{name.removeprefix('text_model.')}"
            tensors[f"{key}.lora_A.weight"] = module.down.contiguous()
            tensors[f"{key}.lora_B.weight"] = module.up.contiguous()
            if module.dora_scale is not None:
                if module.dora_scale.shape[0] != module.up.shape[0]:
                    raise AdapterError(
                        f"{component}.{name}: DoRA over inputs, which PEFT does not have: write kohya"
                    )
                one_dimension = module.down.ndim == 2
                shape = [-1] if one_dimension else [1, -1, *[1] * (module.down.ndim - 2)]
                tensors[f"{key}.lora_magnitude_vector"] = module.dora_scale.reshape(shape)
        options = _peft_options(modules)
        packed = json.dumps(
            {f"base_model.model.{key}": value for key, value in options.items()}, sort_keys=True
        )
        save_tensors(target / PEFT_WEIGHTS, tensors, {"format": "pt", "lora_adapter_metadata": packed})
        kind = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
            "fan_in_fan_out": False,
        }
        write_json(target / PEFT_CONFIG, {**kind, **options, "modules_to_save": None})
        total += (target / PEFT_WEIGHTS).stat().st_size
    return total
