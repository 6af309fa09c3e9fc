"""What interventions on a trained adapter change, as signals and in sentences: each is paired with the arm's
own pictures of the same prompts.

The base's unconditional branch and scaled-down intruders are told by what they bring back, as a share of the
base's prompt fidelity of these prompts; a cut to a lower rank by what it keeps.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorascope.diagnosis.signals import ArmSignals, Fronts, Signal, make_signal, of_estimate
from lorascope.evaluation.front import FrontPoint
from lorascope.evaluation.statistics import MIN_PROMPTS, Resamples
from lorascope.evaluation.sweep_rows import SCALED_INTRUDERS, rank_of_cut

Values = NDArray[np.float64]
_UNPAIRED = "no prompt was drawn both ways"
_UNDRAWN = "strength 1 was not drawn"


def intervention_signals(fronts: Fronts | None, arm: str) -> dict[str, Signal]:
    """The signals of an arm's interventions at strength 1, by the fields of `ArmSignals`."""
    if fronts is None:
        return {}
    own = fronts.own.full_strength(arm)
    found: dict[str, Signal] = {}
    if fronts.base_unconditional is not None:
        swapped = fronts.base_unconditional.full_strength(arm)
        if swapped is not None:
            found["base_unconditional"] = of_estimate(
                "base_unconditional", swapped.retention, swapped.num_prompts, 1.0
            )
            found["unconditional_recovery"] = _recovery("unconditional_recovery", own, swapped)
    # Of several cuts, which full fine-tuning has, the lowest rank's comes last and stands.
    for weights, front in sorted(fronts.edited.items(), key=lambda item: -(rank_of_cut(item[0]) or 0)):
        edited, rank = front.full_strength(arm), rank_of_cut(weights)
        if edited is not None and weights == SCALED_INTRUDERS:
            found["intruder_recovery"] = _recovery("intruder_recovery", own, edited)
        elif edited is not None and rank is not None:
            found |= _of_cut(rank, own, edited)
    return found


@dataclass(frozen=True)
class _Pairs:
    """Values of the prompts that an arm has with and without an intervention: [n] each.

    CLIP scores and styles are minus the base's, `whole` is what the base's CLIP scores lie above the floor.
    """

    before: Values
    after: Values
    whole: Values
    styles: Values  # [m, 2], before and after, of the prompts whose style was measured

    @property
    def own(self) -> float:
        """Retention without the intervention."""
        return 1 + float(self.before.mean() / self.whole.mean())


def _pairs(own: FrontPoint, other: FrontPoint) -> _Pairs | None:
    """None where the two share no prompt that the base was scored on."""
    theirs = {(item.category, item.prompt_index): item for item in other.per_prompt}
    both = [
        (ours, theirs[key])
        for ours in own.per_prompt
        if (key := (ours.category, ours.prompt_index)) in theirs
    ]
    rows = [
        (ours.difference, item.difference, ours.whole)
        for ours, item in both
        if None not in (ours.difference, item.difference, ours.whole)
    ]
    if not rows:
        return None
    styles = [(ours.style, item.style) for ours, item in both if None not in (ours.style, item.style)]
    before, after, whole = np.array(rows, np.float64).T
    return _Pairs(before, after, whole, np.array(styles, np.float64).reshape(-1, 2))


def _recovery(key: str, own: FrontPoint | None, other: FrontPoint) -> Signal:
    """Retention with the intervention minus that without it; the control is what was lost without it."""
    pairs = None if own is None else _pairs(own, other)
    if reason := _why_not(own, other, pairs):
        return make_signal(key, None, reason)
    assert pairs is not None
    gained = pairs.after - pairs.before
    value = float(gained.mean() / pairs.whole.mean())
    low, high = _interval(gained, pairs.whole)
    return make_signal(
        key, value, _too_few(len(gained)), low=low, high=high, control=1 - pairs.own, count=len(gained)
    )


def _of_cut(rank: int, own: FrontPoint | None, cut: FrontPoint) -> dict[str, Signal]:
    """Retention and style of an adapter cut to a rank; the controls are those of the adapter as it was.

    The interval is that of the paired difference from the control: one that holds the control shows no
    difference.
    """
    pairs = None if own is None else _pairs(own, cut)
    if reason := _why_not(own, cut, pairs):
        return {key: make_signal(key, None, reason) for key in ("cut_retention", "cut_style")}
    assert pairs is not None
    before, after = pairs.styles.T
    units = np.ones(len(before))
    kept = _beside("cut_retention", rank, pairs.own, pairs.after - pairs.before, pairs.whole)
    if not len(before):
        return {"cut_retention": kept, "cut_style": make_signal("cut_style", None, cut.style.reason)}
    style = _beside("cut_style", rank, float(before.mean()), after - before, units)
    return {"cut_retention": kept, "cut_style": style}


def _beside(key: str, rank: int, control: float, differences: Values, units: Values) -> Signal:
    """A signal whose value lies off its control by differences, counted in the mean of `units`."""
    low, high = _interval(differences, units)
    few = _too_few(len(differences))
    return make_signal(
        key,
        control + float(differences.mean() / units.mean()),
        f"cut to rank {rank}" + (f"; {few}" if few else ""),
        low=None if low is None else control + low,
        high=None if high is None else control + high,
        control=control,
        count=len(differences),
    )


def _why_not(own: FrontPoint | None, other: FrontPoint, pairs: _Pairs | None) -> str | None:
    """Why nothing can be compared, if so."""
    if own is None:
        return _UNDRAWN
    if other.retention.value is None:
        return other.retention.reason
    return _UNPAIRED if pairs is None else None


def _interval(values: Values, units: Values) -> tuple[float | None, float | None]:
    """The interval of the mean of values over that of units, both of the same bootstrap samples."""
    if len(values) < MIN_PROMPTS:
        return None, None
    draws = Resamples(len(values))
    return draws.interval(draws.means(values) / draws.means(units)) or (None, None)


def _too_few(count: int) -> str | None:
    return None if count >= MIN_PROMPTS else f"{count} of them: an interval takes at least {MIN_PROMPTS}"


def tell_interventions(signals: ArmSignals) -> Iterator[str]:
    """A sentence for each intervention that was measured: what it changed on the same prompts."""
    for what, signal in (
        ("the base's unconditional prediction", signals.unconditional_recovery),
        ("intruder directions at three quarters of their size", signals.intruder_recovery),
    ):
        if signal.value is not None:
            own = "" if signal.control is None else f"; kept without that: {_percent(1 - signal.control)}"
            yield (
                f"With {what}: prompt fidelity {100 * signal.value:+.0f} % of the base's"
                f"{_reach(signal, 100)}{own}."
            )
    kept, style = signals.cut_retention, signals.cut_style
    if kept.value is not None:
        said = (
            f"{_percent(kept.value)} of the prompts kept{_reach(kept, 100)}, uncut {_percent(kept.control)}"
        )
        if style.value is not None:
            said += f"; style {style.value:.2f}{_reach(style)}, uncut {style.control or 0.0:.2f}"
        without = ", its norms and biases left out" if signals.arm.kind == "full" else ""
        yield f"Cut to the study's lowest rank{without}: {said}."


def tell_lower_rank(signals: ArmSignals, max_prompt_loss: float) -> str | None:
    """A remark where the cut adapter is shown to keep the prompts as the uncut one does, but for at most
    `max_prompt_loss`, and no loss of style is shown.
    """
    kept, style = signals.cut_retention, signals.cut_style
    if kept.low is None or kept.control is None or style.low is None or style.high is None:
        return None
    if (
        signals.arm.kind == "full"
        or kept.low < kept.control - max_prompt_loss
        or style.high < (style.control or 0.0)
        or style.low <= 0
    ):
        return None
    return (
        "A lower rank may do: cut to the study's lowest, the adapter keeps as much of the prompts, and no "
        "loss of style is shown."
    )


def _percent(value: float | None) -> str:
    return f"{100 * (value or 0.0):.0f} %"


def _reach(signal: Signal, factor: float = 1.0) -> str:
    """The interval in brackets; empty where there is none."""
    if signal.low is None or signal.high is None:
        return ""
    places = 0 if factor > 1 else 2
    return f" (95 % interval {factor * signal.low:.{places}f} to {factor * signal.high:.{places}f})"
