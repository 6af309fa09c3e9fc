"""What the programs that read adapter files would do with one: each program's own rule, applied to Stable
Diffusion v1.5.

A program knows the model's layers by names of its own and looks for them among the keys of a file. What it
does not find it passes over, at most with a line in a console: such a file loads and does nothing. A rule
needs the keys, shapes and metadata of a file and no tensor. The rules were written from these sources; those
of diffusers and PEFT are held by tests against the packages, the others by nothing but reading, and for WebUI
and ComfyUI not of the text of one release:

- WebUI: AUTOMATIC1111/stable-diffusion-webui, extensions-builtin/Lora/networks.py, network.py and
  network_lora.py: an older text of 1.x and the copy that Forge carries, held against what others report of
  trials with 1.10.1
- ComfyUI: comfyanonymous/ComfyUI, comfy/weight_adapter/lora.py of a commit after 0.3.64, comfy/lora.py of one
  before it
- Forge: lllyasviel/stable-diffusion-webui-forge dfdcbab6 (2.0.1),
  extensions-builtin/sd_forge_lora/networks.py and network.py,
  packages_3rdparty/comfyui_lora_collection/lora.py, backend/patcher/lora.py
- sd-scripts: kohya-ss/sd-scripts 48d368fa, networks/lora.py (`create_network_from_weights`, then
  `load_state_dict`, not strict)
- diffusers 0.42: loaders/lora_pipeline.py, lora_conversion_utils.py, lora_base.py and peft.py, with
  transformers 5
- PEFT 0.21: `PeftModel.from_pretrained` on a folder, utils/save_and_load.py, tuners/loha/layer.py and
  tuners/lokr/layer.py
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from lorascope.adapters.file_modules import (
    DIFFUSERS,
    KOHYA,
    PEFT,
    PROCESSOR,
    SPELLINGS,
    TRANSFORMERS,
    FileModule,
    file_modules,
    num_elements,
)
from lorascope.adapters.peft_config import kronecker_factors
from lorascope.base.layers import Layers, Shape, ldm_path, stable_diffusion_layers, stable_diffusion_norms
from lorascope.store import PEFT_RANK

FORGE_LIMIT = 12  # keys without a match that Forge puts up with
SAYS = {  # what a user sees of a module that is passed over
    "WebUI": "without a word",
    "ComfyUI": "with a line in its console",
    "Forge": "with a line in its console",
    "diffusers": "with a warning",
    "PEFT": "without a word",
    "sd-scripts": "with a line in its console",
}


_TAKE_NORMS = ("WebUI", "ComfyUI", "Forge")


@dataclass(frozen=True)
class Reading:
    """What one program would do with a file on Stable Diffusion v1.5."""

    reader: str
    taken: frozenset[str]  # paths of the model's layers that would be changed
    ignored: tuple[str, ...]  # names of the file's modules that would be passed over
    refusal: str | None  # the error or refusal that ends the loading; then nothing is taken
    notes: tuple[str, ...] = ()  # what happens in silence to what is taken

    @property
    def verdict(self) -> str:
        """`yes` for the whole file, `in part`, `nothing`, or `refuses`."""
        if self.refusal:
            return "refuses"
        if not self.taken:
            return "nothing"
        return "in part" if self.ignored else "yes"


@dataclass(frozen=True)
class _File:
    """What a rule looks at."""

    shapes: Mapping[str, Shape]  # in the file's order
    modules: Mapping[str, FileModule]
    leftover: tuple[str, ...]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None  # PEFT's adapter_config.json

    def whole(self) -> list[FileModule]:
        return [module for module in self.modules.values() if module.kind]


def read_by_all(
    shapes: Mapping[str, Shape],
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None = None,
    layers: Layers | None = None,
) -> list[Reading]:
    """What each program would do with a file of these keys, shapes and metadata.

    `config` is the adapter_config.json of a PEFT folder, None for a single file; `layers` the model to look
    into, Stable Diffusion v1.5 when None.
    """
    modules, leftover = file_modules(shapes)
    file = _File(shapes, modules, leftover, metadata, config)
    model = stable_diffusion_layers() if layers is None else layers
    with_norms = {**model, **stable_diffusion_norms()}  # sizes do not matter: whole differences are taken
    rules = {
        "WebUI": _webui,
        "ComfyUI": _comfyui,
        "Forge": _forge,
        "diffusers": _diffusers,
        "PEFT": _peft,
        "sd-scripts": _sd_scripts,
    }
    return [
        _read(name, rule, file, with_norms if name in _TAKE_NORMS else model) for name, rule in rules.items()
    ]


class _Refusal(Exception):
    """A rule's program would stop here."""


def _read(name: str, rule: Any, file: _File, layers: Layers) -> Reading:
    try:
        taken, notes = rule(file, layers)
    except _Refusal as refusal:
        return Reading(name, frozenset(), tuple(module.name for module in file.whole()), str(refusal))
    ignored = tuple(module.name for module in file.whole() if module.name not in taken)
    return Reading(name, frozenset(taken.values()), ignored, None, tuple(notes))


def _require_one_alpha(module: FileModule) -> None:
    """All programs read alpha by `item()`, or an `if` of its array, before they look at anything else."""
    if (count := num_elements(module.parts.get(".alpha", ()))) != 1:
        raise _Refusal(f"RuntimeError: {module.name}.alpha has {count} numbers, where one is needed")


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _parts_of(path: str) -> tuple[str, str]:
    part, _, rest = path.partition(".")
    return part, rest


@cache
def _webui_names(paths: tuple[str, ...]) -> dict[str, str]:
    """Layers, and containers of layers, by the names under which WebUI finds them."""
    names = {}
    for path in _with_containers(paths):
        part, rest = _parts_of(path)
        if part == "unet":
            original = _flat(ldm_path(rest))
            names.update(
                {
                    f"lora_unet_{_flat(rest)}": path,
                    f"lora_unet_{original}": path,
                    f"diffusion_model_{original}": path,
                }
            )
        else:
            names.update(
                {f"{prefix}{_flat(rest)}": path for prefix in ("lora_te_", "lora_te1_", "transformer_")}
            )
    return names


def _with_containers(paths: Iterable[str]) -> list[str]:
    """Paths of layers, after those of the modules that hold them below the lists of blocks."""
    found = {}
    for path in paths:
        parts = path.split(".")
        start = next(
            (i + 3 for i, part in enumerate(parts) if part in ("attentions", "resnets", "layers")), len(parts)
        )
        found.update(dict.fromkeys(".".join(parts[:end]) for end in range(start, len(parts))))
    return [*found, *paths]


def _webui(file: _File, layers: Layers) -> tuple[dict[str, str], list[str]]:
    names, taken = _webui_names(tuple(layers)), {}
    for module in file.modules.values():
        path = names.get(module.name)
        if path is None:
            continue
        if path not in layers:
            raise _Refusal(
                f"AssertionError: {module.name} matched a layer with unsupported "
                f"type{_missing_index(module.name)}"
            )
        is_half_norm = module.kind == "norm difference" and ".b_norm" not in module.parts
        if module.kind is None or is_half_norm or (module.spelling and module.spelling not in (KOHYA, PEFT)):
            raise _Refusal(
                "AssertionError: could not find a module type for the keys "
                f"{', '.join(sorted(module.parts))} of {module.name}"
            )
        _require_one_alpha(module)
        if module.fits(layers[path], strict=False):
            taken[module.name] = path
    for key in file.leftover:
        if key.partition(".")[0] in names:
            raise _Refusal(f"AssertionError: could not find a module type for the key {key}")
    return taken, _listing(file, "WebUI")


def _missing_index(name: str) -> str:
    return ": its name lacks the _0" if name.endswith("to_out") else ""


_COMFYUI_KINDS = ("LoHa", "LoKr", "GLoRA", "full difference", "norm difference")


@cache
def _comfyui_names(paths: tuple[str, ...], forge: bool) -> dict[str, str]:
    names = {}
    for path in paths:
        part, rest = _parts_of(path)
        if part == "unet":
            original = ldm_path(rest)
            old = rest.replace(".to_", ".processor.to_")
            old = old.removesuffix(".0") if old.endswith(".to_out.0") else old
            spellings = [
                f"lora_unet_{_flat(original)}",
                f"diffusion_model.{original}",
                f"lora_unet_{_flat(rest)}",
                f"lycoris_{_flat(rest)}",
            ]
            names.update(dict.fromkeys([*spellings, old, f"unet.{old}"], path))
        else:
            if "norm" not in rest:  # it lists the layers that it knows by these names
                names.update(dict.fromkeys([f"lora_te_{_flat(rest)}", f"lora_te1_{_flat(rest)}", path], path))
            if not forge:
                names[f"text_encoders.clip_l.transformer.{rest}"] = path
    return names


def _comfyui(file: _File, layers: Layers) -> tuple[dict[str, str], list[str]]:
    taken, _ = _comfyui_lookup(file, layers, forge=False)
    return {
        name: path for name, path in taken.items() if file.modules[name].fits(layers[path], strict=False)
    }, []


def _comfyui_lookup(file: _File, layers: Layers, *, forge: bool) -> tuple[dict[str, str], set[str]]:
    """Modules by name with the layers' paths, and the keys that were found a use for."""
    names = _comfyui_names(tuple(layers), forge)
    spellings = (KOHYA, PROCESSOR, PEFT, DIFFUSERS, TRANSFORMERS) if forge else SPELLINGS
    taken, used = {}, set()
    for module in file.modules.values():
        if module.name not in names:
            continue
        _require_one_alpha(module)
        for down, up in spellings:
            if up in module.parts and down not in module.parts:
                raise _Refusal(f"KeyError: {module.name}{down}")
        if (
            module.spelling in spellings
            or module.kind in _COMFYUI_KINDS
            or (not forge and ".oft_blocks" in module.parts)
        ):
            taken[module.name] = names[module.name]
            used |= {module.name + ending for ending in module.parts}
        else:
            used |= {module.name + ending for ending in (".alpha", ".dora_scale") if ending in module.parts}
    return taken, used


def _forge(file: _File, layers: Layers) -> tuple[dict[str, str], list[str]]:
    taken, used = _comfyui_lookup(file, layers, forge=True)
    if (unmatched := len(file.shapes) - len(used)) > FORGE_LIMIT:
        raise _Refusal(f"LoRA version mismatch: {unmatched} keys without a match, {FORGE_LIMIT} are allowed")
    for name, path in taken.items():
        if not file.modules[name].fits(layers[path], strict=False):
            raise _Refusal(f"RuntimeError while merging {name}: its shape is not the layer's")
    return taken, _listing(file, "Forge")


def listed_version(metadata: Mapping[str, str], reader: str) -> str:
    """The model family under which WebUI or Forge lists a file: `SD1`, `SD2`, `SDXL` or `Unknown`; from
    metadata alone.
    """
    architecture = metadata.get("modelspec.architecture", "")
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    if reader == "Forge" and architecture == "stable-diffusion-xl-v1-base/lora":
        return "SDXL"
    if metadata.get("ss_v2") == "True":
        return "SD2"
    if reader == "Forge":
        return "SD1" if architecture == "stable-diffusion-v1/lora" else "Unknown"
    return "SD1" if metadata else "Unknown"


def _listing(file: _File, reader: str) -> list[str]:
    version = listed_version(file.metadata, reader)
    return (
        []
        if version == "SD1"
        else [
            f"listed as {version}, for want of metadata" if version == "Unknown" else f"listed as {version}"
        ]
    )


@cache
def _sd_scripts_names(paths: tuple[str, ...]) -> dict[str, str]:
    names = {}
    for path in paths:
        part, rest = _parts_of(path)
        if part == "text_encoder":
            names[f"lora_te_{_flat(rest)}"] = path
        elif re.search(r"attentions|resnets|samplers", rest):
            names[f"lora_unet_{_flat(rest)}"] = path
    return names


def _sd_scripts(file: _File, layers: Layers) -> tuple[dict[str, str], list[str]]:
    names = _sd_scripts_names(tuple(layers))
    taken = {
        module.name: names[module.name]
        for module in file.modules.values()
        if module.spelling == KOHYA and module.name in names
    }
    for name, path in taken.items():
        _require_one_alpha(file.modules[name])
        if not file.modules[name].fits(layers[path], strict=True):
            raise _Refusal(f"RuntimeError: size mismatch for {name}")
    return taken, _dora_note(file, taken)


def _dora_note(file: _File, taken: Mapping[str, str]) -> list[str]:
    count = sum(file.modules[name].is_dora for name in taken)
    return (
        [f"the DoRA magnitudes of {count} modules are dropped, so the pictures differ from the trained ones"]
        if count
        else []
    )


def _diffusers(file: _File, layers: Layers) -> tuple[dict[str, str], list[str]]:
    keys = [key for key in file.shapes if "dora_scale" not in key]
    stated = _stated_config(file)
    is_kohya = all(key.startswith(("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_")) for key in keys)
    if is_kohya:
        _refuse_kohya(file, keys)
        if any(key.endswith(".alpha") for key in keys) and "lora_adapter_metadata" in file.metadata:
            raise _Refusal("ValueError: both `network_alphas` and `metadata` cannot be specified")
        taken = _diffusers_kohya(file, layers)
    else:
        if stray := [key for key in keys if "lora" not in key]:
            raise _Refusal(
                f"ValueError: invalid LoRA checkpoint: {len(stray)} keys without 'lora' in their names, "
                f"the first is {stray[0]}"
            )
        taken = {**_diffusers_unet(file, keys, layers), **_diffusers_text(file, layers)}
    _require_ranks(file, taken, stated)
    for name, path in taken.items():
        if not file.modules[name].fits(layers[path], strict=True):
            raise _Refusal(f"RuntimeError: size mismatch for {path.partition('.')[2]}")
    return taken, _dora_note(
        file, {name: path for name, path in taken.items() if ".dora_scale" in file.modules[name].parts}
    )


def _stated_config(file: _File) -> Mapping[str, Any] | None:
    """PEFT's configuration in the header, which diffusers believes over the tensors."""
    if not (text := file.metadata.get("lora_adapter_metadata")):
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Refusal("JSONDecodeError: its lora_adapter_metadata is no JSON") from error
    if not isinstance(content, dict):
        raise _Refusal(
            f"AttributeError: its lora_adapter_metadata is a {type(content).__name__}, not an object"
        )
    return content


# What PEFT 0.21's LoraConfig may be given. diffusers gives it all that the header states, where a key that is
# not here is an error; of a folder's adapter_config.json PEFT leaves such a key out, with a warning.
_CONFIG_KEYS = frozenset({
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping",
    "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "kasa_config",
    "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "modules_to_save", "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters",
    "task_type", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora",
    "velora_config"
})  # fmt: skip


def _require_known(component: str, config: Mapping[str, Any]) -> None:
    if unknown := sorted(set(config) - _CONFIG_KEYS):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise _Refusal(
            "TypeError: `LoraConfig` class could not be instantiated, for its lora_adapter_metadata states "
            f"{component}.{unknown[0][:80]}{more}, which PEFT 0.21 does not know"
        )


def _require_ranks(file: _File, taken: Mapping[str, str], stated: Mapping[str, Any] | None) -> None:
    """PEFT builds its layers by the ranks that are stated, else by those of the tensors."""
    ranks: dict[str, int] = {}
    for component in ("unet", "text_encoder"):
        own = {name: path for name, path in taken.items() if path.startswith(f"{component}.")}
        if stated is None:
            configs = {name: {"r": _rank_of(file.modules[name])} for name in own}
        else:
            config = {
                key.removeprefix(f"{component}."): value
                for key, value in stated.items()
                if key.startswith(f"{component}.")
            }
            if own:
                _require_known(component, config)
            if own and config.get("target_modules") is None:
                kind = (
                    "KeyError: 'model_type'"
                    if component == "unet"
                    else "ValueError: please specify target_modules"
                )
                raise _Refusal(
                    f"{kind}, for lora_adapter_metadata says nothing of the {component}'s target_modules"
                )
            configs = dict.fromkeys(own, config)
        ranks |= {name: _stated_rank(path.partition(".")[2], configs[name]) for name, path in own.items()}
    for name, rank in ranks.items():
        if rank != (found := _rank_of(file.modules[name])):
            raise _Refusal(
                f"RuntimeError: size mismatch for {name}: its metadata say rank {repr(rank)[:80]}, it has "
                f"{found}"
            )


def _rank_of(module: FileModule) -> int | None:
    """Rows of A, None where it has no dimension."""
    return module.factors[0][0] if module.factors and module.factors[0] else None


def _stated_rank(path: str, config: Mapping[str, Any]) -> int:
    """The rank of a layer by PEFT's configuration, whose default is 8."""
    patterns = config.get("rank_pattern")
    pairs = patterns.items() if isinstance(patterns, dict) else ()
    rank = next(
        (value for key, value in pairs if path == key or path.endswith(f".{key}")),
        config.get("r", PEFT_RANK),
    )
    if not isinstance(rank, int):
        raise _Refusal(f"TypeError: the rank {repr(rank)[:80]} of {path} is no number")
    if rank <= 0:
        raise _Refusal(
            f"ValueError: `r` should be a positive integer value but the value passed is {repr(rank)[:80]}"
        )
    return rank


def _refuse_kohya(file: _File, keys: list[str]) -> None:
    for module in file.modules.values():
        if KOHYA[0] in module.parts:
            if KOHYA[1] not in module.parts:
                raise _Refusal(f"KeyError: {module.name}{KOHYA[1]}")
            _require_one_alpha(module)
    used = {
        m.name + ending for m in file.modules.values() if m.spelling == KOHYA for ending in (*KOHYA, ".alpha")
    }
    if left := [key for key in keys if key not in used]:
        raise _Refusal(
            f"ValueError: {len(left)} keys have not been correctly renamed, the first is {left[0]}"
        )


def _diffusers_kohya(file: _File, layers: Layers) -> dict[str, str]:
    names = {}
    for path in layers:
        part, rest = _parts_of(path)
        if part == "unet":
            names[f"lora_unet_{_flat(rest)}"] = path
            if rest.startswith(
                ("conv_", "time_embedding.")
            ):  # the only layers that it knows by their original names too
                names[f"lora_unet_{_flat(ldm_path(rest))}"] = path
        else:  # transformers 5 has no text_model in its names, and diffusers takes either
            names.update(
                {
                    f"{prefix}{_flat(name)}": path
                    for prefix in ("lora_te_", "lora_te1_")
                    for name in (rest, _short(rest))
                }
            )
    taken = {name: names[name] for name in file.modules if name in names}
    unet = [name for name in file.modules if name.startswith("lora_unet_")]
    if unet and not any(name in taken for name in unet):
        raise _Refusal("NoMatchingPeftModuleError: target modules not found in the base model")
    text = [path for path in taken.values() if path.startswith("text_encoder.")]
    if text and not any(path.endswith(("out_proj", "fc1", "fc2")) for path in text):
        raise _Refusal("ValueError: could not automatically infer state dict type")
    return taken


def _short(path: str) -> str:
    return path.removeprefix("text_model.")


def _diffusers_unet(file: _File, keys: list[str], layers: Layers) -> dict[str, str]:
    """The U-Net's part: the first key decides whether the older spellings are translated at all."""
    first = next((key for key in keys if key.startswith("unet.")), None)
    if first is None:
        return {}
    old_spellings = "lora_A" not in first
    accepted = (PEFT, DIFFUSERS, PROCESSOR) if old_spellings else (PEFT,)
    modules = [m for m in file.modules.values() if m.name.startswith("unet.") and m.spelling in accepted]
    if not modules and not any("lora_B" in key for key in keys):
        raise _Refusal(
            "IndexError: list index out of range, for no key spells lora_B, lora.up or to_q_lora.up"
        )
    containers = {path for path in _with_containers(layers) if path not in layers}
    taken = {}
    for module in modules:
        name = module.name.replace(".processor.", ".") if old_spellings else module.name
        if module.spelling == PROCESSOR and name.endswith(".to_out"):
            name += ".0"
        if name in containers:
            raise _Refusal(f"ValueError: target module {name} is not supported{_missing_index(name)}")
        if name in layers:
            taken[module.name] = name
    if modules and not taken:
        raise _Refusal("NoMatchingPeftModuleError: target modules not found in the base model")
    return taken


def _diffusers_text(file: _File, layers: Layers) -> dict[str, str]:
    modules = [
        module
        for module in file.modules.values()
        if module.name.startswith("text_encoder.") and module.spelling
    ]
    if not modules:
        return {}
    spelled = {module.spelling for module in modules}
    attention = any(".self_attn." in module.name for module in modules)
    if TRANSFORMERS not in spelled and PROCESSOR not in spelled and not (PEFT in spelled and attention):
        raise _Refusal("ValueError: could not automatically infer state dict type")
    names = {
        f"text_encoder.{name}": path
        for path in layers
        if path.startswith("text_encoder.")
        for name in _both(_parts_of(path)[1])
    }
    old = {
        f"text_encoder.{name.replace(own, new)}": path
        for name, path in _named(names)
        for own, new in _OLD_TEXT
        if own in name
    }
    taken = {}
    for module in modules:
        known = (
            old if module.spelling == PROCESSOR else names if module.spelling in (PEFT, TRANSFORMERS) else {}
        )
        if module.name in known:
            taken[module.name] = known[module.name]
    return taken


_OLD_TEXT = [("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")]


def _both(path: str) -> tuple[str, str]:
    return path, _short(path)


def _named(names: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(name.removeprefix("text_encoder."), path) for name, path in names.items()]


def _peft(file: _File, layers: Layers) -> tuple[dict[str, str], list[str]]:
    if file.config is None:
        raise _Refusal("ValueError: can't find 'adapter_config.json': PEFT loads folders")
    kind = _PEFT_KINDS.get(str(file.config.get("peft_type")))
    if kind is None:
        raise _Refusal(f"peft_type is {str(file.config.get('peft_type'))!r}, not LORA, LOHA or LOKR")
    if not isinstance(file.config.get("rank_pattern") or {}, dict):
        raise _Refusal(
            f"AttributeError: rank_pattern is a {type(file.config['rank_pattern']).__name__}, not a table"
        )
    names = {f"base_model.model.{rest}": path for path in layers for rest in _both(_parts_of(path)[1])}
    taken = {}
    for module in file.modules.values():
        path = names.get(module.name)
        if (
            path
            and (module.spelling == PEFT if kind == "LoRA" else module.kind == kind)
            and _is_target(module.name.removeprefix("base_model.model."), file.config)
        ):
            taken[module.name] = path
    ranks = {name: _stated_rank(name.removeprefix("base_model.model."), file.config) for name in taken}
    for name, path in list(taken.items()):
        module = file.modules[name]
        if kind == "LoRA":
            is_right = _rank_of(module) == ranks[name] and module.fits(layers[path], strict=True)
        else:
            built = _peft_parts(kind, layers[path], ranks[name], file.config)
            is_right = all(module.parts.get(ending, shape) == shape for ending, shape in built.items())
            if not all(ending in module.parts for ending in built):
                del taken[name]
        if not is_right:
            raise _Refusal(f"RuntimeError: size mismatch for {name}")
    return taken, []


_PEFT_KINDS = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr"}


def _peft_parts(kind: str, layer: Shape, rank: int, config: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors of LoHa or LoKr that PEFT builds for a layer, by the ends of their keys."""
    outputs, inputs, *kernel = layer
    size = num_elements(tuple(kernel))
    has_core = bool(config.get("use_effective_conv2d")) and size > 1
    core = (rank, rank, *kernel)
    if kind == "LoHa":
        left, right = (
            ((rank, outputs), (rank, inputs)) if has_core else ((outputs, rank), (rank, inputs * size))
        )
        cores = {f".hada_t{number}": core for number in (1, 2) if has_core}
        factors = {".hada_w1_a": left, ".hada_w1_b": right, ".hada_w2_a": left, ".hada_w2_b": right}
        return {**factors, **cores}
    factor = config.get("decompose_factor", -1)
    (rows, more_rows), (columns, more_columns) = (
        kronecker_factors(side, factor if isinstance(factor, int) else -1) for side in (outputs, inputs)
    )
    parts: dict[str, Shape] = {".lokr_w1": (rows, columns)}
    if config.get("decompose_both") and rank < max(rows, columns) / 2:
        parts = {".lokr_w1_a": (rows, rank), ".lokr_w1_b": (rank, columns)}
    if rank >= max(more_rows, more_columns) / 2:
        return {**parts, ".lokr_w2": (more_rows, more_columns, *kernel)}
    if has_core:
        left, right = (rank, more_rows), (rank, more_columns)
        return {**parts, ".lokr_w2_a": left, ".lokr_w2_b": right, ".lokr_t2": core}
    return {**parts, ".lokr_w2_a": (more_rows, rank), ".lokr_w2_b": (rank, more_columns * size)}


def _is_target(path: str, config: Mapping[str, Any]) -> bool:
    """PEFT's rule: a list holds paths or their last parts.

    A string is a regular expression, which is not run on a stranger's word: taken to mean the modules that
    the file has.
    """
    targets = config.get("target_modules")
    return isinstance(targets, str) or (
        isinstance(targets, list) and any(path == target or path.endswith(f".{target}") for target in targets)
    )
