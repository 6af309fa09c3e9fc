"""T-LoRA's schedule: how many components of an adapter act at a timestep (Soboleva et al. 2025)."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from lorascope.arms import Arm
from lorascope.errors import AdapterError

SCHEDULE_KEY = "lorascope_tlora"  # of a file's header
NUM_TIMESTEPS = 1000  # of Stable Diffusion


@dataclass(frozen=True)
class RankSchedule:
    """At timestep t of T the first r(t) = int(((T - t) / T)^exponent (rank - min_rank)) + min_rank components
    act: all of them where there is no noise, `min_rank` where there is nothing else.
    """

    rank: int
    min_rank: int
    exponent: float = 1.0
    num_timesteps: int = NUM_TIMESTEPS
    # Whether a file holds twice as many: the latter half subtracts what the first started from, and of either
    # half the same components act.
    halves: bool = False

    def table(self, rank: int) -> list[int]:
        """r(t) of a layer of `rank`, whose least is the same share of it as `min_rank` is of the adapter's.

        An entry a timestep.
        """
        least = self.min_rank if rank == self.rank else max(1, round(self.min_rank * rank / self.rank))
        # By Python's numbers, as published: float32 would cut whole numbers to those below.
        shares = (
            (self.num_timesteps - timestep) / self.num_timesteps for timestep in range(self.num_timesteps)
        )
        return [int(share**self.exponent * (rank - least)) + least for share in shares]

    def as_text(self) -> str:
        """What a file's header holds of it."""
        values = asdict(self)
        if not self.halves:
            del values["halves"]
        return json.dumps(values, sort_keys=True)


def read_schedule(metadata: Mapping[str, str]) -> RankSchedule | None:
    """The schedule in a file's header, None where there is none; raises `AdapterError` for one that is not
    as `RankSchedule.as_text` writes it.
    """
    text = metadata.get(SCHEDULE_KEY)
    if text is None:
        return None
    try:
        schedule = RankSchedule(**json.loads(text))
        is_right = 1 <= schedule.min_rank <= schedule.rank and schedule.exponent > 0
        whole = (schedule.rank, schedule.min_rank, schedule.num_timesteps)
        is_right &= type(schedule.halves) is bool
        is_right &= all(type(number) is int for number in whole) and 1 <= schedule.num_timesteps <= 10**6
    except (TypeError, ValueError, RecursionError):
        is_right = False
    if not is_right:
        raise AdapterError(
            f"{SCHEDULE_KEY} = {text[:200]!r}: is no schedule of T-LoRA: must have rank, min_rank from 1 to "
            "that, exponent above 0 and num_timesteps: export it again"
        )
    return schedule


def schedule_of(arm: Arm, training: bool = False) -> RankSchedule | None:
    """The schedule by which an arm's components act in drawing, or in `training`; None where all do."""
    if arm.kind != "tlora" or (arm.mask_when == "training" and not training):
        return None
    assert arm.min_rank is not None
    return RankSchedule(arm.rank, arm.min_rank, arm.mask_exponent, halves=arm.is_anchored)
