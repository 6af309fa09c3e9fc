"""The adapter that the tensors of a file make up, and what is wrong with them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.modules import (
    KIND_NAMES,
    FullModule,
    LohaModule,
    LokrModule,
    LoraModule,
    Module,
    ModuleKind,
)
from lorascope.adapters.names import parse_key
from lorascope.adapters.peft_config import (
    alpha_of,
    configuration_notes,
    peft_configs,
    rank_faults,
    stated_scale,
)

Found = Mapping[str, torch.Tensor]  # the tensors of one module by field, as `names.Key` has them
_LARGEST = 2**28  # numbers; the largest layer of Stable Diffusion has 2**25
_CONVOLUTIONS = ("proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "conv", "conv_in", "conv_out")


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
        named = parse_key(key)
        if named is None:
            leftover.append(key)
            continue
        layout, path, field = named
        layouts[layout] = None
        if other := names.get((path, field)):
            faults.append(f"two modules of one name: {other[:200]!r} and {key[:200]!r} are both {path[:200]}")
            continue
        names[path, field] = key
        # PEFT's magnitudes are the outputs', of shape [out] or [1, out, 1, 1]; others' say it by their shape.
        parts.setdefault(path, {})[field] = (
            tensors[key].flatten() if ".lora_magnitude_vector" in key else tensors[key]
        )
    configs = peft_configs(metadata, peft_config, faults)
    modules: dict[str, Module] = {}
    for path, found in parts.items():
        if fault := _module_fault(path, found):
            faults.append(fault)
            leftover.extend(names[path, field] for field in found)
        else:
            modules[path] = _module(path, found, configs.get(path.partition(".")[0]))
    faults += rank_faults(modules, configs)
    notes = configuration_notes(tensors, metadata, peft_config)
    return Adapter(
        modules, " + ".join(layouts), dict(metadata), tuple(sorted(leftover)), tuple(faults), tuple(notes)
    )


def _module_fault(path: str, found: Found) -> str | None:
    """What keeps the tensors of one module from being an adapter, or None."""
    if other := [field for field, tensor in found.items() if not _is_number(field, tensor.dtype)]:
        return (
            f"{path}: {other[0]} holds {str(found[other[0]].dtype).removeprefix('torch.')}, not "
            "floating-point weights"
        )
    kinds = _kinds(found)
    if len(kinds) > 1:
        return (
            f"{path}: has {', '.join(sorted(found))}: tensors of {' and of '.join(kinds.values())} for one "
            "layer: only one of them can be read"
        )
    kind = _kind(found)
    if kind != "lora" and "dora_scale" in found:
        return f"{path}: is {KIND_NAMES[kind]} with DoRA's dora_scale, which is read of LoRA alone"
    if fault := _FAULTS[kind](path, found):
        return fault
    alpha = found.get("alpha")
    if alpha is not None and (alpha.numel() != 1 or not alpha.float().isfinite().all()):
        return f"{path}: alpha must be one finite number, is of shape {list(alpha.shape)}"
    return _magnitude_fault(path, found) if kind == "lora" else _size_fault(path, _module(path, found, None))


def _size_fault(path: str, module: Module) -> str | None:
    if module.num_numbers > _LARGEST:
        rows, columns = module.matrix_shape
        return f"{path}: its tensors mean a weight of {rows} x {columns}, which no layer has: a damaged file"
    return None


def _kinds(found: Found) -> dict[ModuleKind, str]:
    """The kinds whose tensors are there, with their names; alpha and magnitudes are of any."""
    kinds: list[ModuleKind] = [
        "loha"
        if field.startswith("hada_")
        else "lokr"
        if field.startswith("lokr_")
        else "full"
        if field.startswith("diff")
        else "lora"
        for field in found
        if field not in ("alpha", "dora_scale")
    ]
    return {kind: KIND_NAMES[kind] for kind in kinds}


def _kind(found: Found) -> ModuleKind:
    kind: ModuleKind = "lora"
    return next(iter(_kinds(found)), kind)


def _missing_fault(path: str, found: Found, needed: Sequence[str]) -> str | None:
    if missing := [field for field in needed if field not in found]:
        return (
            f"{path}: has {', '.join(sorted(found))} without {' and '.join(missing)}: the file is incomplete"
        )
    return None


def _shape_fault(path: str, found: Found, allowed: Mapping[str, tuple[int, ...]]) -> str | None:
    """A tensor whose number of dimensions is none of those `allowed`, or that has no elements."""
    for field, tensor in found.items():
        if field in allowed and (tensor.ndim not in allowed[field] or not tensor.numel()):
            dimensions = " or ".join(map(str, allowed[field]))
            return f"{path}: {field} is {list(tensor.shape)}: expected {dimensions} dimensions and no 0"
    return None


def _rank_fault(path: str, found: Found, ranks: Mapping[str, int]) -> str | None:
    """Tensors whose rank is not that of the first."""
    if len(set(ranks.values())) > 1:
        shapes = ", ".join(f"{field} {list(found[field].shape)}" for field in ranks)
        return f"{path}: {shapes} do not fit together: their ranks must be equal"
    return None


def _ranks(found: Found, left: str, right: str, core: str) -> dict[str, int]:
    """The ranks that two factors and their core have; a core that is not square has none."""
    if core not in found:
        return {left: found[left].shape[1], right: found[right].shape[0]}
    first, second = found[core].shape[:2]
    return {
        left: found[left].shape[0],
        right: found[right].shape[0],
        core: first if first == second else 0,
    }


def _lora_fault(path: str, found: Found) -> str | None:
    if fault := _missing_fault(path, found, ("down", "up")):
        return fault
    down, up = found["down"], found["up"]
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
        or (mid is not None and not inner == mid.shape[1] == down.shape[0])
    ):
        core = "" if mid is None else f" with a core {list(mid.shape)}"
        return (
            f"{path}: down {list(down.shape)} and up {list(up.shape)}{core} do not fit together: their "
            "ranks must be equal"
        )
    return None


def _magnitude_fault(path: str, found: Found) -> str | None:
    magnitudes, up, down = found.get("dora_scale"), found["up"], found["down"]
    if magnitudes is not None and not (
        magnitudes.ndim
        and magnitudes.numel() == max(magnitudes.shape)
        and (magnitudes.shape[0] == up.shape[0] or magnitudes.shape[:2] == (1, down.shape[1]))
    ):
        expected = f"{up.shape[0]} outputs or {down.shape[1]} inputs"
        return f"{path}: dora_scale is {list(magnitudes.shape)}: expected one number for each of {expected}"
    return None


def _loha_fault(path: str, found: Found) -> str | None:
    factors = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    cores = ("hada_t1", "hada_t2")
    needed = (*factors, *cores) if any(core in found for core in cores) else factors
    if fault := _missing_fault(path, found, needed):
        return fault
    dimensions = {**dict.fromkeys(factors, (2,)), **dict.fromkeys(cores, (4,))}
    if fault := _shape_fault(path, found, dimensions):
        return fault
    ranks = _ranks(found, *factors[:2], cores[0]) | _ranks(found, *factors[2:], cores[1])
    if fault := _rank_fault(path, found, ranks):
        return fault
    module = _loha(found)
    other = replace(module, w1_a=module.w2_a, w1_b=module.w2_b, t1=module.t2)
    if (module.matrix_shape, module.kernel) != (other.matrix_shape, other.kernel):
        (first, second), (third, fourth) = module.matrix_shape, other.matrix_shape
        return (
            f"{path}: its two products are {first} x {second} and {third} x {fourth}: they must be of one "
            "size"
        )
    return None


def _lokr_fault(path: str, found: Found) -> str | None:
    ranks: dict[str, int] = {}
    dimensions = {f"lokr_{name}": (2,) for name in ("w1", "w1_a", "w1_b", "w2_a", "w2_b")}
    if fault := _shape_fault(path, found, {**dimensions, "lokr_w2": (2, 4), "lokr_t2": (4,)}):
        return fault
    for whole, core in (("lokr_w1", ""), ("lokr_w2", "lokr_t2")):
        parts = (f"{whole}_a", f"{whole}_b")
        if whole in found:
            if beside := [field for field in (*parts, core) if field in found]:
                return f"{path}: has {whole} beside {beside[0]}: it is whole or a product, not both"
            continue
        needed = parts if any(field in found for field in (*parts, core)) else (whole,)
        if fault := _missing_fault(path, found, needed):
            return fault
        ranks |= _ranks(found, *parts, core)
    return _rank_fault(path, found, ranks)


def _full_fault(path: str, found: Found) -> str | None:
    if fault := _missing_fault(path, found, ("diff",)):
        return fault
    if fault := _shape_fault(path, found, {"diff": (1, 2, 4), "diff_b": (1,)}):
        return fault
    bias, outputs = found.get("diff_b"), found["diff"].shape[0]
    if bias is not None and len(bias) != outputs:
        return f"{path}: the bias's difference is {list(bias.shape)}: the weight's has {outputs} outputs"
    return None


_FAULTS: Mapping[ModuleKind, Callable[[str, Found], str | None]] = {
    "lora": _lora_fault,
    "loha": _loha_fault,
    "lokr": _lokr_fault,
    "full": _full_fault,
}


def _is_number(field: str, dtype: torch.dtype) -> bool:
    """Whether a field may be of this dtype: floating-point, and alpha, which programs read by `item()`, an
    integer.
    """
    return dtype.is_floating_point or (field == "alpha" and not dtype.is_complex and dtype != torch.bool)


def _module(path: str, found: Found, config: Mapping[str, Any] | None) -> Module:
    """One module from its tensors, with the dimensions that its layer has: 4 for a convolution, 2 for a
    Linear.
    """
    name = path.partition(".")[2]
    match _kind(found):
        case "loha":
            loha = _loha(found)
            return replace(loha, alpha=_alpha(name, found, config, loha.rank))
        case "lokr":
            tensors = {field.removeprefix("lokr_"): found[field] for field in found if field != "alpha"}
            lokr = LokrModule(alpha=None, **tensors)
            if lokr.has_scale:
                return replace(lokr, alpha=_alpha(name, found, config, lokr.rank))
            # PEFT multiplies by its alpha / r here too, other programs do not.
            scale = stated_scale(config, name)
            return lokr if scale == 1 else replace(lokr, w1=found["lokr_w1"].float() * scale)
        case "full":
            return FullModule(found["diff"], found.get("diff_b"))
        case _:
            lora = _lora(path, found)
            return replace(lora, alpha=_alpha(name, found, config, lora.rank))


def _alpha(name: str, found: Found, config: Mapping[str, Any] | None, rank: int) -> float | None:
    return float(found["alpha"].item()) if "alpha" in found else alpha_of(config, name, rank)


def _loha(found: Found) -> LohaModule:
    tensors = {field.removeprefix("hada_"): found[field] for field in found if field != "alpha"}
    return LohaModule(alpha=None, **tensors)


def _lora(path: str, found: Found) -> LoraModule:
    down, up, mid, dora_scale = found["down"], found["up"], found.get("mid"), found.get("dora_scale")
    is_convolution = (
        path.rpartition(".")[2] in _CONVOLUTIONS or (down if mid is None else mid).shape[2:].numel() > 1
    )
    if is_convolution and down.ndim == 2:
        down = down[..., None, None]
    if is_convolution and up.ndim == 2:
        up = up[..., None, None]
    if not is_convolution:
        down, up = down.flatten(1), up.flatten(1)
        if mid is not None:  # a matrix between two others: no program's Linear layer has one
            down, mid = mid.float().flatten(1) @ down.float(), None
    if dora_scale is not None:  # over inputs only where its shape says so: [1, in(, 1, 1)]
        over_outputs = dora_scale.shape[0] == up.shape[0]
        ones = [1] * (down.ndim - 2)
        dora_scale = dora_scale.reshape((-1, 1, *ones) if over_outputs else (1, -1, *ones))
    return LoraModule(down, up, None, mid, dora_scale)
