"""Figures of the scores: arm minus base by prompt, over the gain, and what a score means."""

import math
from collections.abc import Mapping, Sequence

from lorascope.evaluation.scores import ALL, BASE, CAPTIONS, NOISE, REAL, SHUFFLED
from lorascope.evaluation.sentences import describe_difference
from lorascope.evaluation.statistics import MIN_PROMPTS, POWER_FORMULA
from lorascope.report.canvas import Look
from lorascope.report.dot_plots import MAX_ROWS, Row, draw_forest, draw_gain, draw_scale
from lorascope.report.evidence import Facts
from lorascope.report.figure import Figure, rows_shown
from lorascope.report.tables import Cell, Column, Table, cell, row


def effect_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    """Each prompt under an arm against itself under the base; None without scores."""
    if not facts.effects or facts.scores is None:
        return None
    scored = list(dict.fromkeys(arm for arm, _ in facts.effects))
    shown = rows_shown(facts, scored)
    named = [arm for arm in shown if looks[arm].colour != looks[BASE].colour]
    rows = []
    for category in facts.scores.categories:
        for arm in shown:
            effect = facts.effects[arm, category]
            points = tuple(item.difference for item in effect.per_prompt) if arm in named else ()
            numbers = (effect.difference, effect.low, effect.high, effect.smallest_detectable)
            rows.append(Row(category, arm, *numbers, points))
    seeds = max(effect.num_seeds for effect in facts.effects.values())
    notes = []
    if len(shown) < len(scored):
        notes.append(
            f" Of {len(scored)} arms the {MAX_ROWS - 4} highest and 4 lowest are drawn; the table has all."
        )
    if len(named) < len(shown):
        notes.append(f" Dots only for {', '.join(named)}.")
    if any(item.low is None for item in rows):
        notes.append(f" No interval from fewer than {MIN_PROMPTS} prompts.")
    return Figure(
        key="effect",
        title="Each prompt against itself: arm minus base",
        description=(
            "A small dot is one "
            f"prompt{f', averaged over {seeds} sampling seeds' if seeds > 1 else ''}; the large mark is "
            "the mean, the bar its 95 % interval. The line at 0 is the base. The grey box reaches as "
            f"far as an effect could have hidden: {POWER_FORMULA}.{''.join(notes)}"
        ),
        alt="Dot plot of paired differences from the base. "
        + " ".join(
            describe_difference(facts.effects[arm, ALL])
            for arm in facts.detailed
            if (arm, ALL) in facts.effects
        ),
        drawing=draw_forest(rows, looks, "CLIP score minus base, points"),
        table=_effect_table(facts, scored, facts.scores.categories),
    )


def _effect_table(facts: Facts, arms: Sequence[str], categories: Sequence[str]) -> Table:
    columns = (
        Column("arm", False),
        Column("prompts", False),
        Column("n"),
        Column("difference"),
        Column("95 % low"),
        Column("95 % high"),
        Column("could be seen from"),
        Column("prompts above base"),
    )
    rows = []
    for arm in arms:
        for category in (*categories, ALL):
            effect = facts.effects[arm, category]
            rows.append(
                row(
                    Cell(arm),
                    Cell(category),
                    cell(effect.num_prompts, "d"),
                    cell(effect.difference, "+.2f"),
                    cell(effect.low, "+.2f"),
                    cell(effect.high, "+.2f"),
                    cell(effect.smallest_detectable, ".2f"),
                    cell(effect.share_above, ".0%"),
                )
            )
    return Table("CLIP score of each arm minus the base's, paired by prompt", columns, tuple(rows))


def gain_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    """The same differences over the gain of the update; None where arms have fewer than three gains."""
    scored = [arm for arm in facts.with_rank if (arm, ALL) in facts.effects]
    if facts.scores is None or len({round(math.log(facts.settings[arm].gain), 6) for arm in scored}) < 3:
        return None
    rows = []
    for category in facts.scores.categories:
        for arm in scored:
            effect = facts.effects[arm, category]
            rows.append(Row(category, arm, effect.difference, effect.low, effect.high))
    gains = {arm: facts.settings[arm].gain for arm in scored}
    columns = (
        Column("arm", False),
        Column("rank"),
        Column("alpha / rank"),
        Column("lr"),
        Column("gain"),
        Column("difference, all prompts"),
    )
    table = [
        row(
            Cell(arm),
            cell(facts.settings[arm].rank, "d"),
            cell(facts.settings[arm].scale, "g"),
            cell(facts.settings[arm].lr, "g"),
            cell(gains[arm], ".2g"),
            cell(facts.effects[arm, ALL].difference, "+.2f"),
        )
        for arm in scored
    ]
    return Figure(
        key="gain",
        title="Rank, or only strength?",
        description=(
            "The same differences over the gain of the update, which puts rank, alpha and learning "
            "rate on one axis. Where arms of different rank lie on one curve, strength explains the "
            "differences; where they part at equal gain, rank adds something."
        ),
        alt="Scatter plot of the difference from the base over the gain of the update, one mark per arm.",
        drawing=draw_gain(rows, gains, looks),
        table=Table("Gain and difference from the base", columns, tuple(table)),
    )


def scale_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    """What a score means: noise and other prompts, base and arms, real pictures; None without scores."""
    if not facts.summary or facts.scores is None:
        return None
    sources = [name for name in (NOISE, SHUFFLED, BASE) if (name, ALL) in facts.summary]
    sources += [arm for arm in facts.detailed if (arm, ALL) in facts.summary]
    sources += [REAL] if (REAL, ALL) in facts.summary else []
    rows, table = [], []
    for source in sources:
        for category in (*facts.scores.categories, CAPTIONS):
            part = facts.summary.get((source, category))
            if part is not None:
                low, high = (None, None) if part.std is None else (part.mean - part.std, part.mean + part.std)
                rows.append(Row(category, source, part.mean, low, high))
                table.append(
                    row(
                        Cell(source),
                        Cell(category),
                        cell(part.count, "d"),
                        cell(part.mean),
                        cell(part.std),
                        cell(part.low),
                        cell(part.high),
                    )
                )
    columns = (
        Column("source", False),
        Column("prompts", False),
        Column("pictures"),
        Column("mean"),
        Column("std"),
        Column("95 % low"),
        Column("95 % high"),
    )
    return Figure(
        key="scale",
        title="What a CLIP score means here",
        description=(
            "Mean and one standard deviation over pictures. Noise and shuffled prompts (the base's "
            "pictures against other prompts) show the floor, real held-out pictures with their "
            "captions what a good match reaches. A score near the floor means that the prompt was lost."
        ),
        alt="Strip of CLIP scores: "
        + "; ".join(f"{source} {facts.summary[source, ALL].mean:.1f}" for source in sources)
        + ".",
        drawing=draw_scale(rows, looks, "CLIP score (100 x cosine)"),
        table=Table("CLIP scores of the calibration rows, the base and the arms", columns, tuple(table)),
    )
