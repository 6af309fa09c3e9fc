"""The reference study's collapse of rank 64 beside the same two ranks of this study, and whether strength
explains it.
"""

import math
from collections.abc import Sequence

from lorascope.arms import Arm
from lorascope.evaluation.scores import PairedDifference, paired_differences
from lorascope.evaluation.sentences import describe_difference
from lorascope.report.evidence import Facts
from lorascope.report.tables import REFERENCE, cell

_CATEGORIES = ("normal", "abstract")
_LOW, _HIGH = 16, 64  # the reference study's ranks, both at alpha = 2 x rank and one learning rate
_SCALE = 2.0
_LR = 5e-4


def collapse_text(facts: Facts) -> str | None:
    """A paragraph for a study with both ranks at the reference study's alpha and one learning rate; None for
    another, and before it was scored.
    """
    scores = facts.scores
    if scores is None or not set(_CATEGORIES) <= set(scores.categories):
        return None
    pairs = _pairs_of(facts)
    if not pairs:
        return None
    low, high = ([facts.settings[pair[place]] for pair in pairs] for place in (0, 1))
    contrasts = [(strong.name, weak.name) for weak, strong in zip(low, high, strict=True)]
    sentences = [
        f"The reference study trained rank {_LOW} and rank {_HIGH} at alpha = 2 x rank and lr {_LR:g}, and "
        f"rank {_HIGH} collapsed: {_published('normal', '.1f')} on normal prompts, "
        f"{_published('abstract', '.1f')} on abstract ones, last losses {_published('loss', '.4f')}.",
        f"Here, at alpha = 2 x rank and lr {low[0].lr:g}, {_ours(facts, low, high)}.",
        "Base and scorer may be others: compare the distance between the ranks, not the height.",
        _said(facts, contrasts),
        f"At one alpha / rank and lr, rank {_HIGH} has twice the gain too (lr x scale x √rank): these arms "
        "alone cannot tell rank from strength.",
    ]
    return " ".join([*sentences, _told_apart(facts, low[0])])


def _pairs_of(facts: Facts) -> list[tuple[str, str]]:
    """Scored arms of both ranks that differ in nothing else, one pair a training seed; of several learning
    rates those at the one nearest to the reference study's.
    """
    scored = facts.scores.arms if facts.scores else ()
    arms = [facts.settings[name] for name in facts.arms if name in scored]

    def others(arm: Arm) -> str:
        """All choices but the rank, and what follows from it."""
        return arm.model_dump_json(exclude={"name", "rank", "alpha", "match_gain"})

    fitting = [arm for arm in arms if arm.scaling == "alpha/r" and arm.scale == _SCALE]
    by_choices = {others(arm): arm.name for arm in fitting if arm.rank == _HIGH}
    found = [
        (arm, by_choices[others(arm)]) for arm in fitting if arm.rank == _LOW and others(arm) in by_choices
    ]
    if not found:
        return []
    first = min((arm for arm, _ in found), key=lambda arm: abs(math.log(arm.lr / _LR)))
    return [(arm.name, high) for arm, high in found if arm.but_seed == first.but_seed]


def _published(key: str, form: str) -> str:
    low, high = REFERENCE["reference r16"][key], REFERENCE["reference r64"][key]
    return f"{cell(low, form).text} and {cell(high, form).text}"


def _ours(facts: Facts, low: Sequence[Arm], high: Sequence[Arm]) -> str:
    """Scores and last losses of both, over their training seeds."""

    def mean(arms: Sequence[Arm], category: str) -> str:
        means = [facts.summary[arm.name, category].mean for arm in arms]
        return cell(sum(means) / len(means), ".1f").text

    def loss(arms: Sequence[Arm]) -> str:
        losses = [facts.training[arm.name].get("final_loss") for arm in arms]
        known = [float(value) for value in losses if value is not None]
        return cell(sum(known) / len(known) if known else None, ".4f").text

    seeds = f" over {len(low)} training seeds" if len(low) > 1 else ""
    names = [facts.settings_in_words([arm.name for arm in arms]) for arms in (low, high)]
    scores = ", ".join(
        f"{mean(low, category)} and {mean(high, category)} on {category} prompts" for category in _CATEGORIES
    )
    return f"{names[0]} and {names[1]} score {scores}{seeds}, last losses {loss(low)} and {loss(high)}"


def _said(facts: Facts, contrasts: Sequence[tuple[str, str]]) -> str:
    """Differences on normal prompts, in full for one training seed, counted for several."""
    found = [_difference(facts, arm, against) for arm, against in contrasts]
    if len(found) == 1:
        return f"On normal prompts: {describe_difference(found[0])}"
    first, second = (facts.settings_in_words([pair[place] for pair in contrasts]) for place in (0, 1))
    below, above = sum(map(_is_below, found)), sum(map(_is_above, found))
    return (
        f"On normal prompts {first} is shown to score below {second} in {below} of {len(found)} training "
        f"seeds, and above in {above}."
    )


def _difference(facts: Facts, arm: str, against: str) -> PairedDifference:
    assert facts.scores is not None
    return paired_differences(facts.scores, arm, against, _CATEGORIES[0], facts.config.score.resamples)


def _is_below(found: PairedDifference) -> bool:
    return found.high is not None and found.high < 0


def _is_above(found: PairedDifference) -> bool:
    return found.low is not None and found.low > 0


def _told_apart(facts: Facts, low: Arm) -> str:
    """What the verdict says of strength and rank; or what would tell them apart."""
    if facts.verdict is not None and facts.verdict.contrast is not None:
        return facts.verdict.contrast.sentence
    if any(facts.settings[arm].rank == _HIGH for group in facts.same_gain for arm in group):
        return "An arm at matched gain is there, but no arm is shown to lose more of the prompts."
    return (
        "No arm of this study has one rank at the gain of the other, so that stays open: an arm of rank "
        f'{_HIGH} with `match_gain = "{facts.settings_in_words([low.name])}"` would show it.'
    )
