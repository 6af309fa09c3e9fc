"""The heat map holds the ratio of every layer, and the costs say how they came about."""

from dataclasses import replace

from lorascope.diagnosis.record import read_diagnosis, write_diagnosis
from lorascope.report.evidence import Facts
from lorascope.report.figures import build_figures
from lorascope.run_folder import RunDir
from lorascope.store import read_json, write_json


def test_the_heat_map_has_the_ratio_of_every_layer(two_arm_run: RunDir) -> None:
    facts = Facts(two_arm_run)
    figure = build_figures(facts)["layers"]
    assert facts.diagnosis is not None
    ratios = [layer.norm_ratio for arm in facts.arms for layer in facts.diagnosis.arms[arm].signals.layers]
    assert sorted(cell.value for row in figure.table.rows for cell in row.cells[2:]) == sorted(ratios)  # type: ignore[type-var]
    assert [cell.text for cell in figure.table.rows[0].cells[:2]] == ["r16", "down 0.0"]
    assert figure.drawing.page_svg.count("var(--series-0)") >= len(ratios)
    assert "r16 at most" in figure.alt and "up 3.2 attn2.to_out.0" in figure.alt


def test_a_diagnosis_without_layers_has_no_heat_map(copied: RunDir) -> None:
    record = read_diagnosis(copied)
    bare = {
        arm: replace(found, signals=replace(found.signals, layers=())) for arm, found in record.arms.items()
    }
    write_diagnosis(copied, bare)
    assert "layers" not in build_figures(Facts(copied))


def test_costs_of_passes_side_by_side_are_told_as_such(copied: RunDir) -> None:
    for arm in ("r16", "r64"):
        path = copied.adapters_dir / arm / "training.json"
        write_json(path, {**read_json(path), "side_by_side": 2})
    told = "Up to 2 passes ran side by side: their times are not those of a machine of their own."
    assert told in build_figures(Facts(copied))["cost"].description
