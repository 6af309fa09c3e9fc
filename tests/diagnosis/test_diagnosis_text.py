"""Diagnoses in words."""

from dataclasses import replace

from lorascope.diagnosis.causes import decide_all
from lorascope.diagnosis.diagnosis_text import record_as_text
from lorascope.diagnosis.record import Keep, Record
from lorascope.diagnosis.thresholds import Thresholds
from synthetic_signals import an_interval, default_arm, diverged_arm, overfit_arm


def test_every_arm_has_its_cause_its_evidence_and_what_to_do() -> None:
    tried = replace(default_arm(), intruder_recovery=an_interval("intruder_recovery", 0.12, 0.07))
    found = decide_all([tried, diverged_arm(), overfit_arm()])
    text = record_as_text(Record(Keep("r64", "best", 0.5), found, Thresholds(), {}))
    first, *parts = text.split("\n\n")
    assert first == "Keep r64 at strength 0.5, epoch of the lowest held-out loss."
    assert len(parts) == len(found)
    for (arm, diagnosis), part in zip(found.items(), parts, strict=True):
        assert part.startswith(f"{arm}: {diagnosis.as_line()}\n")
        for sentence in (*diagnosis.evidence_for, *diagnosis.evidence_against):
            assert sentence in part
        for change in diagnosis.remedy.changes:
            assert change.reason in part
    assert "\n  tried    With intruder directions at three quarters of their size: " in parts[0]
    assert "training diverged (confidence" in text and "arms.lr = " in text
    assert record_as_text(Record(None, {}, Thresholds(), {})) == "Keep no arm."
