"""Training of all groups: what happens where memory runs out; tests/test_study.py runs whole trainings."""

import pytest

from lorascope.errors import RunError
from lorascope.schema import StudyConfig
from lorascope.training.packing import ArmGroup
from lorascope.training.stage import smaller

ARMS = StudyConfig().expand_arms()


def test_a_group_that_does_not_fit_goes_on_as_two() -> None:
    assert [group.names for group in smaller(ArmGroup(ARMS), "tried to allocate 2 GiB", None)] == [
        ["r16"],
        ["r64"],
    ]


def test_an_arm_that_does_not_fit_alone_gets_gradient_checkpointing_or_is_refused() -> None:
    alone = ArmGroup(ARMS[:1])
    checkpointed = smaller(alone, "tried to allocate 2 GiB", None)
    assert [group.gradient_checkpointing for group in checkpointed] == [True]
    with pytest.raises(
        RunError,
        match=(
            r"^arm r16: not enough memory for it alone \(2 GiB\): in another folder, lower its batch_size "
            r".*px$"
        ),
    ):
        smaller(checkpointed[0], "2 GiB", None)
    with pytest.raises(RunError, match=r"or set train.gradient_checkpointing = true$"):
        smaller(alone, "2 GiB", False)
