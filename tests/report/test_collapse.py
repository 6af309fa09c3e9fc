"""The reference study's collapse beside a study's own ranks: which arms are meant, and what is said."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lorascope.evaluation.contrast import GainContrast
from lorascope.evaluation.scores import paired_differences
from lorascope.evaluation.sentences import describe_difference
from lorascope.report.collapse import collapse_text
from lorascope.report.evidence import Facts
from lorascope.report.page import build_report
from lorascope.run_folder import RunDir
from synthetic_run import make_run

STAGES = ("data", "encode", "train", "sample", "score")


def make(
    path: Path, lrs: Sequence[float] = (5e-4,), seeds: Sequence[int] = (0,), ranks: Sequence[int] = (16, 64)
) -> RunDir:
    return make_run(path, ranks, lrs, seeds, num_steps=8, side_px=8, stages=STAGES, with_probes=False)


def said(facts: Facts, arm: str, against: str) -> str:
    assert facts.scores is not None
    return describe_difference(paired_differences(facts.scores, arm, against, "normal", 500))


def test_our_figures_stand_beside_the_published_ones(tmp_path: Path) -> None:
    run = make(tmp_path / "two")
    facts = Facts(run)
    text = collapse_text(facts)
    assert text is not None and text.startswith(
        "The reference study trained rank 16 and rank 64 at alpha = 2 x rank and lr 0.0005, and rank 64 "
        "collapsed: 29.3 and 19.8 on normal prompts, 23.4 and 22.1 on abstract ones, last losses 0.1192 and "
        "0.1266. Here, at alpha = 2 x rank and lr 0.0005, r16 and r64 score "
    )
    means = [
        f"{facts.summary['r16', category].mean:.1f} and {facts.summary['r64', category].mean:.1f}"
        for category in ("normal", "abstract")
    ]
    assert f"score {means[0]} on normal prompts, {means[1]} on abstract prompts, last losses 0.12" in text
    assert f"On normal prompts: {said(facts, 'r64', 'r16')} At one alpha / rank and lr, rank 64 has" in text
    assert text.endswith('so that stays open: an arm of rank 64 with `match_gain = "r16"` would show it.')
    report = build_report(run)
    assert "29.3 and 19.8 on normal prompts" in report.html_path.read_text(encoding="utf-8")
    assert "29.3 and 19.8 on normal prompts" in report.md_path.read_text(encoding="utf-8")


def test_what_the_verdict_says_of_strength_and_rank_ends_it(tmp_path: Path) -> None:
    facts = Facts(make(tmp_path / "three", lrs=(5e-4, 2.5e-4)))
    text = collapse_text(facts)
    assert text is not None and "match_gain" not in text
    assert "Here, at alpha = 2 x rank and lr 0.0005, r16-lr0.0005 and r64-lr0.0005 score " in text
    assert text.endswith("but no arm is shown to lose more of the prompts.")
    assert facts.verdict is not None
    contrast = GainContrast(("a",), ("b",), ("c",), "strength", "On average, it is the strength.")
    facts.verdict = replace(facts.verdict, contrast=contrast)
    assert (collapse_text(facts) or "").endswith(contrast.sentence)


def test_training_seeds_are_counted(tmp_path: Path) -> None:
    text = collapse_text(Facts(make(tmp_path / "seeds", seeds=(0, 1))))
    assert text is not None and "r16 and r64 score " in text and "over 2 training seeds, last" in text
    assert (
        "On normal prompts r64 is shown to score below r16 in 2 of 2 training seeds, and above in 0" in text
    )
    assert 'match_gain = "r16"' in text


@pytest.mark.parametrize("ranks", [(16, 32), (64,)])
def test_another_study_has_no_such_paragraph(ranks: tuple[int, ...], tmp_path: Path) -> None:
    assert collapse_text(Facts(make(tmp_path / "other", ranks=ranks))) is None


def test_before_scoring_there_is_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "two", num_steps=8, side_px=8, stages=STAGES[:3], with_probes=False)
    assert collapse_text(Facts(run)) is None
