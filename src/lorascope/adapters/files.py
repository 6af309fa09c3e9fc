"""Adapter files: where one comes in, and where one goes out with its alpha.

Layouts: `kohya` (WebUI, Forge, ComfyUI, sd-scripts), `peft` (a folder), `diffusers` (one file for
`load_lora_weights`).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.foreign import foreign_kind
from lorascope.adapters.hashes import kohya_hashes
from lorascope.adapters.modules import KIND_NAMES, FullModule, LohaModule, LokrModule, LoraModule, Module
from lorascope.adapters.names import kohya_name
from lorascope.adapters.parsing import parse_adapter
from lorascope.adapters.peft_config import peft_options, read_peft_config
from lorascope.adapters.peft_forms import loha_options, lokr_for_peft, lokr_options, lycoris_tensors
from lorascope.adapters.schedule import SCHEDULE_KEY, read_schedule
from lorascope.base.weights import load_tensors, read_header, require_finite, save_tensors
from lorascope.errors import AdapterError
from lorascope.store import PEFT_CONFIG, PEFT_WEIGHTS, access_errors, write_json

Layout = Literal["kohya", "peft", "diffusers"]
Dtype = Literal["fp32", "fp16", "bf16"]
STRENGTH = "lorascope_strength"  # a key of headers: what alpha was multiplied by on its way into the file
_READ = "only LoRA, LoHa, LoKr and full differences for Stable Diffusion v1 can be read"
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@access_errors(AdapterError)
def load_adapter(path: Path | str) -> Adapter:
    """The adapter in a file, or in a PEFT folder (or a folder of one for `unet` and one for `text_encoder`),
    on the CPU. A folder of full differences needs no configuration.

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
        notes = tuple(note for part in parts for note in part.notes)
        return Adapter(modules, "peft", {}, leftover, notes=notes, schedule=parts[0].schedule)
    weights = path / PEFT_WEIGHTS if path.is_dir() else path
    if weights.suffix.lower() == ".safetensors":
        header = read_header(weights)
        shapes, metadata = {name: info.shape for name, info in header.tensors.items()}, header.metadata
        if kind := foreign_kind(shapes):
            raise AdapterError(f"{path}: is {kind}: {_READ}")
        tensors = load_tensors(weights)
    else:
        tensors, metadata = load_tensors(weights), {}
        if kind := foreign_kind({name: tuple(tensor.shape) for name, tensor in tensors.items()}):
            raise AdapterError(f"{path}: is {kind}: {_READ}")
    require_finite(tensors, weights)
    config = read_peft_config(weights)
    adapter = replace(parse_adapter(tensors, metadata, config), schedule=read_schedule(metadata))
    if (
        path.is_dir()
        and config is None
        and "lora_adapter_metadata" not in metadata
        and adapter.kinds != ("full",)
    ):
        raise AdapterError(
            f"{path}: has no {PEFT_CONFIG}, so alpha is unknown: put it there, or name {PEFT_WEIGHTS} itself "
            "to take the strength 1"
        )
    if adapter.faults:
        more = f" (and {len(adapter.faults) - 1} more)" if len(adapter.faults) > 1 else ""
        raise AdapterError(f"{path}: {adapter.faults[0]}{more}")
    if not adapter.modules:
        raise AdapterError(
            f"{path}: none of its {len(tensors)} keys names a module, the first is "
            f"{adapter.leftover[0][:200]!r}"
        )
    return adapter


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
    dtype: Dtype = "fp16",
    metadata: Mapping[str, str] | None = None,
) -> Written:
    """Write an adapter atomically: `kohya` and `diffusers` as one file, `peft` as a folder.

    alpha is kept exactly: a float32 tensor a module in `kohya` (the rank where there was none), PEFT's
    configuration with patterns in the other two, since diffusers refuses a file that has both. Convolutions
    are written with four dimensions. A Tucker core is folded into `down` where the layout has none. An
    adapter with text-encoder modules becomes a `peft` folder of two, `unet/` and `text_encoder/`. LoHa, LoKr
    and full differences go into `kohya` as LyCORIS writes them, and into `peft`, which takes one kind a
    component: LoHa and LoKr as PEFT builds them, full differences, which PEFT does not have, without a
    configuration. `metadata`
    goes into the header of `kohya` and `diffusers` files, and of it `STRENGTH` into that of `peft`; the
    hashes of WebUI and the ModelSpec standard are added to `kohya`. Raises `AdapterError` for what the layout
    cannot hold and for weights beyond the range of `dtype`. T-LoRA goes into `peft` folders alone, with its
    schedule in the header.
    """
    if layout != "peft":
        adapter.require_unscheduled(
            f"{layout} files are used at the full rank by all programs: write peft, or with --as-lora what "
            "they would use"
        )
    notes = list(adapter.notes)
    if adapter.leftover:
        notes.append(
            f"{len(adapter.leftover)} keys belong to no module and are left out, the first is "
            f"{adapter.leftover[0][:200]!r}"
        )
    modules = adapter.modules
    if layout == "diffusers" and (others := [item for item in modules.items() if item[1].kind != "lora"]):
        path_of_other, other = others[0]
        raise AdapterError(
            f"{path_of_other}: is {KIND_NAMES[other.kind]}, diffusers' load_lora_weights reads LoRA alone: "
            "write kohya, or for diffusers merged-diffusers"
        )
    if layout == "peft":
        modules = _as_peft_has_them(modules, notes)
    if layout != "kohya" and any(
        isinstance(item, LoraModule) and item.mid is not None for item in modules.values()
    ):
        notes.append(
            f"{layout} has no Tucker core: it was multiplied into the down matrices, which is the same "
            "update in more bytes"
        )
        modules = {path: _without_core(module) for path, module in modules.items()}
    modules, rounding = _rounded(modules, dtype)
    if rounding.num_lost > rounding.num_values / 1000:
        notes.append(
            f"{rounding.num_lost:,} of {rounding.num_values:,} weights are below the range of {dtype} "
            "and became 0"
        )
    rounded = replace(adapter, modules=modules)
    match layout:
        case "kohya":
            tensors = _kohya_tensors(rounded, notes)
            save_tensors(path, tensors, kohya_hashes(tensors, metadata or {}))
            num_bytes = path.stat().st_size
        case "diffusers":
            num_bytes = _save_diffusers(rounded, path, metadata or {}, notes)
        case "peft":
            num_bytes = _save_peft(rounded, path, metadata or {}, notes)
    return Written(path, num_bytes, rounding.relative_error, tuple(notes))


def _as_peft_has_them(modules: Mapping[str, Module], notes: list[str]) -> dict[str, Module]:
    """The modules with LoKr's as PEFT builds them."""
    lokr = {path: module for path, module in modules.items() if isinstance(module, LokrModule)}
    changed, num_changed = lokr_for_peft(lokr)
    if num_changed:
        notes.append(
            f"PEFT has other factors in {num_changed} of {len(lokr)} LoKr modules: they were multiplied out, "
            "which is the same update"
        )
    return {**modules, **changed}


def _without_core(module: Module) -> Module:
    """The same update without LoRA's Tucker core; in float32, since the products may be beyond fp16's
    range.
    """
    if not isinstance(module, LoraModule) or module.mid is None:
        return module
    down = replace(module, down=module.down.float()).full_down()
    return replace(module, down=down.contiguous(), mid=None)


@dataclass(frozen=True)
class _Rounding:
    relative_error: float
    num_lost: int  # weights that became 0
    num_values: int


def _rounded(modules: Mapping[str, Module], dtype: Dtype) -> tuple[dict[str, Module], _Rounding]:
    """The modules in `dtype`, and what that cost; raise `AdapterError` for weights that become infinite."""
    target = DTYPES[dtype]
    result: dict[str, Module] = {}
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
                f"{path}: {_PRODUCTS[module.kind]} reaches {peak:.3g}, beyond fp16's "
                f"{torch.finfo(target).max:.6g}, so programs that multiply in fp16 draw black pictures: "
                "write bf16 or fp32, or train it with a lower learning rate"
            )
    return result, _Rounding(math.sqrt(error / norm) if norm else 0.0, lost, count)


_PRODUCTS = {
    "lora": "up @ down",
    "loha": "(w1_a @ w1_b) * (w2_a @ w2_b)",
    "lokr": "kron(w1, w2)",
}


def _peak(module: Module) -> float:
    """The largest absolute value of the product of the tensors before its scale, as programs multiply them;
    an upper bound of it where that is within fp16 already. 0 where there is no product.
    """
    match module:
        case LoraModule():
            down = replace(module, down=module.down.float()).full_down()
            bound = _bound(module.up, down)
        case LohaModule():
            bound = math.inf
            if module.t1 is None:
                bound = _bound(module.w1_a, module.w1_b) * _bound(module.w2_a, module.w2_b)
        case LokrModule():
            first, second = module.whole()
            return float(first.abs().max() * second.abs().max())
        case FullModule():
            return 0.0
    if bound <= torch.finfo(torch.float16).max:
        return bound
    return float(replace(module, alpha=None).update().abs().max())


def _bound(left: torch.Tensor, right: torch.Tensor) -> float:
    """An upper bound of the absolute values in left @ right, by Cauchy and Schwarz."""
    rows = torch.linalg.vector_norm(left.float().flatten(1), dim=1).max()
    return float(rows * torch.linalg.vector_norm(right.float().flatten(1), dim=0).max())


def _kohya_tensors(adapter: Adapter, notes: list[str]) -> dict[str, torch.Tensor]:
    """Tensors under kohya's names, module by module in the adapter's order; LyCORIS' of its kinds."""
    tensors = {}
    for path, module in adapter.modules.items():
        name = kohya_name(path)
        for ending, tensor in _kohya_module(module).items():
            tensors[f"{name}.{ending}"] = tensor
        if isinstance(module, FullModule):
            continue
        alpha = torch.tensor(module.effective_alpha, dtype=torch.float32)
        if not alpha.isfinite():
            raise AdapterError(
                f"{path}: alpha {module.effective_alpha:g} is beyond the float32 that kohya files have: "
                "write peft or diffusers"
            )
        tensors[f"{name}.alpha"] = alpha
    if others := [KIND_NAMES[kind] for kind in adapter.kinds if kind != "lora"]:
        notes.append(
            f"{' and '.join(others)}: WebUI, Forge and ComfyUI read it; diffusers and sd-scripts' "
            "networks.lora do not: give diffusers the merged-diffusers folder"
        )
        return tensors
    if any(isinstance(module, LoraModule) and module.mid is not None for module in adapter.modules.values()):
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


def _kohya_module(module: Module) -> dict[str, torch.Tensor]:
    """The tensors of a module, but alpha, by the ends of their names in kohya files."""
    match module:
        case LoraModule():
            endings = {
                "down": "lora_down.weight",
                "up": "lora_up.weight",
                "mid": "lora_mid.weight",
                "dora_scale": "dora_scale",
            }
            return {endings[field]: tensor.contiguous() for field, tensor in module.tensors().items()}
        case FullModule(weight, bias) if module.is_norm:  # WebUI wants both
            bias = torch.zeros_like(weight) if bias is None else bias
            return {"w_norm": weight.contiguous(), "b_norm": bias.contiguous()}
        case FullModule():
            return _difference(module)
        case _:
            return lycoris_tensors(module)


def _difference(module: FullModule) -> dict[str, torch.Tensor]:
    bias = {} if module.bias is None else {"diff_b": module.bias.contiguous()}
    return {"diff": module.weight.contiguous(), **bias}


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
        lora = {name: item for name, item in modules.items() if isinstance(item, LoraModule)}
        options |= {f"{component}.{key}": value for key, value in peft_options(lora).items()}
        for name, module in lora.items():
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


def _save_peft(adapter: Adapter, folder: Path, metadata: Mapping[str, str], notes: list[str]) -> int:
    """A PEFT folder of the U-Net's adapter, or one a component."""
    own = {STRENGTH: metadata[STRENGTH]} if STRENGTH in metadata else {}
    if adapter.schedule is not None:
        own[SCHEDULE_KEY] = adapter.schedule.as_text()
        notes.append("T-LoRA: PEFT reads it as LoRA of the full rank; lorascope goes by its schedule")
    components = adapter.components()
    if set(components) != {"unet"}:
        notes.append(
            "PEFT adapts one model a folder: the components are in folders of their own, unet/ and "
            "text_encoder/, the latter under the names of transformers 5"
        )
    total = 0
    for component, modules in components.items():
        target = folder if set(components) == {"unet"} else folder / component
        tensors, options = _peft_component(component, modules, notes)
        packed = {}
        if options:
            named = {f"base_model.model.{key}": value for key, value in options.items()}
            packed["lora_adapter_metadata"] = json.dumps(named, sort_keys=True)
        save_tensors(target / PEFT_WEIGHTS, tensors, {"format": "pt", **packed, **own})
        if options:
            kind = {
                "peft_type": "LORA",
                "task_type": None,
                "base_model_name_or_path": None,
                "inference_mode": True,
                **({} if "peft_type" in options else {"fan_in_fan_out": False}),
            }
            write_json(target / PEFT_CONFIG, {**kind, **options, "modules_to_save": None})
        else:
            (target / PEFT_CONFIG).unlink(missing_ok=True)  # of an adapter that was there before
        total += (target / PEFT_WEIGHTS).stat().st_size
    return total


def _peft_component(
    component: str, modules: Mapping[str, Module], notes: list[str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and configuration of a component's modules, which PEFT takes of one kind; no configuration of
    full differences.
    """
    kinds = [KIND_NAMES[kind] for kind in dict.fromkeys(module.kind for module in modules.values())]
    if len(kinds) > 1:
        raise AdapterError(
            f"{component}: has {' and '.join(kinds)}, PEFT takes one kind of adapter: write kohya"
        )
    parts: dict[str, dict[str, torch.Tensor]] = {}
    lora, loha, lokr = {}, {}, {}
    for name, module in modules.items():
        # PEFT goes by the live names of transformers 5
        key = f"base_model.model.{name.removeprefix('text_model.')}"
        match module:
            case LoraModule():
                lora[name], parts[key] = module, _peft_lora(f"{component}.{name}", module)
            case LohaModule():
                loha[name], parts[key] = module, lycoris_tensors(module)
            case LokrModule():
                lokr[name], parts[key] = module, lycoris_tensors(module)
            case FullModule():
                parts[key] = _difference(module)
    tensors = {f"{key}.{ending}": part for key, found in parts.items() for ending, part in found.items()}
    if loha:
        return tensors, loha_options(component, loha)
    if lokr:
        return tensors, lokr_options(component, lokr)
    if not lora:
        notes.append(
            "PEFT has no full differences: lorascope reads this folder, other programs the kohya file"
        )
        return tensors, {}
    with_dora = [module.dora_scale is not None for module in lora.values()]
    if any(with_dora) and not all(with_dora):
        raise AdapterError(
            f"{component}: {sum(with_dora)} of {len(with_dora)} modules are DoRA, PEFT needs all or "
            "none: write kohya"
        )
    return tensors, peft_options(lora)


def _peft_lora(path: str, module: LoraModule) -> dict[str, torch.Tensor]:
    tensors = {"lora_A.weight": module.down.contiguous(), "lora_B.weight": module.up.contiguous()}
    if module.dora_scale is None:
        return tensors
    if module.dora_scale.shape[0] != module.up.shape[0]:
        raise AdapterError(f"{path}: DoRA over inputs, which PEFT does not have: write kohya")
    one_dimension = module.down.ndim == 2
    shape = [-1] if one_dimension else [1, -1, *[1] * (module.down.ndim - 2)]
    return {**tensors, "lora_magnitude_vector": module.dora_scale.reshape(shape)}
