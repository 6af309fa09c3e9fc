"""The noise schedule of a base, from configurations sound and odd."""

from pathlib import Path

import pytest

from bases import change_json, load
from lorascope.base.schedule import noise_schedule, read_scheduler
from lorascope.errors import BaseModelError


def test_unknown_or_broken_schedules_are_refused(own_copy: Path) -> None:
    path = own_copy / "scheduler" / "scheduler_config.json"
    change_json(path, prediction_type="sample")
    with pytest.raises(
        BaseModelError, match="prediction_type = 'sample': must be one of epsilon, v_prediction"
    ):
        load(own_copy)
    path.write_text("{")
    with pytest.raises(BaseModelError, match="cannot be read"):
        load(own_copy)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_train_timesteps", 10**12, "num_train_timesteps = 10+ of the scheduler: must be 1 to 100,000"),
        ("beta_start", "low", "gives no noise schedule"),
        ("trained_betas", [0.1, 0.2], "give no schedule of 1000 finite steps"),
    ],
)
def test_numbers_that_give_no_schedule_are_refused(
    own_copy: Path, key: str, value: object, message: str
) -> None:
    change_json(own_copy / "scheduler" / "scheduler_config.json", **{key: value})
    with pytest.raises(BaseModelError, match=message):
        noise_schedule(read_scheduler(own_copy))
