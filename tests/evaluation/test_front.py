"""What each arm keeps and gains: hand-computed cases, and intervals beside a plain loop."""

import dataclasses

import numpy as np
import pytest

from lorascope.evaluation.front import (
    FrontPoint,
    outer_points,
    style_difference,
    trace_front,
)
from lorascope.evaluation.scores import BASE
from lorascope.evaluation.statistics import (
    bootstrap_interval,
    expanded_tail,
    nested_interval,
    smallest_detectable_effect,
)
from lorascope.evaluation.sweep_rows import SCALED_INTRUDERS, Discrepancy, StyleFacts, Sweep, cut_to
from synthetic_sweeps import STYLED, make_sweep, point_rows, simple_sweep

SHUFFLED = point_rows(BASE, 0.0, ([10.0, 12.0], [0.0, 0.1]), kind="shuffled")
BASE_ROWS = point_rows(BASE, 0.0, ([30.0, 32.0], [0.0, 0.1]))
ARM = point_rows("r16", 0.5, ([25.0, 29.0], [0.2, 0.5]))


def only(sweep: Sweep) -> FrontPoint:
    (point,) = trace_front(sweep).points
    return point


def test_retention_style_and_difference_by_hand() -> None:
    front = trace_front(make_sweep([*BASE_ROWS, *SHUFFLED, *ARM]))
    (point,) = front.points
    assert (front.base, front.floor, front.guidance) == (31, 11, 7.5)
    assert (point.arm, point.epoch, point.strength, point.rank) == ("r16", "last", 0.5, 16)
    assert point.retention.value == pytest.approx((27 - 11) / (31 - 11))
    assert point.style.value == pytest.approx(0.3)
    assert point.difference.value == pytest.approx(-4)
    assert point.clip == 27
    assert (point.num_prompts, point.num_seeds) == (2, 1)
    assert [(item.difference, item.style) for item in point.per_prompt] == [
        (-5.0, pytest.approx(0.2)),
        (-3.0, pytest.approx(0.4)),
    ]
    assert point.style.low is None and point.style.reason == "2 prompts: an interval takes at least 6"
    assert point.difference.smallest_detectable == pytest.approx(
        smallest_detectable_effect(float(np.std([-5, -3], ddof=1)), 2)
    )
    # What each prompt adds to the ratio: 0.8 + ((15, 17) - 0.8 x (20, 20)) / 20.
    assert point.retention.spread is not None
    assert point.retention.spread.prompt_std == pytest.approx(np.std([0.75, 0.85], ddof=1))


def test_sampling_seeds_are_averaged_and_only_common_pictures_count() -> None:
    again = point_rows("r16", 0.5, ([27.0, 31.0], [0.4, 0.7]), seed=1)
    base = point_rows(BASE, 0.0, ([28.0, 30.0], [0.0, 0.1]), seed=1)
    shuffled = point_rows(BASE, 0.0, ([14.0, 12.0], [0.0, 0.1]), kind="shuffled", seed=1)
    point = only(make_sweep([*BASE_ROWS, *base, *SHUFFLED, *shuffled, *ARM, *again]))
    assert (point.num_prompts, point.num_seeds) == (2, 2)
    assert point.retention.value == pytest.approx((28 - 12) / (30 - 12))
    assert point.style.value == pytest.approx(0.4)
    odd = only(make_sweep([*BASE_ROWS, *SHUFFLED, *ARM, *again]))  # the base has no second seed
    assert (odd.num_seeds, odd.retention.value) == (1, pytest.approx(0.8))


def test_other_guidance_and_interventions_are_no_points_of_the_front() -> None:
    others = [
        dataclasses.replace(row, **change)
        for row in ARM
        for change in (
            {"guidance": 1.0},
            {"unconditional": "base"},
            {"weights": SCALED_INTRUDERS},
            {"weights": cut_to(4)},
        )
    ]
    base = [dataclasses.replace(row, guidance=1.0) for row in BASE_ROWS]
    front = trace_front(make_sweep([*BASE_ROWS, *base, *SHUFFLED, *ARM, *others]))
    assert [item.point for item in front.points] == [ARM[0].point]
    # Without a floor the guidance with the most pictures is the study's.
    assert trace_front(make_sweep([*BASE_ROWS, *base, *ARM])).guidance == 7.5


def test_intervals_agree_with_a_plain_loop() -> None:
    sweep = simple_sweep({("r16", 0.5): (0.9, 0.3)}, num_prompts=9, clip_std=2.0, style_std=0.2)
    point = only(sweep)
    base = np.array([row.clip_score for row in sweep.rows if row.arm == BASE and row.kind == "point"])
    floor = np.array([row.clip_score for row in sweep.shuffled])
    arm = np.array([row.clip_score for row in sweep.of(point.point)])
    generator = np.random.default_rng(0)
    drawn = []
    for start in (0, 4096, 8192):
        for chosen in generator.integers(0, 9, (min(4096, 10_000 - start), 9)):
            lowest = floor[chosen].mean()
            drawn.append((arm[chosen].mean() - lowest) / (base[chosen].mean() - lowest))
    tail = expanded_tail(9, 0.95)
    assert (point.retention.low, point.retention.high) == pytest.approx(
        tuple(np.quantile(drawn, [tail, 1 - tail]))
    )
    differences = [item.difference for item in point.per_prompt]
    assert (point.difference.low, point.difference.high) == pytest.approx(bootstrap_interval(differences))
    styles = [item.style for item in point.per_prompt]
    assert (point.style.low, point.style.high) == pytest.approx(bootstrap_interval(styles))


def test_arms_of_one_setting_are_pooled_over_training_seeds() -> None:
    sweep = simple_sweep({("r16", 0.5): (0.9, 0.3), ("r16-s1", 0.5): (0.7, 0.1), ("r64", 0.5): (0.8, 0.2)})
    front = trace_front(sweep)
    (setting,) = front.settings
    assert (setting.arms, setting.training_seeds, setting.rank) == (("r16", "r16-s1"), (0, 1), 16)
    assert (setting.epoch, setting.strength, setting.num_prompts) == ("last", 0.5, 24)
    assert setting.retention.value == pytest.approx(0.8)
    assert setting.style.value == pytest.approx(0.2)
    table = [[item.difference for item in point.per_prompt] for point in front.points[:2]]
    assert (setting.difference.low, setting.difference.high) == nested_interval(table)
    assert setting.retention.spread is not None
    # The two runs lie 0.2 apart: 0.2 / sqrt 2, and what prompts add is taken off.
    assert setting.retention.spread.seed_std == pytest.approx(0.2 / np.sqrt(2), abs=0.01)
    assert setting.retention.low is not None and front.points[0].retention.low is not None
    assert setting.retention.low < front.points[1].retention.low < front.points[0].retention.low
    named = trace_front(sweep, {"r16": "a", "r16-s1": "b", "r64": "b"})
    assert [item.arms for item in named.settings] == [("r16-s1", "r64")]
    unscored = trace_front(dataclasses.replace(sweep, style=StyleFacts(reason="no layer")))
    assert unscored.settings[0].style.reason == "no layer"
    baseless = trace_front(make_sweep([row for row in sweep.rows if row.arm != BASE]))
    assert (baseless.settings[0].retention.value, baseless.settings[0].difference.value) == (None, None)


def test_what_is_undefined_has_a_reason() -> None:
    missing = only(make_sweep([*BASE_ROWS, *SHUFFLED, *ARM], StyleFacts(reason="no real pictures")))
    assert (missing.style.value, missing.style.reason) == (None, "no real pictures")
    weak = only(make_sweep([*BASE_ROWS, *SHUFFLED, *ARM], dataclasses.replace(STYLED, auc=0.7)))
    assert weak.style.reason == "not separable here: AUC 0.70, must be at least 0.8"
    bare = [dataclasses.replace(row, style=None) for row in (*BASE_ROWS, *SHUFFLED, *ARM)]
    assert only(make_sweep(bare)).style.reason == "no style was measured of these pictures"
    baseless = trace_front(make_sweep(ARM))
    assert baseless.fidelity_reason == baseless.style_reason == "the base has no pictures of these prompts"
    assert (baseless.base, baseless.floor, baseless.points[0].difference.value) == (None, None, None)
    floorless = trace_front(make_sweep([*BASE_ROWS, *ARM]))
    assert floorless.points[0].retention.reason == (
        "the base's pictures were not scored against other prompts, of which it takes two"
    )
    assert floorless.points[0].difference.value == -4
    blind = [dataclasses.replace(row, kind="shuffled") for row in BASE_ROWS]
    assert only(make_sweep([*BASE_ROWS, *blind, *ARM])).retention.reason == (
        "the base's pictures were not shown to fit their own prompts better than others: they score 31.0, "
        "with other prompts 31.0"
    )
    one = make_sweep([rows[0] for rows in (BASE_ROWS, SHUFFLED, ARM)])
    assert only(one).retention.value == 0.75
    assert only(one).retention.reason == "1 prompt: an interval takes at least 6"
    elsewhere = [dataclasses.replace(row, prompt_index=7) for row in ARM]
    apart = only(make_sweep([*BASE_ROWS, *SHUFFLED, *elsewhere]))
    assert (apart.num_prompts, apart.retention.value, apart.style.value) == (0, None, None)
    assert trace_front(make_sweep([])).points == ()


def test_style_must_exceed_what_the_bases_own_drawings_vary_by() -> None:
    points = {("r16", 0.5): (0.9, 0.1)}
    calm = trace_front(simple_sweep(points))
    assert calm.style_null == pytest.approx(2.07 * 0.05 / np.sqrt(24), rel=0.2)
    assert calm.gains_style(calm.points[0])
    wild = trace_front(simple_sweep(points, base_style_std=1.0))
    assert wild.points[0].style.low is not None and wild.points[0].style.low > 0
    assert not wild.gains_style(wild.points[0])
    assert not calm.gains_style(only(simple_sweep({("r16", 0.5): (0.9, -0.1)})))
    few = simple_sweep(points, num_prompts=4)
    assert trace_front(few).style_null is None and not trace_front(few).gains_style(only(few))
    # With two sampling seeds it is the base against itself: here it draws the same twice.
    sweep = simple_sweep(points, base_style_std=1.0)
    again = [dataclasses.replace(row, seed=1) for row in sweep.rows]
    both = trace_front(make_sweep([*sweep.rows, *again]))
    assert both.style_null == 0 and both.gains_style(both.points[0])


def test_outer_points_are_those_nothing_beats() -> None:
    places = {("r4", 0.25): (0.9, 0.1), ("r4", 0.5): (0.8, 0.2), ("r16", 0.25): (0.8, 0.3)}
    front = trace_front(simple_sweep({**places, ("r16", 0.5): (0.7, 0.25)}))
    assert {(item.arm, item.strength) for item in outer_points(front.points)} == {
        ("r4", 0.25),
        ("r16", 0.25),
    }
    assert outer_points([dataclasses.replace(only(make_sweep(ARM)))]) == ()


def test_style_of_two_points_is_compared_prompt_by_prompt() -> None:
    front = trace_front(simple_sweep({("r4", 0.5): (0.9, 0.1), ("r16", 0.5): (0.9, 0.3)}))
    found = style_difference(front.points[1], front.points[0])
    assert found.value == pytest.approx(0.2)
    pairs = zip(front.points[1].per_prompt, front.points[0].per_prompt, strict=True)
    values = [a.style - b.style for a, b in pairs if a.style is not None and b.style is not None]
    assert (found.low, found.high) == pytest.approx(bootstrap_interval(values))
    unknown = dataclasses.replace(front.points[0], per_prompt=())
    assert style_difference(front.points[1], unknown).reason == "no style was measured of these pictures"


def test_discrepancies_stand_beside_their_points() -> None:
    sweep = make_sweep(
        [*BASE_ROWS, *SHUFFLED, *ARM],
        discrepancies={
            "r16/last-s0.50-g7.5": Discrepancy(2.0, 0.5),
            "base/last-s0.00-g7.5": Discrepancy(9, 0),
        },
    )
    front = trace_front(sweep)
    assert front.base_discrepancy == Discrepancy(9, 0) and front.points[0].discrepancy == Discrepancy(
        2.0, 0.5
    )
