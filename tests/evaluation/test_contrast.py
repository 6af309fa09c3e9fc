"""Strength against rank: what a study with a matched gain shows, and what it does not."""

import re

import numpy as np
import pytest

from lorascope.arms import Arm
from lorascope.evaluation.contrast import GainContrast, contrast_gains
from lorascope.evaluation.front import trace_front
from lorascope.evaluation.scores import BASE
from synthetic_sweeps import make_sweep, point_rows

NUM_PROMPTS = 24
R16 = Arm(name="r16", rank=16, alpha=32, lr=1.4e-3, seed=0)
R64 = Arm(name="r64", rank=64, alpha=128, lr=1.4e-3, seed=0)
MATCHED = Arm(name="r64-gain-r16", rank=64, alpha=128, lr=7e-4, seed=0, match_gain="r16")


def contrast_of(
    kept: dict[str, float],
    arms: tuple[Arm, ...] = (R16, R64, MATCHED),
    num_prompts: int = NUM_PROMPTS,
    strengths: tuple[float, ...] = (1.0,),
) -> GainContrast | None:
    """With CLIP scores around 40 times what is kept, 40 of the base and 0 with other prompts.

    At lower strengths than 1 arms keep more, so that a strength of s costs s times as much.
    """
    generator = np.random.default_rng(0)

    def drawn(mean: float) -> tuple[list[float], list[float | None]]:
        return (mean + generator.normal(0, 2, num_prompts)).tolist(), [0.1] * num_prompts

    rows = point_rows(BASE, 0.0, drawn(40)) + point_rows(BASE, 0.0, drawn(0), "shuffled")
    for arm in arms:
        for strength in strengths:
            mean = 40 * (1 - strength * (1 - kept[arm.name]))
            rows += point_rows(arm.name, strength, drawn(mean), rank=arm.rank, training_seed=arm.seed)
    settings = {arm.name: arm.but_seed for arm in arms}
    return contrast_gains(trace_front(make_sweep(rows), settings, 500), arms, 500)


def test_a_rank_that_does_well_at_the_gain_of_another_fails_by_strength() -> None:
    found = contrast_of({"r16": 0.5, "r64": 0.2, "r64-gain-r16": 0.6})
    assert found is not None
    assert (found.failing, found.matched, found.reference) == (("r64",), ("r64-gain-r16",), ("r16",))
    assert found.finding == "strength"
    assert found.sentence.startswith("At strength 1, r64 keeps 20 % (95 % interval 18 to 22 %) of the base's")
    assert (
        "r64-gain-r16, of the same rank but with the gain of r16 (lr 0.0007 in place of 0.0014)"
        in found.sentence
    )
    assert "24 prompts, 1 training run each" in found.sentence
    assert found.sentence.endswith("not the rank, in these training runs; other training seeds may differ.")


@pytest.mark.parametrize(
    ("kept", "finding"),
    [
        ({"r16": 0.9, "r64": 0.2, "r64-gain-r16": 0.6}, "strength and rank"),
        ({"r16": 0.9, "r64": 0.2, "r64-gain-r16": 0.2}, "rank"),
        ({"r16": 0.245, "r64": 0.2, "r64-gain-r16": 0.228}, "open"),
        ({"r16": 0.5, "r64": 0.7, "r64-gain-r16": 0.6}, None),
    ],
)
def test_other_findings(kept: dict[str, float], finding: str | None) -> None:
    found = contrast_of(kept)
    assert (found.finding if found else None) == finding
    if found is not None and finding != "strength and rank":
        assert "not shown to be more" in found.sentence


def test_with_several_training_seeds_it_speaks_of_runs() -> None:
    arms = tuple(
        arm.model_copy(update={"name": f"{arm.name}-s{seed}", "seed": seed})
        for arm in (R16, R64, MATCHED)
        for seed in (0, 1, 2)
    )
    kept = {arm.name: 0.2 if arm.name.startswith("r64-s") else 0.6 for arm in arms}
    found = contrast_of(kept, arms)
    assert found is not None and found.finding == "strength"
    assert found.failing == ("r64-s0", "r64-s1", "r64-s2")
    assert "At strength 1, r64 keep 1" in found.sentence and "3 training runs each" in found.sentence
    assert found.sentence.endswith("So it is the strength of the update that fails, not the rank.")


def test_scores_are_means_over_the_strengths_that_all_three_have() -> None:
    found = contrast_of({"r16": 0.5, "r64": 0.2, "r64-gain-r16": 0.6}, strengths=(0.25, 0.5, 1.0))
    assert found is not None and found.finding == "strength"
    # 1 - .8 x (.25 + .5 + 1) / 3 is .53, 1 - .4 x .58 is .77, and .23 of 40 points 9.3
    assert found.sentence.startswith("On average over strengths 0.25 to 1, r64 keeps 53 % (")
    more = re.search(r"0.0014\), keeps (\d+) % .*, ([\d.]+) CLIP points more", found.sentence)
    assert more is not None and abs(int(more[1]) - 77) <= 2 and abs(float(more[2]) - 9.3) <= 0.5


def test_nothing_is_said_without_a_matched_gain_or_with_few_prompts_or_unequal_seeds() -> None:
    kept = {"r16": 0.5, "r64": 0.2, "r64-gain-r16": 0.6}
    assert contrast_of(kept, (R16, R64)) is None
    assert contrast_of(kept, num_prompts=4) is None
    for other in ({"seed": 1}, {"epochs": 7}, {"kind": "dora"}, {"init": "orthogonal"}):
        assert contrast_of(kept, (R16, R64, MATCHED.model_copy(update=other))) is None


def test_arms_of_one_kind_are_compared_whatever_kind_it_is() -> None:
    kept = {"r16": 0.5, "r64": 0.2, "r64-gain-r16": 0.6}
    arms = [
        arm.model_copy(update={"kind": "tlora", "min_rank": arm.rank // 4}) for arm in (R16, R64, MATCHED)
    ]
    found = contrast_of(kept, (arms[0], arms[1], arms[2]))
    assert found is not None and found.finding == "strength"
    of_another_share = arms[0].model_copy(update={"min_rank": 8})
    assert contrast_of(kept, (of_another_share, arms[1], arms[2])) is None
