"""Interventions are held against the same arm's pictures of the same prompts."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lorascope.diagnosis.interventions import intervention_signals, tell_interventions, tell_lower_rank
from lorascope.diagnosis.signals import make_signal, trace_fronts
from lorascope.evaluation.scores import BASE
from lorascope.evaluation.statistics import expanded_tail
from lorascope.evaluation.sweep_rows import SCALED_INTRUDERS, StyleFacts, cut_to
from synthetic_signals import an_interval, signals_of
from synthetic_sweeps import STYLED, make_sweep, point_rows

# The base leads the floor by 10 in the first half of each category and by 30 in the second.
CLIP, STYLE = np.linspace(25, 35, 24), np.linspace(-0.1, 0.1, 24)
LEAD = np.tile(np.repeat([10.0, 30.0], 6), 2)
LOST = np.tile(np.repeat([4.0, 20.0], 6), 2) + np.tile([0.5, -0.5], 12)


def drawn(arm: str, lost: Any, gained: float, **values: Any) -> list[Any]:
    return point_rows(arm, 1.0, (CLIP - lost, STYLE + gained), **values)


def first_half(rows: list[Any]) -> list[Any]:
    return [row for row in rows if row.prompt_index < 6]


WIGGLE = np.tile([0.3, -0.3], 12)
SWAPPED = first_half(drawn("r8", LOST - 3 + WIGGLE, 0.4, unconditional="base"))
SCALED = first_half(drawn("r8", LOST - 1, 0.35, weights=SCALED_INTRUDERS))
CUT = first_half(drawn("r8", LOST + 0.5 + WIGGLE, 0.3, weights=cut_to(4)))
OWN = [
    *point_rows(BASE, 0.0, (CLIP, STYLE)),
    *point_rows(BASE, 0.0, (CLIP - LEAD, STYLE), kind="shuffled"),
    *drawn("r8", LOST, 0.4),
    *drawn("r4", LOST - 2, 0.1),
]


def measured(*rows: Any, arm: str = "r8", style: StyleFacts = STYLED) -> dict[str, Any]:
    return intervention_signals(trace_fronts(make_sweep(list(rows), style), resamples=200), arm)


def test_what_comes_back_is_a_share_of_the_base_on_the_prompts_that_were_drawn_both_ways() -> None:
    found = measured(*OWN, *SWAPPED, *SCALED)
    back = found["unconditional_recovery"]
    # Over all prompts the base leads by 20 and 60 % of that is lost; over these it is 10 and 40 %.
    assert (back.value, back.control, back.count) == (pytest.approx(0.3), pytest.approx(0.4), 12)
    assert back.low == pytest.approx(0.3, abs=0.03) and back.low < 0.3 < back.high
    swapped = found["base_unconditional"]
    assert swapped.value == pytest.approx(0.6 + 0.3) and swapped.count == 12
    scaled = found["intruder_recovery"]
    assert (scaled.value, scaled.control, scaled.note) == (pytest.approx(0.1), pytest.approx(0.4), None)
    assert (scaled.low, scaled.high) == pytest.approx((0.1, 0.1))


def test_the_interval_is_that_of_a_ratio_over_the_same_bootstrap_samples() -> None:
    again = drawn("r8", LOST - np.linspace(0, 6, 24), 0.4, weights=SCALED_INTRUDERS)
    back = measured(*OWN, *again)["intruder_recovery"]
    gained, generator = np.linspace(0, 6, 24), np.random.default_rng(0)
    ratios = []
    for start in (0, 4096, 8192):
        chosen = generator.integers(0, 24, (min(4096, 10_000 - start), 24))
        ratios += [*(gained[chosen].mean(axis=1) / LEAD[chosen].mean(axis=1))]
    tail = expanded_tail(24, 0.95)
    assert (back.low, back.high) == pytest.approx(tuple(np.quantile(ratios, [tail, 1 - tail])))


def test_a_cut_is_told_by_what_it_keeps_beside_the_uncut_adapter() -> None:
    found = measured(*OWN, *CUT)
    kept, style = found["cut_retention"], found["cut_style"]
    assert (kept.value, kept.control, kept.count) == (pytest.approx(0.55), pytest.approx(0.6), 12)
    assert kept.low < 0.55 < kept.high < 0.6  # the paired difference is not 0
    assert (style.value, style.control, style.count) == (pytest.approx(0.3), pytest.approx(0.4), 12)
    assert (style.low, style.high) == pytest.approx((0.3, 0.3))
    assert kept.note == style.note == "cut to rank 4"
    assert measured(*OWN, *CUT, arm="r4") == {}


def test_what_cannot_be_paired_says_why() -> None:
    without_base = [row for row in OWN if row.arm != BASE or row.kind == "shuffled"]
    found = measured(*without_base, *SWAPPED, *CUT)
    for key in ("unconditional_recovery", "cut_retention", "cut_style"):
        assert (found[key].value, found[key].note) == (None, "the base has no pictures of these prompts")
    at_half = [replace(row, strength=0.5) if row.arm == "r8" else row for row in OWN]
    found = measured(*at_half, *SWAPPED, *SCALED)
    assert found["base_unconditional"].value == pytest.approx(0.9)
    assert found["unconditional_recovery"].note == "strength 1 was not drawn"
    assert found["intruder_recovery"].note == "strength 1 was not drawn"
    others = [row for row in OWN if row.arm != "r8" or row.prompt_index > 5]
    assert measured(*others, *SCALED)["intruder_recovery"].note == "no prompt was drawn both ways"
    assert intervention_signals(None, "r8") == {} and measured() == {}


def test_a_cut_without_style_tells_the_prompts_alone() -> None:
    unseparable = StyleFacts(0.6, 2, 40, None)
    found = measured(*OWN, *CUT, style=unseparable)
    assert found["cut_retention"].value == pytest.approx(0.55)
    assert found["cut_style"].note == "not separable here: AUC 0.60, must be at least 0.8"


def test_too_few_prompts_have_no_interval() -> None:
    few = [row for row in (*SWAPPED, *CUT) if row.prompt_index < 2]
    found = measured(*OWN, *few)
    back, kept = found["unconditional_recovery"], found["cut_retention"]
    assert back.value is not None and back.low is None
    assert back.note == "4 of them: an interval takes at least 6"
    assert kept.low is None and kept.note == "cut to rank 4; 4 of them: an interval takes at least 6"


def test_interventions_are_told_with_what_they_are_held_against() -> None:
    signals = signals_of(
        None,
        unconditional_recovery=make_signal("unconditional_recovery", -0.02),
        intruder_recovery=an_interval("intruder_recovery", 0.12, 0.07, control=0.43),
        cut_retention=an_interval("cut_retention", 0.55, 0.02, control=0.56),
        cut_style=an_interval("cut_style", 0.4, 0.03, control=0.41),
    )
    assert list(tell_interventions(signals)) == [
        "With the base's unconditional prediction: prompt fidelity -2 % of the base's.",
        "With intruder directions at three quarters of their size: prompt fidelity +12 % of the base's "
        "(95 % interval 5 to 19); kept without that: 57 %.",
        "Cut to the study's lowest rank: 55 % of the prompts kept (95 % interval 53 to 57), uncut 56 %; "
        "style 0.40 (95 % interval 0.37 to 0.43), uncut 0.41.",
    ]
    bare = signals_of(None, cut_retention=make_signal("cut_retention", 0.5, control=0.6))
    assert list(tell_interventions(bare)) == [
        "Cut to the study's lowest rank: 50 % of the prompts kept, uncut 60 %."
    ]
    assert list(tell_interventions(signals_of())) == []


@pytest.mark.parametrize(
    ("kept", "style", "may_do"),
    [
        ((0.55, 0.02, 0.56), (0.4, 0.03, 0.41), True),
        ((0.7, 0.02, 0.56), (0.5, 0.03, 0.41), True),  # more of both
        ((0.5, 0.06, 0.56), (0.4, 0.03, 0.41), False),  # it may cost more than the price
        ((0.55, 0.02, 0.56), (0.3, 0.03, 0.41), False),  # less style
        ((0.55, 0.02, 0.56), (0.02, 0.03, 0.03), False),  # no style to keep
        (None, (0.4, 0.03, 0.41), False),
        ((0.55, 0.02, 0.56), None, False),
    ],
)
def test_a_lower_rank_may_do_where_the_cut_is_shown_to_keep_as_much(
    kept: tuple[float, float, float] | None, style: tuple[float, float, float] | None, may_do: bool
) -> None:
    given = {"cut_retention": kept, "cut_style": style}
    signals = signals_of(
        None,
        **{
            key: an_interval(key, value[0], value[1], control=value[2])
            for key, value in given.items()
            if value is not None
        },
    )
    remark = tell_lower_rank(signals, 0.1)
    assert (remark is not None) == may_do
    assert remark is None or remark.startswith("A lower rank may do: cut to the study's lowest")
