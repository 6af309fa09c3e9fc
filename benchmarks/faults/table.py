"""The result of planted faults as Markdown and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.faults.files import FileFinding
from benchmarks.faults.learn import COLUMNS, Cut, Judged, Matrix

from lorascope.diagnosis.thresholds import Thresholds

_KINDS = {"tlora": "T-LoRA", "dora": "DoRA"}
_MOST_SHOWN = 40  # of the arms that were called something else


@dataclass(frozen=True)
class Result:
    """All that a run of the benchmark found.

    `matrix` is of arms that nothing was learnt from, by what was learnt; `default_matrix` the same arms by
    the thresholds of the package. `other_matrices` are of arms of other kinds of adapter, of all seeds, by
    what was learnt from LoRA.
    """

    quick: bool
    learning_seeds: tuple[int, ...]
    judging_seeds: tuple[int, ...]
    facts: Mapping[str, Any]  # lorascope's version, device, date
    cuts: Mapping[str, Cut]
    matrix: Matrix
    default_matrix: Matrix
    files: Sequence[FileFinding]
    other_matrices: Mapping[str, Matrix] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The whole as JSON has it."""
        return asdict(self)


def as_markdown(result: Result) -> str:
    """The confusion matrix, what it comes to, thresholds, file faults and what was confused."""
    learning, judging = (
        ", ".join(map(str, seeds)) for seeds in (result.learning_seeds, result.judging_seeds)
    )
    facts = ", ".join(f"{key} {value}" for key, value in result.facts.items())
    lines = [
        "# Planted faults and what they were found as",
        "",
        f"Learnt from training seeds {learning}; judged: {judging}. {facts}.",
        *(["", "**A quick run: too few arms for thresholds that hold.**"] if result.quick else []),
        "",
        "## Thresholds as learnt here",
        "",
        *_matrix(result.matrix),
        "",
        "## Thresholds of the package",
        "",
        *_matrix(result.default_matrix),
        "",
        *(
            line
            for kind, matrix in result.other_matrices.items()
            for line in (
                f"## {_KINDS[kind]} arms, by the thresholds learnt from LoRA",
                "",
                *_matrix(matrix),
                "",
            )
        ),
        "## Thresholds",
        "",
        *_thresholds(result.cuts),
        "",
        "## Faults in files, and which check sees them",
        "",
        *_files(result.files),
        "",
        "## Called something else",
        "",
        *_confused(result.matrix.confused),
    ]
    return "\n".join(lines) + "\n"


def _matrix(matrix: Matrix) -> list[str]:
    columns = [name for name in COLUMNS if any(row.get(name) for row in matrix.counts.values())]
    lines = [
        f"| planted | {' | '.join(map(_words, columns))} |",
        f"|---|{'---|' * len(columns)}",
        *(
            f"| {_words(label)} | {' | '.join(str(row.get(name) or '') for name in columns)} |"
            for label, row in matrix.counts.items()
        ),
    ]
    share = "none judged" if matrix.right is None else f"{100 * matrix.right:.0f} %"
    return [
        *lines,
        "",
        f"Right: {matrix.num_right} of {matrix.num_judged} ({share}). Cannot tell: {matrix.num_undecided}. "
        f"Healthy arms called faulty: {matrix.healthy_called_faulty} of {matrix.num_healthy}.",
    ]


def _thresholds(cuts: Mapping[str, Cut]) -> list[str]:
    table = Thresholds().as_table()
    lines = [
        "| threshold | now | learnt | gap | with the fault | without |",
        "|---|---|---|---|---|---|",
    ]
    for key, cut in cuts.items():
        value = cut.reason if cut.value is None else f"{cut.value:.3g}"
        gap = "" if cut.low is None or cut.high is None else f"{cut.low:.3g} to {cut.high:.3g}"
        shares = [
            f"{count}" if share is None else f"{100 * share:.0f} % of {count}"
            for share, count in (
                (cut.with_fault, cut.num_with),
                (cut.without_fault, cut.num_without),
            )
        ]
        lines.append(f"| `{key}` | {table[key].value:g} | {value} | {gap} | {' | '.join(shares)} |")
    return lines


def _files(findings: Sequence[FileFinding]) -> list[str]:
    lines = [
        "| fault | digest | reading it for its arm | merged against unmerged |",
        "|---|---|---|---|",
    ]
    for fault in dict.fromkeys(finding.fault for finding in findings):
        members = [finding for finding in findings if finding.fault == fault]
        merged = [
            finding.merge is None or not finding.merge["ok"] for finding in members
        ]  # refused, or seen to differ
        seen = (
            [finding.digest_line is not None for finding in members],
            [finding.reading_line is not None for finding in members],
            merged,
        )
        cells = " | ".join(f"{sum(item)} of {len(item)}" for item in seen)
        lines.append(f"| {fault} | {cells} |")
    return lines


def _confused(confused: Sequence[Judged]) -> list[str]:
    if not confused:
        return ["Nothing."]
    lines = ["| arm | seed | planted | found | by |", "|---|---|---|---|---|"]
    for item in confused[:_MOST_SHOWN]:
        evidence = " ".join(item.evidence).replace("|", "\\|").replace("\n", " ")
        words = f"{_words(item.label)} | {_words(item.found)}"
        lines.append(f"| {item.name} | {item.seed} | {words} | {evidence} |")
    if len(confused) > _MOST_SHOWN:
        lines.append(f"\nAnd {len(confused) - _MOST_SHOWN} more: `matrix.json` has all.")
    return lines


def _words(name: str) -> str:
    return name.replace("_", " ")
