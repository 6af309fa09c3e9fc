"""Kinds of adapter side by side: what each costs, and how arms of different kinds do at equal file size and
at equal training time.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorascope.arms import Arm
from lorascope.diagnosis.signals import trace_fronts
from lorascope.evaluation.choice import choose_by_arm, choose_point
from lorascope.evaluation.front import FrontPoint
from lorascope.evaluation.scores import ALL, PairedDifference
from lorascope.evaluation.sweep_rows import rank_of_cut
from lorascope.evaluation.verdict import HeldoutLoss
from lorascope.report.evidence import NOT_MEASURED, Facts, count
from lorascope.report.tables import Cell, Column, Table, TableRow, cell, row

NAMES: dict[str, str] = {
    "lora": "LoRA",
    "tlora": "T-LoRA",
    "dora": "DoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "full": "full fine-tuning",
}
NEAR = 1.25  # times: files and times that lie no further apart are called equal

_BLANK = Cell("")


class Span(NamedTuple):
    """The lowest and the highest of several numbers."""

    low: float
    high: float


@dataclass(frozen=True)
class KindCost:
    """What the trained arms of one kind and rank cost, each a span over `arms`; None where it isn't recorded.

    `step_s` is the time of their pass divided by its arms and steps, `memory_bytes` the peak of the whole
    pass. `beside` are the other kinds in their passes.
    """

    kind: str
    rank: int
    arms: tuple[str, ...]
    parameters: Span | None
    step_s: Span | None
    memory_bytes: Span | None
    file_bytes: Span | None
    beside: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """One of the arms that are near each other in `amount`, bytes or seconds, with its scores.

    `group` counts from 1. `point` is where the study's rule uses the arm, or, where no point of it `counts`,
    the last epoch at full strength; None where the arm was not drawn so. `effect` and `loss` are of full
    strength.
    """

    group: int
    arm: str
    amount: float
    point: FrontPoint | None
    counts: bool
    effect: PairedDifference | None
    loss: HeldoutLoss | None


def kinds_of(arms: Iterable[Arm]) -> list[str]:
    """The kinds of these arms, each once, in the order of `NAMES`."""
    found = {arm.kind for arm in arms}
    return [kind for kind in NAMES if kind in found]


def costs_by_kind(facts: Facts) -> list[KindCost]:
    """What each kind and rank cost, of the arms that finished, by kind and then by rank."""
    arms = [facts.settings[arm] for arm in _finished(facts)]
    found = []
    for kind in kinds_of(arms):
        for rank in sorted({arm.rank for arm in arms if arm.kind == kind}):
            own = tuple(arm.name for arm in arms if (arm.kind, arm.rank) == (kind, rank))
            found.append(_cost(facts, kind, rank, own))
    return found


def _finished(facts: Facts) -> list[str]:
    return [arm for arm in facts.arms if "file_bytes" in facts.training[arm]]


def _cost(facts: Facts, kind: str, rank: int, arms: tuple[str, ...]) -> KindCost:
    def span(measure: Callable[[str], float | None]) -> Span | None:
        values = [value for value in map(measure, arms) if value is not None]
        return Span(min(values), max(values)) if values else None

    passes = {other for arm in arms for other in facts.training[arm].get("group", ())}
    together = kinds_of(facts.settings[other] for other in passes if other in facts.settings)
    return KindCost(
        kind=kind,
        rank=rank,
        arms=arms,
        parameters=span(lambda arm: facts.training[arm]["parameters"]),
        step_s=span(lambda arm: _step_seconds(facts, arm)),
        memory_bytes=span(lambda arm: facts.training[arm]["peak_memory_bytes"]),
        file_bytes=span(lambda arm: facts.training[arm]["file_bytes"]),
        beside=tuple(other for other in together if other != kind),
    )


def training_seconds(facts: Facts, arm: str) -> float:
    """An arm's share of the time of its pass: divided evenly, since arms of a pass take the same steps."""
    own = facts.training[arm]
    return float(own["run_time_s"]) / max(1, len(own.get("group", ())))


def _step_seconds(facts: Facts, arm: str) -> float | None:
    steps = facts.training[arm].get("steps")
    return training_seconds(facts, arm) / steps if steps else None


def near_groups(
    amounts: Mapping[str, float], kinds: Mapping[str, str], factor: float = NEAR
) -> list[tuple[str, ...]]:
    """Arms whose amounts are at most `factor` times each other, where they are of several kinds.

    From small to large. A group is as large as it can be, so that an arm between two stands in both.
    """
    ordered = sorted(amounts, key=lambda arm: amounts[arm])
    groups: list[tuple[str, ...]] = []
    for start, first in enumerate(ordered):
        near = tuple(arm for arm in ordered[start:] if amounts[arm] <= factor * amounts[first])
        is_part = bool(groups) and set(near) <= set(groups[-1])
        if not is_part and len({kinds[arm] for arm in near}) > 1:
            groups.append(near)
    return groups


def candidates_near(facts: Facts, amounts: Mapping[str, float]) -> list[Candidate]:
    """The arms of every group of `near_groups`, with their scores."""
    kinds = {arm: facts.settings[arm].kind for arm in amounts}
    points = _points(facts)
    return [
        Candidate(
            group,
            arm,
            amounts[arm],
            *points.get(arm, (None, False)),
            effect=facts.effects.get((arm, ALL)),
            loss=facts.heldout_losses.get(arm),
        )
        for group, arms in enumerate(near_groups(amounts, kinds), start=1)
        for arm in arms
    ]


def _points(facts: Facts) -> dict[str, tuple[FrontPoint | None, bool]]:
    """By arm where it is used, and whether that counts."""
    if facts.front is None:
        return {}
    price, resamples = facts.config.verdict.max_prompt_loss, facts.config.score.resamples
    choice = choose_point(facts.front, price, facts.alike, resamples)
    chosen = choose_by_arm(facts.front, choice, price, facts.alike, resamples)
    return {
        arm: (chosen[arm], True) if arm in chosen else (facts.front.full_strength(arm), False)
        for arm in facts.arms
    }


def build_kind_tables(facts: Facts) -> tuple[Table, ...]:
    """Costs by kind, then arms of different kinds at equal file size and at equal time, then low ranks of
    full fine-tuning; none in a study of one kind.

    A table without columns is a sentence: its caption.
    """
    if len(kinds_of(facts.settings.values())) < 2:
        return ()
    finished = _finished(facts)
    sizes = {arm: float(facts.training[arm]["file_bytes"]) for arm in finished}
    seconds = {arm: training_seconds(facts, arm) for arm in finished}
    return (
        _cost_table(facts),
        _size_table(facts, candidates_near(facts, sizes)),
        _time_table(facts, candidates_near(facts, seconds)),
        *_low_rank_tables(facts),
    )


def kind_texts(facts: Facts) -> tuple[str, ...]:
    """What kinds have in common here, what one study can say of them, and what the tables' scores are."""
    seeds: dict[str, set[int]] = {}
    for arm in facts.settings.values():
        seeds.setdefault(arm.but_seed, set()).add(arm.seed)
    most = max(map(len, seeds.values()))
    runs = "one training seed" if most == 1 else f"{count(most, 'training seed')} at most"
    names = [NAMES[kind] for kind in kinds_of(facts.settings.values())]
    texts = [
        f"{', '.join(names[:-1])} and {names[-1]} were trained on the same pictures. Each setting has "
        f"{runs}, and a kind may do better at learning rates that are not in this study: what stands here is "
        "said of these arms, not of kinds in general."
    ]
    if _has_retention(facts):
        texts.append(
            "Prompts kept and style are told at the strength that the study's rule uses an arm at, or at "
            "full strength where no point of it counts. Held-out loss is minus the base's. In brackets are "
            "95 % intervals."
        )
    return tuple(texts)


def _has_retention(facts: Facts) -> bool:
    return facts.front is not None and facts.front.fidelity_reason is None


def _cost_table(facts: Facts) -> Table:
    costs = costs_by_kind(facts)
    parameters = (facts.manifest.get("base", {}).get("parameters") or {}).get("unet")
    rows = []
    if parameters is not None:
        blanks = [_BLANK] * 6
        rows.append(row(Cell("base, U-Net"), *blanks[:2], cell(parameters, ",d"), *blanks[2:]))
    for cost in costs:
        rows.append(
            row(
                Cell(NAMES[cost.kind]),
                Cell("full", cost.rank) if cost.kind == "full" else cell(cost.rank, "d"),
                cell(len(cost.arms), "d"),
                _span(cost.parameters, lambda value: f"{value:,.0f}"),
                _span(cost.step_s, lambda value: _milliseconds(1000 * value)),
                _span(cost.memory_bytes, lambda value: f"{value / 1e9:.2f} GB"),
                _span(cost.file_bytes, lambda value: f"{value / 1e6:.2f} MB"),
                Cell(", ".join(NAMES[kind] for kind in cost.beside) or "its own kind alone"),
            )
        )
    told = " The base's row is what it has, of which nothing is trained." if parameters is not None else ""
    return Table(
        "What arms of each kind and rank cost, from the lowest to the highest where they differ. Time a step "
        "is that of an arm: the time of its pass, divided by the pass's steps and arms. So arms of different "
        "kinds in one pass have one time, and peak memory is the whole pass's. Times are of this machine, "
        f"and say nothing of others.{told}",
        (
            Column("kind", False),
            Column("rank"),
            Column("arms"),
            Column("parameters"),
            Column("time a step"),
            Column("peak memory"),
            Column("file"),
            Column("in one pass with", False),
        ),
        tuple(rows),
        title="What each kind costs",
    )


def _size_table(facts: Facts, candidates: Sequence[Candidate]) -> Table:
    return _near_table(
        facts,
        candidates,
        title="At equal file size",
        what="files",
        note="Each row is one training run, which tells nothing of its kind in general.",
        extra={"file": lambda item: Cell(f"{item.amount / 1e6:.2f} MB", item.amount)},
    )


def _time_table(facts: Facts, candidates: Sequence[Candidate]) -> Table:
    groups = (tuple(facts.training[arm].get("group", (arm,))) for arm in _finished(facts))
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups), start=1)}
    passes = {arm: number for group, number in numbers.items() for arm in group}
    return _near_table(
        facts,
        candidates,
        title="At equal training time",
        what="training times",
        note="An arm's time is that of its pass, divided by the pass's arms: of arms in one pass equal times "
        "follow from this division, and were not measured. One training run tells nothing of its kind in "
        "general.",
        extra={
            "time": lambda item: Cell(_seconds(item.amount), item.amount),
            "pass": lambda item: cell(passes.get(item.arm), "d"),
        },
    )


def low_ranks_of_full(facts: Facts) -> list[tuple[str, int | None, FrontPoint]]:
    """Full fine-tunings of the last epoch at full strength, as trained (None) and cut to ranks, the highest
    first.
    """
    arms = [arm for arm, setting in facts.settings.items() if setting.kind == "full"]
    if not arms or facts.sweep is None:
        return []
    fronts = trace_fronts(facts.sweep, facts.config.score.resamples)
    cuts = {rank: front for key, front in fronts.edited.items() if (rank := rank_of_cut(key)) is not None}
    found: list[tuple[str, int | None, FrontPoint]] = []
    for arm in arms:
        ranks = sorted((rank for rank in cuts if cuts[rank].full_strength(arm)), reverse=True)
        points = [
            (None, fronts.own.full_strength(arm)),
            *((rank, cuts[rank].full_strength(arm)) for rank in ranks),
        ]
        found += [(arm, rank, point) for rank, point in points if ranks and point is not None]
    return found


def _low_rank_tables(facts: Facts) -> list[Table]:
    """What LoRA of low ranks would keep of full fine-tuning; no table where nothing was cut."""
    found = low_ranks_of_full(facts)
    if not found:
        return []
    rows = [
        TableRow(
            (
                Cell(arm),
                Cell("all of it") if rank is None else Cell(f"cut to rank {rank}", rank),
                cell(point.num_prompts, "d"),
                _with_interval(
                    point.retention.value, point.retention.low, point.retention.high, ".1f", 100.0
                ),
                _with_interval(point.style.value, point.style.low, point.style.high, "+.2f"),
            ),
            starts=rank is None and number > 0,
        )
        for number, (arm, rank, point) in enumerate(found)
    ]
    columns = ("arm", "weights", "prompts", "prompts kept, %", "style")
    return [
        Table(
            "The best approximation of the whole change by LoRA of a rank, by SVD layer by layer, norms and "
            "biases left out, drawn at full strength beside the change as it was trained. Fewer prompts may "
            "be drawn with a cut than without.",
            tuple(Column(name, name in columns[2:]) for name in columns),
            tuple(rows),
            title="What low ranks keep of full fine-tuning",
        )
    ]


def _near_table(
    facts: Facts,
    candidates: Sequence[Candidate],
    title: str,
    what: str,
    note: str,
    extra: Mapping[str, Callable[[Candidate], Cell]],
) -> Table:
    """The candidates with columns of their own, by name, before the scores."""
    if not candidates:
        sentence = f"No two arms of different kinds have {what} at most {NEAR:g} times apart."
        return Table(sentence, (), (), title=title)
    several = candidates[-1].group > 1
    has_retention = _has_retention(facts)
    measures = ("strength", "prompts kept, %", "style") if has_retention else ("CLIP minus base",)
    columns = (
        Column("arm", False),
        *([Column("group")] if several else []),
        Column("kind", False),
        *(Column(name) for name in extra),
        *(Column(name, name != "strength") for name in measures),
        Column("held-out loss"),
    )
    rows = []
    for before, item in zip((None, *candidates), candidates, strict=False):
        cells = (
            Cell(item.arm),
            *([cell(item.group, "d")] if several else []),
            Cell(NAMES[facts.settings[item.arm].kind]),
            *(form(item) for form in extra.values()),
            *(_front_cells(item) if has_retention else [_effect_cell(item.effect)]),
            _loss_cell(item.loss),
        )
        starts = before is not None and before.group != item.group
        rows.append(TableRow(cells, marked=facts.role(item.arm) == "kept", starts=starts))
    groups = (
        ", in groups from small to large; an arm that is near two groups stands in both" if several else ""
    )
    caption = (
        f"Scores of arms of different kinds whose {what} are at most {NEAR:g} times apart{groups}. {note}"
    )
    return Table(caption, columns, tuple(rows), title=title)


def _front_cells(item: Candidate) -> list[Cell]:
    """Strength, prompts kept in percent and style."""
    point = item.point
    if point is None:
        return [cell(None)] * 3
    epoch = ", best epoch" if point.epoch == "best" else ""
    none = "" if item.counts else ", none counts"
    kept, style = point.retention, point.style
    return [
        Cell(f"{point.strength:g}{epoch}{none}", point.strength),
        _with_interval(kept.value, kept.low, kept.high, ".1f", 100.0),
        _with_interval(style.value, style.low, style.high, "+.2f"),
    ]


def _effect_cell(effect: PairedDifference | None) -> Cell:
    if effect is None:
        return cell(None)
    return _with_interval(effect.difference, effect.low, effect.high, "+.2f")


def _loss_cell(loss: HeldoutLoss | None) -> Cell:
    return cell(None) if loss is None else _with_interval(loss.difference, loss.low, loss.high, "+.4f")


def _with_interval(
    value: float | None, low: float | None, high: float | None, form: str, factor: float = 1.0
) -> Cell:
    """A number with its interval behind it; it sorts by the number."""
    if value is None:
        return cell(None)
    shown = cell(factor * value, form)
    if low is None or high is None:
        return Cell(f"{shown.text} (interval {NOT_MEASURED})", shown.value)
    ends = f"{cell(factor * low, form).text} to {cell(factor * high, form).text}"
    return Cell(f"{shown.text} ({ends})", shown.value)


def _span(span: Span | None, form: Callable[[float], str]) -> Cell:
    """One number, or the lowest and the highest; it sorts by the lowest."""
    if span is None:
        return cell(None)
    low, high = form(span.low), form(span.high)
    return Cell(low if low == high else f"{low} to {high}", span.low)


def _milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.1f} s"
