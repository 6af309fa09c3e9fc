"""The verdict: which arm is kept, by which rule, and the sentences that say why."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorascope.evaluation.scores import ALL, BASE, PairedDifference, Scores, paired_differences, prompt_means
from lorascope.evaluation.statistics import MIN_PROMPTS

RULE = (
    "An arm qualifies if it learned the style: after its last epoch its held-out denoising loss is "
    "below the base's, with the whole 95 % interval of the paired difference below 0. Of the "
    "qualifying arms the one with the highest mean CLIP similarity over all prompts is kept; but where "
    "the 95 % interval of its paired difference to a qualifying arm of lower rank includes 0, the "
    "lowest such rank is kept: no difference in prompt fidelity was shown, and its file is smaller. If "
    "no arm qualifies, only the base is kept."
)
RULE_WITHOUT_STYLE = (
    "Held-out loss was not measured, so the rule rests on CLIP similarity alone: of all arms the one "
    "with the highest mean over all prompts is kept; but where the 95 % interval of its paired "
    "difference to an arm of lower rank includes 0, that rank is kept."
)


@dataclass(frozen=True)
class Style:
    """Held-out denoising loss of an arm minus the base's, after the arm's last epoch."""

    arm: str
    difference: float
    low: float
    high: float
    num_pictures: int

    @property
    def is_learned(self) -> bool:
        """Whether the loss fell, with the whole interval below 0; never for a loss that is not finite."""
        return (
            math.isfinite(self.difference)
            and math.isfinite(self.low)
            and self.difference < 0
            and self.high < 0
        )


@dataclass(frozen=True)
class Verdict:
    """Which arm to keep. `keep` is None where nothing but the base is worth keeping."""

    headline: str
    keep: str | None
    runner_up: str | None
    rule: str
    reasons: tuple[str, ...]
    undecided: tuple[str, ...]
    against_base: PairedDifference | None
    against_runner_up: PairedDifference | None
    style_measured: bool
    num_prompts: int
    num_seeds: int
    num_training_seeds: int


def choose_arm(
    scores: Scores, probes: Iterable[Mapping[str, Any]], failed: Sequence[str] = (), resamples: int = 10_000
) -> Verdict:
    """Which arm to keep, and why.

    An arm qualifies if it learned the style: after its last epoch its held-out denoising loss (records of
    `metrics.jsonl`, split heldout, band `all`, conditional) is below the base's with the whole 95 % interval
    below 0. Of the qualifying arms the one with the highest mean CLIP similarity over all prompts is kept;
    but where the interval of its paired difference to a qualifying arm of lower rank includes 0, the lowest
    such rank is kept. If none qualifies, nothing is kept. Without any such record the rule falls back to CLIP
    similarity alone and says so. `failed` names arms that ended without pictures; arms with records but no
    pictures count as such too.
    """
    styles = read_styles(probes)
    arms = scores.arms
    missing = [arm for arm in dict.fromkeys((*failed, *styles)) if arm not in arms]
    measured = any(arm in styles for arm in arms) or (not arms and bool(styles))
    reasons = [f"{arm} failed: it has no pictures, so it was not compared." for arm in missing]
    if measured:
        reasons += [
            _describe_style(styles[arm]) if arm in styles else f"{arm}: held-out loss not measured."
            for arm in arms
        ]
    qualifying = [arm for arm in arms if not measured or (arm in styles and styles[arm].is_learned)]
    settings = {arm: scores.of(arm)[0] for arm in arms}
    means = {arm: float(np.mean(list(prompt_means(scores.of(arm)).values()))) for arm in arms}
    by_mean = sorted(qualifying, key=lambda arm: (-means[arm], settings[arm].rank or 0))

    def compare(arm: str, against: str) -> PairedDifference:
        return paired_differences(scores, arm, against, resamples=resamples)

    keep = runner_up = None
    if by_mean:
        top = keep = by_mean[0]
        lower = [
            arm
            for arm in by_mean[1:]
            if (settings[arm].rank or 0) < (settings[top].rank or 0) and not compare(top, arm).is_shown
        ]
        if lower:
            keep = min(lower, key=lambda arm: (settings[arm].rank or 0, -means[arm]))
            runner_up = top
            reasons.append(
                f"{top} has the highest mean CLIP similarity, {means[top]:.1f}; {keep}, of lower rank, "
                f"has {means[keep]:.1f}."
            )
            reasons.append(
                f"{describe_difference(compare(top, keep))} So the lower rank is kept: its file is smaller."
            )
        else:
            runner_up = by_mean[1] if len(by_mean) > 1 else None
            whom = "qualifying arms" if measured else "arms"
            only = (
                f"is the only one of the {whom}"
                if len(by_mean) == 1
                else f"has the highest mean CLIP similarity of the {whom}"
            )
            reasons.append(
                f"{keep} {only}, {means[keep]:.1f}."
                if len(by_mean) > 1
                else f"{keep} {only}; its mean is {means[keep]:.1f}."
            )
            if runner_up is not None:
                reasons.append(describe_difference(compare(keep, runner_up)))
    against_base = compare(keep, BASE) if keep and scores.of(BASE) else None
    if against_base is not None:
        reasons.append(describe_difference(against_base))
    elif keep:
        reasons.append("The base has no pictures: the difference to it was not measured.")
    if not arms:
        reasons.append("No arm has pictures: there is nothing to compare.")
    elif not qualifying:
        reasons.append(
            "No arm was shown to have learned the style, so there is nothing to keep: keep the base."
        )

    rows = [row for row in scores.rows if row.kind == "arm"]
    rivals = [compare(keep, arm) for arm in qualifying if arm != keep] if keep else []
    return Verdict(
        headline=f"Keep {keep}" if keep else "Keep the base",
        keep=keep,
        runner_up=runner_up,
        rule=RULE if measured or not arms else RULE_WITHOUT_STYLE,
        reasons=tuple(reasons),
        undecided=tuple(_undecided(scores, rivals, against_base, measured)),
        against_base=against_base,
        against_runner_up=compare(keep, runner_up) if keep and runner_up else None,
        style_measured=measured,
        num_prompts=len({(row.category, row.prompt_index) for row in rows}),
        num_seeds=len({row.seed for row in rows}),
        num_training_seeds=min(_runs_per_setting(scores).values(), default=0),
    )


def read_styles(probes: Iterable[Mapping[str, Any]]) -> dict[str, Style]:
    """Each arm's last held-out, conditional, all-bands record of `metrics.jsonl`; other records are passed
    over.
    """
    last: dict[str, Mapping[str, Any]] = {}
    for record in probes:
        wanted = {"kind": "probe", "split": "heldout", "band": ALL, "conditional": True}
        if all(record.get(key) == value for key, value in wanted.items()) and record["arm"] != BASE:
            arm = str(record["arm"])
            if arm not in last or (record["step"], record["epoch"]) >= (
                last[arm]["step"],
                last[arm]["epoch"],
            ):
                last[arm] = record
    styles = {}
    for arm, record in last.items():
        difference, low, high = (
            _number(record.get(key)) for key in ("difference", "difference_low", "difference_high")
        )
        styles[arm] = Style(arm, difference, low, high, int(record.get("count", 0)))
    return styles


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _describe_style(style: Style) -> str:
    if not all(math.isfinite(value) for value in (style.difference, style.low, style.high)):
        return f"{style.arm} did not learn the style: its held-out loss is not finite."
    what = "learned the style" if style.is_learned else "was not shown to have learned the style"
    side = "below" if style.difference < 0 else "above"
    interval = (
        f"95 % interval {style.low:+.2g} to {style.high:+.2g}; {style.num_pictures} pictures, 1 training run"
    )
    return (
        f"{style.arm} {what}: its held-out loss is {abs(style.difference):.2g} {side} the base's "
        f"({interval})."
    )


def _runs_per_setting(scores: Scores) -> dict[tuple[Any, ...], int]:
    """Number of training runs for each (rank, alpha, lr)."""
    runs: dict[tuple[Any, ...], set[Any]] = {}
    for arm in scores.arms:
        row = scores.of(arm)[0]
        runs.setdefault((row.rank, row.alpha, row.lr), set()).add(row.training_seed)
    return {setting: len(seeds) for setting, seeds in runs.items()}


def _undecided(
    scores: Scores,
    differences: Sequence[PairedDifference],
    against_base: PairedDifference | None,
    measured: bool,
) -> list[str]:
    sentences = []
    if scores.arms and not measured:
        sentences.append("Whether the arms learned the style: held-out loss was not measured.")
    for difference in (*differences, *([against_base] if against_base else [])):
        pair = f"between {difference.arm} and {difference.against}"
        if difference.low is None:
            sentences.append(
                f"Whether there is a difference {pair}: no interval from "
                f"{_count(difference.num_prompts, 'prompt')}."
            )
        elif not difference.is_shown:
            sentences.append(
                f"No difference shown {pair}; under {_unseen(difference)} could not have been seen."
            )
    runs = _runs_per_setting(scores)
    if len(runs) > 1 and min(runs.values()) == 1:
        what = "rank" if len({setting[0] for setting in runs}) == len(runs) else "setting"
        sentences.append(f"One training run per {what} cannot separate {what} from luck.")
    elif runs and min(runs.values()) == 1:
        sentences.append("One training run cannot say how another seed of the same setting would score.")
    return sentences


def describe_difference(difference: PairedDifference) -> str:
    """One sentence: the effect, its 95 % interval, how many prompts, seeds and training runs."""
    d = difference
    runs = "1 training run" if BASE in (d.arm, d.against) else "1 training run each"
    basis = (
        _count(d.num_prompts, "prompt") + (f" x {d.num_seeds} seeds" if d.num_seeds > 1 else "") + f", {runs}"
    )
    if d.share_below == d.share_above == 0:
        return f"{d.arm} scores the same as {d.against} for every prompt ({basis})."
    if d.low is None or d.high is None:
        shown = _amount(d.difference, d.difference)
        return (
            f"{d.arm} scores {shown} {_side(d.difference)} {d.against} ({basis}); no interval: it takes at "
            f"least {MIN_PROMPTS} prompts."
        )
    if not d.is_shown:
        shown = f"mean difference {d.difference:+.1f}, 95 % interval {d.low:+.1f} to {d.high:+.1f}"
        return (
            f"{d.arm} against {d.against}: no difference shown; under {_unseen(d)} could not have been seen "
            f"({shown}; {basis})."
        )
    near, far = sorted((abs(d.low), abs(d.high)))
    amount, nearest, farthest = (_amount(value, near) for value in (d.difference, near, far))
    side = _side(d.difference)
    return (
        f"{d.arm} scores {amount} {side} {d.against} (95 % interval {nearest} to {farthest} {side}; {basis})."
    )


def _side(value: float) -> str:
    return "below" if value < 0 else "above"


def _amount(value: float, smallest: float) -> str:
    """Size of a value with one decimal, or with as many as keep the smallest beside it from reading 0.0."""
    decimals = 1 if abs(smallest) >= 0.1 or smallest == 0 else min(6, -math.floor(math.log10(abs(smallest))))
    return f"{abs(value):.{decimals}f}"


def _unseen(difference: PairedDifference) -> str:
    return _amount(difference.smallest_detectable or 0.0, difference.smallest_detectable or 0.0)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
