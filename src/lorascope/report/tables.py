"""The report's tables: of arms, contrasts, the reference study and what a reader needs to repeat the run."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lorascope.arms import Arm
from lorascope.evaluation.scores import ALL, BASE, planned_contrasts
from lorascope.report.evidence import NOT_MEASURED, Facts, count
from lorascope.store import digest_bytes, digest_file

MAX_CONTRASTS = 12  # arms; with more, contrasts between neighbours say little and take long

# Settings of an arm with the form of their numbers, "s" of a word.
_SETTINGS = {
    "kind": "s",
    "rank": "d",
    "min_rank": "d",
    "mask_exponent": "g",
    "mask_when": "s",
    "alpha": "g",
    "init": "s",
    "layers": "s",
    "lr": "g",
    "lr_ratio": "g",
    "rank_dropout": "g",
    "max_weight_norm": "g",
    "gain": ".3g",
    "seed": "d",
    "batch_size": "d",
    "epochs": "d",
}
# Not told where all arms have the default.
_SELDOM = {
    "kind",
    "min_rank",
    "mask_exponent",
    "mask_when",
    "init",
    "layers",
    "lr_ratio",
    "rank_dropout",
    "max_weight_norm",
}

# The reference study as published: SD 1.5, 1,500 cartoon pictures, one GPU (its Table 1, Figure 1 and text).
REFERENCE: dict[str, dict[str, float]] = {
    "reference r16": {"normal": 29.2631, "normal std": 3.4643, "abstract": 23.3837, "abstract std": 2.4608,
                      "loss": 0.1192, "run_time_s": 4383, "memory": 16.2e9, "file": 16e6},
    "reference r64": {"normal": 19.7907, "normal std": 2.8496, "abstract": 22.1148, "abstract std": 1.5294,
                      "loss": 0.1266, "run_time_s": 4541, "memory": 16.6e9, "file": 64e6},
}  # fmt: skip


class Cell(NamedTuple):
    """One cell of a table; `value` is what it sorts by; `void` marks a missing number."""

    text: str
    value: float | None = None
    void: bool = False


class Column(NamedTuple):
    """The head of a table's column."""

    name: str
    numeric: bool = True


class TableRow(NamedTuple):
    """One row; `marked` rows stand out: the kept arm. One that `starts` has a line above it."""

    cells: tuple[Cell, ...]
    marked: bool = False
    starts: bool = False


@dataclass(frozen=True)
class Table:
    """A table as both the page and the Markdown show it; without columns it is its caption alone."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    sortable: bool = False
    title: str = ""

    @property
    def id(self) -> str:
        """A name for the page's anchors."""
        return "table-" + digest_bytes(self.caption.encode())[:8]


_BLANK = Cell("")


def cell(value: float | None, form: str = ".2f") -> Cell:
    """A number with a true minus sign, or `not measured`."""
    if value is None or not math.isfinite(value):
        return Cell(NOT_MEASURED, None, True)
    text = format(value, form)
    if not form.endswith("g"):  # `1e-4` keeps its hyphen
        text = text.replace("-", "\N{MINUS SIGN}")
    return Cell(text, float(value))


def interval(low: float | None, high: float | None) -> Cell:
    """A 95 % interval; it sorts by its lower bound."""
    if low is None or high is None:
        return cell(None)
    return Cell(f"{cell(low, '+.2f').text} to {cell(high, '+.2f').text}", low)


def row(*cells: Cell, marked: bool = False) -> TableRow:
    """A row of these cells."""
    return TableRow(cells, marked)


def build_arms_table(facts: Facts) -> Table:
    """Every arm of the study with what was measured: the reference study's Table 1 with the base as its first
    row.

    A setting that all arms share stands in the caption, the others in a column each.
    """
    categories = facts.scores.categories if facts.scores else ("normal", "abstract")
    shared = [
        key for key in _SETTINGS if len({_setting(arm, key).text for arm in facts.settings.values()}) == 1
    ]
    varied = [key for key in _SETTINGS if key not in shared]
    example = next(iter(facts.settings.values()))
    told = [
        key for key in shared if key not in _SELDOM or getattr(example, key) != Arm.model_fields[key].default
    ]
    best = {arm: (training.get("best") or {}).get("epoch") for arm, training in facts.training.items()}
    has_best = any(best.values())
    columns = (
        Column("arm", False),
        Column("verdict", False),
        *(Column(_in_words(key), _SETTINGS[key] != "s") for key in varied),
        *(Column(f"{category} (std)") for category in categories),
        Column("minus base"),
        Column("95 % interval"),
        Column("held-out loss"),
        *([Column("best epoch")] if has_best else []),
    )
    rows = []
    for arm in (BASE, *facts.settings):
        role = _role(facts, arm)
        cells = [
            Cell(arm),
            Cell(role),
            *_setting_cells(facts, arm, varied),
            *_mean_cells(facts, arm, categories),
            *_difference_cells(facts, arm),
        ]
        if has_best:
            cells.append(_BLANK if arm == BASE else cell(best.get(arm), "d"))
        rows.append(TableRow(tuple(cells), marked=role == "kept"))
    return Table(_arms_caption(facts, told, has_best), columns, tuple(rows), sortable=True)


def _in_words(key: str) -> str:
    return key.replace("_", " ")


def _role(facts: Facts, arm: str) -> str:
    """What the arm is in the verdict, or why it is not in it."""
    if arm in facts.failed:
        return "failed"
    return "not trained" if arm != BASE and arm not in facts.training else facts.role(arm)


def _setting_cells(facts: Facts, arm: str, keys: Iterable[str]) -> list[Cell]:
    setting = facts.settings.get(arm)  # the base has none
    return [_BLANK if setting is None else _setting(setting, key) for key in keys]


def _setting(arm: Arm, key: str) -> Cell:
    value, form = getattr(arm, key), _SETTINGS[key]
    if value is None:
        return Cell("none")
    if arm.kind == "full" and key in ("rank", "alpha"):
        return Cell("full", value)
    if arm.kind == "full" and key == "gain":
        return Cell("none")
    if isinstance(value, tuple):
        return Cell(", ".join(value))
    return Cell(value) if form == "s" else cell(value, form)


def _mean_cells(facts: Facts, arm: str, categories: Sequence[str]) -> list[Cell]:
    parts = [facts.summary.get((arm, category)) for category in categories]
    return [
        Cell(f"{part.mean:.2f} ({cell(part.std).text})", part.mean) if part else cell(None) for part in parts
    ]


def _difference_cells(facts: Facts, arm: str) -> list[Cell]:
    """Score minus base with its interval, and held-out loss minus the base's."""
    if arm == BASE:
        return [_BLANK] * 3
    effect, loss = facts.effects.get((arm, ALL)), facts.heldout_losses.get(arm)
    return [
        cell(effect.difference if effect else None, "+.2f"),
        interval(effect.low if effect else None, effect.high if effect else None),
        cell(loss.difference if loss else None, "+.4f"),
    ]


def _arms_caption(facts: Facts, shared: Sequence[str], has_best: bool) -> str:
    """What the columns are, the settings of all arms, and which arms are compared at equal lr or gain."""
    parts = [
        f"CLIP score of the base and {count(len(facts.settings), 'arm')}: mean and standard deviation "
        "over pictures, as in the reference study's Table 1",
        "the difference from the base over all prompts",
        "held-out loss minus the base's",
    ]
    if has_best:
        parts.append("and the epoch at which it was lowest")
    example = next(iter(facts.settings.values()))
    parts += [f"{_in_words(key)} {_setting(example, key).text} throughout" for key in shared]
    has_ratio = any(arm.lr_ratio != 1 for arm in facts.settings.values())
    parts.append(f"gain is lr x {'lr ratio x ' if has_ratio else ''}scale x √rank")
    if "rslora" in {arm.scaling for arm in facts.settings.values()}:
        parts.append("alpha is as in files: √rank times the study's with rsLoRA")
    if facts.same_gain and {"gain", "lr"} - set(shared):
        parts += [
            f"{how}: {facts.settings_in_words(group)}"
            for how, groups in (("at equal lr", facts.same_lr), ("at matched gain", facts.same_gain))
            for group in groups
        ]
    return "; ".join(parts)


def build_reference_table() -> Table:
    """The reference study's published scores."""
    columns = (
        Column("arm", False),
        Column("normal mean"),
        Column("std"),
        Column("abstract mean"),
        Column("std"),
    )
    keys = ("normal", "normal std", "abstract", "abstract std")
    rows = tuple(row(Cell(arm), *(cell(values[key]) for key in keys)) for arm, values in REFERENCE.items())
    return Table(
        "The reference study's Table 1 as published (SD 1.5; it has no row for the base and no intervals)",
        columns,
        rows,
    )


def build_contrast_table(facts: Facts) -> Table | None:
    """Planned contrasts with their p-values, for a study of a few arms."""
    if facts.scores is None or not 2 <= len(facts.scores.arms) <= MAX_CONTRASTS:
        return None
    columns = (
        Column("contrast", False),
        Column("difference"),
        Column("95 % low"),
        Column("95 % high"),
        Column("p"),
        Column("p, Holm"),
    )
    rows = []
    for contrast in planned_contrasts(facts.scores, facts.config.score.resamples):
        d = contrast.difference
        numbers = [
            cell(d.difference, "+.2f"),
            cell(d.low, "+.2f"),
            cell(d.high, "+.2f"),
            _p_value(contrast.p_value),
            _p_value(contrast.p_adjusted),
        ]
        rows.append(row(Cell(f"{d.arm} minus {d.against}"), *numbers))
    return Table(
        "Planned contrasts over all prompts: sign-flip test, and adjusted for their number after Holm",
        columns,
        tuple(rows),
    )


def _p_value(value: float) -> Cell:
    return Cell("< 0.001", value) if value < 0.001 else cell(value, ".3f")


def build_fact_tables(facts: Facts) -> list[Table]:
    """What a reader needs to repeat the run: versions, device, digests, times, scorer."""
    manifest, data = facts.manifest, facts.data or {}
    device, base, adapter = manifest.get("device", {}), manifest.get("base", {}), manifest.get("adapter", {})
    memory = device.get("memory_bytes")
    run = {
        **{key: manifest.get(key) for key in ("lorascope", "commit", "started", "finished")},
        "device": device.get("name"),
        "threads": device.get("threads"),
        "memory": f"{memory / 2**30:.1f} GiB" if memory else None,
        "adapted layers": adapter.get("modules"),
        "base dtype": base.get("dtype"),
        "prediction": base.get("prediction_type"),
    }
    keep = facts.verdict.keep if facts.verdict else None
    file = facts.run.adapters_dir / str(keep) / "adapter_model.safetensors"
    scorer = facts.scores.scorer if facts.scores else {}
    digests = {
        f"base {base.get('model', facts.config.base.model)}": base.get("digest"),
        f"scorer {scorer.get('model', facts.config.score.model)}": scorer.get("digest"),
        "data": data.get("fingerprint"),
        "configuration": manifest.get("config_digest"),
        **({f"adapter {keep}": digest_file(file)} if keep and file.exists() else {}),
    }
    stages = {
        name: f"{entry['seconds']:,.1f} s" for name, entry in manifest["stages"].items() if name != "report"
    }
    return [
        _facts("The run", "fact", run),
        _facts("Packages", "package", manifest.get("versions", {})),
        _facts("Digests (SHA-256)", "of", digests),
        _facts("Time of each stage", "stage", stages),
        _facts("Scorer", "fact", {key: value for key, value in scorer.items() if key != "digest"}),
    ]


def _facts(caption: str, first: str, values: Mapping[str, Any]) -> Table:
    def shown(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)

    rows = tuple(
        row(Cell(name), Cell("not recorded", None, True) if value is None else Cell(shown(value)))
        for name, value in values.items()
    )
    return Table(caption, (Column(first, False), Column("value", False)), rows)
