"""What leaves a run: adapter files with the run's metadata, conversion, names that are taken or free."""

import datetime
import re
from pathlib import Path
from typing import Any, Literal

from lorascope.adapters.adapter import Adapter, misfits
from lorascope.adapters.files import STRENGTH, Dtype, Layout, Written, load_adapter, save_adapter
from lorascope.adapters.merge import MergedFormat, write_merged
from lorascope.adapters.metadata import kohya_metadata, tag_frequency
from lorascope.arms import Arm
from lorascope.console import log
from lorascope.errors import AdapterError, ConfigError, StorageError
from lorascope.run_folder import RunDir
from lorascope.schema import StudyConfig
from lorascope.sections import BaseSection
from lorascope.store import PEFT_CONFIG, PEFT_WEIGHTS, access_errors, export_name

Format = Literal[Layout, MergedFormat]
_MAX_STRENGTH = 2.0  # beyond, a percentage or a slip of the hand is likelier than a wish


def _training_facts(run_dir: RunDir, config: StudyConfig, arm: Arm) -> dict[str, Any]:
    """The `ss_` keys of a trained arm, from what the run folder holds."""
    training = run_dir.training(arm.name, "steps", "epochs")
    data = run_dir.data()
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


@access_errors(StorageError)
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
    strength: float = 1.0,
    as_lora: bool = False,
) -> Written:
    """Write one trained arm of a run in any format; the merged ones load the run's base.

    By default the file lies in the current folder and is called after study and arm. `strength`, above 0 and
    at most 2, goes into alpha, or into the merged weights: the file at weight 1 is the arm at that weight.
    `as_lora` writes T-LoRA as LoRA of its full rank, for programs that know no other.
    Raises `ConfigError` for an arm or checkpoint that is not there, for a strength out of range and for an
    `out` that exists, unless `force`; `AdapterError` as `save_adapter` and `merge_weights` do.
    """
    if not 0 < strength <= _MAX_STRENGTH:
        raise ConfigError(
            f"--strength {strength:g}: must be above 0 and at most {_MAX_STRENGTH:g}: give the weight that "
            "you draw with, such as 0.6"
        )
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
    marks = ("-best" if checkpoint == "best" else "") + ("" if strength == 1 else f"-strength-{strength:g}")
    name = plain_name(name or f"{config.name}-{arm_name}{marks}")
    out, dtype = out or Path(export_name(name, layout)), dtype or default_dtype(layout)
    require_free(out, force)
    run_dir.require_unchanged(arm_name)
    match layout:
        case "merged-diffusers" | "merged-ldm":
            adapter = load_adapter(folder)
            adapter = adapter.as_lora() if as_lora else adapter
            return write_merged(config.base, adapter, out, layout, dtype, name, strength)
        case _:
            arm = arms[arm_name]
            return _write_layout(run_dir, config, arm, folder, layout, out, dtype, name, strength, as_lora)


def _write_layout(
    run_dir: RunDir,
    config: StudyConfig,
    arm: Arm,
    folder: Path,
    layout: Layout,
    out: Path,
    dtype: Dtype,
    name: str,
    strength: float = 1.0,
    as_lora: bool = False,
) -> Written:
    """One adapter file of a run, with the run's metadata."""
    adapter = load_adapter(folder)
    if as_lora:
        adapter = adapter.as_lora()
    if strength != 1:
        adapter = adapter.at_strength(strength)
    manifest = run_dir.manifest()
    metadata = kohya_metadata(
        adapter,
        name,
        _training_facts(run_dir, config, arm),
        started=datetime.datetime.fromisoformat(manifest["started"]) if "started" in manifest else None,
        resolution_px=config.data.resolution_px,
        prediction_type=manifest.get("base", {}).get("prediction_type", "epsilon"),
    )
    if strength != 1:
        metadata[STRENGTH] = str(strength)
    return _noted(save_adapter(adapter, out, layout, dtype, metadata), adapter)


@access_errors(AdapterError)
def convert(
    source: Path,
    out: Path,
    layout: Format,
    dtype: Dtype | None = None,
    name: str | None = None,
    base: str | None = None,
    force: bool = False,
    as_lora: bool = False,
) -> Written:
    """Write an adapter file or folder of any known layout in another one, or merged into `base` (a model as
    `base.model` names it).

    Training metadata of the source are kept in a kohya or diffusers file. `as_lora` is as of `export_arm`.
    Raises `ConfigError` for an `out` that exists, unless `force`, and for a merged format without `base`;
    `AdapterError` as `load_adapter` and `save_adapter` do.
    """
    require_free(out, force)
    dtype = dtype or default_dtype(layout)
    adapter = load_adapter(source)
    if as_lora:
        adapter = adapter.as_lora()
    name = plain_name(name) if name else made_plain(adapter.metadata.get("ss_output_name") or out.stem)
    match layout:
        case "merged-diffusers" | "merged-ldm":
            if base is None:
                raise ConfigError(f"--format {layout}: needs the model to merge into: give --base")
            return write_merged(BaseSection(model=base), adapter, out, layout, dtype, name)
        case _:
            return write_adapter(adapter, out, layout, dtype, name)


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
        if (key.startswith(("ss_", "modelspec.")) or key == STRENGTH) and key not in own
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
    files = (PEFT_CONFIG, PEFT_WEIGHTS)
    marks = (
        "model_index.json",
        *(f"{part}{file}" for part in ("", "unet/", "text_encoder/") for file in files),
    )
    if path.is_dir() and not any((path / mark).is_file() for mark in marks):
        raise ConfigError(
            f"{path}: is a folder without a model or an adapter in it, which --force does not replace: "
            "name another path"
        )
