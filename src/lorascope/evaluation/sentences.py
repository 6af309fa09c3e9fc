"""What numbers say in words: the effect, its 95 % interval, what varied, how many prompts and runs."""

import math

from lorascope.evaluation.front import Estimate, FrontPoint, SettingPoint
from lorascope.evaluation.scores import BASE, PairedDifference
from lorascope.evaluation.statistics import MIN_PROMPTS, prompts_needed, seeds_needed
from lorascope.evaluation.sweep_rows import Epoch

EPOCHS: dict[Epoch, str] = {"last": "last epoch", "best": "the epoch of its lowest held-out loss"}


def describe_difference(difference: PairedDifference) -> str:
    """One sentence: the effect, its 95 % interval, how many prompts, seeds and training runs."""
    d = difference
    runs = "1 training run" if BASE in (d.arm, d.against) else "1 training run each"
    basis = f"{_basis(d.num_prompts, d.num_seeds)}, {runs}"
    if d.share_below == d.share_above == 0:
        return f"{d.arm} scores the same as {d.against} for every prompt ({basis})."
    if d.low is None or d.high is None:
        shown = _amount(d.difference, d.difference)
        return (
            f"{d.arm} scores {shown} {_side(d.difference)} {d.against} ({basis}); no interval: it takes at "
            f"least {MIN_PROMPTS} prompts."
        )
    if not d.is_shown:
        unseen = amount(d.smallest_detectable or 0.0)
        shown = f"mean difference {d.difference:+.1f}, 95 % interval {d.low:+.1f} to {d.high:+.1f}"
        return (
            f"{d.arm} against {d.against}: no difference shown; under {unseen} could not have been seen "
            f"({shown}; {basis})."
        )
    near, far = sorted((abs(d.low), abs(d.high)))
    shown, nearest, farthest = (_amount(value, near) for value in (d.difference, near, far))
    side = _side(d.difference)
    return (
        f"{d.arm} scores {shown} {side} {d.against} (95 % interval {nearest} to {farthest} {side}; {basis})."
    )


def name_point(point: FrontPoint | SettingPoint) -> str:
    """An arm, or the arms of a setting, at its strength; with the epoch where that is not the last."""
    arm = point.arm if isinstance(point, FrontPoint) else " and ".join(point.arms)
    epoch = "" if point.epoch == "last" else f", {EPOCHS[point.epoch]}"
    return f"{arm} at strength {point.strength:g}{epoch}"


def describe_point(point: FrontPoint) -> str:
    """One sentence: how much of the base's prompt fidelity it keeps and how much style it gains."""
    basis = f"{_basis(point.num_prompts, point.num_seeds)}, 1 training run"
    return (
        f"{name_point(point)} keeps {_kept(point.retention)} and {_gained(point.style)} "
        f"({_both(point.retention, point.style)}{basis})."
    )


def describe_setting(setting: SettingPoint) -> str:
    """The same of a setting, with what varied: training seeds and prompts."""
    basis = _basis(setting.num_prompts, setting.num_seeds)
    return (
        f"Over {len(setting.arms)} training runs, {name_point(setting)} keep {_kept(setting.retention)} and "
        f"{_gained(setting.style, plural=True)} ({_both(setting.retention, setting.style)}{basis}; intervals "
        "over training seeds and prompts)."
    )


def _both(retention: Estimate, style: Estimate) -> str:
    """The two intervals, before a semicolon; nothing where there are none."""
    parts = []
    if retention.low is not None and retention.high is not None:
        parts.append(f"{100 * retention.low:.0f} to {100 * retention.high:.0f} %")
    if style.low is not None and style.high is not None:
        parts.append(f"{style.low:+.2f} to {style.high:+.2f}")
    if not parts:
        return f"no interval: it takes at least {MIN_PROMPTS} prompts; "
    return f"95 % interval{'s' if len(parts) > 1 else ''} {' and '.join(parts)}; "


def _kept(retention: Estimate) -> str:
    if retention.value is None:
        return f"an unknown share of the base's prompt fidelity ({retention.reason})"
    return f"{100 * retention.value:.0f} % of the base's prompt fidelity"


def _gained(style: Estimate, plural: bool = False) -> str:
    s = "" if plural else "s"
    if style.value is None:
        return f"its style was not measured ({style.reason})"
    if style.low is None or style.high is None or style.low > 0 or style.high < 0:
        side = "nearer to" if style.value >= 0 else "further from"
        return f"lie{s} {abs(style.value):.2f} {side} the style than the base"
    unseen = amount(style.smallest_detectable or 0.0, 2)
    return f"show{s} no difference in style; under {unseen} could not have been seen"


def percent_text(retention: Estimate) -> str:
    """What is kept, in percent, with its interval."""
    if retention.value is None:
        return f"not measured ({retention.reason})"
    shown = f"{100 * retention.value:.0f} %"
    if retention.low is None or retention.high is None:
        return f"{shown} (no interval)"
    return f"{shown} (95 % interval {100 * retention.low:.0f} to {100 * retention.high:.0f} %)"


def style_text(style: Estimate) -> str:
    """Style minus the base's, with its interval; 1 is where real pictures of the style stand."""
    if style.value is None:
        return f"not measured ({style.reason})"
    if style.low is None or style.high is None:
        return f"{style.value:+.2f} (no interval)"
    return f"{style.value:+.2f} (95 % interval {style.low:+.2f} to {style.high:+.2f})"


def say_needed(effect: float, estimate: Estimate, num_prompts: int, num_runs: int = 1) -> str:
    """How many prompts, or training runs where there are several, would decide a difference of this size."""
    spread = estimate.spread
    if spread is None or not effect > 0:
        return "No number of prompts would decide it."
    seeds = spread.seed_std or 0.0
    if num_runs > 1:
        runs = seeds_needed(effect, spread.prompt_std, num_prompts, seeds, spread.residual_std)
        if runs is not None:
            return f"About {_rounded(max(runs, num_runs + 1))} training runs would decide it."
    prompts = prompts_needed(effect, spread.prompt_std, seeds, num_runs, spread.residual_std)
    if prompts is None:
        return "No number of prompts that anyone draws would decide it."
    return f"About {_rounded(max(prompts, num_prompts + 1))} prompts would decide it."


def _rounded(number: int) -> str:
    """A number that is only about right: its first two digits, rounded up."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return f"{-(-number // unit) * unit:,}"


def _basis(num_prompts: int, num_seeds: int) -> str:
    return count(num_prompts, "prompt") + (f" x {num_seeds} seeds" if num_seeds > 1 else "")


def _side(value: float) -> str:
    return "below" if value < 0 else "above"


def amount(value: float, decimals: int = 1) -> str:
    """Size of a value, with more decimals where it would read 0."""
    return _amount(value, value, decimals)


def _amount(value: float, smallest: float, decimals: int = 1) -> str:
    """Size of a value, with as many decimals as keep the smallest beside it from reading 0."""
    if abs(smallest) < 10**-decimals and smallest != 0:
        decimals = min(6, -math.floor(math.log10(abs(smallest))))
    return f"{abs(value):.{decimals}f}"


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it needs it."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
