"""Thresholds say where they come from, and a learner can put others in their place."""

import pytest

from lorascope.diagnosis.thresholds import Thresholds


def test_every_threshold_says_its_unit_and_where_it_comes_from() -> None:
    table = Thresholds().as_table()
    assert {key: table[key].value for key in ("intruder_share", "guidance_cosine", "train_gap")} == {
        "intruder_share": 0.2,
        "guidance_cosine": 0.15,
        "train_gap": 0.02,
    }
    assert (table["gain_ratio"].value, table["member_auc"].value) == (0.25, 0.65)
    assert all(item.name and item.unit and item.source for item in table.values())


def test_others_take_their_place() -> None:
    learned = Thresholds().with_values({"train_gap": 0.03}, "from planted faults on the pocket base")
    assert (learned.train_gap.value, learned.train_gap.source) == (
        0.03,
        "from planted faults on the pocket base",
    )
    assert learned.member_auc == Thresholds().member_auc
    with pytest.raises(ValueError, match="gap: no such threshold: must be one of black"):
        Thresholds().with_values({"gap": 1.0}, "nowhere")
