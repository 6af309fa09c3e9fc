"""Signals of made-up arms, for the tests of the diagnosis and of what rests on it."""

from collections.abc import Sequence
from typing import Any

from lorascope.arms import Arm
from lorascope.diagnosis.signals import ArmSignals, PointSignals, make_signal
from lorascope.evaluation.sweep_rows import Epoch

YES, NO = 1.0, 0.0


def an_arm(name: str = "r64", **values: Any) -> Arm:
    return Arm(**{"name": name, "rank": 64, "alpha": 128.0, "lr": 5e-4, "seed": 0, "epochs": 3, **values})


def a_point(
    strength: float,
    kept: float | None,
    style: float | None,
    epoch: Epoch = "last",
    reach: float = 0.06,
    style_reach: float = 0.05,
    broken: bool | None = False,
) -> PointSignals:
    """A point whose intervals reach so far to either side; the base's own drawings vary by .05 in style."""
    distance = None if broken is None else (90.0 if broken else 24.0)
    return PointSignals(
        epoch,
        strength,
        _around("retention", kept, reach, 1.0, 24, 0.2),
        _around("style", style, style_reach, 0.05, 24, 0.2),
        make_signal("discrepancy", distance, control=67.0),
    )


def _around(key: str, value: float | None, reach: float, control: float, count: int, std: float) -> Any:
    if value is None:
        return make_signal(key, None, "not separable here: AUC 0.61" if key == "style" else None)
    return make_signal(
        key, value, low=value - reach, high=value + reach, control=control, count=count, std=std
    )


def an_interval(key: str, value: float, reach: float, **others: Any) -> Any:
    return make_signal(key, value, low=value - reach, high=value + reach, count=24, **others)


def signals_of(arm: Arm | None = None, *points: PointSignals, **values: Any) -> ArmSignals:
    """An arm with nothing wrong in its numbers and files, and what else is given: a number stands for a
    signal with a narrow interval.
    """
    sound = {
        **{key: make_signal(key, YES) for key in ("finished", "finite_training", "finite_losses")},
        **{key: make_signal(key, YES) for key in ("finite_pictures", "merge_ok", "file_ok")},
    }
    found = {
        key: an_interval(key, value, 0.01) if isinstance(value, float) and key not in _FACTS else value
        for key, value in values.items()
    }
    return ArmSignals(arm or an_arm(), **{"points": points, "chosen": chosen_of(points), **sound, **found})


def chosen_of(points: Sequence[PointSignals]) -> tuple[Epoch, float] | None:
    """What the rule chooses where every difference in style is shown: the most style at a price of 10 %."""
    counting = [
        point
        for point in points
        if (point.retention.value or 0.0) >= 0.9
        and (point.style.low or 0.0) > 0
        and (point.style.value or 0.0) > (point.style.control or 0.0)
    ]
    best = max(counting, key=lambda point: point.style.value or 0.0, default=None)
    return None if best is None else (best.epoch, best.strength)


_FACTS = ("chosen", "best_epoch", "num_train", "caption_dropout")


# Arms as they were measured on the pocket base: 16 DDIM steps, one sampling seed, one training seed.
def default_arm() -> ArmSignals:
    """Rank 64 at lr 5e-4: too much at strength 1, about right at a half."""
    return signals_of(
        None,
        a_point(1.0, 0.57, 0.53),
        a_point(0.5, 0.91, 0.2),
        heldout=-0.068,
        gain_ratio=0.6,
        train_gap=0.004,
        guidance_cosine=0.32,
        advantage_kept=0.15,
        norm_ratio=0.18,
        intruder_share=0.08,
    )


def diverged_arm() -> ArmSignals:
    """Rank 64 at lr 2e-3: no strength brings it back."""
    return signals_of(
        an_arm("r64-lr0.002", lr=2e-3),
        a_point(1.0, -0.1, 0.18, broken=True),
        a_point(0.5, 0.48, 0.1),
        heldout=-0.048,
        gain_ratio=0.47,
        train_gap=0.003,
        guidance_cosine=0.02,
        advantage_kept=-0.07,
        norm_ratio=0.48,
        intruder_share=0.41,
    )


def overfit_arm() -> ArmSignals:
    """Sixteen pictures, many epochs."""
    return signals_of(
        an_arm("few", rank=16, alpha=32.0, epochs=60),
        a_point(1.0, 0.67, 0.3),
        a_point(0.5, 0.91, 0.15),
        best_epoch=20,
        num_train=16,
        heldout=-0.041,
        gain_ratio=0.67,
        train_gap=an_interval("train_gap", 0.046, 0.02),
        rise=0.012,
        guidance_cosine=0.64,
        advantage_kept=0.79,
        norm_ratio=0.08,
        intruder_share=0.006,
    )


def drifted_arm() -> ArmSignals:
    """Scrambled pictures under empty captions."""
    return signals_of(
        an_arm("scrambled", rank=16, alpha=32.0),
        a_point(1.0, 0.45, 0.3),
        a_point(0.5, 1.0, 0.2),
        caption_dropout=0.3,
        heldout=-0.051,
        gain_ratio=an_interval("gain_ratio", 0.08, 0.055),
        train_gap=0.003,
        guidance_cosine=0.33,
        advantage_kept=0.74,
        norm_ratio=0.05,
        intruder_share=0.01,
    )


def short_arm() -> ArmSignals:
    """Ten steps."""
    return signals_of(
        an_arm("ten-steps", epochs=1),
        a_point(1.0, 1.0, 0.01, reach=0.02, style_reach=0.03),
        a_point(0.5, 1.0, 0.0, reach=0.02, style_reach=0.02),
        heldout=an_interval("heldout", -0.006, 0.002),
        gain_ratio=0.63,
        train_gap=0.0,
        guidance_cosine=1.0,
        advantage_kept=0.99,
        norm_ratio=0.003,
        intruder_share=0.0,
    )


def healthy_arm(name: str = "r16", **values: Any) -> ArmSignals:
    """An arm that gains style and keeps the prompts."""
    return signals_of(
        an_arm(name, rank=16, alpha=32.0, lr=2e-4),
        a_point(1.0, 0.97, 0.3),
        a_point(0.5, 0.99, 0.15),
        heldout=-0.05,
        gain_ratio=0.6,
        train_gap=0.003,
        guidance_cosine=0.5,
        intruder_share=0.02,
        **values,
    )
