"""What leaves a run: adapter files with the metadata that their readers show, and whole models with an
adapter merged in.
"""

import datetime
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lorascope.adapters.files import (
    DTYPES,
    Adapter,
    Layout,
    LoraModule,
    Written,
    load_adapter,
    misfits,
    save_adapter,
)
from lorascope.base.loading import Base, is_sd15, load_base, save_ldm
from lorascope.base.weights import read_header
from lorascope.console import log
from lorascope.errors import AdapterError, ConfigError, StorageError
from lorascope.schema import Arm, BaseSection, StudyConfig
from lorascope.store import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    RunDir,
    digest_bytes,
    export_name,
    read_regular,
    read_table,
    storage_errors,
    write_json,
)

Format = Literal["kohya", "peft", "diffusers", "merged-diffusers", "merged-ldm"]
Dtype = Literal["fp32", "fp16", "bf16"]
_LAYOUTS: dict[str, Layout] = {
    layout: layout for layout in get_args(Layout)
}  # the formats that are adapter files
# the commonest ones: a caption that is a sentence is a tag of its own, and all of them would be megabytes
_MAX_TAGS = 1000
_MERGED_JSON = "lorascope.json"  # in a merged pipeline folder: the digests of what was merged


# -- metadata ------------------------------------------------------------------------------------------------


def kohya_metadata(
    adapter: Adapter,
    name: str,
    training: Mapping[str, Any] | None = None,
    *,
    started: datetime.datetime | None = None,
    resolution_px: int = 512,
    prediction_type: str = "epsilon",
) -> dict[str, str]:
    """The metadata of a kohya file, all strings: what WebUI, Forge and ComfyUI read, in the words of
    sd-scripts and ModelSpec 1.0.0.

    `name` becomes `ss_output_name`, the alias in WebUI's prompts: keep it unique. `training` are further
    `ss_` keys, of which mappings are written as JSON and None as "None"; `started` is the time training
    began. An adapter whose layers are not Stable Diffusion v1.5's is not declared as such. The hashes are
    added by `save_adapter`.
    """
    fits = not misfits(adapter)
    dims = {module.rank for module in adapter.modules.values()}
    alphas = {module.effective_alpha for module in adapter.modules.values()}
    facts: dict[str, Any] = {
        "ss_output_name": name,
        "ss_v2": False,
        "ss_base_model_version": "sd_v1" if fits else "other",
        **_network(adapter),
        "ss_network_dim": dims.pop() if len(dims) == 1 else "Dynamic",
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic",
        "ss_resolution": f"({resolution_px}, {resolution_px})",
        **(training or {}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora" if fits else "other/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{resolution_px}x{resolution_px}",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
    }
    if started is not None:
        facts["ss_training_started_at"] = started.timestamp()
        facts["modelspec.date"] = started.astimezone(datetime.UTC).isoformat(timespec="seconds")
    return {
        key: json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else str(value)
        for key, value in facts.items()
    }


def _network(adapter: Adapter) -> dict[str, Any]:
    """Which of its readers' network kinds an adapter is, with that kind's arguments."""
    modules = adapter.modules.values()
    kernels = [module for module in modules if math.prod(module.weight_shape[2:]) > 1]
    has_core, is_dora = (
        any(getattr(module, name) is not None for module in modules) for name in ("mid", "dora_scale")
    )
    arguments: dict[str, str] = {}
    if kernels:
        arguments |= {"conv_dim": str(kernels[0].rank), "conv_alpha": f"{kernels[0].effective_alpha:g}"}
    if has_core or is_dora:
        arguments |= {"algo": "locon", "use_tucker": str(has_core), "dora_wd": str(is_dora)}
    return {
        "ss_network_module": "lycoris.kohya" if has_core or is_dora else "networks.lora",
        "ss_network_args": arguments,
    }


def tag_frequency(captions: Sequence[str]) -> dict[str, int]:
    """How often each comma-separated tag stands in the captions: the commonest thousand, those of one count
    by name.
    """
    counts = Counter(
        tag for caption in captions for tag in (part.strip() for part in caption.split(",")) if tag
    )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MAX_TAGS])


def _training_facts(run_dir: RunDir, config: StudyConfig, arm: Arm) -> dict[str, Any]:
    """The `ss_` keys of a trained arm, from what the run folder holds."""
    training = run_dir.training(arm.name)
    data = read_table(run_dir.data_json)
    section = config.train
    return {
        "ss_sd_model_name": Path(config.base.model).name,
        "ss_learning_rate": arm.lr,
        "ss_unet_lr": arm.lr,
        "ss_seed": arm.seed,
        "ss_optimizer": section.optimizer,
        "ss_lr_scheduler": section.schedule,
        "ss_lr_warmup_steps": section.warmup_steps,
        "ss_max_grad_norm": section.max_grad_norm,
        "ss_gradient_accumulation_steps": section.accumulation_steps,
        "ss_gradient_checkpointing": bool(section.gradient_checkpointing),
        "ss_noise_offset": section.noise_offset,
        "ss_min_snr_gamma": section.min_snr_gamma,
        "ss_caption_dropout_rate": section.caption_dropout,
        "ss_batch_size_per_device": arm.batch_size,
        "ss_num_epochs": arm.epochs,
        "ss_max_train_steps": training["steps"],
        "ss_steps": training["steps"],
        "ss_epoch": training["epochs"],
        "ss_num_train_images": data["num_train"],
        "ss_num_reg_images": 0,
        "ss_enable_bucket": config.data.buckets,
        "ss_tag_frequency": {
            Path(config.data.source).name: tag_frequency([row["caption"] for row in data["train"]])
        },
        "ss_training_comment": f"lorascope study {config.name}, arm {arm.name}",
    }


# -- adapter files -------------------------------------------------------------------------------------------


def default_dtype(layout: Format) -> Dtype:
    """fp32 for a PEFT folder, which people train on from; fp16 for what only draws."""
    return "fp32" if layout == "peft" else "fp16"


def write_study_files(run_dir: RunDir, config: StudyConfig, arm: Arm) -> list[Written]:
    """Write the files of `[export]` beside a trained arm's PEFT folder:
    `adapters/<arm>/<study>-<arm>.safetensors` and so on.

    An adapter that a format cannot hold is a warning in the log, since the training itself stands.
    """
    written = []
    folder = run_dir.adapters_dir / arm.name
    for layout in config.export.formats:
        name = f"{config.name}-{arm.name}"
        try:
            written.append(
                _write_layout(
                    run_dir,
                    config,
                    arm,
                    folder,
                    layout,
                    folder / export_name(name, layout),
                    config.export.dtype,
                    name,
                )
            )
        except AdapterError as error:
            log.warning("export   %s: no %s file: %s", arm.name, layout, error)
    return written


def export_arm(
    run_dir: RunDir,
    config: StudyConfig,
    arm_name: str,
    layout: Format,
    out: Path | None = None,
    dtype: Dtype | None = None,
    name: str | None = None,
    checkpoint: Literal["best", "last"] = "last",
    force: bool = False,
) -> Written:
    """Write one trained arm of a run in any format; the merged ones load the run's base.

    By default the file lies in the current folder and is called after study and arm. Raises `ConfigError` for
    an arm or checkpoint that is not there and for an `out` that exists, unless `force`; `AdapterError` as
    `save_adapter` and `merge_weights` do.
    """
    arms = {arm.name: arm for arm in config.expand_arms()}
    if arm_name not in arms:
        raise ConfigError(f"--arm {arm_name!r}: not an arm of this run: choose one of {', '.join(arms)}")
    folder = run_dir.adapters_dir / arm_name / ("best" if checkpoint == "best" else "")
    if not any((folder / part / PEFT_WEIGHTS).is_file() for part in ("", "unet", "text_encoder")):
        kept = (
            " (train.keep_best keeps it)"
            if checkpoint == "best"
            else ": train it, or choose one that did not fail"
        )
        raise ConfigError(f"{folder}: no {checkpoint} adapter of arm {arm_name!r} here{kept}")
    name = plain_name(name or f"{config.name}-{arm_name}" + ("-best" if checkpoint == "best" else ""))
    out, dtype = out or Path(export_name(name, layout)), dtype or default_dtype(layout)
    require_free(out, force)
    run_dir.require_unchanged(arm_name)
    if layout in _LAYOUTS:
        return _write_layout(run_dir, config, arms[arm_name], folder, _LAYOUTS[layout], out, dtype, name)
    return write_merged(config.base, load_adapter(folder), out, layout, dtype, name)


def _write_layout(
    run_dir: RunDir,
    config: StudyConfig,
    arm: Arm,
    folder: Path,
    layout: Layout,
    out: Path,
    dtype: Dtype,
    name: str,
) -> Written:
    """One adapter file of a run, with the run's metadata."""
    adapter = load_adapter(folder)
    manifest = run_dir.manifest()
    metadata = kohya_metadata(
        adapter,
        name,
        _training_facts(run_dir, config, arm),
        started=datetime.datetime.fromisoformat(manifest["started"]) if "started" in manifest else None,
        resolution_px=config.data.resolution_px,
        prediction_type=manifest.get("base", {}).get("prediction_type", "epsilon"),
    )
    return _noted(save_adapter(adapter, out, layout, dtype, metadata), adapter)


def convert(
    source: Path,
    out: Path,
    layout: Format,
    dtype: Dtype | None = None,
    name: str | None = None,
    base: str | None = None,
    force: bool = False,
) -> Written:
    """Write an adapter file or folder of any known layout in another one, or merged into `base` (a model as
    `base.model` names it).

    Training metadata of the source are kept in a kohya or diffusers file. Raises `ConfigError` for an `out`
    that exists, unless `force`, and for a merged format without `base`; `AdapterError` as `load_adapter` and
    `save_adapter` do.
    """
    require_free(out, force)
    dtype = dtype or default_dtype(layout)
    adapter = load_adapter(source)
    name = plain_name(name) if name else made_plain(adapter.metadata.get("ss_output_name") or out.stem)
    if layout not in _LAYOUTS:
        if base is None:
            raise ConfigError(f"--format {layout}: needs the model to merge into: give --base")
        return write_merged(BaseSection(model=base), adapter, out, layout, dtype, name)
    return write_adapter(adapter, out, _LAYOUTS[layout], dtype, name)


def write_adapter(adapter: Adapter, out: Path, layout: Layout, dtype: Dtype, name: str) -> Written:
    """Write an adapter under a new name, with the training metadata of the file it came from; raises as
    `save_adapter` does.
    """
    # These are the new file's own, not its source's.
    own = ["ss_output_name", "ss_network_dim", "ss_network_alpha", "modelspec.title", "modelspec.hash_sha256"]
    if not misfits(adapter):  # whatever its source's said
        own += ["ss_v2", "ss_base_model_version", "modelspec.architecture"]
    kept = {
        key: value
        for key, value in adapter.metadata.items()
        if key.startswith(("ss_", "modelspec.")) and key not in own
    }
    training = {key: value for key, value in kept.items() if key.startswith("ss_")}
    return _noted(
        save_adapter(adapter, out, layout, dtype, {**kohya_metadata(adapter, name, training), **kept}),
        adapter,
    )


def _noted(written: Written, adapter: Adapter) -> Written:
    if not (others := misfits(adapter)):
        return written
    count = f"{len(others)} of {len(adapter.modules)}"
    note = (
        f"{count} modules do not fit Stable Diffusion v1.5, the first is {others[0]}: only the base it was "
        "trained on can use it"
    )
    return Written(written.path, written.num_bytes, written.rounding, (*written.notes, note))


def plain_name(name: str) -> str:
    """`name` if it can stand in a file name and in WebUI's prompts; raises `ConfigError` otherwise."""
    if not re.fullmatch(r"[\w][\w .+-]{0,99}", name) or name.endswith("."):
        raise ConfigError(
            f"--name {name[:200]!r}: use letters, digits, spaces and . _ + -, at most 100 of them"
        )
    return name


def made_plain(text: str) -> str:
    """`text` with what cannot stand in a name replaced by underscores."""
    return re.sub(r"[^\w.+-]+|^[^\w]+|\.+$", "_", text)[:100]


def require_free(path: Path, force: bool) -> None:
    """Raise `ConfigError` where `path` exists, unless `force` and it is a file, a model folder or a PEFT
    folder.
    """
    if not path.exists():
        return
    if not force:
        raise ConfigError(f"{path}: exists: name another path, or replace it with --force")
    marks = ("model_index.json", PEFT_CONFIG, f"unet/{PEFT_CONFIG}", f"text_encoder/{PEFT_CONFIG}")
    if path.is_dir() and not any((path / mark).is_file() for mark in marks):
        raise ConfigError(
            f"{path}: is a folder without a model or an adapter in it, which --force does not replace: "
            "name another path"
        )


# -- merging -------------------------------------------------------------------------------------------------


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
    """The weights of a model with an adapter added: W + strength * scale * up @ down, in float32, then in
    `dtype`.

    `state` maps `unet.<parameter>` and `text_encoder.<parameter>` to weights, and is left alone; tensors that
    no module names are passed on as they are. `dtype` None keeps each weight's own. DoRA's weights are W' = m
    (W + U) / ||W + U||, at other strengths W + strength (W' - W) (Liu et al. 2024). Raises `AdapterError` for
    modules that `state` lacks, shapes that differ, and results beyond the range of the dtype.
    """
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
        exact, update = _merged(state[key].float(), module, strength, path)
        merged[key] = exact.to(dtype or state[key].dtype)
        if not merged[key].isfinite().all():
            raise AdapterError(
                f"{path}: the merged weight is beyond the range of {merged[key].dtype}: choose bf16 or fp32"
            )
        error += float((merged[key].double() - exact.double()).square().sum())
        norm += float(update.double().square().sum())
    return merged, MergeReport(len(places), math.sqrt(error / norm) if norm else 0.0)


def _weight_key(path: str, state: Mapping[str, torch.Tensor]) -> str | None:
    """The name of a module's weight, with or without the `text_model.` that transformers 5 dropped."""
    names = (f"{path}.weight", f"{path}.weight".replace("text_encoder.text_model.", "text_encoder.", 1))
    return next((name for name in names if name in state), None)


def _merged(
    weight: torch.Tensor, module: LoraModule, strength: float, path: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The merged weight in float32, and what it adds to `weight`."""
    update = module.update().to(weight.device)
    if update.numel() != weight.numel() or module.weight_shape[:2] != weight.shape[:2]:
        raise AdapterError(
            f"{path}: the adapter is for a weight of shape {list(module.weight_shape)}, the base's is "
            f"{list(weight.shape)}"
        )
    update = update.reshape(weight.shape)
    if module.dora_scale is not None:
        adapted = weight + update
        other_axes = [axis for axis, extent in enumerate(module.dora_scale.shape) if extent == 1]
        magnitudes = module.dora_scale.to(weight.device, torch.float32)
        scale = magnitudes / torch.linalg.vector_norm(adapted, dim=other_axes, keepdim=True)
        update = adapted * scale - weight
    return weight + strength * update, strength * update


@contextmanager
def merged_into(base: Base, adapter: Adapter, dtype: torch.dtype | None = None) -> Iterator[MergeReport]:
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
    merged, report = merge_weights(state, adapter, dtype=dtype)
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
    section: BaseSection, adapter: Adapter, out: Path, layout: Format, dtype: Dtype, name: str
) -> Written:
    """Write a whole model with an adapter merged in: a diffusers folder, or one file in the original LDM
    layout.

    Merging is done in float32. Raises `AdapterError` where the base had this very adapter merged in before.
    """
    base = load_base(section, torch.device("cpu"), "fp32")
    digest = adapter_digest(adapter)
    before = _merged_before(section, base)
    if digest in before:
        raise AdapterError(
            f"{section.model}: has this adapter merged in already: merge into the model it was trained on"
        )
    save = _save_pipeline if layout == "merged-diffusers" else _save_checkpoint
    with merged_into(base, adapter, DTYPES[dtype]) as report:
        for part in (*base.components.values(), base.vae):
            part.to(DTYPES[dtype])
        num_bytes = save(base, out, name, [*before, digest])
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


def _save_pipeline(base: Base, folder: Path, name: str, merged: list[str]) -> int:
    """Write a complete diffusers pipeline folder; returns its size in bytes."""
    partial = folder.with_name(f".{folder.name}.partial")
    with storage_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        base.build_pipeline().save_pretrained(partial, safe_serialization=True)
        write_json(partial / _MERGED_JSON, {"name": name, "merged": merged})
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _save_checkpoint(base: Base, path: Path, name: str, merged: list[str]) -> int:
    """Write one checkpoint file in the original layout; returns its size in bytes."""
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1" if is_sd15(base) else "other",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": name,
        "modelspec.prediction_type": "v" if base.prediction_type == "v_prediction" else "epsilon",
        "lorascope_merged": json.dumps(merged),
    }
    save_ldm(base, path, base.unet.dtype, metadata)
    return path.stat().st_size
