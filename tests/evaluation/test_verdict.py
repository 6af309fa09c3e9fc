"""Which arm is kept, and the sentences that say why."""

import dataclasses
import json
import math
from typing import Any

import pytest

from lorascope.evaluation.score_text import scores_as_dict
from lorascope.evaluation.scores import BASE, Scores, paired_differences
from lorascope.evaluation.verdict import (
    RULE,
    RULE_WITHOUT_STYLE,
    choose_arm,
    describe_difference,
    read_styles,
)
from synthetic_scores import SCORER, draws, make_scores, probe, shifted


def reworded(**values: Any) -> str:
    model = paired_differences(make_scores({BASE: draws(26), "r64": draws(20, seed=1)}), "r64")
    shown = {"difference": -5.9, "low": -6.5, "high": -5.4, "smallest_detectable": 1.8, "num_prompts": 50}
    return describe_difference(dataclasses.replace(model, **{**shown, **values}))


def test_wording_of_differences() -> None:
    assert (
        reworded()
        == "r64 scores 5.9 below base (95 % interval 5.4 to 6.5 below; 50 prompts, 1 training run)."
    )
    assert (
        reworded(difference=2.0, low=1.0, high=3.0)
        == "r64 scores 2.0 above base (95 % interval 1.0 to 3.0 above; 50 prompts, 1 training run)."
    )
    assert reworded(low=-1.0, high=0.4, difference=-0.3) == (
        "r64 against base: no difference shown; under 1.8 could not have been seen "
        "(mean difference -0.3, 95 % interval -1.0 to +0.4; 50 prompts, 1 training run)."
    )
    assert reworded(low=0.0, high=0.4, difference=0.2).startswith("r64 against base: no difference shown")
    assert "50 prompts x 4 seeds, 1 training run each" in reworded(against="r16", num_seeds=4)
    assert reworded(difference=0.02, low=0.01, high=0.031).startswith(
        "r64 scores 0.02 above base (95 % interval 0.01 to 0.03 above;"
    )
    assert reworded(low=None, high=None, num_prompts=1) == (
        "r64 scores 5.9 below base (1 prompt, 1 training run); no interval: it takes at least 6 prompts."
    )
    assert (
        reworded(share_below=0.0, share_above=0.0)
        == "r64 scores the same as base for every prompt (50 prompts, 1 training run)."
    )


def test_highest_mean_of_the_arms_that_learned_the_style_is_kept() -> None:
    verdict = choose_arm(
        shifted(r4=-1, r16=-3, r64=-6), [probe("r4", 0.001), probe("r16", -0.01), probe("r64", -0.02)]
    )
    assert (verdict.keep, verdict.runner_up, verdict.headline) == ("r16", "r64", "Keep r16")
    assert verdict.rule == RULE
    assert verdict.style_measured
    assert verdict.against_base is not None
    assert verdict.against_base.difference == pytest.approx(-3)
    assert verdict.against_runner_up is not None
    assert verdict.against_runner_up.difference == pytest.approx(3)
    assert (verdict.num_prompts, verdict.num_seeds, verdict.num_training_seeds) == (50, 1, 1)
    assert verdict.reasons[0] == (
        "r4 was not shown to have learned the style: its held-out loss is 0.001 above the base's "
        "(95 % interval -0.001 to +0.003; 32 pictures, 1 training run)."
    )
    assert verdict.reasons[1].startswith("r16 learned the style: its held-out loss is 0.01 below the base's")
    assert "r16 has the highest mean CLIP similarity of the qualifying arms" in verdict.reasons[3]
    assert any(reason.startswith("r16 scores 3.0 below base (95 % interval") for reason in verdict.reasons)
    assert verdict.undecided == ("One training run per rank cannot separate rank from luck.",)


def test_lower_rank_is_kept_where_no_difference_is_shown() -> None:
    probes = [probe(arm, -0.01) for arm in ("r4", "r16", "r64")]
    verdict = choose_arm(shifted(r4=-2, r16=-0.15, r64=-0.1), probes)
    assert (verdict.keep, verdict.runner_up) == ("r16", "r64")
    assert any("So the lower rank is kept" in reason for reason in verdict.reasons)
    assert verdict.undecided[0].startswith("No difference shown between r16 and r64; under 0.")
    assert verdict.undecided[0].endswith(" could not have been seen.")
    assert choose_arm(shifted(r4=-2, r16=-0.1, r64=-0.15), probes).keep == "r16"  # ahead, and of lower rank
    assert choose_arm(shifted(r4=-0.2, r16=-0.15, r64=-0.1), probes).keep == "r4"  # the lowest of several
    assert choose_arm(shifted(r4=-2, r16=-3, r64=-0.1), probes).keep == "r64"


def test_nothing_is_kept_where_no_arm_learned_the_style() -> None:
    verdict = choose_arm(shifted(r4=2, r16=-1), [probe("r4", 0.0), probe("r16", math.nan)])
    assert (verdict.keep, verdict.runner_up, verdict.headline) == (None, None, "Keep the base")
    assert verdict.against_base is None
    assert verdict.against_runner_up is None
    assert "r16 did not learn the style: its held-out loss is not finite." in verdict.reasons
    assert verdict.reasons[-1].endswith("keep the base.")


def test_without_held_out_loss_the_rule_rests_on_clip_alone_and_says_so() -> None:
    others = [
        {"kind": "train", "step": 1, "arm": "r4", "loss": 1.0},
        probe("base", 0.0, epoch=0),
        probe("r4", -1, split="train"),
    ]
    verdict = choose_arm(shifted(r4=-1, r16=-3), others)
    assert (verdict.keep, verdict.style_measured, verdict.rule) == ("r4", False, RULE_WITHOUT_STYLE)
    assert verdict.undecided[0] == "Whether the arms learned the style: held-out loss was not measured."


def test_an_arm_without_its_own_record_does_not_qualify() -> None:
    verdict = choose_arm(shifted(r4=-1, r16=-3), [probe("r16", -0.01)])
    assert verdict.keep == "r16"
    assert verdict.runner_up is None
    assert "r4: held-out loss not measured." in verdict.reasons
    assert any("r16 is the only one of the qualifying arms" in reason for reason in verdict.reasons)


def test_failed_arms_are_named() -> None:
    verdict = choose_arm(shifted(r4=-1), [probe("r4", -0.01), probe("r64", math.nan)], failed=["r32"])
    assert verdict.keep == "r4"
    assert verdict.reasons[:2] == tuple(
        f"{arm} failed: it has no pictures, so it was not compared." for arm in ("r32", "r64")
    )
    nothing = choose_arm(shifted(), [probe("r4", -0.01)])
    assert nothing.keep is None
    assert "No arm has pictures: there is nothing to compare." in nothing.reasons
    assert nothing.num_training_seeds == 0
    assert choose_arm(Scores.from_rows([], SCORER), []).keep is None


def test_a_missing_base_is_said() -> None:
    scores = Scores.from_rows([row for row in shifted(r4=-1, r16=-3).rows if row.arm != BASE], SCORER)
    verdict = choose_arm(scores, [probe("r4", -0.01), probe("r16", -0.01)])
    assert verdict.keep == "r4"
    assert verdict.against_base is None
    assert "The base has no pictures: the difference to it was not measured." in verdict.reasons


def test_few_prompts_decide_nothing() -> None:
    scores = make_scores({BASE: [20, 21], "r4": [19, 20], "r16": [20, 20.5]})
    verdict = choose_arm(scores, [probe("r4", -0.01), probe("r16", -0.01)])
    assert verdict.keep == "r4"  # no difference to the lower rank was shown
    assert (
        "Whether there is a difference between r4 and r16: no interval from 2 prompts." in verdict.undecided
    )
    json.dumps(scores_as_dict(scores, verdict), allow_nan=False)


def test_training_seeds_are_counted_per_setting() -> None:
    first = shifted(r4=-1, r16=-3)
    again = [
        dataclasses.replace(row, arm=f"{row.arm}-s1", training_seed=1)
        for row in first.rows
        if row.arm != BASE
    ]
    both = Scores.from_rows([*first.rows, *again], SCORER)
    assert choose_arm(both, []).num_training_seeds == 2
    assert not any("luck" in sentence for sentence in choose_arm(both, []).undecided)
    lr = [dataclasses.replace(row, arm="r4-lr1", lr=1e-4) for row in first.rows if row.arm == "r4"]
    undecided = choose_arm(Scores.from_rows([*first.rows, *lr], SCORER), []).undecided
    assert "One training run per setting cannot separate setting from luck." in undecided
    assert (
        choose_arm(shifted(r4=-1), []).undecided[-1]
        == "One training run cannot say how another seed of the same setting would score."
    )


def test_style_is_read_from_the_last_held_out_record_of_all_bands() -> None:
    records = [
        probe("r4", -0.5, epoch=2),
        probe("r4", 0.3, epoch=3),
        probe("r4", -0.1, epoch=1),
        probe("r4", -9, epoch=9, band="0-250"),
        probe("r4", -9, epoch=9, split="train"),
        probe("r4", -9, epoch=9, conditional=False),
        probe("base", 0, epoch=0),
        {"kind": "train", "arm": "r8", "step": 1},
    ]
    styles = read_styles(records)
    assert list(styles) == ["r4"]
    assert styles["r4"].difference == 0.3
    assert not styles["r4"].is_learned
    assert not read_styles([probe("r4", -0.01, half=0.02)])["r4"].is_learned  # the interval reaches 0
    assert not read_styles([probe("r4", -0.01, difference_high=None)])["r4"].is_learned
