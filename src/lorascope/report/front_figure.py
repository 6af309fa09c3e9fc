"""The figure of the front: prompts against style, strength by strength."""

from collections.abc import Mapping, Sequence

from lorascope.evaluation.choice import counting_points
from lorascope.evaluation.front import Estimate, Front, FrontPoint
from lorascope.evaluation.sweep_rows import Point
from lorascope.report.canvas import MAX_LINES, Look, looks_by_series
from lorascope.report.evidence import Facts
from lorascope.report.figure import Figure
from lorascope.report.front_plot import FRONT_FLOOR, Mark, draw_front
from lorascope.report.kinds import NAMES, kinds_of
from lorascope.report.tables import Cell, Column, Table, cell, row


def front_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    """What arms keep of the prompts and gain of the style at each strength; None without a sweep.

    In a study of several kinds the colours are the kinds'.
    """
    front, verdict = facts.front, facts.verdict
    if front is None or verdict is None:
        return None
    known = [point for point in front.points if None not in (point.style.value, point.retention.value)]
    if not known:
        return None
    kept = verdict.point.point if verdict.point else None
    price = 100 * verdict.max_prompt_loss
    strengths = sorted({point.strength for point in known})
    notes = []
    if any(point.epoch == "best" for point in known):
        notes.append(" Open marks are of the adapter with the lowest held-out loss.")
    if kept is not None:
        notes.append(" The ring is what the verdict keeps, its bars the 95 % intervals.")
    if any((point.retention.value or 0.0) < FRONT_FLOOR / 100 for point in known):
        notes.append(f" Marks under {cell(FRONT_FLOOR, '.0f').text} % are not drawn; the table has them.")
    kinds = _kinds(facts, known)
    series: Mapping[str, Look] = {}
    named = [arm for arm in kinds if len(kinds) <= MAX_LINES or arm in facts.detailed]
    if kinds:
        ordered = sorted(kinds, key=lambda arm: arm not in named)  # the named ones get the first dashes
        looks, series = looks_by_series({arm: kinds[arm] for arm in ordered}, tuple(NAMES.values()))
        notes.append(" Here colour and shape are the arm's kind, dashes tell arms of one kind apart.")
        notes += [f" Named and thick are {', '.join(named)}."] if len(named) < len(kinds) else []
    elif len(facts.arms) > MAX_LINES:
        notes.append(f" Colours only for {', '.join(facts.detailed)}.")
    return Figure(
        key="front",
        title="Prompts against style",
        description=(
            "Each mark is an arm at one strength. To the right there is more style: 0 is where the base's "
            "drawings stand, 1 where real pictures of the style do. Further up, more of the base's prompt "
            "fidelity is left. Along a line the strength grows from the base, at the cross, by "
            f"{', '.join(f'{strength:g}' for strength in strengths)}, and the marks with it. Grey is what "
            "costs at most the price that is written at its edge; the study's own is "
            f"{price:g} %.{''.join(notes)}"
        ),
        alt="Line plot of the share of prompt fidelity kept over style. "
        + " ".join(_paths(facts, known, kinds)),
        drawing=draw_front(
            [_mark(point, point.point == kept) for point in known],
            looks,
            (0.0, 100.0),
            100 - price,
            "style gained over the base",
            "prompt fidelity kept, %",
            series=series,
            named=named,
        ),
        table=_front_table(front, kept, verdict.max_prompt_loss, kinds),
    )


def _kinds(facts: Facts, points: Sequence[FrontPoint]) -> dict[str, str]:
    """The kinds of these arms in words, kind by kind; none where all are of one."""
    drawn = {point.arm for point in points}
    arms = [arm for name, arm in facts.settings.items() if name in drawn]
    kinds = kinds_of(arms)
    return {arm.name: NAMES[kind] for kind in kinds for arm in arms if arm.kind == kind and len(kinds) > 1}


def _mark(point: FrontPoint, is_kept: bool) -> Mark:
    def reach(estimate: Estimate, factor: float) -> tuple[float, float] | None:
        if not is_kept or estimate.low is None or estimate.high is None:
            return None
        return factor * estimate.low, factor * estimate.high

    return Mark(
        point.arm,
        point.strength,
        point.style.value or 0.0,
        100 * (point.retention.value or 0.0),
        point.epoch == "best",
        reach(point.style, 1.0),
        reach(point.retention, 100.0),
    )


def _paths(facts: Facts, points: Sequence[FrontPoint], kinds: Mapping[str, str]) -> list[str]:
    """A sentence for each arm in detail: its kind if there are several, and what it keeps and gains from
    strength to strength.
    """
    sentences = []
    for arm in facts.detailed:
        own = [point for point in points if point.arm == arm and point.epoch == "last"]
        steps = [
            f"at {point.strength:g} {100 * (point.retention.value or 0.0):.0f} % and "
            f"{cell(point.style.value, '+.2f').text}"
            for point in own
        ]
        kind = f" ({kinds[arm]})" if arm in kinds else ""
        sentences += [f"{arm}{kind}: {', '.join(steps)}."] if steps else []
    return sentences


def _front_table(front: Front, kept: Point | None, max_prompt_loss: float, kinds: Mapping[str, str]) -> Table:
    counting = [point.point for point in counting_points(front, max_prompt_loss)]
    names = ("kept, %", "95 % low", "95 % high", "style", "95 % low", "95 % high")
    columns = (
        Column("arm", False),
        *([Column("kind", False)] if kinds else []),
        Column("epoch", False),
        Column("strength"),
        *(Column(name) for name in names),
        Column("counts", False),
    )
    rows = []
    for point in front.points:
        keeps, style = point.retention, point.style
        shares = [None if value is None else 100 * value for value in (keeps.value, keeps.low, keeps.high)]
        rows.append(
            row(
                Cell(point.arm),
                *([Cell(kinds.get(point.arm, ""))] if kinds else []),
                Cell(point.epoch),
                cell(point.strength, "g"),
                *(cell(value, ".1f") for value in shares),
                *(cell(value, "+.2f") for value in (style.value, style.low, style.high)),
                Cell("yes" if point.point in counting else "no"),
                marked=point.point == kept,
            )
        )
    caption = (
        "Prompt fidelity kept and style gained at each strength; a point counts if it is shown to gain style "
        f"and costs at most {100 * max_prompt_loss:g} %, the study's own price"
    )
    return Table(caption, columns, tuple(rows))
