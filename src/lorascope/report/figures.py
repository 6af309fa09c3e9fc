"""The report's figures: what each shows, in words, as a drawing and as a table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorascope.diagnosis.layers import heat_map, place_of, summarise
from lorascope.evaluation.choice import counting_points
from lorascope.evaluation.front import Estimate, Front, FrontPoint
from lorascope.evaluation.scores import ALL, BASE, CAPTIONS, NOISE, REAL, SHUFFLED
from lorascope.evaluation.sentences import describe_difference
from lorascope.evaluation.statistics import MIN_PROMPTS, POWER_FORMULA
from lorascope.evaluation.sweep_rows import Point
from lorascope.report.drawing import (
    FRONT_FLOOR,
    MAX_LINES,
    MAX_ROWS,
    Drawing,
    Line,
    Look,
    Mark,
    Row,
    draw_bands,
    draw_costs,
    draw_forest,
    draw_front,
    draw_gain,
    draw_heat,
    draw_lines,
    draw_scale,
    looks_of,
)
from lorascope.report.evidence import Facts, count
from lorascope.report.tables import REFERENCE, Cell, Column, Table, cell, row
from lorascope.report.why import arms_in_focus

NUM_CURVE_POINTS = 160


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


def build_figures(facts: Facts) -> dict[str, Figure]:
    """All figures for which the run folder has numbers, by key."""
    looks = looks_of(list(facts.settings), facts.detailed)
    drawn = [
        _front_figure(facts, looks),
        _effect_figure(facts, looks),
        _gain_figure(facts, looks),
        _scale_figure(facts, looks),
        _loss_figure(facts, looks),
    ]
    drawn += [_epochs_figure(facts, looks), _bands_figure(facts, looks), _cost_figure(facts, looks)]
    drawn += [_layers_figure(facts)]
    return {figure.key: figure for figure in drawn if figure is not None}


def _rows_shown(facts: Facts, arms: Sequence[str]) -> list[str]:
    """All arms of a few; of many the first and last by mean score, so that the figure stays readable."""
    if len(arms) <= MAX_LINES:
        return list(arms)
    ordered = [arm for arm in facts.ranked if arm in arms] or list(arms)
    return ordered if len(ordered) <= MAX_ROWS else [*ordered[: MAX_ROWS - 4], *ordered[-4:]]


def _front_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
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
    if len(facts.arms) > MAX_LINES:
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
        alt="Line plot of the share of prompt fidelity kept over style. " + " ".join(_paths(facts, known)),
        drawing=draw_front(
            [_mark(point, point.point == kept) for point in known],
            looks,
            (0.0, 100.0),
            100 - price,
            "style gained over the base",
            "prompt fidelity kept, %",
        ),
        table=_front_table(front, kept, verdict.max_prompt_loss),
    )


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


def _paths(facts: Facts, points: Sequence[FrontPoint]) -> list[str]:
    """A sentence for each arm in detail: what it keeps and gains from strength to strength."""
    sentences = []
    for arm in facts.detailed:
        own = [point for point in points if point.arm == arm and point.epoch == "last"]
        steps = [
            f"at {point.strength:g} {100 * (point.retention.value or 0.0):.0f} % and "
            f"{cell(point.style.value, '+.2f').text}"
            for point in own
        ]
        sentences += [f"{arm}: {', '.join(steps)}."] if steps else []
    return sentences


def _front_table(front: Front, kept: Point | None, max_prompt_loss: float) -> Table:
    counting = [point.point for point in counting_points(front, max_prompt_loss)]
    names = ("kept, %", "95 % low", "95 % high", "style", "95 % low", "95 % high")
    columns = (
        Column("arm", False),
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


def _layers_figure(facts: Facts) -> Figure | None:
    found = facts.diagnosis.arms if facts.diagnosis else {}
    layers = {arm: found[arm].signals.layers for arm in arms_in_focus(facts) if arm in found}
    spreads = {arm: summarise(own).norm_ratio for arm, own in layers.items() if own}
    known = {arm: spread for arm, spread in spreads.items() if spread is not None}
    maps = {arm: heat_map(layers[arm], "norm_ratio") for arm in known}
    greatest = max((spread.greatest for spread in known.values()), default=0.0)
    if not greatest > 0:
        return None
    kinds = tuple(dict.fromkeys(column for heat in maps.values() for column in heat.columns))
    table = []
    for arm, heat in maps.items():
        for place, values in zip(heat.rows, heat.values, strict=True):
            by_kind = dict(zip(heat.columns, values, strict=True))
            ratios = (by_kind.get(kind) for kind in kinds)
            cells = (Cell("") if ratio is None else cell(ratio, ".3f") for ratio in ratios)
            table.append(row(Cell(arm), Cell(place), *cells))
    medians = ", ".join(f"{arm} {spread.median:.2g}" for arm, spread in known.items())
    tops = "; ".join(
        f"{arm} at most {spread.greatest:.2g}, in {' '.join(place_of(spread.greatest_layer))}"
        for arm, spread in known.items()
    )
    return Figure(
        key="layers",
        title="Where the update sits",
        description=(
            "Size of each adapted layer's update beside the base's weight (Frobenius norms), after the last "
            f"epoch: the stronger the colour, the larger. Medians: {medians}. Rows are places in the model, "
            "from input to output, columns kinds of layers. No size is known to be too much by itself: "
            "compare arms."
        ),
        alt=f"Heat maps of the update's size by layer: {tops}.",
        drawing=draw_heat(maps, greatest),
        table=Table(
            "Size of the update over that of the base's weight by layer",
            (Column("arm", False), Column("place", False), *(Column(kind) for kind in kinds)),
            tuple(table),
        ),
    )


def _effect_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    if not facts.effects or facts.scores is None:
        return None
    scored = list(dict.fromkeys(arm for arm, _ in facts.effects))
    shown = _rows_shown(facts, scored)
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


def _gain_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    scored = [arm for arm in facts.arms if (arm, ALL) in facts.effects]
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


def _scale_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
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


def _loss_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    curves = _loss_curves(facts)
    if not curves:
        return None
    longest = max(map(len, curves.values()))
    window = max(1, round(0.04 * longest))
    drawn = sorted(curves, key=lambda arm: looks[arm].colour != looks[BASE].colour)  # grey ones first, below
    first, second = "training loss, smoothed", "difference from the arms' mean, smoothed"
    lines = [
        Line(first, arm, *thin([x for x, _ in curves[arm]], smooth([y for _, y in curves[arm]], window)))
        for arm in drawn
    ]
    complete = [arm for arm in drawn if arm in facts.arms and len(curves[arm]) == longest]
    settings = {(facts.settings[arm].seed, facts.settings[arm].batch_size) for arm in complete}
    paired = len(complete) > 1 and len(settings) == 1
    if paired:
        losses = [[y for _, y in curves[arm]] for arm in complete]
        means = [sum(values) / len(values) for values in zip(*losses, strict=True)]
        for arm in complete:
            gaps = [y - mean for (_, y), mean in zip(curves[arm], means, strict=True)]
            lines.append(Line(second, arm, *thin([x for x, _ in curves[arm]], smooth(gaps, window))))
    finals = "; ".join(
        f"{arm} {facts.training[arm]['final_loss']:.4f}"
        for arm in facts.detailed
        if "final_loss" in facts.training[arm]
    )
    why = (
        " The arms met the same noise at every step, so their difference is far quieter than either curve."
        if paired
        else ""
    )
    steps = f", averaged over {window} steps" if window > 1 else " of each step"
    return Figure(
        key="loss",
        title="Training loss",
        description=(
            f"{_loss_name(facts)}{steps}. Last epoch: {finals}.{why} Training loss says little about which "
            "arm to keep."
        ),
        alt=f"Line plot of the smoothed training loss of {count(len(curves), 'arm')}. Mean of the last "
        f"epoch: {finals}.",
        drawing=draw_lines(
            lines,
            looks,
            "epoch",
            {first: "loss", second: "loss difference"},
            "loss",
            (1, 0.75) if paired else (),
            (second,),
        ),
        table=_loss_table(curves),
        reference=(
            "Figure 2 of the reference study; its last losses were 0.1192 at rank 16 and 0.1266 at rank 64."
        ),
    )


def _loss_curves(facts: Facts) -> dict[str, list[tuple[float, float]]]:
    """Each arm's training losses as pairs of epoch and loss, without those that are not finite."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in facts.metrics:
        if record.get("kind") == "train" and record["loss"] is not None and math.isfinite(record["loss"]):
            curves.setdefault(record["arm"], []).append((record["epoch"], record["loss"]))
    return curves


def _loss_name(facts: Facts) -> str:
    train = facts.config.train
    name = "Huber loss" if train.loss == "huber" else "Mean squared error"
    if train.min_snr_gamma:
        name += f", weighted by timestep (min-SNR, gamma {train.min_snr_gamma:g})"
    return name


def _loss_table(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Table:
    last = max(epoch for points in curves.values() for epoch, _ in points)
    epochs = range(1, math.ceil(last - 1e-9) + 1)
    rows = []
    for arm, points in curves.items():
        parts = [[y for x, y in points if epoch - 1 < x - 1e-9 <= epoch] for epoch in epochs]
        means = (cell(sum(part) / len(part) if part else None, ".4f") for part in parts)
        rows.append(row(Cell(arm), *means))
    columns = (Column("arm", False), *(Column(f"epoch {epoch}") for epoch in epochs))
    return Table("Mean training loss in each epoch", columns, tuple(rows))


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average; at the ends over the part of the window that exists."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    bounds = [
        (max(0, i - window // 2), min(len(values), i - window // 2 + window)) for i in range(len(values))
    ]
    return [(sums[high] - sums[low]) / (high - low) for low, high in bounds]


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """At most `NUM_CURVE_POINTS` points, evenly spaced, first and last among them."""
    count = min(len(x), NUM_CURVE_POINTS)
    places = [round(i * (len(x) - 1) / max(1, count - 1)) for i in range(count)]
    return tuple(x[i] for i in places), tuple(y[i] for i in places)


def _probes_of(facts: Facts, **wanted: Any) -> list[dict[str, Any]]:
    return [
        record
        for record in facts.probes
        if all(record.get(key) == value for key, value in wanted.items()) and record["arm"] in facts.settings
    ]


def _epochs_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    records = _probes_of(facts, band=ALL, conditional=True)
    if not records:
        return None
    names = {"heldout": "held-out pictures", "train": "training pictures"}
    lines, table = [], []
    for arm in facts.detailed:
        for split, facet in names.items():
            points = [(0.0, 0.0, 0.0, 0.0)]
            points += [
                (r["epoch"], r["difference"], r["difference_low"], r["difference_high"])
                for r in records
                if r["arm"] == arm and r["split"] == split
            ]
            if len(points) > 1:
                x, y, low, high = (tuple(values) for values in zip(*points, strict=True))
                lines.append(Line(facet, arm, x, y, low, high))
            table += [
                row(
                    Cell(arm),
                    Cell(facet),
                    cell(p[0], "g"),
                    cell(p[1], "+.4f"),
                    cell(p[2], "+.4f"),
                    cell(p[3], "+.4f"),
                )
                for p in points[1:]
            ]
    if not lines:
        return None
    columns = (
        Column("arm", False),
        Column("pictures", False),
        Column("epoch"),
        Column("difference"),
        Column("95 % low"),
        Column("95 % high"),
    )
    return Figure(
        key="probe-epochs",
        title="What was learned, and what was only memorised",
        description=(
            "Denoising loss at fixed pictures, noise and timesteps, minus the base's; the band is the "
            "95 % interval over pictures. Below 0 on held-out pictures, the arm predicts them better than "
            "the base; where training pictures go on falling and held-out ones turn up, the arm memorises."
        ),
        alt="Line plot of the loss difference from the base over epochs, held-out and training pictures.",
        drawing=draw_lines(
            lines,
            looks,
            "epoch",
            dict.fromkeys(names.values(), "loss minus base"),
            "probe-epochs",
            zero=tuple(names.values()),
        ),
        table=Table("Denoising loss minus the base's, all timesteps, with caption", columns, tuple(table)),
    )


def _bands_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    groups: dict[str, list[Row]] = {}
    table = []
    for conditional, facet in ((True, "with caption"), (False, "without caption")):
        records = _probes_of(facts, split="heldout", conditional=conditional)
        for arm in facts.detailed:
            own = [record for record in records if record["arm"] == arm]
            last = max((record["step"] for record in own), default=None)
            for record in own:
                if record["step"] == last:
                    values = [record["difference"], record["difference_low"], record["difference_high"]]
                    table.append(
                        row(
                            Cell(arm),
                            Cell(facet),
                            Cell(record["band"]),
                            cell(record["loss"], ".4f"),
                            *(cell(value, "+.4f") for value in values),
                        )
                    )
                    if record["band"] != ALL:
                        groups.setdefault(facet, []).append(Row(record["band"], arm, *values))
    if not groups:
        return None
    columns = (
        Column("arm", False),
        Column("caption", False),
        Column("timesteps", False),
        Column("loss"),
        Column("minus base"),
        Column("95 % low"),
        Column("95 % high"),
    )
    return Figure(
        key="probe-bands",
        title="Held-out loss by timestep",
        description=(
            "After the last epoch, minus the base's, with 95 % intervals over pictures. Early "
            "timesteps (0-250) hold fine detail, late ones (750-1000) layout. An arm that is better "
            "with captions and worse without has lost its unconditional branch, which guidance then "
            "amplifies."
        ),
        alt="Dot plot of the held-out loss difference from the base in four timestep bands, with and "
        "without caption.",
        drawing=draw_bands(groups, looks, "timestep", "loss minus base", "probe-bands"),
        table=Table("Held-out denoising loss by timestep band after the last epoch", columns, tuple(table)),
    )


def _cost_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    arms = [arm for arm in facts.arms if "file_bytes" in facts.training[arm]]
    if not arms:
        return None
    shown = _rows_shown(facts, arms)
    # By measure the key in `training.json`, that in `REFERENCE`, and what makes the unit of both.
    measures = {
        "run time, s": ("run_time_s", "run_time_s", 1.0),
        "memory, GB": ("peak_memory_bytes", "memory", 1e-9),
        "file, MB": ("file_bytes", "file", 1e-6),
    }
    costs = {
        name: {arm: facts.training[arm][key] * factor for arm in shown}
        for name, (key, _, factor) in measures.items()
    }
    reference = {
        name: {arm: values[key] * factor for arm, values in REFERENCE.items()}
        for name, (_, key, factor) in measures.items()
    }
    stacked = any(len(facts.training[arm].get("group", ())) > 1 for arm in arms)
    note = " Arms trained together in one pass share its time and memory." if stacked else ""
    beside = max(facts.training[arm].get("side_by_side", 1) for arm in arms)
    note += (
        f" Up to {beside} passes ran side by side: their times are not those of a machine of their own."
        if beside > 1
        else ""
    )
    return Figure(
        key="cost",
        title="Run time, peak memory and file size",
        description=(
            f"Each scale is logarithmic.{note} The hollow marks are the reference study's, on another "
            "base and machine: their distance between ranks can be compared, their height cannot."
        ),
        alt="Three dot plots: "
        + "; ".join(
            f"{name} " + ", ".join(f"{arm} {value:.3g}" for arm, value in list(values.items())[:MAX_LINES])
            for name, values in costs.items()
        )
        + ".",
        drawing=draw_costs(costs, reference, looks),
        table=_cost_table(facts, arms),
        reference="Figure 1 of the reference study.",
    )


def _cost_table(facts: Facts, arms: Sequence[str]) -> Table:
    columns = (
        Column("arm", False),
        Column("run time"),
        Column("peak memory"),
        Column("kind", False),
        Column("file"),
        Column("parameters"),
        Column("trained with", False),
    )
    kinds = {"rss": "whole process", "cuda": "GPU, allocated"}
    rows = []
    for arm in arms:
        own = facts.training[arm]
        group = ", ".join(other for other in own.get("group", ()) if other != arm) or "alone"
        rows.append(
            row(
                Cell(arm),
                Cell(f"{own['run_time_s']:,.0f} s", own["run_time_s"]),
                Cell(f"{own['peak_memory_bytes'] / 1e9:.2f} GB", own["peak_memory_bytes"]),
                Cell(kinds.get(own["peak_memory_kind"], own["peak_memory_kind"])),
                Cell(f"{own['file_bytes'] / 1e6:.1f} MB", own["file_bytes"]),
                cell(own["parameters"], ",d"),
                Cell(group),
            )
        )
    for arm, values in REFERENCE.items():
        rows.append(
            row(
                Cell(arm),
                Cell(f"{values['run_time_s']:,.0f} s", values["run_time_s"]),
                Cell(f"{values['memory'] / 1e9:.1f} GB", values["memory"]),
                Cell("GPU"),
                Cell(f"{values['file'] / 1e6:.0f} MB", values["file"]),
                cell(None),
                Cell("alone"),
            )
        )
    return Table("Cost of each arm", columns, tuple(rows))
