"""A benchmark's result as a Markdown table and a plot, by themselves or in a document."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorascope.console import duration, size
from lorascope.errors import ConfigError
from lorascope.report.canvas import Drawing, looks_of
from lorascope.report.line_plots import Line, draw_lines
from lorascope.store import read_json, write_bytes, write_text

_WHAT = {"adapters": "adapters in one pass", "rank": "rank", "batch": "pictures a step"}


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table with its conditions; ratios are over the same ranks' P1, P3 and fastest P4 that were measured
    here.
    """
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    protocol = result["protocol"]
    lines = [
        f"{result['base']}, {result['resolution_px']} px, batch {result['batch_size']}; {result['device']}, "
        f"{result['num_threads']} threads; {versions}; lorascope {result['lorascope']}; "
        f"{result['started'][:10]}.",
        "",
        f"Gate: {protocol['num_gate_steps']} steps. Timing: {protocol['num_warm_ups']} further "
        f"warm-ups, {protocol['num_blocks']} blocks of {protocol['num_steps']} steps in turns; median "
        "of the blocks, in brackets the fastest and the slowest.",
        "",
    ]
    if limit := result.get("limit"):
        limits = ", ".join(f"{dtype} {value / 1e12:.3g} TFLOP/s" for dtype, value in limit.items())
        flops = ", ".join(f"{rank} {value / 1e9:.4g} GFLOP" for rank, value in result["flops"].items())
        lines += [f"Limit (a large matrix product, measured): {limits}. A step needs (counted): {flops}.", ""]
    lines += [
        "| arm | | precision | ms per arm-step | x P1 | x P3 | x P4 | images/s | of the limit | peak "
        "memory | reserved | set-up + first step, s | 3,750 steps |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = result["entries"]
    for key in sorted(rows, key=_order):
        lines.append(_line(key, rows[key], rows))
    if scaling := result.get("scaling"):
        lines += ["", *_scaling_table(scaling)]
    return "\n".join(lines) + "\n"


def _order(key: str) -> tuple[int, bool, str]:
    name, _, ranks = key.partition("-")
    found = re.findall(r"\d+", ranks)  # none of full fine-tuning
    rank = int(found[0]) if len(found) == 1 else 10**6
    return rank, name.startswith("O"), name


def _line(key: str, row: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    barred = f" (not used here: {', '.join(row['barred'])})" if row.get("barred") else ""
    head = f"| {key} | {row['label']}{barred} | {row['precision']} "
    if row["status"] != "measured":
        return f"{head}| {row['status']}: {row['reason']} |" + " |" * 9
    low, high = row["arm_step_ms_range"]
    cells = [f"{row['arm_step_ms']:.4g} ({low:.4g} to {high:.4g})"]
    cells += [_ratio(row, rows, peer) for peer in ("P1", "P3", "P4")]
    cells += [
        f"{row['images_per_s']:.3g}",
        f"{row['limit_fraction']:.0%}",
        f"{size(row['peak_memory_bytes'])} ({row['peak_memory_kind']})",
    ]
    cells.append(size(row["reserved_memory_bytes"]) if row["reserved_memory_bytes"] else "")
    cells += [f"{row['setup_s']:.1f} + {row['first_step_s']:.1f}", duration(row["total_s"])]
    return f"{head}| {' | '.join(cells)} |"


def _ratio(row: Mapping[str, Any], rows: Mapping[str, Any], peer: str) -> str:
    """How many times as fast an entry is as a peer (the fastest of its kind) at the same rank."""
    ranks = sorted(set(row["ranks"]))
    times = [
        other["arm_step_ms"]
        for other in rows.values()
        if other["name"].startswith(peer)
        and other["status"] == "measured"
        and sorted(set(other["ranks"])) == ranks
    ]
    return f"{min(times) / row['arm_step_ms']:.2f}" if times else ""


def _scaling_table(points: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| what grows | value | ms per step | peak memory |", "|---|---|---|---|"]
    for point in points:
        told = (
            f"{point['step_ms']:.4g} | {size(point['memory_bytes'])}"
            if "step_ms" in point
            else f"{point['reason']} | "
        )
        lines.append(f"| {_WHAT[point['what']]} | {point['value']} | {told} |")
    return lines


def draw_scaling(points: Sequence[Mapping[str, Any]]) -> Drawing:
    """Time and memory of a step over the factor by which adapters, rank or batch grew from their least."""
    lines = []
    for facet, key, unit in (("Time", "step_ms", 1.0), ("Memory", "memory_bytes", 2.0**30)):
        for what, label in _WHAT.items():
            own = [point for point in points if point["what"] == what and key in point]
            if own:
                x, y = (
                    tuple(float(point["value"]) for point in own),
                    tuple(point[key] / unit for point in own),
                )
                lines.append(Line(facet, label, tuple(value / x[0] for value in x), y))
    looks = looks_of(list(_WHAT.values()))
    return draw_lines(lines, looks, "times the least", {"Time": "ms a step", "Memory": "GiB"}, "scaling")


def update_document(document: Path, results: Sequence[Path]) -> None:
    """Put tables and plots of result files `bench.json` in place of what stands between the document's
    markers.

    Markers are `<!-- bench NAME -->` and `<!-- end -->`, NAME that of the result's folder. Raises
    `ConfigError` for a result that the document has no markers for.
    """
    text = document.read_text(encoding="utf-8")
    for path in results:
        result, name = read_json(path), path.parent.name
        content = as_markdown(result)
        if result.get("scaling"):
            drawing = draw_scaling(result["scaling"])
            picture = document.parent / f"scaling-{name}.png"
            write_bytes(picture, drawing.png)
            content += f"\n![Time and memory of a step]({picture.name})\n"
        pattern = re.compile(rf"(<!-- bench {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        found = pattern.search(text)
        if found is None:
            raise ConfigError(
                f"{document}: has no lines <!-- bench {name} --> and <!-- end -->: add them where the "
                "table shall stand"
            )
        begin, end = found[1], found[2]
        text = text[: found.start()] + begin + content + end + text[found.end() :]
    write_text(document, text)
