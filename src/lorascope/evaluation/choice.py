"""The choice of an arm, a strength and an epoch: the most style at a price in prompt fidelity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lorascope.evaluation.front import Estimate, Front, FrontPoint, style_difference
from lorascope.evaluation.sweep_rows import Point

Decision = Literal["keep", "keep_base", "cannot_tell"]
MAX_PROMPT_LOSS = 0.1
NO_SWEEP = "not measured: run `lorascope diagnose RUN`"


@dataclass(frozen=True)
class Choice:
    """What the rule chose. `tied` are the points whose style is not shown to lie below the most, it included.

    `reason` says why nothing can be told, and is None otherwise.
    """

    decision: Decision
    point: FrontPoint | None = None
    top: FrontPoint | None = None
    tied: tuple[FrontPoint, ...] = ()
    runner_up: FrontPoint | None = None
    reason: str | None = None


def rule_text(max_prompt_loss: float = MAX_PROMPT_LOSS) -> str:
    """The rule in words."""
    price = f"{100 * max_prompt_loss:g} %"
    return (
        "Each arm was drawn at several strengths, and with the adapter of its lowest held-out loss too where "
        "that was not the last. A point counts if it gains style, with the whole 95 % interval of the paired "
        "difference from the base above 0 and more than the base's own drawings vary by, and if it costs at "
        f"most {price} of the base's prompt fidelity: of the CLIP similarity by which the base's pictures "
        "fit their own prompts better than others. Of these points the one with the most style is kept. "
        "Where no style difference to it is shown, the lowest rank of those alike is kept, then the last "
        "epoch, then what keeps the most of the prompts. If no point counts, the base is kept."
    )


def choose_point(
    front: Front | None,
    max_prompt_loss: float = MAX_PROMPT_LOSS,
    settings: Mapping[str, str] | None = None,
    resamples: int = 10_000,
) -> Choice:
    """The point that `rule_text` describes; None for a `front` says that no sweep was drawn.

    The runner-up is the point with the most style of those that count in another setting, else in another
    arm; `settings` is as for `trace_front`.
    """
    if reason := _why_not(front):
        return Choice("cannot_tell", reason=reason)
    assert front is not None
    counting = counting_points(front, max_prompt_loss)
    if not counting:
        return Choice("keep_base")
    ordered = sorted(counting, key=lambda point: (-(point.style.value or 0.0), _preference(point)))
    top = ordered[0]
    tied = tuple(
        point for point in ordered if point is top or not is_above(style_difference(top, point, resamples))
    )
    chosen = min(tied, key=_preference)

    def setting_of(point: FrontPoint) -> Any:
        return settings[point.arm] if settings else (point.rank, point.alpha, point.lr)

    others = [point for point in ordered if point.arm != chosen.arm]
    others.sort(key=lambda point: setting_of(point) == setting_of(chosen))
    return Choice("keep", chosen, top, tied, others[0] if others else None)


def choose_at_prices(
    front: Front | None,
    prices: Sequence[float],
    settings: Mapping[str, str] | None = None,
    resamples: int = 10_000,
) -> list[Choice]:
    """What `choose_point` chooses at each price; prices at which the same points count share a choice."""
    chosen: dict[tuple[Point, ...], Choice] = {}
    choices = []
    for price in prices:
        counting = () if front is None else tuple(item.point for item in counting_points(front, price))
        if counting not in chosen:
            chosen[counting] = choose_point(front, price, settings, resamples)
        choices.append(chosen[counting])
    return choices


def choose_by_arm(
    front: Front | None,
    choice: Choice,
    max_prompt_loss: float = MAX_PROMPT_LOSS,
    settings: Mapping[str, str] | None = None,
    resamples: int = 10_000,
) -> dict[str, FrontPoint]:
    """The point to use each arm at, of every arm that has one that counts: what the same rule chooses among
    its own points, and of the arm that is kept what `choice`, the study's, has.
    """
    if front is None:
        return {}
    chosen = {}
    for arm in dict.fromkeys(point.arm for point in front.points):
        alone = replace(front, points=front.of(arm))
        point = choose_point(alone, max_prompt_loss, settings, resamples).point
        if point is not None:
            chosen[arm] = point
    if choice.point is not None:
        chosen[choice.point.arm] = choice.point
    return chosen


def _why_not(front: Front | None) -> str | None:
    """Why nothing can be told, if so."""
    if front is None:
        return NO_SWEEP
    if not front.points:
        return "no arm was drawn at several strengths: run `lorascope diagnose RUN`"
    if reason := front.fidelity_reason or front.style_reason:
        return reason
    if all(point.style.low is None or point.retention.low is None for point in front.points):
        first = front.points[0]
        return first.retention.reason or first.style.reason
    return None


def counting_points(front: Front, max_prompt_loss: float) -> list[FrontPoint]:
    """The points that gain style at the price."""
    return [
        point for point in front.points if front.gains_style(point) and is_in_price(point, max_prompt_loss)
    ]


def is_in_price(point: FrontPoint, max_prompt_loss: float) -> bool:
    """Whether the estimate of what a point keeps is within the price."""
    kept = point.retention.value
    return kept is not None and kept >= 1 - max_prompt_loss - 1e-9


def is_shown(point: FrontPoint, max_prompt_loss: float) -> bool:
    """Whether the whole interval of what a point keeps is within the price."""
    low = point.retention.low
    return low is not None and low >= 1 - max_prompt_loss - 1e-9


def is_above(estimate: Estimate) -> bool:
    """Whether the whole interval lies above 0."""
    return estimate.low is not None and estimate.low > 0


def _preference(point: FrontPoint) -> tuple[Any, ...]:
    return point.rank, point.epoch != "last", -(point.retention.value or 0.0), point.arm
