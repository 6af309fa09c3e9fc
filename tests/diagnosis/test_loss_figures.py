"""Figures of losses: planted effects come out, SciPy agrees, and what cannot be said says why."""

import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lorascope.diagnosis.loss_figures import (
    Losses,
    Measured,
    SetLosses,
    loss_figures,
    paired_rise,
    rise_from_best,
)

BANDS = ("0-250", "250-500", "500-750", "750-1000")
LEVELS = np.array([0.3, 0.1, 0.05, 0.01])  # of a loss, by band


def some_losses(
    num_pictures: int, change: float, change_uncaptioned: float, advantages: tuple[float, float], seed: int
) -> SetLosses:
    """Losses of the base and two arms, the first of which is the base again.

    The second changes by so much, with pictures scattered by a tenth of it; a caption lowers the base's loss
    by the first of the advantages and the arm's by the second.
    """
    generator = np.random.default_rng(seed)
    base = LEVELS * generator.uniform(0.8, 1.2, (num_pictures, 4))
    scatter = generator.normal(1, 0.1, (4, num_pictures, 1))
    arm, arm_uncaptioned = (
        base + part * by
        for part, by in zip(scatter[:2], (change, change_uncaptioned + advantages[1]), strict=True)
    )
    of_base = base + scatter[2] * advantages[0]
    return SetLosses(np.stack([base, base, arm]), np.stack([of_base, of_base, arm_uncaptioned]))


def make_losses(**changes: Any) -> Losses:
    """An arm that gained .02 with captions and 60 % of it without, and on training pictures .05."""
    cosines = np.full((3, 12, 4), 1.0)
    cosines[2] = 0.25
    parts: dict[str, Any] = {
        "train": some_losses(30, -0.05, -0.03, (0.0, 0.0), 1),
        "heldout": some_losses(24, -0.02, -0.012, (0.0, 0.0), 2),
        "drawings": some_losses(12, 0.0, 0.0, (0.04, 0.01), 3),
        "cosines": cosines,
    }
    return Losses(names=("same", "arm"), bands=BANDS, **{**parts, **changes})


def test_planted_effects_come_out_with_intervals_around_them() -> None:
    losses = make_losses()
    figures = loss_figures(losses, "arm")
    assert (figures.num_train, figures.num_heldout, figures.num_drawings) == (30, 24, 12)
    planted = {
        "heldout": -0.02,
        "heldout_uncaptioned": -0.012,
        "gain_ratio": 0.6,
        "train_gap": 0.03,
        "train_gap_uncaptioned": 0.018,
        "base_advantage_drawings": 0.04,
        "advantage_drawings": 0.01,
        "advantage_kept_drawings": 0.25,
    }
    for name, value in planted.items():
        figure: Measured = getattr(figures, name)
        assert figure.value == pytest.approx(value, rel=0.15), name
        assert figure.value and figure.low and figure.high and figure.note is None, name
        assert figure.low < figure.value < figure.high and figure.high - figure.low < abs(value), name
    assert [*figures.heldout_bands] == [*figures.heldout_bands_uncaptioned] == [*BANDS]
    assert figures.heldout_bands["0-250"].value == pytest.approx(figures.heldout.value)
    assert figures.guidance_cosine == Measured(0.25, 0.25, 0.25, 12)
    assert figures.member_auc.value == 1.0 and figures.member_p is not None and figures.member_p < 0.001


def test_the_base_itself_differs_in_nothing() -> None:
    losses = make_losses()
    rounded = losses.heldout.captioned.copy()
    rounded[1] *= 1 + 3e-7
    figures = loss_figures(replace(losses, heldout=replace(losses.heldout, captioned=rounded)), "same")
    zero = Measured(0.0, 0.0, 0.0, 24)
    assert figures.heldout == figures.heldout_uncaptioned == figures.train_gap == zero
    assert figures.member_auc.value == 0.5 and figures.member_p == 1.0
    assert figures.guidance_cosine.value == 1.0 and figures.advantage_kept_drawings.value == 1.0
    note = figures.gain_ratio.note
    assert figures.gain_ratio.value is None and note is not None and note.startswith("no gain to compare")


def test_intervals_and_auc_are_scipys() -> None:
    generator = np.random.default_rng(6)
    heldout = some_losses(24, 0.0, 0.0, (0.0, 0.0), 5)
    heldout.captioned[2] += generator.normal(-0.01, 0.02, (24, 1))
    train = some_losses(24, 0.0, 0.0, (0.0, 0.0), 7)
    train.captioned[2] += generator.normal(-0.02, 0.02, (24, 1))
    figures = loss_figures(make_losses(train=train, heldout=heldout), "arm")
    members, others = ((part.captioned[2] - part.captioned[0]).mean(axis=1) for part in (train, heldout))
    students = stats.t.interval(0.95, 23, others.mean(), stats.sem(others))
    assert (figures.heldout.low, figures.heldout.high) == pytest.approx(students, abs=0.1 * np.ptp(students))
    test = stats.mannwhitneyu(-members, -others)
    assert figures.member_auc.value == pytest.approx(test.statistic / 24**2)
    assert figures.member_p == pytest.approx(test.pvalue, abs=0.02)
    welch = stats.ttest_ind(others, members, equal_var=False).confidence_interval()
    assert (figures.train_gap.low, figures.train_gap.high) == pytest.approx(
        (welch.low, welch.high), abs=0.1 * (welch.high - welch.low)
    )


def test_a_drift_lowers_the_gain_ratio_and_an_unlearned_arm_has_none() -> None:
    drifted = make_losses(heldout=some_losses(24, -0.02, -0.0016, (0.0, 0.0), 2))
    ratio = loss_figures(drifted, "arm").gain_ratio
    assert ratio.value == pytest.approx(0.08, abs=0.01) and ratio.high is not None and ratio.high < 0.1
    elsewhere = some_losses(24, -0.02, -0.012, (0.0, 0.0), 2)
    elsewhere.uncaptioned[2, :, :2] = elsewhere.uncaptioned[0, :, :2]
    assert loss_figures(make_losses(heldout=elsewhere), "arm").gain_ratio.value == pytest.approx(0.6, rel=0.1)
    worse = loss_figures(make_losses(heldout=some_losses(24, 0.02, 0.02, (0.0, 0.0), 2)), "arm")
    assert worse.gain_ratio.value is None and worse.heldout.value == pytest.approx(0.02, rel=0.1)


def test_no_share_of_an_advantage_that_the_base_does_not_have() -> None:
    losses = make_losses(heldout=some_losses(24, 0.0, 0.0, (-0.03, 0.01), 2))
    figures = loss_figures(losses, "arm")
    assert figures.base_advantage_heldout.value == pytest.approx(-0.03, rel=0.1)
    assert figures.advantage_kept_heldout == Measured(
        None, count=24, note="captions are not shown to lower the base's loss on held-out pictures"
    )


@pytest.mark.parametrize(
    ("count", "note"),
    [
        (0, "no held-out pictures: at least 2 are needed"),
        (1, "1 held-out picture: at least 2 are needed"),
        (3, "3 held-out pictures: an interval needs at least 6"),
    ],
)
def test_few_pictures_give_no_figure_or_no_interval_and_the_reason(count: int, note: str) -> None:
    losses = make_losses(heldout=some_losses(count, -0.02, -0.012, (0.0, 0.0), 2))
    figures = loss_figures(losses, "arm")
    for figure in (figures.heldout, figures.train_gap, figures.heldout_bands["500-750"]):
        assert figure.note == note and figure.low is None and (figure.value is None) == (count < 2)
    assert (figures.member_auc.value is None) == (figures.member_p is None) == (count < 2)
    for ratio in (figures.gain_ratio, figures.advantage_kept_heldout):
        assert ratio.value is None and ratio.note
    assert figures.guidance_cosine.value == 0.25
    assert paired_rise(losses, "arm", "same").note == note


def test_no_drawings_and_none_that_captions_change() -> None:
    nothing = make_losses(drawings=some_losses(0, 0.0, 0.0, (0.0, 0.0), 3), cosines=np.empty((3, 0, 4)))
    figures = loss_figures(nothing, "arm")
    assert figures.guidance_cosine.note == "no drawings of the base: at least 2 are needed"
    assert figures.advantage_kept_drawings.note == figures.guidance_cosine.note
    cosines = np.full((3, 12, 4), math.nan)
    unmoved = loss_figures(make_losses(cosines=cosines), "arm").guidance_cosine
    assert unmoved.value is None and unmoved.note is not None and "do not change the base" in unmoved.note
    cosines[:, 3:] = 0.5
    cosines[2, 3, 0], cosines[0, 3, 0] = 0.0, math.nan  # one band without a vector: the other three count
    some = loss_figures(make_losses(cosines=cosines), "arm").guidance_cosine
    assert (some.value, some.count) == (0.5, 9)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_named_and_spoil_only_their_arm(broken: float) -> None:
    losses = make_losses()
    for part in (losses.train, losses.heldout):
        part.captioned[2, 1, 2], part.captioned[2, 1, 3] = broken, -broken
    figures = loss_figures(losses, "arm")
    note = "losses on held-out pictures are not finite"
    assert figures.heldout == figures.advantage_heldout == Measured(None, count=24, note=note)
    assert figures.gain_ratio.note == figures.advantage_kept_heldout.note == note
    assert figures.train_gap.note == "losses on training pictures are not finite"
    assert figures.heldout_uncaptioned.value is not None
    assert loss_figures(losses, "same").heldout.value == 0.0


def test_figures_are_json() -> None:
    figures = asdict(loss_figures(make_losses(), "arm"))
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_the_rise_since_the_best_epoch_is_paired() -> None:
    rise = paired_rise(make_losses(), "same", "arm")
    assert rise.value == pytest.approx(0.02, rel=0.1) and rise.low is not None and rise.low > 0
    assert paired_rise(make_losses(), "arm", "arm").value == 0.0


def test_the_rise_in_the_records_of_training() -> None:
    def probe(epoch: int, loss: float, **changes: object) -> dict[str, object]:
        record = {"kind": "probe", "arm": "r4", "split": "heldout", "band": "all", "conditional": True}
        return {**record, "epoch": epoch, "loss": loss, **changes}

    others = [
        probe(1, 0.01, arm="r8"),
        probe(1, 0.01, split="train"),
        probe(2, 0.01, band="0-250"),
        probe(3, 0.01, conditional=False),
        {"kind": "train", "arm": "r4", "step": 3, "epoch": 1, "loss": 0.01},
    ]
    rise = rise_from_best([probe(1, 0.125), probe(2, 0.0625), probe(3, 0.09375), *others], "r4")
    assert rise is not None
    assert asdict(rise) == {
        "best_epoch": 2,
        "best_loss": 0.0625,
        "last_epoch": 3,
        "last_loss": 0.09375,
        "rise": 0.03125,
    }
    falling = rise_from_best([probe(2, 0.1), probe(1, 0.2)], "r4")
    assert falling is not None and (falling.best_epoch, falling.rise) == (2, 0.0)
    assert rise_from_best(others, "r4") is None
