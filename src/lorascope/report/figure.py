"""A figure of the report: a drawing with its words and numbers, and which arms it shows of many."""

from collections.abc import Sequence
from dataclasses import dataclass

from lorascope.report.canvas import MAX_LINES, Drawing
from lorascope.report.dot_plots import MAX_ROWS
from lorascope.report.evidence import Facts
from lorascope.report.tables import Table


@dataclass(frozen=True)
class Figure:
    """A drawing with its title, description, text alternative and data."""

    key: str
    title: str
    description: str
    alt: str
    drawing: Drawing
    table: Table
    reference: str = ""


def rows_shown(facts: Facts, arms: Sequence[str]) -> list[str]:
    """All arms of a few; of many the first and last by mean score, so that the figure stays readable."""
    if len(arms) <= MAX_LINES:
        return list(arms)
    ordered = [arm for arm in facts.ranked if arm in arms] or list(arms)
    return ordered if len(ordered) <= MAX_ROWS else [*ordered[: MAX_ROWS - 4], *ordered[-4:]]
