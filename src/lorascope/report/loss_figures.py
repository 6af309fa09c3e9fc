"""Figures of losses: in training, and at fixed noise by epoch and by timestep."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorascope.evaluation.scores import ALL, BASE
from lorascope.report.canvas import Look
from lorascope.report.dot_plots import Row, draw_bands
from lorascope.report.evidence import Facts, count
from lorascope.report.figure import Figure
from lorascope.report.line_plots import Line, draw_lines
from lorascope.report.tables import Cell, Column, Table, cell, row

NUM_CURVE_POINTS = 160


def loss_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    """Training loss over epochs, and each arm's distance from their mean; None without records."""
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


def epochs_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    """Loss at fixed noise minus the base's after every epoch, by split; None without probes."""
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


def bands_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    """Held-out loss minus the base's by timestep, with and without captions; None without probes."""
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


def _probes_of(facts: Facts, **wanted: Any) -> list[dict[str, Any]]:
    return [
        record
        for record in facts.probes
        if all(record.get(key) == value for key, value in wanted.items()) and record["arm"] in facts.settings
    ]
