"""The decision: a table of cases for each cause, combinations of faults, and what is not measured."""

from dataclasses import replace
from typing import Any

import pytest

from lorascope.diagnosis.causes import decide
from lorascope.diagnosis.signals import ArmSignals, make_signal
from lorascope.diagnosis.thresholds import Thresholds
from lorascope.diagnosis.words import CAUSES, WORDS
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


def decided(signals: ArmSignals) -> tuple[Any, ...]:
    found = decide(signals)
    return found.cause, found.confidence, found.contributing


LOST, BACK = a_point(1.0, 0.5, 0.4), a_point(0.5, 0.97, 0.2)
GONE = a_point(0.5, 0.6, 0.3)  # still lost at half strength


@pytest.mark.parametrize(
    ("signals", "expected"),
    [
        (default_arm(), ("too_strong", "medium", ())),
        (diverged_arm(), ("diverged", "high", ())),
        (overfit_arm(), ("overfit", "high", ("too_strong",))),
        (drifted_arm(), ("unconditional_drift", "medium", ("too_strong",))),
        (short_arm(), ("not_learned", "high", ())),
        (
            replace(default_arm(), merge_ok=make_signal("merge_ok", NO)),
            ("file_fault", "high", ("too_strong",)),
        ),
        (healthy_arm(), ("healthy", "high", ())),
    ],
    ids=["default", "diverged", "overfit", "drift", "ten-steps", "doubled-alpha", "healthy"],
)
def test_the_measured_arms(signals: ArmSignals, expected: tuple[Any, ...]) -> None:
    assert decided(signals) == expected


@pytest.mark.parametrize("key", ["finished", "finite_training", "finite_losses", "finite_pictures"])
def test_numbers_that_are_not_finite_come_first(key: str) -> None:
    signals = replace(diverged_arm(), **{key: make_signal(key, NO, "loss is not finite at step 12")})
    signals = replace(signals, file_ok=make_signal("file_ok", NO))
    found = decide(signals)
    assert (found.cause, found.confidence) == ("numerical", "high")
    assert found.contributing == ("file_fault", "diverged")
    assert "at step 12" in found.evidence_for[0]
    assert any("training diverged" in sentence for sentence in found.evidence_for)
    assert found.remedy.strength is None


@pytest.mark.parametrize(("share", "base", "cause"), [(0.3, 0.0, "numerical"), (0.3, 0.25, "healthy")])
def test_black_pictures_count_beyond_the_bases(share: float, base: float, cause: str) -> None:
    assert decide(healthy_arm(black=make_signal("black", share, control=base))).cause == cause


def test_a_loss_above_the_bases_is_a_collapse_unless_training_pictures_gained() -> None:
    collapsed = replace(diverged_arm(), heldout=an_interval("heldout", 0.1, 0.02), points=())
    assert decided(collapsed)[:2] == ("diverged", "high")
    memorised = replace(
        overfit_arm(),
        heldout=an_interval("heldout", 0.03, 0.01),
        train_gap=an_interval("train_gap", 0.09, 0.02),
    )
    assert decided(memorised)[0] == "overfit"
    assert decide(replace(healthy_arm(), heldout=an_interval("heldout", 0.01, 0.02))).cause == "healthy"


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        # no style, prompts kept
        ((a_point(1.0, 0.99, 0.01, style_reach=0.03),), ("not_learned", "high")),
        # no style, and whether prompts are kept is open
        ((a_point(1.0, 0.93, 0.01, style_reach=0.03),), ("not_learned", "medium")),
        # little style, and more than the base's own variation is not ruled out
        ((a_point(1.0, 0.99, 0.03),), ("cannot_tell", "low")),
        # no style, but prompts are lost: something did change
        ((a_point(1.0, 0.2, -0.01), GONE), ("cannot_tell", "low")),
        # a lower strength shows style: it was learned
        ((a_point(1.0, 0.99, 0.01), a_point(0.5, 0.99, 0.3)), ("cannot_tell", "low")),
        # style above the base's own variation, but its interval reaches below 0
        ((a_point(1.0, 0.99, 0.12, style_reach=0.2),), ("cannot_tell", "low")),
        # style and prompts
        ((a_point(1.0, 0.97, 0.3),), ("healthy", "high")),
        ((a_point(1.0, 0.97, 0.3, broken=None),), ("healthy", "medium")),
        # pictures farther from real ones than the base's: style is not what it seems
        ((a_point(1.0, 0.97, 0.3, broken=True),), ("cannot_tell", "low")),
        # the interval reaches over the price
        ((a_point(1.0, 0.93, 0.3), BACK), ("cannot_tell", "low")),
        ((a_point(1.0, 0.87, 0.3), BACK), ("cannot_tell", "low")),
        # lost at 1
        ((LOST, BACK), ("too_strong", "high")),
        ((LOST, a_point(0.5, 0.92, 0.2)), ("too_strong", "medium")),
        ((LOST, GONE, a_point(0.25, 0.98, 0.1)), ("too_strong", "high")),
        # a lower strength has the prompts, but no style
        ((LOST, a_point(0.5, 0.99, 0.02)), ("cannot_tell", "low")),
        ((LOST, GONE), ("cannot_tell", "low")),
        ((LOST,), ("cannot_tell", "low")),
        # not measured
        ((), ("cannot_tell", "low")),
        ((a_point(1.0, None, 0.3),), ("cannot_tell", "low")),
        ((a_point(1.0, 0.97, None),), ("cannot_tell", "low")),
        ((a_point(1.0, 0.5, None), a_point(0.5, 0.97, None)), ("cannot_tell", "low")),
        ((a_point(0.5, 0.97, 0.3),), ("cannot_tell", "low")),
    ],
)
def test_style_and_prompts_over_strengths(points: tuple[Any, ...], expected: tuple[str, str]) -> None:
    assert decided(signals_of(None, *points))[:2] == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # the intervention decides alone
        ({"unconditional_recovery": 0.4}, ("unconditional_drift", "high")),
        (
            {"unconditional_recovery": an_interval("unconditional_recovery", 0.3, 0.2)},
            ("unconditional_drift", "medium"),
        ),
        # and against the ratio
        ({"unconditional_recovery": 0.0, "gain_ratio": 0.05}, ("too_strong", "high")),
        # it is open: the ratio decides
        (
            {"unconditional_recovery": an_interval("unconditional_recovery", 0.2, 0.4), "gain_ratio": 0.05},
            ("unconditional_drift", "medium"),
        ),
        # a ratio whose interval reaches over the threshold decides nothing
        ({"gain_ratio": an_interval("gain_ratio", 0.2, 0.1)}, ("too_strong", "high")),
        # a sound ratio speaks against the intervention
        ({"unconditional_recovery": 0.4, "gain_ratio": 0.6}, ("unconditional_drift", "medium")),
        # held against what was lost on the prompts that were drawn both ways
        (
            {"unconditional_recovery": an_interval("unconditional_recovery", 0.1, 0.02, control=0.15)},
            ("unconditional_drift", "high"),
        ),
        (
            {"unconditional_recovery": an_interval("unconditional_recovery", 0.4, 0.02, control=0.95)},
            ("too_strong", "high"),
        ),
        # where nothing was lost on those nothing can come back
        (
            {"unconditional_recovery": an_interval("unconditional_recovery", 0.1, 0.02, control=-0.02)},
            ("too_strong", "high"),
        ),
    ],
)
def test_a_drift_of_the_unconditional_prediction(values: dict[str, Any], expected: tuple[str, str]) -> None:
    assert decided(signals_of(None, LOST, BACK, **values))[:2] == expected


GAP = an_interval("train_gap", 0.05, 0.02)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"train_gap": GAP, "rise": 0.02}, ("overfit", "high")),
        ({"train_gap": GAP, "rise": make_signal("rise", 0.02)}, ("overfit", "medium")),
        ({"train_gap": make_signal("train_gap", 0.05), "rise": 0.02}, ("overfit", "low")),
        (
            {"train_gap": GAP, "member_auc": 0.9, "member_p": make_signal("member_p", 0.001)},
            ("overfit", "medium"),
        ),
        ({"train_gap": GAP, "copying_excess": 0.2}, ("overfit", "medium")),
        # none of them alone
        ({"train_gap": GAP}, ("too_strong", "high")),
        ({"rise": 0.02}, ("too_strong", "high")),
        (
            {"train_gap": GAP, "member_auc": 0.9, "member_p": make_signal("member_p", 0.2)},
            ("too_strong", "high"),
        ),
        ({"train_gap": GAP, "member_auc": 0.9}, ("too_strong", "high")),
        ({"train_gap": an_interval("train_gap", 0.03, 0.04), "rise": 0.02}, ("too_strong", "high")),
        ({"train_gap": 0.01, "rise": 0.02, "member_auc": 0.9}, ("too_strong", "high")),
    ],
)
def test_overfitting_takes_a_gap_and_a_witness(values: dict[str, Any], expected: tuple[str, str]) -> None:
    assert decided(signals_of(None, LOST, BACK, **values))[:2] == expected


def test_the_best_epoch_speaks_for_overfitting_or_against_it() -> None:
    overfit = overfit_arm()
    better = replace(
        overfit, points=(*overfit.points, a_point(1.0, 0.95, 0.25, epoch="best")), chosen=("best", 1.0)
    )
    found = decide(better)
    assert any("best epoch keeps more" in sentence for sentence in found.evidence_for)
    assert (found.remedy.strength, found.remedy.epoch) == (1.0, "best")
    worse = replace(overfit, points=(*overfit.points, a_point(1.0, 0.6, 0.25, epoch="best")))
    found = decide(worse)
    assert (found.cause, found.confidence) == ("overfit", "medium")
    assert any("keeps no more" in sentence for sentence in found.evidence_against)


@pytest.mark.parametrize(
    ("points", "values", "expected"),
    [
        ((LOST, GONE), {"intruder_share": 0.4, "guidance_cosine": 0.02}, ("diverged", "high")),
        # the cosine's interval reaches over the threshold
        (
            (LOST, GONE),
            {"intruder_share": 0.4, "guidance_cosine": an_interval("guidance_cosine", 0.1, 0.2)},
            ("diverged", "medium"),
        ),
        # one of two is not enough, and one that was not measured does not count
        ((LOST, GONE), {"intruder_share": 0.4, "guidance_cosine": 0.3}, ("cannot_tell", "low")),
        ((LOST, GONE), {"intruder_share": 0.4}, ("diverged", "medium")),
        ((LOST,), {"intruder_share": 0.4}, ("cannot_tell", "low")),
        ((LOST,), {"intruder_share": 0.4, "guidance_cosine": 0.02}, ("diverged", "medium")),
        # a lower strength whose own interval decides outweighs both, an open one does not
        ((LOST, BACK), {"intruder_share": 0.4, "guidance_cosine": 0.02}, ("too_strong", "medium")),
        (
            (LOST, a_point(0.5, 0.92, 0.2)),
            {"intruder_share": 0.4, "guidance_cosine": 0.02},
            ("diverged", "medium"),
        ),
    ],
)
def test_divergence(points: tuple[Any, ...], values: dict[str, Any], expected: tuple[str, str]) -> None:
    assert decided(signals_of(None, *points, **values))[:2] == expected


def test_scaled_intruders_speak_for_divergence_or_against_it_and_decide_nothing() -> None:
    def with_back(arm: ArmSignals, value: float, reach: float) -> Any:
        return decide(replace(arm, intruder_recovery=an_interval("intruder_recovery", value, reach)))

    said = "scaled-down intruder directions bring back"
    for arm in (diverged_arm(), replace(diverged_arm(), heldout=an_interval("heldout", 0.05, 0.01))):
        found = with_back(arm, 0.2, 0.1)
        assert (found.cause, found.confidence) == ("diverged", "high")
        assert any(f"{said} 20 % (95 % interval 10 to 30)." in text for text in found.evidence_for)
        assert not any(said in text for text in found.evidence_against)
    found = with_back(diverged_arm(), 0.02, 0.1)
    assert (found.cause, found.confidence) == ("diverged", "high")
    assert any(
        text.endswith("(95 % interval -8 to 12): not shown to be above 0.") for text in found.evidence_against
    )
    strong = signals_of(None, LOST, BACK)
    found = with_back(strong, 0.2, 0.1)
    assert (found.cause, found.confidence) == ("too_strong", "high")
    assert any(said in text and text.endswith(", as in a diverged arm.") for text in found.evidence_against)
    assert with_back(strong, 0.02, 0.1).evidence_against == decide(strong).evidence_against
    assert with_back(healthy_arm(), 0.2, 0.1).cause == "healthy"


def test_faults_together_are_named_in_order() -> None:
    everything = signals_of(
        None,
        LOST,
        GONE,
        train_gap=GAP,
        rise=0.02,
        gain_ratio=0.05,
        intruder_share=0.4,
        guidance_cosine=0.02,
        merge_ok=make_signal("merge_ok", NO),
    )
    assert decided(everything) == ("file_fault", "high", ("overfit", "unconditional_drift", "diverged"))


def test_a_healthy_arm_may_have_memorised() -> None:
    found = decide(replace(healthy_arm(), train_gap=GAP, rise=an_interval("rise", 0.02, 0.01), best_epoch=1))
    assert (found.cause, found.contributing) == ("healthy", ("overfit",))
    assert {change.key: change.value for change in found.remedy.changes}["arms.epochs"] == 1


def test_an_arm_that_memorised_is_overfit_though_it_is_open_whether_its_prompts_are_kept() -> None:
    signals = overfit_arm()
    wide = replace(signals.full, retention=replace(signals.full.retention, value=0.8, low=0.6, high=1.0))
    found = decide(replace(signals, points=(wide, *signals.points[1:])))
    assert found.cause == "overfit" and found.contributing == ()


def test_nothing_measured_decides_nothing() -> None:
    found = decide(ArmSignals(an_arm()))
    assert (found.cause, found.contributing, found.confidence) == ("cannot_tell", (), "low")
    assert found.evidence_for == ("Prompt fidelity was not measured.",)
    assert found.remedy.strength is None and found.remedy.changes == ()


@pytest.mark.parametrize("key", ["retention", "style"])
def test_the_reason_why_something_is_missing_is_told(key: str) -> None:
    points = (replace(healthy_arm().full, **{key: make_signal(key, None, "not separable here: AUC 0.61")}),)
    found = decide(signals_of(None, *points))
    assert "not separable here: AUC 0.61" in found.evidence_for[0]


def test_what_is_open_comes_with_the_prompts_that_would_decide_it() -> None:
    found = decide(signals_of(None, a_point(1.0, 0.93, 0.3)))
    assert found.remedy.prompts == 349  # (2.8 x .2 / .03)^2
    assert "About 349 prompts instead of 24 would decide it" in found.evidence_for[1]
    assert "15 sampling seeds of each" in found.evidence_for[1]
    found = decide(signals_of(None, a_point(1.0, 0.99, 0.12, style_reach=0.2)))
    assert found.remedy.prompts == 64
    on_the_line = decide(signals_of(None, a_point(1.0, 0.9, 0.3)))
    assert on_the_line.remedy.prompts is None and len(on_the_line.evidence_for) == 1


def test_other_thresholds_decide_otherwise() -> None:
    assert decide(default_arm(), Thresholds().with_values({"prompt_loss": 0.6}, "a study")).cause == "healthy"
    strict = Thresholds().with_values({"intruder_share": 0.05, "guidance_cosine": 0.4}, "planted faults")
    assert decide(default_arm(), strict).cause == "diverged"


def test_every_cause_has_its_words() -> None:
    assert tuple(WORDS) == CAUSES
    for signals in (default_arm(), diverged_arm(), overfit_arm(), drifted_arm(), short_arm(), healthy_arm()):
        found = decide(signals)
        for sentence in (*found.evidence_for, *found.evidence_against):
            assert sentence[0].isupper() and sentence.endswith(".") and "None" not in sentence
