"""Why each arm wins or fails: a row an arm, with what decided, what speaks against it and what to do."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from lorascope.diagnosis.causes import decide_all
from lorascope.diagnosis.record import write_diagnosis
from lorascope.report.evidence import NOT_MEASURED, Facts
from lorascope.report.page import build_report
from lorascope.report.why import arms_in_focus, explain_arms
from lorascope.run_folder import RunDir
from synthetic_run import make_run
from synthetic_signals import (
    a_point,
    an_arm,
    an_interval,
    default_arm,
    diverged_arm,
    healthy_arm,
    overfit_arm,
    signals_of,
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "two", num_prompts=8, num_steps=8, side_px=16)


def diagnose(run: RunDir, **made_up: object) -> None:
    """Write the diagnosis of made-up arms under these names; they are named as arms of the study."""
    named = {name: replace(signals, arm=an_arm(name)) for name, signals in made_up.items()}  # type: ignore[type-var]
    write_diagnosis(run, decide_all(list(named.values())))


def test_an_arm_has_its_cause_its_two_signals_and_its_remedy(run: RunDir) -> None:
    diagnose(run, r16=default_arm(), r64=overfit_arm())
    first, second = explain_arms(Facts(run))
    assert (first.arm, first.role, first.state, first.sign) == ("r16", "kept", "caution", "!")
    assert (first.cause, first.confidence) == ("too strong at strength 1", "medium")
    assert len(first.evidence) == 2 and first.evidence[0].startswith("Strength 0.5 brings the prompts back")
    assert first.against == ("That it keeps enough there is its estimate, not its whole interval.",)
    assert first.settings[0][0] == "arms.lr = 0.00025"
    assert second.cause == "overfit to the training pictures"
    assert second.contributing == ("too strong at strength 1",)
    assert ("train.caption_dropout = 0.1", "") in [(line, "") for line, _ in second.settings]
    assert [line for line, reason in second.settings if "More pictures" in reason] == [""]


def test_interventions_stand_beside_the_evidence_and_a_cut_that_would_do_in_the_next_study(
    run: RunDir,
) -> None:
    tried = replace(
        default_arm(),
        intruder_recovery=an_interval("intruder_recovery", 0.12, 0.07, control=0.43),
        cut_retention=an_interval("cut_retention", 0.56, 0.02, control=0.57),
        cut_style=an_interval("cut_style", 0.53, 0.02, control=0.53),
    )
    diagnose(run, r16=healthy_arm(), r64=tried)
    rows = explain_arms(Facts(run))
    assert rows[0].tried == () and len(rows[1].tried) == 2
    assert rows[1].settings[-1][0] == "" and rows[1].settings[-1][1].startswith("A lower rank may do")
    report = build_report(run)
    page, text = (path.read_text(encoding="utf-8") for path in (report.html_path, report.md_path))
    assert page.count("<dt>Tried at strength 1</dt>") == 1
    for sentence in rows[1].tried:
        assert sentence in text and sentence.replace("'", "&#39;") in page


def test_states_say_whether_there_is_a_way_to_use_the_arm(run: RunDir) -> None:
    diagnose(run, r16=healthy_arm(), r64=diverged_arm())
    healthy, diverged = explain_arms(Facts(run))
    assert (healthy.state, healthy.css, diverged.state) == ("yes", "yes", "no")
    assert diverged.now == ("No strength that was drawn has style and keeps the prompts.",)
    diagnose(run, r16=healthy_arm())
    missing = explain_arms(Facts(run))[1]
    assert (missing.state, missing.css) == (NOT_MEASURED, "not-measured")
    assert missing.cause == "not measured: run `lorascope diagnose RUN`"


def test_what_is_open_is_said_once(run: RunDir) -> None:
    undecided = signals_of(an_arm("r16"), a_point(1.0, 0.91, 0.3))
    diagnose(run, r16=undecided)
    row = explain_arms(Facts(run))[0]
    assert (row.state, row.evidence_name) == (NOT_MEASURED, "What is open")
    assert row.evidence[1].startswith("About ")
    assert not [text for text in row.now if "prompts would decide" in text]
    page = build_report(run).html_path.read_text(encoding="utf-8")
    assert "<dt>What is open</dt>" in page and "<dt>Against it</dt>" not in page


def test_an_arm_is_used_at_the_strength_of_the_verdicts_rule(run: RunDir) -> None:
    facts = Facts(run)
    assert facts.verdict is not None and facts.verdict.point is not None and facts.diagnosis is not None
    rows = explain_arms(facts)
    assert facts.verdict.point.strength == 0.75
    assert rows[0].now[0] == "Use it at strength 0.75, last epoch, as the verdict does."
    remedy = facts.diagnosis.arms["r64"].remedy
    assert rows[1].now[0] == f"Use it at strength {remedy.strength:g}, last epoch."
    # Of a diagnosis by another version, which knew another rule.
    diagnose(run, r16=default_arm(), r64=default_arm())
    facts = Facts(run)
    assert facts.diagnosis is not None and facts.diagnosis.arms["r16"].remedy.strength == 0.5
    assert explain_arms(facts)[0].now == ("Use it at strength 0.75, last epoch, as the verdict does.",)


def test_of_many_arms_the_kept_one_the_runner_up_and_the_worst_are_shown_first(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "many", ranks=(4, 16, 64), lrs=(5e-4, 1e-3, 4e-3), num_prompts=5, num_steps=4, side_px=16
    )
    facts = Facts(run)
    assert facts.verdict is not None and facts.diagnosis is not None
    assert arms_in_focus(facts) == (facts.verdict.keep, facts.runner_up, "r64-lr0.004")
    assert facts.diagnosis.arms["r64-lr0.004"].cause == "diverged"
    page = build_report(run).html_path.read_text(encoding="utf-8")
    assert "<summary>6 further arms</summary>" in page
    run.diagnosis_json.unlink()
    assert arms_in_focus(Facts(run))[-1] == facts.ranked[-1]


def test_a_failed_arm_is_told_as_such(tmp_path: Path) -> None:
    run = make_run(tmp_path / "failed", failed=("r64",), num_prompts=5, num_steps=8, side_px=16)
    row = explain_arms(Facts(run))[1]
    assert (row.cause, row.state) == ("numbers that are not finite, or black pictures", "no")
    assert row.evidence == ("No: training ended without a fault (loss is not finite).",)
    assert "training ended without a fault" in build_report(run).md_path.read_text(encoding="utf-8")


def test_a_run_without_a_diagnosis_says_what_to_run(run: RunDir) -> None:
    run.diagnosis_json.unlink()
    assert explain_arms(Facts(run)) == []
    said = "Not measured: run `lorascope diagnose RUN`."
    report = build_report(run)
    shown = re.sub("`(.*)`", r"<code>\1</code>", said)
    assert f"<p>{shown}</p>" in report.html_path.read_text(encoding="utf-8").replace("&#39;", "'")
    assert "## 4 Why each arm wins or fails" in report.md_path.read_text(encoding="utf-8")
