"""Adapters merged into a model: its weights, a loaded base for the while, and whole models as files."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lorascope.adapters.adapter import Adapter, weight_shape
from lorascope.adapters.files import DTYPES, STRENGTH, Dtype, Written
from lorascope.adapters.modules import FullModule, Module
from lorascope.base.loading import Base, is_sd15, load_base
from lorascope.base.saving import save_ldm
from lorascope.base.weights import read_header
from lorascope.errors import AdapterError, StorageError
from lorascope.sections import BaseSection
from lorascope.store import digest_bytes, read_regular, storage_errors, write_json

MergedFormat = Literal["merged-diffusers", "merged-ldm"]

_MERGED_JSON = "lorascope.json"  # in a merged pipeline folder: the digests of what was merged


@dataclass(frozen=True)
class MergeReport:
    """What merging changed."""

    num_modules: int
    rounding: float  # l2 of what the output dtype cost the merged weights, over that of the update


@torch.no_grad()
def merge_weights(
    state: Mapping[str, torch.Tensor],
    adapter: Adapter,
    strength: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, torch.Tensor], MergeReport]:
    """The weights of a model with an adapter added: W + strength * scale * up @ down, or what another kind
    adds, in float32, then in `dtype`. A full difference may add to the bias too.

    `state` maps `unet.<parameter>` and `text_encoder.<parameter>` to weights, and is left alone; tensors that
    no module names are passed on as they are. `dtype` None keeps each weight's own. DoRA's weights are W' = m
    (W + U) / ||W + U||, at other strengths W + strength (W' - W) (Liu et al. 2024). Raises `AdapterError` for
    modules and biases that `state` lacks, shapes that differ, and results beyond the range of the dtype.
    T-LoRA, which has no single weight, is refused too.
    """
    adapter.require_unscheduled("draw with the adapter beside the base, or write it with --as-lora")
    merged = dict(state)
    error = norm = 0.0
    places = {path: _weight_key(path, state) for path in adapter.modules}
    if missing := [path for path, key in places.items() if key is None]:
        raise AdapterError(
            f"the base lacks {len(missing)} of {len(places)} adapted layers, the first is {missing[0]}: "
            "another base model"
        )
    for path, module in adapter.modules.items():
        key = str(places[path])
        changes = {key: _merged(state[key].float(), module, strength, path)}
        if isinstance(module, FullModule) and module.bias is not None:
            bias = f"{key.removesuffix('.weight')}.bias"
            changes[bias] = _merged_bias(state.get(bias), module.bias, strength, path)
        for name, (exact, update) in changes.items():
            merged[name] = exact.to(dtype or state[name].dtype)
            if not merged[name].isfinite().all():
                raise AdapterError(
                    f"{path}: the merged {name.rpartition('.')[2]} is beyond the range of "
                    f"{merged[name].dtype}: choose bf16 or fp32"
                )
            error += float((merged[name].double() - exact.double()).square().sum())
            norm += float(update.double().square().sum())
    return merged, MergeReport(len(places), math.sqrt(error / norm) if norm else 0.0)


def _weight_key(path: str, state: Mapping[str, torch.Tensor]) -> str | None:
    """The name of a module's weight, with or without the `text_model.` that transformers 5 dropped."""
    names = (f"{path}.weight", f"{path}.weight".replace("text_encoder.text_model.", "text_encoder.", 1))
    return next((name for name in names if name in state), None)


def _merged(
    weight: torch.Tensor, module: Module, strength: float, path: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The merged weight in float32, and what it adds to `weight`."""
    if not module.fits(weight.shape):
        raise AdapterError(
            f"{path}: the adapter is for a weight of shape {list(weight_shape(path, module))}, the base's is "
            f"{list(weight.shape)}"
        )
    update = module.update().to(weight.device).reshape(weight.shape)
    if module.dora_scale is not None:
        adapted = weight + update
        axis = 0 if module.dora_scale.shape[0] == weight.shape[0] else 1
        others = [other for other in range(weight.ndim) if other != axis]
        norms = torch.linalg.vector_norm(adapted, dim=others, keepdim=True)
        if not norms.all():
            raise AdapterError(
                f"{path}: weight and update cancel in {int((norms == 0).sum())} of {norms.numel()} rows, so "
                "DoRA has no direction to scale: another base model, or a damaged file"
            )
        magnitudes = module.dora_scale.to(weight.device, torch.float32).reshape(norms.shape)
        update = adapted * (magnitudes / norms) - weight
    return weight + strength * update, strength * update


def _merged_bias(
    bias: torch.Tensor | None, difference: torch.Tensor, strength: float, path: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_merged`, of a layer's bias."""
    if bias is None or bias.shape != difference.shape:
        found = "has none" if bias is None else f"has one of {len(bias)} numbers"
        raise AdapterError(
            f"{path}: the adapter changes a bias of {len(difference)} numbers, the base's layer {found}: "
            "another base model"
        )
    update = strength * difference.float().to(bias.device)
    return bias.float() + update, update


@contextmanager
def merged_into(
    base: Base, adapter: Adapter, dtype: torch.dtype | None = None, strength: float = 1.0
) -> Iterator[MergeReport]:
    """Within, the layers of `base` that an adapter adapts hold it merged in, as `merge_weights` does;
    afterwards their own tensors again.

    Beside the base only the merged weights take memory: the layers point at these for the while, and nothing
    is written into the base's tensors.
    """
    parts = {name: part for name, part in base.components.items() if name in adapter.components()}
    weights = {
        f"{name}.{key}": weight for name, part in parts.items() for key, weight in part.named_parameters()
    }
    state = {key: weight.data for key, weight in weights.items()}
    merged, report = merge_weights(state, adapter, strength, dtype)
    own = {
        key: tensor for key, tensor in state.items() if merged[key] is not tensor
    }  # of the layers that change
    try:
        for key in own:
            weights[key].data = merged[key]
        yield report
    finally:
        for key, tensor in own.items():
            weights[key].data = tensor


def write_merged(
    section: BaseSection,
    adapter: Adapter,
    out: Path,
    layout: MergedFormat,
    dtype: Dtype,
    name: str,
    strength: float = 1.0,
) -> Written:
    """Write a whole model with an adapter merged in: a diffusers folder, or one file in the original LDM
    layout.

    Merging is done in float32. Raises `AdapterError` where the base had this very adapter merged in before,
    at whatever strength.
    """
    base = load_base(section, torch.device("cpu"), "fp32")
    digest = adapter_digest(adapter)
    before = _merged_before(section, base)
    if digest in before:
        raise AdapterError(
            f"{section.model}: has this adapter merged in already: merge into the model it was trained on"
        )
    save = _save_pipeline if layout == "merged-diffusers" else _save_checkpoint
    with merged_into(base, adapter, DTYPES[dtype], strength) as report:
        for part in (*base.components.values(), base.vae):
            part.to(DTYPES[dtype])
        num_bytes = save(base, out, name, [*before, digest], strength)
    notes = [
        (
            f"{report.num_modules} modules merged in float32; the rounding error is relative to the update, "
            "not to the weights"
        )
    ]
    if layout == "merged-ldm" and not is_sd15(base):
        notes.append(
            "the base is not of Stable Diffusion v1.5's sizes, so only lorascope reads this file: for "
            "diffusers write merged-diffusers"
        )
    if adapter.leftover:
        notes.append(
            f"{len(adapter.leftover)} keys belong to no module and are left out, the first is "
            f"{adapter.leftover[0][:200]!r}"
        )
    return Written(out, num_bytes, report.rounding, tuple(notes))


def adapter_digest(adapter: Adapter) -> str:
    """SHA-256 over names, alphas and weights rounded to fp16: the same for every layout of one adapter, in
    fp32 and fp16.
    """
    parts = []
    for path, module in sorted(adapter.modules.items()):
        parts += [path.encode(), repr(torch.tensor(module.effective_alpha).item()).encode()]
        parts += [tensor.half().contiguous().numpy().tobytes() for tensor in module.tensors().values()]
    return digest_bytes(*parts)


def _merged_before(section: BaseSection, base: Base) -> list[str]:
    """The digests of the adapters that a base written by us has merged in; none where it does not say so
    legibly.
    """
    file = Path(section.model).expanduser()
    try:
        if base.folder is None:
            merged = (
                json.loads(read_header(file).metadata.get("lorascope_merged", "[]"))
                if file.suffix == ".safetensors"
                else []
            )
        else:
            merged = json.loads(read_regular(base.folder / _MERGED_JSON))["merged"]
    except (OSError, StorageError, ValueError, RecursionError, KeyError, TypeError):
        return []
    return [str(digest) for digest in merged] if isinstance(merged, list) else []


def _save_pipeline(base: Base, folder: Path, name: str, merged: list[str], strength: float) -> int:
    """Write a complete diffusers pipeline folder; returns its size in bytes."""
    partial = folder.with_name(f".{folder.name}.partial")
    with storage_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        base.build_pipeline().save_pretrained(partial, safe_serialization=True)
        own = {} if strength == 1 else {"strength": strength}
        write_json(partial / _MERGED_JSON, {"name": name, "merged": merged, **own})
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _save_checkpoint(base: Base, path: Path, name: str, merged: list[str], strength: float) -> int:
    """Write one checkpoint file in the original layout; returns its size in bytes."""
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1" if is_sd15(base) else "other",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": name,
        "modelspec.prediction_type": "v" if base.prediction_type == "v_prediction" else "epsilon",
        "lorascope_merged": json.dumps(merged),
        **({} if strength == 1 else {STRENGTH: str(strength)}),
    }
    save_ldm(base, path, base.unet.dtype, metadata)
    return path.stat().st_size
