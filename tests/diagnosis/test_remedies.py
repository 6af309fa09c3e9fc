"""Remedies: the strength to use now, what each cause asks to change, and the gain of an arm that holds."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorascope.diagnosis.case import Case
from lorascope.diagnosis.causes import Diagnosis, decide, decide_all
from lorascope.diagnosis.remedies import find_reference, find_remedy
from lorascope.diagnosis.signals import ArmSignals, make_signal, sweep_signals, trace_fronts
from lorascope.diagnosis.thresholds import Thresholds
from lorascope.diagnosis.words import Cause
from lorascope.evaluation.choice import Choice, choose_by_arm, choose_point
from lorascope.evaluation.sweep_rows import Sweep
from synthetic_signals import (
    NO,
    a_point,
    an_arm,
    an_interval,
    default_arm,
    diverged_arm,
    drifted_arm,
    healthy_arm,
    overfit_arm,
    short_arm,
    signals_of,
)
from synthetic_sweeps import simple_sweep

LOST = a_point(1.0, 0.5, 0.4)


def test_the_strength_to_use_now_is_the_chosen_one() -> None:
    points = (LOST, a_point(0.75, 0.92, 0.3), a_point(0.5, 0.97, 0.2), a_point(0.25, 0.99, 0.1))
    found = decide(signals_of(None, *points))
    assert (found.remedy.strength, found.remedy.epoch) == (0.75, "last")
    assert found.remedy.reason.startswith("Strength 0.75: prompt fidelity kept 92 %")
    other = decide(signals_of(None, *points, chosen=("last", 0.5)))
    assert other.remedy.strength == 0.5 and "times 0.5 gives" in other.remedy.changes[0].reason
    none = decide(signals_of(None, *points, chosen=None))
    assert none.remedy.strength is None
    assert none.remedy.reason == "No strength that was drawn has style and keeps the prompts."
    assert decide(default_arm()).remedy.strength == 0.5
    assert decide(diverged_arm()).remedy.strength is None
    assert decide(healthy_arm()).remedy.strength == 1.0
    assert decide(healthy_arm(chosen=("last", 0.5))).remedy.reason.startswith("Strength 0.5: ")


def test_pictures_that_a_second_measure_speaks_against_are_said_to_be_looked_at() -> None:
    found = decide(signals_of(None, LOST, a_point(0.5, 0.97, 0.2, broken=True)))
    assert found.remedy.strength == 0.5
    assert found.remedy.reason.endswith("above the base's: look at the pictures.")


def diagnosed(sweep: Sweep, price: float) -> tuple[Choice, dict[str, Diagnosis]]:
    """The study's choice over a sweep, and the diagnoses of its arms as the diagnose stage makes them."""
    fronts = trace_fronts(sweep, resamples=200)
    choice = choose_point(fronts.own, price, resamples=200)
    chosen = choose_by_arm(fronts.own, choice, price, resamples=200)
    signals = []
    for name in dict.fromkeys(point.arm for point in fronts.own.points):
        point = chosen.get(name)
        use = None if point is None else (point.epoch, point.strength)
        fields = {**sweep_signals(fronts, name), "chosen": use}
        signals.append(ArmSignals(an_arm(name, rank=16 if name == "r16" else 64), **fields))
    return choice, decide_all(signals, Thresholds().with_values({"prompt_loss": price}, "a study"))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    points=st.dictionaries(
        st.tuples(st.sampled_from(["r16", "r64"]), st.sampled_from([0.25, 0.5, 0.75, 1.0])),
        st.tuples(st.floats(0.2, 1.05), st.floats(-0.1, 0.6)),
        min_size=1,
    ),
    price=st.sampled_from([0.0, 0.1, 0.3]),
    style_std=st.sampled_from([0.02, 0.3]),
)
def test_verdict_and_remedy_name_the_same_strength(
    points: dict[tuple[str, float], tuple[float, float]], price: float, style_std: float
) -> None:
    sweep = simple_sweep(points, num_prompts=8, style_std=style_std)
    choice, found = diagnosed(sweep, price)
    for name, diagnosis in found.items():
        remedy = diagnosis.remedy
        if choice.point is not None and choice.point.arm == name:
            assert (remedy.strength, remedy.epoch) == (choice.point.strength, choice.point.epoch)
    if choice.point is None:
        assert all(diagnosis.remedy.strength is None for diagnosis in found.values())


def changes_of(found: Diagnosis) -> dict[str, Any]:
    return {change.key: change.value for change in found.remedy.changes}


def test_the_changes_of_each_cause() -> None:
    assert changes_of(decide(default_arm())) == {"arms.lr": 2.5e-4}
    assert changes_of(decide(diverged_arm())) == {"arms.lr": 5e-4}
    assert changes_of(decide(short_arm())) == {"arms.lr": 1.5e-3}
    assert changes_of(decide(replace(short_arm(), best_epoch=1))) == {"arms.epochs": 2}
    assert changes_of(decide(overfit_arm())) == {
        "arms.epochs": 20,
        "data.source": None,
        "train.caption_dropout": 0.1,
    }
    assert changes_of(decide(drifted_arm()))["train.caption_dropout"] == 0.0
    assert changes_of(decide(replace(drifted_arm(), caption_dropout=0.0)))["train.caption_dropout"] == 0.1
    numerical = replace(default_arm(), finite_training=make_signal("finite_training", NO))
    assert changes_of(decide(numerical))["train.max_grad_norm"] == 1.0
    assert changes_of(decide(healthy_arm())) == {}
    for signals in (default_arm(), overfit_arm(), drifted_arm(), short_arm()):
        assert all(change.reason.endswith(".") for change in decide(signals).remedy.changes)


def test_a_cut_that_keeps_as_much_is_a_remark_on_the_rank() -> None:
    cut = {
        "cut_retention": an_interval("cut_retention", 0.57, 0.02, control=0.57),
        "cut_style": an_interval("cut_style", 0.53, 0.02, control=0.53),
    }
    for arm in (default_arm(), diverged_arm(), healthy_arm()):
        found, before = decide(replace(arm, **cut)), decide(arm)
        assert found.remedy.changes[:-1] == before.remedy.changes
        remark = found.remedy.changes[-1]
        assert (remark.key, remark.value) == ("arms.rank", None) and remark.reason.startswith(
            "A lower rank may do"
        )
        assert (found.cause, found.evidence_for) == (before.cause, before.evidence_for)
    broken = replace(default_arm(), merge_ok=make_signal("merge_ok", 0.0))
    assert decide(replace(broken, **cut)).remedy == decide(broken).remedy


def test_an_arm_that_keeps_more_shows_which_gain_holds() -> None:
    healthy = healthy_arm()
    found = decide_all([healthy, default_arm(), diverged_arm()])
    assert {name: item.cause for name, item in found.items()} == {
        "r16": "healthy",
        "r64": "too_strong",
        "r64-lr0.002": "diverged",
    }
    for name in ("r64", "r64-lr0.002"):
        signals = found[name].signals
        lr = changes_of(found[name])["arms.lr"]
        gain = lr * signals.arm.scale * signals.arm.rank**0.5
        assert gain == pytest.approx(healthy.arm.gain, rel=0.05)
        assert "that of r16" in found[name].remedy.changes[0].reason
    assert found["r16"] == decide(healthy)
    without = decide_all([default_arm(), diverged_arm()])
    assert "that of r64," in without["r64-lr0.002"].remedy.changes[0].reason
    assert without["r64"] == decide(default_arm())


def test_the_first_cause_to_name_a_key_decides_its_value() -> None:
    case = Case(overfit_arm(), Thresholds())
    alone = find_remedy(case, "not_learned")
    both = find_remedy(case, "not_learned", ("diverged", "unconditional_drift"), prompts=40)
    assert [change.key for change in both.changes] == ["arms.lr", "train.caption_dropout"]
    assert both.changes[0] == alone.changes[0]
    assert (alone.prompts, both.prompts) == (None, 40)


def test_only_an_arm_of_a_smaller_gain_that_keeps_more_is_a_reference() -> None:
    healthy, default, diverged = healthy_arm(), default_arm(), diverged_arm()
    known: list[tuple[Cause, ArmSignals]] = [
        ("healthy", healthy),
        ("too_strong", default),
        ("diverged", diverged),
    ]
    assert find_reference(healthy, known) is None
    assert find_reference(default, known) == healthy
    assert find_reference(diverged, known[1:]) == default
    assert find_reference(diverged, known[2:]) is None


def test_a_remedy_takes_the_gain_of_an_arm_of_its_own_kind() -> None:
    sound, failed = healthy_arm(), diverged_arm()
    assert find_reference(failed, [("healthy", sound)]) is sound
    other = replace(sound, arm=sound.arm.model_copy(update={"kind": "dora"}))
    assert find_reference(failed, [("healthy", other)]) is None
