"""The verdict: which arm is kept, at which strength and of which epoch, by which rule, and why."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorascope.evaluation.choice import (
    MAX_PROMPT_LOSS,
    NO_SWEEP,
    Choice,
    Decision,
    choose_point,
    counting_points,
    is_above,
    is_in_price,
    is_shown,
    rule_text,
)
from lorascope.evaluation.contrast import GainContrast
from lorascope.evaluation.front import Estimate, Front, FrontPoint, SettingPoint, style_difference
from lorascope.evaluation.scores import ALL, BASE, PairedDifference, Scores, paired_differences, prompt_means
from lorascope.evaluation.sentences import (
    EPOCHS,
    amount,
    count,
    describe_difference,
    describe_point,
    describe_setting,
    name_point,
    say_needed,
)
from lorascope.evaluation.sweep_rows import Epoch

_MAX_LISTED = 6  # arms that do not count, a sentence each


@dataclass(frozen=True)
class HeldoutLoss:
    """Held-out denoising loss of an arm minus the base's, after the arm's last epoch."""

    arm: str
    difference: float
    low: float
    high: float
    num_pictures: int


@dataclass(frozen=True)
class Verdict:
    """Which arm to keep, and how to use it. `keep` is None where it is the base, or nothing can be told.

    `is_shown` says whether the whole interval of `retention` stays within the price, not its estimate alone.
    `tag` is what a prompt of WebUI, Forge or ComfyUI takes. `against_base` is the CLIP score of the kept arm
    at full strength, over the prompts of the score stage. `sentences` are the answer in short.
    """

    decision: Decision
    headline: str
    keep: str | None
    epoch: Epoch | None
    strength: float | None
    tag: str | None
    is_shown: bool
    retention: Estimate | None
    style: Estimate | None
    point: FrontPoint | None
    runner_up: FrontPoint | None
    max_prompt_loss: float
    rule: str
    sentences: tuple[str, ...]
    reasons: tuple[str, ...]
    undecided: tuple[str, ...]
    contrast: GainContrast | None
    against_base: PairedDifference | None
    num_prompts: int
    num_seeds: int
    num_training_seeds: int


def reach_verdict(
    scores: Scores | None,
    front: Front | None,
    probes: Iterable[Mapping[str, Any]] = (),
    failed: Sequence[str] = (),
    study: str = "study",
    max_prompt_loss: float = MAX_PROMPT_LOSS,
    settings: Mapping[str, str] | None = None,
    contrast: GainContrast | None = None,
    resamples: int = 10_000,
) -> Verdict:
    """Which arm to keep, at which strength and epoch, and why.

    The rule is `choose_point`'s. Held-out loss (`probes`: records of `metrics.jsonl`) and scores at full
    strength are told beside it. `failed` names arms that ended without pictures; arms with records but no
    pictures count as such too. `study` names the files. `contrast` says why one loses the prompts.
    """
    choice = choose_point(front, max_prompt_loss, settings, resamples)
    losses = read_heldout_losses(probes)
    point = choice.point
    tag = None if point is None else tag_of(study, point)
    full = _at_full_strength(scores, None if point is None else point.arm, resamples)
    reasons = _reasons(choice, front, max_prompt_loss, resamples)
    undecided = _undecided(choice, front, max_prompt_loss, resamples)
    runs = _runs_per_setting(scores, front, settings)
    return Verdict(
        decision=choice.decision,
        headline=headline_of(choice),
        keep=None if point is None else point.arm,
        epoch=None if point is None else point.epoch,
        strength=None if point is None else point.strength,
        tag=tag,
        is_shown=point is not None and is_shown(point, max_prompt_loss),
        retention=None if point is None else point.retention,
        style=None if point is None else point.style,
        point=point,
        runner_up=choice.runner_up,
        max_prompt_loss=max_prompt_loss,
        rule=rule_text(max_prompt_loss),
        sentences=_summary(choice, reasons, undecided, tag, full, contrast),
        reasons=(
            *_missing(scores, front, failed, losses),
            *reasons,
            *(_describe_loss(losses[arm]) for arm in _arms_of(scores, front) if arm in losses),
            *_full_strength_sentences(scores, full),
        ),
        undecided=(*undecided, *_luck(runs)),
        contrast=contrast,
        against_base=full if point is not None and full is not None and full.arm == point.arm else None,
        num_prompts=max((item.num_prompts for item in front.points), default=0) if front else 0,
        num_seeds=max((item.num_seeds for item in front.points), default=0) if front else 0,
        num_training_seeds=min(map(len, runs.values()), default=0),
    )


def headline_of(choice: Choice) -> str:
    """What to keep, in a line without a full stop."""
    if choice.point is None:
        return "Keep the base" if choice.decision == "keep_base" else "Cannot tell which arm to keep"
    return f"Keep {choice.point.arm} at strength {choice.point.strength:g}, {EPOCHS[choice.point.epoch]}"


def tag_of(study: str, point: FrontPoint) -> str:
    """What a prompt of WebUI or Forge says to use the point's exported file at its strength."""
    suffix = "-best" if point.epoch == "best" else ""
    return f"<lora:{study}-{point.arm}{suffix}:{point.strength:g}>"


def read_heldout_losses(probes: Iterable[Mapping[str, Any]]) -> dict[str, HeldoutLoss]:
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
    losses = {}
    for arm, record in last.items():
        difference, low, high = (
            _number(record.get(key)) for key in ("difference", "difference_low", "difference_high")
        )
        losses[arm] = HeldoutLoss(arm, difference, low, high, int(record.get("count", 0)))
    return losses


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _reasons(choice: Choice, front: Front | None, max_prompt_loss: float, resamples: int) -> list[str]:
    """How the rule came to its choice, a sentence each."""
    if front is None or choice.reason is not None:
        return [f"{_capital(choice.reason or NO_SWEEP)}."]
    reasons = []
    if choice.point is not None and choice.top is not None:
        reasons.append(describe_point(choice.point))
        if choice.point is not choice.top:
            reasons.append(_describe_tie(choice.point, choice.top, resamples))
        if choice.runner_up is not None:
            reasons.append(f"Runner-up: {describe_point(choice.runner_up)}")
        reasons += [describe_setting(setting) for setting in _settings_of(choice.point, front)]
        reasons += _second_witness(choice.point, front)
    counting = {point.arm for point in counting_points(front, max_prompt_loss)}
    idle = [arm for arm in _front_arms(front) if arm not in counting]
    reasons += [_describe_failing(front, arm) for arm in idle[:_MAX_LISTED]]
    if len(idle) > _MAX_LISTED:
        reasons.append(f"No point of {count(len(idle) - _MAX_LISTED, 'more arm')} counts.")
    if choice.decision == "keep_base":
        reasons.append(_nothing_counts(max_prompt_loss))
    return reasons


def _settings_of(point: FrontPoint, front: Front) -> list[SettingPoint]:
    """The point's setting over its training seeds, if it was trained with several."""
    return [
        setting
        for setting in front.settings
        if point.arm in setting.arms and (setting.epoch, setting.strength) == (point.epoch, point.strength)
    ]


def _nothing_counts(max_prompt_loss: float) -> str:
    return (
        f"No arm was shown to gain style at a cost of at most {100 * max_prompt_loss:g} % of the base's "
        "prompt fidelity, at any strength that was drawn: keep the base."
    )


def _describe_tie(point: FrontPoint, top: FrontPoint, resamples: int) -> str:
    found = style_difference(top, point, resamples)
    if top.rank > point.rank:
        why = "the lower rank is kept: its file is smaller"
    elif top.epoch != point.epoch:
        why = "the last epoch is kept"
    else:
        why = "the one that keeps more of the prompts is kept"
    shown = f"difference {found.value or 0.0:+.2f}"
    if found.low is not None and found.high is not None:
        shown += f", 95 % interval {found.low:+.2f} to {found.high:+.2f}"
    return f"{name_point(top)} has the most style, but no difference to it is shown ({shown}). So {why}."


def _second_witness(point: FrontPoint, front: Front) -> list[str]:
    """Distance to real pictures, where it speaks against the point: broken pictures lie far from them too."""
    ours, base = point.discrepancy, front.base_discrepancy
    if ours is None or base is None or ours.value <= base.value:
        return []
    return [
        "A second measure speaks against it: the squared MMD of its pictures to real ones is "
        f"{ours.value:.3g}, the base's {base.value:.3g}. Look at its pictures."
    ]


def _front_arms(front: Front) -> list[str]:
    return list(dict.fromkeys(point.arm for point in front.points))


def _describe_failing(front: Front, arm: str) -> str:
    """Why an arm does not count at any strength, by its point that comes nearest."""
    gaining = [point for point in front.of(arm) if front.gains_style(point)]
    if gaining:
        nearest = max(gaining, key=lambda point: point.retention.value or 0.0)
        return (
            f"{arm} costs too much where it gains style: at the least, {name_point(nearest)} keeps "
            f"{100 * (nearest.retention.value or 0.0):.0f} % of the base's prompt fidelity."
        )
    most = max(front.of(arm), key=lambda point: point.style.value or 0.0)
    return f"{arm} was not shown to gain style at any strength: {describe_point(most)}"


def _undecided(choice: Choice, front: Front | None, max_prompt_loss: float, resamples: int) -> list[str]:
    """What the prompts and runs at hand cannot tell, with the number that could."""
    if front is None or choice.reason is not None:
        return [f"Which arm to keep: {choice.reason or NO_SWEEP}."]
    if choice.point is None:
        return _undecided_base(front, max_prompt_loss)
    point, price = choice.point, f"{100 * max_prompt_loss:g} %"
    sentences = []
    if not is_shown(point, max_prompt_loss) and point.retention.low is not None:
        room = (point.retention.value or 0.0) - (1 - max_prompt_loss)
        sentences.append(
            f"Whether {name_point(point)} costs at most {price} of the base's prompt fidelity: the interval "
            f"of what it keeps reaches down to {100 * point.retention.low:.1f} %. "
            + say_needed(room, point.retention, point.num_prompts)
        )
    rivals = [item for item in choice.tied if item.arm != point.arm]
    if rivals:
        first = rivals[0]
        found = style_difference(first, point, resamples)
        more = f" and {count(len(rivals) - 1, 'more point')}" if len(rivals) > 1 else ""
        sentences.append(
            f"No difference in style shown between {name_point(point)} and {name_point(first)}{more}; under "
            f"{amount(found.smallest_detectable or 0.0, 2)} could not have been seen."
        )
    for setting in _settings_of(point, front):
        low, kept = setting.retention.low, setting.retention.value
        if kept is None or low is None or low >= 1 - max_prompt_loss:
            continue
        sentences.append(
            f"Whether another training run of this setting costs at most {price}: over "
            f"{count(len(setting.arms), 'run')} the interval reaches down to {100 * low:.1f} %. "
            + say_needed(
                abs(kept - (1 - max_prompt_loss)), setting.retention, setting.num_prompts, len(setting.arms)
            )
        )
    return sentences


def _undecided_base(front: Front, max_prompt_loss: float) -> list[str]:
    """What might still count with more prompts, where nothing does."""
    sentences = []
    kept = [
        point
        for point in front.points
        if is_in_price(point, max_prompt_loss) and not front.gains_style(point)
    ]
    if kept:
        most = max(kept, key=lambda point: point.style.value or 0.0)
        value, null = most.style.value or 0.0, front.style_null or 0.0
        if is_above(most.style):
            text = f"it lies {value:+.2f} from the base, whose own drawings vary by {null:.2f}."
            if value > 0 and null > 0:
                # What the base's drawings vary by falls with the root of their number.
                times = (null / value) ** 2
                text += f" With {times:.1f} times as many prompts that could be told."
        else:
            unseen = amount(most.style.smallest_detectable or 0.0, 2)
            text = f"under {unseen} could not have been seen."
            if value > 0:
                text += f" {say_needed(value, most.style, most.num_prompts)}"
        sentences.append(f"Whether {name_point(most)} gains style: {text}")
    costly = [point for point in front.points if front.gains_style(point)]
    if costly:
        nearest = max(costly, key=lambda point: point.retention.value or 0.0)
        high = nearest.retention.high
        if high is not None and high >= 1 - max_prompt_loss:
            missing = 1 - max_prompt_loss - (nearest.retention.value or 0.0)
            sentences.append(
                f"Whether {name_point(nearest)} costs more than {100 * max_prompt_loss:g} %: the interval of "
                f"what it keeps reaches up to {100 * high:.1f} %. "
                + say_needed(missing, nearest.retention, nearest.num_prompts)
            )
    return sentences


def _summary(
    choice: Choice,
    reasons: Sequence[str],
    undecided: Sequence[str],
    tag: str | None,
    at_full_strength: PairedDifference | None,
    contrast: GainContrast | None,
) -> tuple[str, ...]:
    """The answer in a few sentences."""
    failing = () if contrast is None else (contrast.sentence,)
    full = [f"At full strength {describe_difference(at_full_strength)}"] if at_full_strength else []
    if choice.point is not None:
        sentences = [reasons[0], f"In a prompt: {tag}."]
        if failing:
            return (*sentences, *failing)
        if choice.runner_up is not None:
            return (*sentences, f"Runner-up: {describe_point(choice.runner_up)}")
        return (*sentences, *undecided[:1])
    return (reasons[-1], *failing, *full)


def _at_full_strength(scores: Scores | None, arm: str | None, resamples: int) -> PairedDifference | None:
    """The kept arm, or the one with the highest mean, against the base in the pictures of the score stage."""
    if scores is None or not scores.of(BASE) or not scores.arms:
        return None
    if arm not in scores.arms:
        means = {name: np.mean(list(prompt_means(scores.of(name)).values())) for name in scores.arms}
        arm = max(scores.arms, key=lambda name: (means[name], name))
    assert arm is not None
    return paired_differences(scores, arm, resamples=resamples)


def _full_strength_sentences(scores: Scores | None, difference: PairedDifference | None) -> list[str]:
    if scores is None:
        return []
    if not scores.arms:
        return ["No arm has pictures of the score stage: there is nothing to compare."]
    if difference is None:
        return ["The base has no pictures: the difference to it at full strength was not measured."]
    return [f"At full strength {describe_difference(difference)}"]


def _arms_of(scores: Scores | None, front: Front | None) -> list[str]:
    """Arms that were scored or drawn at several strengths."""
    return list(dict.fromkeys((*(scores.arms if scores else ()), *(_front_arms(front) if front else ()))))


def _missing(
    scores: Scores | None, front: Front | None, failed: Sequence[str], losses: Mapping[str, HeldoutLoss]
) -> list[str]:
    """Arms that could not be compared."""
    arms = _arms_of(scores, front)
    if scores is None and front is None:
        return []
    sentences = [
        f"{arm} failed: it has no pictures, so it was not compared."
        for arm in dict.fromkeys((*failed, *losses))
        if arm not in arms
    ]
    if front is not None:
        undrawn = [arm for arm in arms if arm not in _front_arms(front)]
        sentences += [f"{arm} was not drawn at several strengths, so it was not compared." for arm in undrawn]
    return sentences


def _describe_loss(loss: HeldoutLoss) -> str:
    if not all(math.isfinite(value) for value in (loss.difference, loss.low, loss.high)):
        return f"{loss.arm}: its held-out loss is not finite."
    side = "below" if loss.difference < 0 else "above"
    shown = "" if loss.low > 0 or loss.high < 0 else "no difference shown; "
    return (
        f"{loss.arm}: its held-out loss is {abs(loss.difference):.2g} {side} the base's ({shown}95 % "
        f"interval {loss.low:+.2g} to {loss.high:+.2g}; {loss.num_pictures} pictures, 1 training run)."
    )


def _runs_per_setting(
    scores: Scores | None, front: Front | None, settings: Mapping[str, str] | None
) -> dict[Any, set[Any]]:
    """The training seeds of each setting."""
    rows: list[Any] = [scores.of(arm)[0] for arm in scores.arms] if scores else []
    rows += front.points if front else []
    runs: dict[Any, set[Any]] = {}
    for row in rows:
        own = (row.rank, row.alpha, row.lr)
        setting = (row.rank, settings.get(row.arm, own) if settings else own)
        runs.setdefault(setting, set()).add(row.training_seed)
    return runs


def _luck(runs: Mapping[Any, set[Any]]) -> list[str]:
    """What a single training run cannot tell."""
    if not runs or min(map(len, runs.values())) > 1:
        return []
    if len(runs) > 1:
        what = "rank" if len({setting[0] for setting in runs}) == len(runs) else "setting"
        return [f"One training run per {what} cannot separate {what} from luck."]
    return ["One training run cannot say how another seed of the same setting would score."]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
