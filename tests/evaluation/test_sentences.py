"""What differences and points say in words."""

import dataclasses
from typing import Any

from lorascope.evaluation.front import Estimate, Front, FrontPoint, trace_front
from lorascope.evaluation.scores import BASE, paired_differences
from lorascope.evaluation.sentences import (
    describe_difference,
    describe_point,
    describe_setting,
    name_point,
    percent_text,
    say_needed,
    style_text,
)
from lorascope.evaluation.statistics import VarianceComponents, seeds_needed
from synthetic_scores import draws, make_scores
from synthetic_sweeps import simple_sweep


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


def traced() -> Front:
    return trace_front(simple_sweep({("r16", 0.5): (0.94, 0.2), ("r16-s1", 0.5): (0.9, 0.2)}))


def point(**values: Any) -> FrontPoint:
    model = traced().points[0]
    retention, style = Estimate(0.94, 0.88, 1.01), Estimate(0.2, 0.15, 0.25, smallest_detectable=0.05)
    return dataclasses.replace(model, **{"retention": retention, "style": style, **values})


def test_wording_of_points() -> None:
    assert describe_point(point()) == (
        "r16 at strength 0.5 keeps 94 % of the base's prompt fidelity and lies 0.20 nearer to the style than "
        "the base (95 % intervals 88 to 101 % and +0.15 to +0.25; 24 prompts, 1 training run)."
    )
    unclear = point(style=Estimate(0.02, -0.01, 0.05, smallest_detectable=0.043), num_seeds=2)
    assert describe_point(unclear) == (
        "r16 at strength 0.5 keeps 94 % of the base's prompt fidelity and shows no difference in style; "
        "under 0.04 could not have been seen (95 % intervals 88 to 101 % and -0.01 to +0.05; 24 prompts "
        "x 2 seeds, 1 training run)."
    )
    away = point(style=Estimate(-0.2, -0.3, -0.1))
    assert "lies 0.20 further from the style than the base" in describe_point(away)
    few = point(retention=Estimate(0.94), style=Estimate(0.2), num_prompts=2)
    ending = describe_point(few).partition(" (")[2]
    assert ending == "no interval: it takes at least 6 prompts; 2 prompts, 1 training run)."
    blind = point(retention=Estimate(reason="no floor"), style=Estimate(reason="no axis"))
    assert "keeps an unknown share of the base's prompt fidelity (no floor)" in describe_point(blind)
    assert "its style was not measured (no axis)" in describe_point(blind)


def test_wording_of_settings_names_runs_and_what_varied() -> None:
    (setting,) = traced().settings
    text = describe_setting(setting)
    assert text.startswith("Over 2 training runs, r16 and r16-s1 at strength 0.5 keep 92 % of the base's")
    assert text.endswith("24 prompts; intervals over training seeds and prompts).")


def test_points_are_named_with_their_epoch_where_it_is_not_the_last() -> None:
    best = dataclasses.replace(traced().points[0].point, epoch="best", strength=1.0)
    assert name_point(point(point=best)) == "r16 at strength 1, the epoch of its lowest held-out loss"


def test_estimates_in_short() -> None:
    assert percent_text(Estimate(0.94, 0.88, 1.01)) == "94 % (95 % interval 88 to 101 %)"
    assert percent_text(Estimate(0.94)) == "94 % (no interval)"
    assert percent_text(Estimate(reason="no floor")) == "not measured (no floor)"
    assert style_text(Estimate(0.2, 0.15, 0.25)) == "+0.20 (95 % interval +0.15 to +0.25)"
    assert style_text(Estimate(-0.2)) == "-0.20 (no interval)"
    assert style_text(Estimate(reason="no axis")) == "not measured (no axis)"


def test_how_many_would_decide() -> None:
    single = Estimate(0.94, spread=VarianceComponents(None, 0.1, 0.0))
    assert say_needed(0.04, single, 24) == "About 49 prompts would decide it."  # (2.8 x 0.1 / 0.04)^2
    assert say_needed(0.01, single, 24) == "About 790 prompts would decide it."  # 784
    assert say_needed(0.5, single, 24) == "About 25 prompts would decide it."  # never fewer than there are
    assert say_needed(0.0, single, 24) == "No number of prompts would decide it."
    assert say_needed(0.1, Estimate(0.9), 24) == "No number of prompts would decide it."
    assert say_needed(1e-4, single, 24) == "No number of prompts that anyone draws would decide it."
    several = Estimate(0.94, spread=VarianceComponents(0.05, 0.1, 0.02))
    runs = seeds_needed(0.08, 0.1, 24, 0.05, 0.02)
    assert say_needed(0.08, several, 24, 2) == f"About {runs} training runs would decide it."
    assert say_needed(0.08, several, 24, 20) == "About 21 training runs would decide it."
    assert say_needed(1e-3, several, 24, 2) == "No number of prompts that anyone draws would decide it."
