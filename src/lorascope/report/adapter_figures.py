"""Figures of the adapters themselves: where the update sits, and what each cost."""

from collections.abc import Mapping, Sequence

from lorascope.diagnosis.layers import heat_map, place_of, summarise
from lorascope.report.canvas import MAX_LINES, Look
from lorascope.report.dot_plots import draw_costs
from lorascope.report.evidence import Facts
from lorascope.report.figure import Figure, rows_shown
from lorascope.report.heat_maps import draw_heat
from lorascope.report.tables import REFERENCE, Cell, Column, Table, cell, row
from lorascope.report.why import arms_in_focus


def layers_figure(facts: Facts) -> Figure | None:
    """The size of the update by layer as a heat map; None where the run was not diagnosed."""
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


def cost_figure(facts: Facts, looks: Mapping[str, Look]) -> Figure | None:
    """Run time, memory and file size beside the reference study's; None where no arm is trained."""
    arms = [arm for arm in facts.arms if "file_bytes" in facts.training[arm]]
    if not arms:
        return None
    shown = rows_shown(facts, arms)
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
