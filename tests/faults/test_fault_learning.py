"""Thresholds learnt from labelled arms, and what is found of others: gaps, ties, too few, the matrix."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.faults.__main__ import evaluate, main, run_study
from benchmarks.faults.arms import BY_NAME, FILE_ARM, FILE_DONOR, Fault, Planned
from benchmarks.faults.files import FileFinding
from benchmarks.faults.learn import (
    RULES,
    SOURCE,
    Labelled,
    best_cut,
    confusion,
    judge,
    judge_files,
    learn_thresholds,
    learnt,
    split_seeds,
)
from benchmarks.faults.table import Result, as_markdown

from lorascope.config import load_study
from lorascope.diagnosis.signals import ArmSignals, make_signal
from lorascope.diagnosis.thresholds import Thresholds
from lorascope.diagnosis.words import Cause
from lorascope.errors import ConfigError
from synthetic_signals import (
    a_point,
    an_interval,
    default_arm,
    diverged_arm,
    drifted_arm,
    healthy_arm,
    overfit_arm,
    short_arm,
)

MADE: dict[Cause, Callable[[], ArmSignals]] = {
    "healthy": healthy_arm,
    "too_strong": default_arm,
    "diverged": diverged_arm,
    "not_learned": short_arm,
    "overfit": overfit_arm,
    "unconditional_drift": drifted_arm,
}


def labelled(label: Cause, seed: int = 0, **changes: object) -> Labelled:
    """A made-up arm of this cause; numbers become signals with a narrow interval."""
    signals = {
        key: an_interval(key, value, 0.01) if isinstance(value, float) else value
        for key, value in changes.items()
    }
    return Labelled(f"main-s{seed}", seed, label, replace(MADE[label](), **signals))  # type: ignore[arg-type]


def all_labelled(seed: int) -> list[Labelled]:
    return [labelled(label, seed) for label in MADE]


def test_a_cut_lies_in_the_middle_of_the_gap() -> None:
    cut = best_cut([0.3, 0.5, 0.4], [0.0, 0.1], above=True)
    assert cut.value == pytest.approx(0.2)
    assert (cut.low, cut.high, cut.with_fault, cut.without_fault) == (0.1, 0.3, 1.0, 1.0)
    assert best_cut([-0.3, -0.5, -0.4], [0.0, -0.1], above=False).value == pytest.approx(-0.2)


def test_of_overlapping_arms_the_cut_splits_the_most_either_kind_counted_alike() -> None:
    sound = [0.0] * 8 + [0.1, 0.9]
    cut = best_cut([0.5, 0.6, 0.7], sound, above=True)
    assert cut.value == pytest.approx(0.3)
    assert (cut.with_fault, cut.without_fault) == (1.0, 0.9)
    assert (cut.num_with, cut.num_without) == (3, 10)


def test_of_equal_cuts_the_widest_gap_counts() -> None:
    # Both 0.15 and 0.45 put 3 of 4 faulty arms, or all of them and 3 of 4 sound ones, on their side.
    cut = best_cut([0.2, 0.7, 0.7, 0.7], [0.1, 0.1, 0.1, 0.25], above=True)
    assert cut.value == pytest.approx((0.25 + 0.7) / 2)


@pytest.mark.parametrize(
    ("faulty", "sound", "reason"),
    [
        ([0.5], [0.1, 0.2], "1 arms with the fault and 2 without it were measured: too few"),
        ([0.5, 0.6], [], "2 arms with the fault and 0 without it were measured: too few"),
        ([0.5, 0.5], [0.5, 0.5], "all values are the same"),
        ([0.1, 0.3], [0.2, 0.4], "splits 50 % of the arms rightly at best"),
    ],
)
def test_what_does_not_split_is_not_learnt(faulty: list[float], sound: list[float], reason: str) -> None:
    cut = best_cut(faulty, sound, above=True)
    assert cut.value is None and str(cut.reason).startswith(reason)


def test_thresholds_are_learnt_one_by_one_and_say_from_what() -> None:
    arms = [
        *all_labelled(0),
        *all_labelled(2),
        labelled("overfit", train_gap=0.03),
        labelled("healthy", train_gap=0.01),
        labelled("diverged", intruder_share=0.3),
        labelled("unconditional_drift"),
    ]
    cuts = learn_thresholds(arms)
    assert cuts.keys() == RULES.keys()
    assert cuts["train_gap"].value == pytest.approx(0.02)  # between .01 and .03
    assert cuts["intruder_share"].value == pytest.approx((0.08 + 0.3) / 2)
    assert cuts["guidance_cosine"].value == pytest.approx((0.02 + 0.32) / 2)
    assert cuts["gain_ratio"].value == pytest.approx((0.08 + 0.055 + 0.47 + 0.01) / 2)  # upper bounds
    assert cuts["copying_excess"].value is None  # never measured
    thresholds = learnt(cuts)
    assert thresholds.intruder_share.source == SOURCE
    assert thresholds.copying_excess == Thresholds().copying_excess


def test_what_the_bases_branch_brings_back_is_a_share_of_what_was_lost() -> None:
    lost = replace(
        drifted_arm(),
        points=(a_point(1.0, 0.5, 0.3),),
        unconditional_recovery=make_signal("unconditional_recovery", 0.4),
    )
    assert RULES["recovered"].measure(lost) == pytest.approx(0.8)
    kept = replace(lost, points=(a_point(1.0, 0.95, 0.3),))
    assert RULES["recovered"].measure(kept) is None


def test_every_rule_is_of_a_threshold_and_the_learning_half_is_not_judged() -> None:
    assert set(RULES) <= set(Thresholds().as_table())
    learning, judging = split_seeds(range(8))
    assert (learning, judging) == ([0, 2, 4, 6], [1, 3, 5, 7])


def test_the_matrix_counts_what_was_found_of_what_was_planted() -> None:
    arms = [*all_labelled(1), *all_labelled(3)]
    matrix = confusion(judge(arms, Thresholds()))
    assert matrix.counts["diverged"] == {"diverged": 2}
    assert (matrix.num_judged, matrix.num_right, matrix.right) == (12, 12, 1.0)
    assert (matrix.num_healthy, matrix.healthy_called_faulty, matrix.confused) == (2, 0, ())
    # A threshold beyond the planted arms: the diverged ones become something else, and it is said what.
    moved = Thresholds().with_values({"intruder_share": 0.9}, "a test")
    matrix = confusion(judge(arms, moved))
    assert matrix.counts["diverged"] == {"cannot_tell": 2} and matrix.num_undecided == 2
    assert matrix.num_right == 10 and matrix.confused == ()


def test_healthy_arms_that_are_called_faulty_are_counted_and_named() -> None:
    wrong = labelled("healthy", 1)
    wrong = replace(wrong, signals=replace(wrong.signals, points=default_arm().points))
    matrix = confusion(judge([wrong, labelled("healthy", 3)], Thresholds()))
    assert (matrix.num_healthy, matrix.healthy_called_faulty) == (2, 1)
    [item] = matrix.confused
    assert (item.seed, item.label, item.found) == (1, "healthy", "too_strong")
    assert "brings the prompts back" in item.evidence[0]


def test_no_arms_give_no_share() -> None:
    assert confusion([]).right is None


MERGED = {"relative_error": 0.3, "tolerance": 1e-3, "mean_pixel_difference": 9.0, "ok": False}


def some_findings(seed: int) -> list[FileFinding]:
    return [
        FileFinding("doubled-alpha", seed, "changed", "of another arm", MERGED, None),
        FileFinding("nan-layer", seed, "changed", "NaN", None, "NaN"),
        FileFinding("zeroed-half", seed, "changed", None, {**MERGED, "ok": True}, None),
    ]


def test_faults_of_files_are_judged_by_the_arms_own_signals_and_the_merge() -> None:
    signals = healthy_arm(FILE_ARM)
    arms = [Labelled("main-s1", 1, "healthy", signals)]
    judged = judge_files([*some_findings(1), *some_findings(2)], arms, Thresholds())
    assert [item.found for item in judged] == ["file_fault", "refused", "healthy"]
    matrix = confusion(judged)
    assert (matrix.num_right, matrix.num_judged) == (2, 3)


def test_the_result_in_words() -> None:
    arms = [*all_labelled(1), labelled("healthy", 3, points=default_arm().points)]
    cuts = learn_thresholds([*all_labelled(0), *all_labelled(2)])
    matrix = confusion([*judge(arms, learnt(cuts)), *judge_files(some_findings(1), [], Thresholds())])
    result = Result(True, (0, 2), (1, 3), {"lorascope": "0"}, cuts, matrix, matrix, some_findings(1))
    text = as_markdown(result)
    assert "Learnt from training seeds 0, 2; judged: 1, 3. lorascope 0." in text
    assert "A quick run" in text
    assert (
        "| planted | healthy | not learned | diverged | too strong | unconditional drift | overfit |" in text
    )
    assert "| healthy | 1 |  |  | 1 |  |  |" in text
    assert "Right: 6 of 7 (86 %). Cannot tell: 0. Healthy arms called faulty: 1 of 2." in text
    assert "| doubled-alpha | 1 of 1 | 1 of 1 | 1 of 1 |" in text
    assert "| zeroed-half | 1 of 1 | 0 of 1 | 0 of 1 |" in text
    assert "| `copying_excess` | 0.05 | 0 arms with the fault and 0 without it" in text
    assert json.loads(json.dumps(result.as_json()))["matrix"]["num_right"] == 6
    none = replace(result, matrix=confusion([]), quick=False)
    assert "none judged" in as_markdown(none) and "A quick run" not in as_markdown(none)


def a_study(study_file: Path, seed: int) -> Planned:
    """The two arms into whose files faults are planted, and one that fails, on the tiny base."""
    faults = (
        Fault(FILE_ARM, "healthy", "mild", 4, 1e-2),
        Fault(FILE_DONOR, "too_strong", "mild", 4, 5e-2),
        BY_NAME["not-finite-r16"],
    )
    config = load_study(
        study_file,
        overrides=["train.epochs=1", "workers=1", "sample.num_prompts=2", "diagnose.guidances=[]"],
        environment={},
    )
    values = {**config.model_dump(), "arms": [fault.grid(seed) for fault in faults]}
    return Planned("mild", seed, faults, type(config).model_validate(values))


def test_studies_are_run_once_and_give_a_result(
    study_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    studies = [a_study(study_file, seed) for seed in range(2)]
    for planned in studies:
        run_study(planned, tmp_path / "quick")
    monkeypatch.setattr("benchmarks.faults.__main__.plan_studies", lambda *_: studies)
    assert main(["--out", str(tmp_path), "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "mild-s0: finished" in printed and "mild-s1: finished" in printed
    kept = json.loads((tmp_path / "quick" / "matrix.json").read_text())
    assert kept["matrix"]["num_judged"] == 3 + 5
    assert "doubled-alpha | 2 of 2 | 2 of 2 | 2 of 2 |" in (tmp_path / "quick" / "matrix.md").read_text()
    result = evaluate(tmp_path / "quick", studies, quick=True)
    assert result.matrix.counts["numerical"] == {"numerical": 1}
    assert result.matrix.counts["file_fault"] == {"file_fault": 3, "refused": 2}
    other = Planned("mild", 0, studies[0].faults, studies[1].config)
    with pytest.raises(ConfigError, match="made with another configuration"):
        run_study(other, tmp_path / "quick")
    monkeypatch.setattr("benchmarks.faults.__main__.plan_studies", lambda *_: [other, studies[1]])
    assert main(["--out", str(tmp_path), "--quick"]) == 2
    assert "faults: " in capsys.readouterr().err
