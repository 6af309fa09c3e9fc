"""Which point is chosen: many small cases."""

import dataclasses
from collections.abc import Mapping

import pytest

from lorascope.evaluation.choice import (
    MAX_PROMPT_LOSS,
    NO_SWEEP,
    Choice,
    choose_at_prices,
    choose_by_arm,
    choose_point,
    rule_text,
)
from lorascope.evaluation.front import trace_front
from lorascope.evaluation.scores import BASE
from lorascope.evaluation.sweep_rows import StyleFacts
from synthetic_sweeps import STYLED, make_sweep, simple_sweep

Points = Mapping[tuple[str, float], tuple[float, float]]  # share kept and style gained, by arm and strength


def choose(points: Points, price: float = MAX_PROMPT_LOSS, **values: object) -> Choice:
    return choose_point(trace_front(simple_sweep(points, **values)), price)  # type: ignore[arg-type]


def place(choice: Choice) -> tuple[str, float] | None:
    return None if choice.point is None else (choice.point.arm, choice.point.strength)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        # The most style of what costs at most 10 %.
        ({("r16", 0.5): (0.95, 0.2), ("r16", 1.0): (0.7, 0.6)}, ("r16", 0.5)),
        ({("r16", 0.5): (0.95, 0.2), ("r16", 0.75): (0.92, 0.4)}, ("r16", 0.75)),
        ({("r16", 0.5): (0.95, 0.2), ("r64", 0.5): (0.91, 0.4)}, ("r64", 0.5)),
        ({("r16", 0.5): (0.95, 0.2), ("r64", 0.5): (0.89, 0.4)}, ("r16", 0.5)),
        ({("r16", 0.5): (1.05, 0.2)}, ("r16", 0.5)),  # more than the base keeps
        ({("r16", 0.5): (0.9, 0.2)}, ("r16", 0.5)),  # on the edge
        # Alike in style: the lower rank, then what keeps more.
        ({("r16", 0.5): (0.95, 0.2), ("r64", 0.5): (0.99, 0.201)}, ("r16", 0.5)),
        ({("r64", 0.5): (0.95, 0.2), ("r16", 0.75): (0.91, 0.201)}, ("r16", 0.75)),
        ({("r16", 0.5): (0.95, 0.2), ("r16", 0.75): (0.92, 0.201)}, ("r16", 0.5)),
        ({("r16", 0.5): (0.95, 0.2), ("r16-s1", 0.5): (0.96, 0.2)}, ("r16-s1", 0.5)),
        # Nothing gains style at the price.
        ({("r16", 0.5): (0.95, 0.0), ("r16", 1.0): (0.7, 0.6)}, None),
        ({("r16", 0.5): (0.99, 0.01)}, None),
        ({("r16", 0.5): (0.95, -0.3)}, None),
    ],
)
def test_the_rule(points: Points, expected: tuple[str, float] | None) -> None:
    choice = choose(points)
    assert place(choice) == expected
    assert choice.decision == ("keep" if expected else "keep_base")
    assert choice.reason is None


def test_the_price_is_the_readers() -> None:
    points = {("r16", 0.5): (0.95, 0.2), ("r16", 1.0): (0.7, 0.6)}
    assert place(choose(points, 0.3)) == ("r16", 1.0)
    assert choose(points, 0.0).decision == "keep_base"
    assert "at most 30 % of the base's prompt fidelity" in rule_text(0.3)


def test_each_arm_is_used_where_the_rule_would_use_it_alone_and_the_kept_one_as_it_is_kept() -> None:
    points = {("r16", 0.5): (0.95, 0.2), ("r16", 1.0): (0.7, 0.6), ("r64", 0.5): (0.91, 0.4)}
    points |= {("r64", 0.25): (0.99, 0.2), ("r4", 1.0): (0.99, 0.0)}
    front = trace_front(simple_sweep(points))
    choice = choose_point(front)
    chosen = choose_by_arm(front, choice)
    assert {arm: point.strength for arm, point in chosen.items()} == {"r16": 0.5, "r64": 0.5}
    assert chosen["r64"] is choice.point
    nearby = dataclasses.replace(choice, point=front.of("r64")[0])
    assert choose_by_arm(front, nearby)["r64"].strength == 0.25
    assert choose_by_arm(None, choose_point(None)) == {}
    assert choose_by_arm(front, choose_point(front, 0.0), 0.0) == {}


def test_alike_in_style_the_last_epoch_is_kept() -> None:
    points = {("r16", 0.5): (0.95, 0.2), ("r16", 0.75): (0.99, 0.2)}
    choice = choose(points, epochs={("r16", 0.75): "best"})
    assert place(choice) == ("r16", 0.5) and choice.point is not None and choice.point.epoch == "last"
    only = choose({("r16", 0.75): (0.99, 0.2)}, epochs={("r16", 0.75): "best"})
    assert only.point is not None and only.point.epoch == "best"


def test_the_runner_up_is_of_another_setting_where_one_counts() -> None:
    points = {("r16", 0.5): (0.95, 0.3), ("r16", 0.75): (0.91, 0.29), ("r64", 0.5): (0.95, 0.2)}
    seeds = {**points, ("r16-s1", 0.5): (0.95, 0.25)}
    without = {where: numbers for where, numbers in seeds.items() if where[0] != "r64"}
    for case, expected in ((points, "r64"), (seeds, "r64"), (without, "r16-s1")):
        runner_up = choose(case).runner_up
        assert runner_up is not None and runner_up.arm == expected
    named = choose_point(trace_front(simple_sweep(seeds)), settings={"r16": "a", "r16-s1": "b", "r64": "a"})
    assert named.runner_up is not None and named.runner_up.arm == "r16-s1"
    assert choose({("r16", 0.5): (0.95, 0.3)}).runner_up is None


def test_what_cannot_be_told_says_why() -> None:
    points = {("r16", 0.5): (0.95, 0.3)}
    sweep = simple_sweep(points)
    assert choose_point(None) == Choice("cannot_tell", reason=NO_SWEEP)
    cases = {
        "no real pictures": simple_sweep(points, style=StyleFacts(reason="no real pictures")),
        "not separable here: AUC 0.60, must be at least 0.8": simple_sweep(
            points, style=dataclasses.replace(STYLED, auc=0.6)
        ),
        "the base has no pictures of these prompts": make_sweep([r for r in sweep.rows if r.arm != BASE]),
        "1 prompt: an interval takes at least 6": make_sweep(
            [r for r in sweep.rows if (r.category, r.prompt_index) == ("normal", 0)]
        ),
        "no arm was drawn at several strengths: run `lorascope diagnose RUN`": make_sweep(
            [r for r in sweep.rows if r.arm == BASE]
        ),
        "the base's pictures were not scored against other prompts, of which it takes two": make_sweep(
            [r for r in sweep.rows if r.kind == "point"]
        ),
    }
    for reason, case in cases.items():
        assert choose_point(trace_front(case)) == Choice("cannot_tell", reason=reason)


def test_every_price_has_its_own_choice() -> None:
    points = {("r16", 0.5): (0.95, 0.2), ("r16", 1.0): (0.7, 0.4), ("r64", 1.0): (0.6, 0.6)}
    front = trace_front(simple_sweep(points))
    prices = [percent / 100 for percent in range(0, 51, 5)]
    assert choose_at_prices(front, prices) == [choose_point(front, price) for price in prices]
    assert [place(choice) for choice in choose_at_prices(front, (0.0, 0.2, 0.35, 0.5))] == [
        None,
        ("r16", 0.5),
        ("r16", 1.0),
        ("r64", 1.0),
    ]
    assert [choice.reason for choice in choose_at_prices(None, (0.0, 0.5))] == [NO_SWEEP] * 2
