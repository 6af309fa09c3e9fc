"""What `lorascope inspect FILE --json` says, in words for a page."""

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorascope.adapters.readers import SAYS
from lorascope.adapters.schedule import SCHEDULE_KEY
from lorascope.console import size
from lorascope.errors import EXIT_DONE, EXIT_GATE_REJECTED
from lorascope.store import digest_json, write_text
from lorascope.web.commands import as_argument, run_command
from lorascope.web.workspace import Workspace

_MAX_TEXT = 400  # characters of a stranger's text
_MAX_ROWS = 2000  # modules in the table
_CSS = {"yes": "yes", "in part": "caution", "nothing": "no", "refuses": "no"}
_SIGNS = {"yes": "✓", "in part": "!", "nothing": "✕", "refuses": "✕"}
# Metadata that say how a file was trained: key, and what it is called here.
_TRAINING = {
    "ss_output_name": "Name",
    "modelspec.title": "Title",
    "modelspec.author": "Author",
    "modelspec.license": "Licence",
    "modelspec.trigger_phrase": "Trigger phrase",
    "ss_sd_model_name": "Trained on",
    "ss_base_model_version": "Base version",
    "ss_network_module": "Network",
    "ss_network_args": "Network options",
    "ss_learning_rate": "Learning rate",
    "ss_text_encoder_lr": "Learning rate, text encoder",
    "ss_optimizer": "Optimizer",
    "ss_lr_scheduler": "Schedule",
    "ss_num_train_images": "Pictures",
    "ss_num_epochs": "Epochs",
    "ss_epoch": "Epoch saved",
    "ss_steps": "Steps",
    "ss_batch_size_per_device": "Batch size",
    "ss_resolution": "Resolution",
    "ss_clip_skip": "Clip skip",
    "ss_noise_offset": "Noise offset",
    "ss_min_snr_gamma": "min-SNR gamma",
    "ss_seed": "Seed",
    "ss_training_started_at": "Training started",
    "ss_training_comment": "Comment",
    "lorascope_strength": "Strength in alpha",
}


@dataclass(frozen=True)
class ReaderRow:
    """What one program would do with the file."""

    reader: str
    answer: str
    css: str
    sign: str
    text: str


@dataclass(frozen=True)
class InspectionView:
    """An inspection as a page shows it. `state` is yes, caution or no; rows are label and text."""

    what: str
    facts: str
    state: str
    answer: str
    readers: tuple[ReaderRow, ...]
    figures: tuple[tuple[str, str], ...]
    faults: tuple[str, ...]
    training: tuple[tuple[str, str], ...]
    modules: tuple[tuple[str, ...], ...]
    num_modules: int
    is_adapter: bool
    is_scheduled: bool  # T-LoRA, which most formats cannot hold


def look_into(workspace: Workspace, path: Path) -> InspectionView:
    """What `lorascope inspect` says of a file or folder; kept until it changes. Raises as `run_command`."""
    kept = _kept(workspace, path)
    if not kept.exists():
        arguments = inspect_arguments(workspace, path)
        ran = run_command(workspace, arguments, fine=(EXIT_DONE, EXIT_GATE_REJECTED))
        write_text(kept, ran.output)
    return view_of(json.loads(kept.read_text(encoding="utf-8")))


def was_looked_into(workspace: Workspace, path: Path) -> bool:
    """Whether the answer is there already."""
    return _kept(workspace, path).exists()


def inspect_arguments(workspace: Workspace, path: Path) -> list[str]:
    """The command that looks into a file."""
    return ["inspect", as_argument(workspace, path), "--json"]


def _kept(workspace: Workspace, path: Path) -> Path:
    members = sorted(path.rglob("*")) if path.is_dir() else [path]
    stamps = [[str(item), item.stat().st_mtime_ns, item.stat().st_size] for item in members]
    return workspace.state_dir / "inspections" / f"{digest_json(stamps)[:32]}.json"


def view_of(found: Mapping[str, Any]) -> InspectionView:
    """An inspection in words."""
    modules: list[dict[str, Any]] = found["modules"]
    facts = [
        found["layout"] or "",
        ", ".join(found["dtypes"]),
        size(found["num_bytes"]) if found["num_bytes"] else "",
        f"{found['num_parameters']:,} parameters" if found["num_parameters"] else "",
    ]
    state, answer = _answer(found)
    return InspectionView(
        what=_cut(found["what"][:1].upper() + found["what"][1:]),
        facts=", ".join(filter(None, facts)),
        state=state,
        answer=answer,
        readers=tuple(_reader(name, row, modules) for name, row in found["readers"].items()),
        figures=tuple(_figures(found, modules)) if modules else (),
        faults=tuple(_faults(found, modules)),
        training=tuple(_training(found["metadata"])),
        modules=tuple(map(_module_row, modules[:_MAX_ROWS])),
        num_modules=len(modules),
        is_adapter=bool(modules),
        is_scheduled=SCHEDULE_KEY in found["metadata"],
    )


def _answer(found: Mapping[str, Any]) -> tuple[str, str]:
    """Whether the file does anything on Stable Diffusion v1.5, in a sentence."""
    if found["dead_because"]:
        reason = found["dead_because"] if found["modules"] else f"it is {found['what']}"
        return "no", _cut(f"No: {reason}.")
    if not found["readers"]:
        return "caution", _cut(
            f"It is made for {found['family']}, and its layers are not Stable Diffusion v1.5's: there the "
            "programs do nothing with it. On its own base it may well work."
        )
    groups: dict[str, list[str]] = {}
    for reader, row in found["readers"].items():
        groups.setdefault(row["answer"], []).append(reader)
    words = {
        "yes": "all of it in {}",
        "in part": "in part in {}",
        "nothing": "nothing in {}",
        "refuses": "refused by {}",
    }
    said = "; ".join(words[key].format(_listed(groups[key])) for key in words if key in groups)
    if "yes" in groups:
        return "yes", f"Yes, {said}."
    return ("caution", f"Only {said}.") if "in part" in groups else ("no", f"No: {said}.")


def _reader(name: str, row: Mapping[str, Any], modules: Sequence[Mapping[str, Any]]) -> ReaderRow:
    total, ignored = row["modules"], row["ignored"]
    passed = f"passed over {SAYS.get(name, 'by it')}"
    match row["answer"]:
        case "refuses":
            text = row["refusal"] or ""
        case "nothing":
            text = f"None of the {total} modules has a name and shape that it looks for; {passed}."
        case "in part":
            names = set(ignored)
            blocks = Counter(module["block"] for module in modules if module["name"] in names)
            lost = ", ".join(f"{count} {block}" for block, count in blocks.most_common())
            text = f"{total - len(ignored)} of {total} modules; {passed}: {lost}, such as {ignored[0]}."
        case _:
            text = f"All {total} modules."
    text = " ".join([text, *(f"{note[:1].upper()}{note[1:]}." for note in row["notes"])])
    return ReaderRow(name, row["answer"], _CSS[row["answer"]], _SIGNS[row["answer"]], _cut(text))


def _figures(found: Mapping[str, Any], modules: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    blocks = Counter(module["block"] for module in modules)
    rows = [
        ("Modules", f"{len(modules):,}: " + ", ".join(f"{n} {block}" for block, n in blocks.most_common()))
    ]
    groups = Counter(
        (module["rank"], module["alpha"], module["scale"])
        for module in modules
        if module["scale"] is not None
    )
    several = [
        f"rank {rank}, alpha {'none' if alpha is None else f'{alpha:g}'} (scale {scale:.4g})"
        + ("" if len(groups) == 1 else f" in {count} modules")
        for (rank, alpha, scale), count in groups.most_common(8)
    ]
    if several:
        more = f"; and {len(groups) - 8} more" if len(groups) > 8 else ""
        rows.append(("Rank and alpha", "; ".join(several) + more))
    norms = [module["norm"] for module in modules if module["norm"] is not None]
    if norms:
        figures = f"least {min(norms):.3g}, median {statistics.median(norms):.3g}, most {max(norms):.3g}"
        rows.append(("Size of the update", f"Frobenius norm by module: {figures}"))
    used = [module["rank_used"] for module in modules if module["rank_used"]]
    if used:
        nominal = statistics.median(module["rank"] or 0 for module in modules if module["norm"] is not None)
        text = f"95 % of the energy in {statistics.median(used):g} of {nominal:g} (median)"
        rows.append(("Rank used", f"{text}, in {min(used)} to {max(used)} over the modules"))
    if found["hashes"]:
        rows.append(("Hashes", "; ".join(f"{key} {value}" for key, value in found["hashes"].items())))
    return [(label, _cut(text)) for label, text in rows]


def _faults(found: Mapping[str, Any], modules: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with the file, or what a user should know besides."""
    faults = []
    if bad := [module for module in modules if module["num_not_finite"]]:
        count = sum(module["num_not_finite"] for module in bad)
        faults.append(
            f"{count:,} values are NaN or infinite, in {len(bad)} modules; the first is {bad[0]['name']}."
        )
    if zero := sum(bool(module["is_zero"]) for module in modules):
        faults.append(f"{zero} of {len(modules)} modules change nothing: their update is exactly zero.")
    faults += [f"{remark[:1].upper()}{remark[1:]}." for remark in found["remarks"]]
    return [_cut(fault) for fault in faults]


def _training(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """The metadata in plain words."""
    rows = []
    for key, label in _TRAINING.items():
        value = str(metadata.get(key, "")).strip()
        if value and value not in ("None", "{}", "False"):
            rows.append((label, _cut(_date(value) if key == "ss_training_started_at" else value)))
    if tags := _tags(str(metadata.get("ss_tag_frequency", ""))):
        rows.append(("Commonest tags", _cut(tags)))
    return rows


def _date(value: str) -> str:
    try:
        return datetime.fromtimestamp(float(value), UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return value


def _tags(text: str) -> str:
    try:
        counts: Counter[str] = Counter()
        for tags in json.loads(text).values():
            counts.update({str(tag).strip(): int(count) for tag, count in tags.items()})
        return ", ".join(f"{tag[:40]} ({count})" for tag, count in counts.most_common(10))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return ""


def _module_row(module: Mapping[str, Any]) -> tuple[str, ...]:
    """Name, kind, rank, rank used, alpha, norm, as text."""
    figures = (module["rank"], module["rank_used"], module["alpha"], module["norm"])
    shown = ("" if value is None else f"{value:.4g}" for value in figures)
    name = (module["path"] or module["name"]).removeprefix("unet.")
    return (_cut(name), str(module["kind"]), *shown)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _cut(text: str) -> str:
    """A text of others on one line, not endless."""
    text = " ".join(str(text).split())
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 3]}..."
