"""Scores and verdict as JSON and Markdown."""

import json
from pathlib import Path

import numpy as np

from lorascope.evaluation.front import trace_front
from lorascope.evaluation.score_text import scores_as_dict, scores_as_markdown
from lorascope.evaluation.scores import (
    BASE,
    NOISE,
    REAL,
    SHUFFLED,
    Scores,
    planned_contrasts,
    summary_table,
    write_scores,
)
from lorascope.evaluation.sentences import describe_difference
from lorascope.evaluation.verdict import Verdict, reach_verdict
from lorascope.run_folder import RunDir
from synthetic_scores import SCORER, draws, make_scores, probe, shifted, with_calibration
from synthetic_sweeps import simple_sweep

FRONT = trace_front(simple_sweep({("r4", 0.5): (0.95, 0.3), ("r16", 0.5): (0.95, 0.2)}))


def judge(scores: Scores) -> Verdict:
    return reach_verdict(scores, FRONT, [probe("r4", -0.01), probe("r16", -0.01)])


def test_no_text_says_significant_or_best() -> None:
    scores = shifted(r4=-0.1, r16=0, r64=-6)
    verdict = judge(scores)
    text = scores_as_markdown(scores, verdict) + json.dumps(scores_as_dict(scores, verdict))
    assert "significant" not in text.lower()
    assert " best" not in text.lower()


def test_dict_form_is_json_with_the_verdict() -> None:
    scores = with_calibration(shifted(r4=-1, r16=-3))
    verdict = judge(scores)
    values = json.loads(json.dumps(scores_as_dict(scores, verdict), allow_nan=False))
    assert values["verdict"]["keep"] == "r4"
    assert values["num_truncated"] == 2
    assert values["scorer"] == SCORER
    assert values["verdict"]["against_base"]["sentence"] == describe_difference(verdict.against_base)  # type: ignore[arg-type]
    assert "per_prompt" not in values["verdict"]["against_base"]
    assert {row["arm"] for row in values["summary"]} == {BASE, "r4", "r16", NOISE, SHUFFLED, REAL}
    assert [(c["arm"], c["against"]) for c in values["contrasts"]] == [
        ("r4", BASE),
        ("r16", BASE),
        ("r16", "r4"),
    ]
    assert scores_as_dict(scores)["verdict"] is None


def test_markdown_form_is_one_aligned_table() -> None:
    scores = with_calibration(shifted(r4=-1, r16=-3))
    lines = scores_as_markdown(scores).splitlines()
    assert len(lines) == 2 + 6
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("|")[1:5] == [
        part.ljust(len(cell))
        for part, cell in zip([" arm", " normal", " abstract", " all"], lines[0].split("|")[1:5], strict=True)
    ]
    assert "| -1.00 " in next(line for line in lines if line.startswith("| r4 "))
    verdict = judge(scores)
    text = scores_as_markdown(scores, verdict)
    assert text.startswith("Keep r4 at strength 0.5, last epoch: <lora:study-r4:0.5>.\n\n| arm")
    assert f"Rule: {verdict.rule}" in text
    assert "Not decided:\n- " in text


def test_order_of_rows_changes_nothing(tmp_path: Path) -> None:
    scores = with_calibration(
        make_scores({"r16": draws(25, 12), BASE: draws(26, 12), "r64": draws(20, 12)}, seeds=3)
    )
    rows = list(scores.rows)
    np.random.default_rng(3).shuffle(rows)  # type: ignore[arg-type]
    shuffled = Scores.from_rows(rows, dict(reversed(SCORER.items())), 2)
    contents = []
    for name, variant in (("a", scores), ("b", shuffled), ("c", Scores(tuple(rows), SCORER, 2))):
        write_scores(RunDir(tmp_path / name), variant)
        contents.append((tmp_path / name / "scores.parquet").read_bytes())
    assert contents[0] == contents[1] == contents[2]
    for summarise in (
        summary_table,
        planned_contrasts,
        judge,
        scores_as_markdown,
        scores_as_dict,
    ):
        assert summarise(shuffled) == summarise(scores)
