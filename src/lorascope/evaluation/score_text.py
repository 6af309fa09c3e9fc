"""Scores and a verdict as plain values for JSON and as a Markdown table."""

from dataclasses import asdict
from typing import Any

from lorascope.evaluation.front import FrontPoint
from lorascope.evaluation.scores import (
    ALL,
    BASE,
    PairedDifference,
    Scores,
    SummaryRow,
    paired_differences,
    planned_contrasts,
    summary_table,
)
from lorascope.evaluation.sentences import describe_difference, describe_point
from lorascope.evaluation.statistics import POWER_FORMULA
from lorascope.evaluation.verdict import Verdict


def scores_as_dict(scores: Scores, verdict: Verdict | None = None, resamples: int = 10_000) -> dict[str, Any]:
    """Summary, planned contrasts and verdict as plain values for JSON; undefined numbers are None."""
    contrasts = planned_contrasts(scores, resamples)
    return {
        "scorer": scores.scorer,
        "num_truncated": scores.num_truncated,
        "summary": [asdict(row) for row in summary_table(scores, resamples)],
        "contrasts": [
            {**_plain(c.difference), "p_value": c.p_value, "p_adjusted": c.p_adjusted} for c in contrasts
        ],
        "smallest_detectable": POWER_FORMULA,
        "verdict": None if verdict is None else verdict_as_dict(verdict),
    }


def _plain(difference: PairedDifference) -> dict[str, Any]:
    """A difference without its list of prompts, with its sentence."""
    values = {key: value for key, value in asdict(difference).items() if key != "per_prompt"}
    return {**values, "sentence": describe_difference(difference)}


def verdict_as_dict(verdict: Verdict) -> dict[str, Any]:
    """A verdict as plain values for JSON; undefined numbers are None, beside their reason."""
    values = asdict(verdict)
    for key in ("sentences", "reasons", "undecided"):
        values[key] = list(values[key])
    for key, point in (("point", verdict.point), ("runner_up", verdict.runner_up)):
        values[key] = None if point is None else _plain_point(point)
    against = verdict.against_base
    values["against_base"] = None if against is None else _plain(against)
    return values


def _plain_point(point: FrontPoint) -> dict[str, Any]:
    """A point without its list of prompts, its place at the top, with its sentence."""
    values = {key: value for key, value in asdict(point).items() if key not in ("per_prompt", "point")}
    return {**asdict(point.point), **values, "sentence": describe_point(point)}


def scores_as_markdown(scores: Scores, verdict: Verdict | None = None, resamples: int = 10_000) -> str:
    """The table of mean and deviation by arm and category as aligned Markdown, which reads as plain text
    too.
    """
    summary = {(row.arm, row.category): row for row in summary_table(scores, resamples)}
    lines = [
        ["arm", *scores.categories, ALL, "95 % interval", "minus base", "95 % interval", "could be seen from"]
    ]
    for arm in dict.fromkeys(row.arm for row in scores.rows):
        cells = [_mean_and_std(summary.get((arm, category))) for category in (*scores.categories, ALL)]
        whole = summary[arm, ALL]
        beside = ["", "", ""]
        if whole.kind == "arm" and arm != BASE and scores.of(BASE):
            d = paired_differences(scores, arm, resamples=resamples)
            seen = "not measured" if d.smallest_detectable is None else f"{d.smallest_detectable:.2f}"
            beside = [f"{d.difference:+.2f}", _interval(d.low, d.high, "+.2f"), seen]
        lines.append([arm, *cells, _interval(whole.low, whole.high, ".2f"), *beside])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    table = "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
    if verdict is None:
        return table + "\n"
    notes = [f"- {sentence}" for sentence in verdict.reasons]
    open_questions = (
        ["", "Not decided:", *(f"- {sentence}" for sentence in verdict.undecided)]
        if verdict.undecided
        else []
    )
    head = verdict.headline + (f": {verdict.tag}" if verdict.tag else "")
    parts = [f"{head}.", "", table, "", *notes, *open_questions, "", f"Rule: {verdict.rule}"]
    return "\n".join(parts) + "\n"


def _mean_and_std(row: SummaryRow | None) -> str:
    if row is None:
        return ""
    return f"{row.mean:.2f}" if row.std is None else f"{row.mean:.2f} ± {row.std:.2f}"


def _interval(low: float | None, high: float | None, form: str) -> str:
    return "not measured" if low is None or high is None else f"{low:{form}} to {high:{form}}"
