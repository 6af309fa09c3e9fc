"""Signals carry what was measured, with interval and control, or say why it was not."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lorascope.diagnosis.layers import LayerFigures, summarise
from lorascope.diagnosis.loss_figures import LossFigures, Measured, Rise
from lorascope.diagnosis.signals import (
    ArmSignals,
    copying_signals,
    file_signals,
    find_picture_faults,
    loss_signals,
    make_signal,
    picture_signals,
    sweep_signals,
    trace_fronts,
    training_signals,
    weight_signals,
)
from lorascope.evaluation.copying import copy_ratio
from lorascope.evaluation.scores import BASE
from lorascope.evaluation.sweep_rows import Discrepancy
from synthetic_signals import a_point, an_arm
from synthetic_sweeps import make_sweep, point_rows

CLIP, STYLE = np.linspace(25, 35, 12), np.linspace(-0.1, 0.1, 12)


def drawn(arm: str, kept: float, gained: float, strength: float = 1.0, **values: Any) -> list[Any]:
    """Pictures that keep a share of the base's lead of 20 over the floor, and gain style."""
    wiggle = np.tile([0.5, -0.5], 6)
    return point_rows(arm, strength, (CLIP - 20 * (1 - kept) + wiggle, STYLE + gained), **values)


def a_sweep() -> Any:
    rows = [
        *point_rows(BASE, 0.0, (CLIP, STYLE)),
        *point_rows(BASE, 0.0, (CLIP - 20, STYLE), kind="shuffled"),
        *point_rows(BASE, 0.0, (CLIP - 4, STYLE), guidance=3.0),
        *drawn("r8", 0.5, 0.4),
        *drawn("r8", 0.9, 0.2, 0.5),
        *drawn("r8", 0.8, 0.3, epoch="best"),
        *drawn("r8", 0.2, 0.4, guidance=3.0),
        *drawn("r4", 1.0, 0.1),
    ]
    distances = {f"{BASE}/last-s0.00-g7.5": Discrepancy(60, 0.01), "r8/last-s1.00-g7.5": Discrepancy(25, 0.1)}
    return make_sweep(rows, discrepancies=distances)


def test_a_sweep_becomes_points() -> None:
    fronts = trace_fronts(a_sweep(), resamples=200)
    signals = ArmSignals(an_arm("r8"), **sweep_signals(fronts, "r8"))
    assert [(point.epoch, point.strength) for point in signals.points] == [
        ("last", 0.5),
        ("last", 1.0),
        ("best", 1.0),
    ]
    full = signals.full
    assert full.retention.value == pytest.approx(0.5) and full.retention.control == 1.0
    assert full.retention.low is not None and full.retention.low < 0.5 and full.retention.count == 12
    assert full.style.value == pytest.approx(0.4) and full.style.control == fronts.own.style_null
    assert (full.discrepancy.value, full.discrepancy.control) == (25, 60)
    assert signals.lower[0].discrepancy.value is None
    assert signals.lower[0].retention.value == pytest.approx(0.9)
    # At guidance 3 beside the base at guidance 3, whose lead over the floor is 16.
    assert [(item.guidance, item.retention.value) for item in signals.guidances] == [
        (3.0, pytest.approx(4 / 16))
    ]


def test_what_was_not_drawn_is_not_measured() -> None:
    fronts = trace_fronts(a_sweep(), resamples=200)
    signals = ArmSignals(an_arm("r4"), **sweep_signals(fronts, "r4"))
    assert signals.full.retention.value == pytest.approx(1.0)
    assert signals.guidances == ()
    assert sweep_signals(None, "r4") == {} and sweep_signals(fronts, "r99") == {"points": (), "guidances": ()}
    own = trace_fronts(make_sweep([]), resamples=200)
    assert own.base_unconditional is None and own.own.guidance is None and own.edited == {}


def test_arms_find_their_points() -> None:
    signals = ArmSignals(an_arm(rank=4, alpha=8.0, lr=1e-3), points=(a_point(0.25, 1, 0), a_point(0.5, 1, 0)))
    assert [point.strength for point in signals.lower] == [0.5, 0.25]
    assert signals.full.retention.note == "strength 1 was not drawn"
    assert signals.at(0.5, "best") is None
    assert ArmSignals(an_arm()).full.style.note == "not measured"
    assert list(signals.by_key())[:2] == ["finished", "finite_training"]


MEASURED = Measured(-0.02, -0.03, -0.01, 24)


def some_figures(**changes: Any) -> LossFigures:
    names = (
        "heldout",
        "heldout_uncaptioned",
        "gain_ratio",
        "train_gap",
        "train_gap_uncaptioned",
        "member_auc",
    )
    names += tuple(
        f"{kind}_{place}"
        for kind in ("base_advantage", "advantage", "advantage_kept")
        for place in ("drawings", "heldout")
    )
    values: dict[str, Any] = dict.fromkeys((*names, "guidance_cosine"), MEASURED)
    values |= {"num_train": 30, "num_heldout": 24, "num_drawings": 12, "member_p": 0.01}
    values |= {"heldout_bands": {}, "heldout_bands_uncaptioned": {}}
    return LossFigures(**{**values, **changes})


def test_losses_become_signals() -> None:
    found = loss_signals(some_figures(), MEASURED)
    assert found["finite_losses"].value == 1
    for key in ("heldout", "train_gap", "gain_ratio", "advantage_kept", "guidance_cosine", "rise"):
        signal = found[key]
        assert (signal.value, signal.low, signal.high, signal.count) == (-0.02, -0.03, -0.01, 24)
    assert (found["member_auc"].control, found["member_p"].value) == (0.5, 0.01)
    by_probes = loss_signals(None, Rise(2, 0.1, 5, 0.12, 0.02))
    assert list(by_probes) == ["rise"] and by_probes["rise"].value == 0.02
    assert by_probes["rise"].low is None and loss_signals(None) == {}


def test_losses_that_are_missing_say_why() -> None:
    few = Measured(None, count=1, note="1 held-out picture: at least 2 are needed")
    found = loss_signals(some_figures(heldout=few, heldout_uncaptioned=few, train_gap=few))
    assert found["finite_losses"].value is None
    assert found["heldout"].note == "1 held-out picture: at least 2 are needed"
    broken = Measured(None, count=24, note="losses on held-out pictures are not finite")
    assert loss_signals(some_figures(heldout=broken))["finite_losses"].value == 0


def test_weights_become_signals() -> None:
    layer = LayerFigures("unet.mid_block.attentions.0.proj_in", 4, 0.2, 0.3, 2.0, 3, 10, 4)
    found = weight_signals(summarise([layer]))
    assert (found["intruder_share"].value, found["norm_ratio"].value) == (0.4, 0.2)
    zero = weight_signals(summarise([replace(layer, norm_ratio=None)]))["norm_ratio"]
    assert (zero.value, zero.note) == (None, "no adapted layer has a weight other than 0")
    assert weight_signals(None) == {}


def test_training_and_files_become_signals() -> None:
    metrics = [{"kind": "train", "arm": "r4", "loss": 0.1}, {"kind": "train", "arm": "r8", "loss": math.nan}]
    assert training_signals(metrics, "r4")["finite_training"].value == 1
    failed = training_signals(metrics, "r8", "loss is not finite at step 2")
    assert (failed["finite_training"].value, failed["finished"].value) == (0, 0)
    assert failed["finished"].note == "loss is not finite at step 2"
    assert training_signals(metrics, "r2")["finite_training"].value is None
    merge = {"relative_error": 0.2, "tolerance": 1e-3, "ok": False}
    found = file_signals(merge, True)
    assert (found["merge_ok"].value, found["merge_ok"].note) == (0, "relative error 0.2, at most 0.001")
    assert found["file_ok"].value == 1
    unknown = file_signals(None, None, "not exported")
    assert list(unknown) == ["file_ok"] and unknown["file_ok"].note == "not exported"


def test_copies_count_beyond_chance() -> None:
    rng = np.random.default_rng(0)
    training, heldout = (rng.integers(0, 256, (8, 6, 6, 3), dtype=np.uint8) for _ in range(2))
    drawings = training.copy()
    found = copying_signals(copy_ratio(drawings, training), copy_ratio(drawings, heldout))["copying_excess"]
    assert (found.value, found.low, found.control, found.count) == (1.0, 1.0, 0.0, 8)
    same = copying_signals(copy_ratio(drawings, training), copy_ratio(drawings, training))["copying_excess"]
    assert (same.value, same.control) == (0.0, 1.0)
    assert copying_signals(None, copy_ratio(drawings, heldout)) == {}


def test_broken_pictures_are_counted() -> None:
    rng = np.random.default_rng(0)
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 90, np.uint8)
    noise = rng.integers(1, 255, (4, 4, 3), dtype=np.uint8)
    hard = np.where(noise > 128, 255, 0).astype(np.uint8)
    faults = find_picture_faults([black, grey, noise, hard])
    assert faults is not None
    assert (faults.black, faults.constant, faults.saturated, faults.count) == (0.25, 0.5, 0.5, 4)
    found = picture_signals(faults, find_picture_faults([noise]), is_finite=True)
    assert (found["black"].value, found["black"].control, found["finite_pictures"].value) == (0.25, 0.0, 1)
    assert find_picture_faults([]) is None
    assert list(picture_signals(None, None)) == ["finite_pictures"]
    assert picture_signals(faults, None)["black"].control is None


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_signal_without_a_value_has_a_reason_and_no_interval(value: float | None) -> None:
    signal = make_signal("train_gap", value, low=0.1, high=0.2)
    assert not signal.is_measured and signal.note
    assert (signal.low, signal.high) == (None, None)
