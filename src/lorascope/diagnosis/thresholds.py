"""Where a signal starts to count: every threshold of the decision with its unit and where it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from lorascope.shapes import Number

_FIRST_SERIES = (
    "between planted faults and sound arms in one series on the pocket base of before 25 November 2026, "
    "when it was trained further (one training seed and one "
    "sampling seed, not validated)"
)
_CHOSEN = "chosen, not measured"


@dataclass(frozen=True)
class Threshold:
    """A value at which a signal starts to count, its unit, and where it comes from."""

    name: str
    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Thresholds:
    """All thresholds of the decision."""

    prompt_loss: Threshold = Threshold(
        "prompt fidelity that may be lost",
        0.1,
        "of the base's",
        "the study's price, `verdict.max_prompt_loss`",
    )
    intruder_share: Threshold = Threshold(
        "least share of intruder directions in a diverged arm", 0.2, "share", _FIRST_SERIES
    )
    guidance_cosine: Threshold = Threshold(
        "greatest agreement of guidance with the base's in a diverged arm", 0.15, "cosine", _FIRST_SERIES
    )
    train_gap: Threshold = Threshold(
        "least gain on training pictures beyond that on held-out ones in an overfit arm",
        0.02,
        "loss",
        _FIRST_SERIES,
    )
    member_auc: Threshold = Threshold(
        "least chance that a training picture gained more than a held-out one in an overfit arm",
        0.65,
        "AUC",
        _FIRST_SERIES,
    )
    member_p: Threshold = Threshold("greatest p-value of that chance", 0.05, "p", "the usual 5 %")
    copying_excess: Threshold = Threshold(
        "least share of copies beyond chance in an overfit arm", 0.05, "share of drawings", _CHOSEN
    )
    gain_ratio: Threshold = Threshold(
        "greatest gain without captions over gain with them where the unconditional prediction drifted",
        0.25,
        "ratio",
        _FIRST_SERIES,
    )
    recovered: Threshold = Threshold(
        "least share of the lost prompt fidelity that the base's unconditional prediction must bring back",
        0.5,
        "share",
        _CHOSEN,
    )
    black: Threshold = Threshold(
        "greatest share of black pictures beyond the base's", 0.1, "share of drawings", _CHOSEN
    )

    def with_values(self, values: Mapping[str, float], source: str) -> "Thresholds":
        """These thresholds with other values for some, which come from `source`; a key that is not one of
        them is a ValueError.
        """
        known = {field.name for field in fields(self)}
        if strangers := [key for key in values if key not in known]:
            raise ValueError(f"{strangers[0]}: no such threshold: must be one of {', '.join(sorted(known))}")
        return replace(
            self,
            **{
                key: replace(getattr(self, key), value=float(value), source=source)
                for key, value in values.items()
            },
        )

    def as_table(self) -> dict[str, Threshold]:
        """Every threshold by its key, in their order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


THRESHOLD_SHAPE: Any = {"name": str, "value": Number, "unit": str, "source": str}
