"""The adapter that the tensors of a file make up, and what is wrong with them."""

from collections.abc import Mapping
from typing import Any

import torch

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.modules import LoraModule
from lorascope.adapters.names import parse_key
from lorascope.adapters.peft_config import alpha_of, configuration_notes, peft_configs, rank_faults

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
    modules = {}
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
        or (mid is not None and not inner == mid.shape[1] == down.shape[0])
    ):
        core = "" if mid is None else f" with a core {list(mid.shape)}"
        return (
            f"{path}: down {list(down.shape)} and up {list(up.shape)}{core} do not fit together: their "
            "ranks must be equal"
        )
    if alpha is not None and (alpha.numel() != 1 or not alpha.float().isfinite().all()):
        return f"{path}: alpha must be one finite number, is of shape {list(alpha.shape)}"
    magnitudes = found.get("dora_scale")
    if magnitudes is not None and not (
        magnitudes.ndim
        and magnitudes.numel() == max(magnitudes.shape)
        and (magnitudes.shape[0] == up.shape[0] or magnitudes.shape[:2] == (1, down.shape[1]))
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
    alpha = (
        float(found["alpha"].item())
        if "alpha" in found
        else alpha_of(config, path.partition(".")[2], down.shape[0])
    )
    return LoraModule(down, up, alpha, mid, dora_scale)
