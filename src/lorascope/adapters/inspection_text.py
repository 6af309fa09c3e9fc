"""An inspection in words for a terminal."""

import json
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from lorascope.adapters.inspection import Inspection, clean
from lorascope.adapters.peft_config import adapter_metadata
from lorascope.adapters.readers import SAYS, Reading
from lorascope.adapters.recognition import NEAR_ZERO_RMS, ModuleFacts
from lorascope.console import size

_WIDTH = 100  # columns
_BLOCKS = ("attention", "feed-forward", "projection", "convolution", "time embedding", "norm", "text encoder")
# Metadata that say how a file was trained: key, and what it is called here.
_TRAINING = {
    "ss_output_name": "name",
    "modelspec.title": "title",
    "modelspec.author": "author",
    "modelspec.license": "licence",
    "modelspec.trigger_phrase": "trigger phrase",
    "modelspec.architecture": "architecture",
    "ss_sd_model_name": "trained on",
    "ss_base_model_version": "base version",
    "ss_network_module": "network",
    "ss_network_args": "network options",
    "ss_learning_rate": "learning rate",
    "ss_unet_lr": "learning rate, U-Net",
    "ss_text_encoder_lr": "learning rate, text encoder",
    "ss_optimizer": "optimizer",
    "ss_lr_scheduler": "schedule",
    "ss_num_train_images": "pictures",
    "ss_num_epochs": "epochs",
    "ss_epoch": "epoch saved",
    "ss_steps": "steps",
    "ss_max_train_steps": "steps planned",
    "ss_total_batch_size": "batch size",
    "ss_batch_size_per_device": "batch size",
    "ss_resolution": "resolution",
    "ss_clip_skip": "clip skip",
    "ss_noise_offset": "noise offset",
    "ss_min_snr_gamma": "min-SNR gamma",
    "ss_v_parameterization": "v-prediction",
    "ss_seed": "seed",
    "ss_training_started_at": "training started",
    "ss_training_comment": "comment",
    "lorascope_strength": "strength in alpha",
    "lora_adapter_metadata": "PEFT configuration",
}


def as_text(inspection: Inspection, list_modules: bool = False) -> str:
    """The whole inspection, at most 100 columns wide; with `list_modules` a line a module."""
    return "\n".join(_lines(inspection, list_modules))


def _lines(inspection: Inspection, list_modules: bool) -> list[str]:
    lines = [
        clean(str(inspection.path), 300),
        *_wrapped(clean(inspection.what[:1].upper() + inspection.what[1:]), ""),
    ]
    facts = [
        inspection.layout,
        ", ".join(inspection.dtypes),
        size(inspection.num_bytes),
        f"{inspection.num_parameters:,} parameters",
    ]
    if inspection.num_bytes:
        lines += _wrapped(", ".join(fact for fact in facts if fact and not fact.startswith("0 ")), "")
    lines += ["", "Would this do anything on Stable Diffusion v1.5?", *_answer(inspection)]
    if inspection.modules:
        lines += ["", *_figures(inspection)]
    if list_modules and inspection.modules:
        lines += ["", *_module_table(inspection.modules)]
    if inspection.hashes:
        lines += [
            "",
            *_row_lines("Hashes", "; ".join(f"{key} {value}" for key, value in inspection.hashes.items())),
        ]
    if training := _training(inspection.metadata):
        lines += ["", "What its metadata say", *training]
    elif inspection.modules:
        lines += ["", *_row_lines("Metadata", "none that say how it was trained")]
    return lines


def _answer(inspection: Inspection) -> list[str]:
    if inspection.dead_because:
        reason = "it is " + inspection.what if not inspection.modules else inspection.dead_because
        lines = _wrapped(f"No: {clean(reason, 300)}.", "  ")
        return (
            lines
            if not inspection.readings
            else [*lines, "  What the programs would take up of it all the same:", *_readers(inspection)]
        )
    if not inspection.readings:
        return _wrapped(
            f"No: it is made for {inspection.family}, and its layers are not Stable Diffusion v1.5's. "
            "On its own base it may well.",
            "  ",
        )
    return [*_wrapped(_summary(inspection.readings), "  "), *_readers(inspection)]


def _summary(readings: Iterable[Reading]) -> str:
    """The answer in a sentence: which programs take all, some or none of it."""
    groups: dict[str, list[str]] = {}
    for reading in readings:
        groups.setdefault(reading.verdict, []).append(reading.reader)
    words = {
        "yes": "Yes, all of it in {}",
        "in part": "in part in {}",
        "nothing": "nothing in {}",
        "refuses": "refused by {}",
    }
    said = [words[verdict].format(_listed(groups[verdict])) for verdict in words if verdict in groups]
    start = "" if "yes" in groups else "Only " if "in part" in groups else "No: "
    return f"{start}{'; '.join(said)}."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _readers(inspection: Inspection) -> list[str]:
    lines = []
    total = len(inspection.modules)
    for reading in inspection.readings:
        match reading.verdict:
            case "refuses":
                text = f"refuses: {clean(str(reading.refusal))}"
            case "nothing":
                text = (
                    f"nothing: none of the {total} modules has a name and shape it looks for; passed over "
                    f"{SAYS[reading.reader]}"
                )
            case "in part":
                taken, lost = total - len(reading.ignored), _lost(reading, inspection.modules)
                text = f"in part: {taken} of {total} modules; passed over {SAYS[reading.reader]}: {lost}"
            case _:
                text = f"yes, all {total} modules"
        lines += _row_lines(reading.reader, "; ".join([text, *map(clean, reading.notes)]), indent="  ")
    return lines


def _lost(reading: Reading, modules: tuple[ModuleFacts, ...]) -> str:
    """Which kinds of layers are lost, with one name."""
    ignored = set(reading.ignored)
    blocks = Counter(module.block for module in modules if module.name in ignored)
    counts = ", ".join(f"{count} {block}" for block, count in blocks.most_common())
    return f"{counts} (such as {clean(reading.ignored[0])})"


def _row_lines(label: str, text: str, indent: str = "") -> list[str]:
    start = f"{indent}{label:<12}"
    return textwrap.wrap(
        text, _WIDTH, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False
    ) or [start]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def _figures(inspection: Inspection) -> list[str]:
    modules = inspection.modules
    blocks = Counter(module.block for module in modules)
    lines = _row_lines(
        "Modules",
        f"{len(modules)}: "
        + ", ".join(f"{blocks[block]} {block}" for block in (*_BLOCKS, "other") if blocks[block]),
    )
    lines += _ranks([module for module in modules if module.scale is not None])
    measured = [module for module in modules if module.norm is not None]
    if measured:
        norms = [float(module.norm or 0) for module in measured]
        most = max(measured, key=lambda module: module.norm or 0)
        figures = (
            f"least {min(norms):.3g}, median {statistics.median(norms):.3g}, most {max(norms):.3g} in "
            f"{clean(most.name)}"
        )
        of = "scale * B A" if all(module.kind == "LoRA" for module in measured) else "the update"
        lines += _row_lines("Norms", f"Frobenius norm of {of}: {figures}")
        used = [module.rank_used for module in measured if module.rank_used]
        if used:
            nominal = statistics.median(module.rank or 0 for module in measured)
            text = (
                f"95 % of the energy in {statistics.median(used):g} of {nominal:g} (median), "
                f"in {min(used)} to {max(used)} over the modules"
            )
            lines += _row_lines("Rank used", text)
    near, zero = sum(module.is_near_zero for module in modules), sum(module.is_zero for module in modules)
    meaning = (
        f"near zero is a root mean square of the update below {NEAR_ZERO_RMS:g}, which half precision "
        "rounds away"
    )
    lines += _row_lines(
        "Near zero",
        (
            f"{near} of {len(modules)} modules ({near / len(modules):.0%}), {zero} of them exactly zero; "
            f"{meaning}"
        ),
    )
    bad = [module for module in modules if module.num_not_finite]
    values = (
        f"{sum(module.num_not_finite for module in bad):,} values in {len(bad)} modules, the first is "
        f"{clean(bad[0].name)}"
        if bad
        else "none"
    )
    lines += _row_lines("NaN or inf", values)
    for remark in inspection.remarks:
        lines += _row_lines("Note", remark)
    return lines


def _ranks(modules: list[ModuleFacts]) -> list[str]:
    """Rank and alpha in one line where all are equal, else a table."""
    groups = Counter((module.rank, module.alpha, module.scale) for module in modules)
    if not groups:
        return []
    if len(groups) == 1:
        ((rank, alpha, scale),) = groups
        return _row_lines(
            "Rank", f"{rank}, alpha {_number(alpha)}, so the scale alpha / rank is {scale:g}, in every module"
        )
    lines = [f"{'Rank':<12}{'rank':>6}{'alpha':>10}{'scale':>10}{'modules':>10}  which"]
    for (rank, alpha, scale), count in groups.most_common(8):
        blocks = Counter(
            module.block
            for module in modules
            if (module.rank, module.alpha, module.scale) == (rank, alpha, scale)
        )
        which = ", ".join(f"{number} {block}" for block, number in blocks.most_common())
        lines += textwrap.wrap(
            f"{'':<12}{rank:>6}{_number(alpha):>10}{scale:>10.4g}{count:>10}  {which}",
            _WIDTH,
            subsequent_indent=" " * 50,
            drop_whitespace=False,
        )
    if len(groups) > 8:
        lines.append(f"{'':<12}and {len(groups) - 8} more pairs of rank and alpha: --modules lists them")
    return lines


def _number(alpha: float | None) -> str:
    return "none" if alpha is None else f"{alpha:g}"


def _module_table(modules: tuple[ModuleFacts, ...]) -> list[str]:
    lines = [f"{'rank':>5}{'used':>5}{'alpha':>8}{'scale':>7}{'norm':>9}  module"]
    for module in modules:
        rank, used = ("-" if value is None else str(value) for value in (module.rank, module.rank_used))
        scale = "-" if module.scale is None else f"{module.scale:.3g}"
        norm = "NaN" if module.num_not_finite else "-" if module.norm is None else f"{module.norm:.3g}"
        alpha = "none" if module.alpha is None else f"{module.alpha:.4g}"
        start = (
            f"{rank:>5}{used:>5}{alpha if module.kind == 'LoRA' else module.kind[:7]:>8}{scale:>7}{norm:>9}  "
        )
        name = (module.path or module.name).removeprefix("unet.")
        lines += textwrap.wrap(
            clean(name),
            _WIDTH,
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_on_hyphens=False,
        )
    return lines


def _training(metadata: Mapping[str, str]) -> list[str]:
    """The metadata in plain words, a line each."""
    lines: list[str] = []
    seen = set()
    for key, label in _TRAINING.items():
        value = metadata.get(key, "").strip()
        if not value or value in ("None", "{}", "False") or label in seen:
            continue
        seen.add(label)
        shown = (
            _date(value)
            if key == "ss_training_started_at"
            else _configuration(value)
            if key == "lora_adapter_metadata"
            else value
        )
        lines += textwrap.wrap(
            clean(shown),
            _WIDTH,
            initial_indent=f"  {label:<28}",
            subsequent_indent=" " * 30,
            break_on_hyphens=False,
        )
    if tags := _tags(metadata.get("ss_tag_frequency", "")):
        lines += textwrap.wrap(
            tags, _WIDTH, initial_indent=f"  {'commonest tags':<28}", subsequent_indent=" " * 30
        )
    if hidden := len([key for key in metadata if key not in _TRAINING and key != "ss_tag_frequency"]):
        lines.append(f"  and {hidden} more keys (--json prints all)")
    return lines if seen or tags else []


def _date(value: str) -> str:
    try:
        return datetime.fromtimestamp(float(value), UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return value


def _configuration(text: str) -> str:
    """What matters of PEFT's configuration in diffusers' `lora_adapter_metadata`."""
    content = adapter_metadata({"lora_adapter_metadata": text})
    known = ("r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights")
    found = [
        f"{key} = {json.dumps(value)}"
        for key, value in content.items()
        if key.rpartition(".")[2] in known and value is not False
    ]
    return ", ".join(found) or text


def _tags(text: str) -> str:
    """The ten commonest tags of `ss_tag_frequency`: a JSON object of folders with counts by tag."""
    try:
        folders = json.loads(text)
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({str(tag).strip(): int(count) for tag, count in tags.items()})
        return ", ".join(f"{clean(tag, 40)} ({count})" for tag, count in counts.most_common(10))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return ""
