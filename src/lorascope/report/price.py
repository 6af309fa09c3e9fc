"""What the study's rule would keep at other prices in prompt fidelity, for the reader to try."""

import json
from dataclasses import dataclass

from lorascope.evaluation.choice import Choice, choose_at_prices
from lorascope.evaluation.sentences import percent_text, style_text
from lorascope.evaluation.verdict import headline_of
from lorascope.report.evidence import Facts

MAX_PERCENT = 50


@dataclass(frozen=True)
class Prices:
    """What is kept at each whole percent from 0 to `MAX_PERCENT`: `places` into `answers`.

    An answer is its headline and what the point keeps and gains. `study` is the study's own price in percent,
    `answer` what is kept at it.
    """

    study: float
    answer: tuple[str, str]
    answers: tuple[tuple[str, str], ...]
    places: tuple[int, ...]

    @property
    def start(self) -> int:
        """Where the slider stands first."""
        return min(MAX_PERCENT, round(self.study))

    @property
    def json(self) -> str:
        """Answers and places for the page's script."""
        return json.dumps({"answers": self.answers, "places": self.places}, ensure_ascii=False)


def price_choices(facts: Facts) -> Prices | None:
    """What would be kept at every price; None where nothing can be told at any."""
    verdict = facts.verdict
    if facts.front is None or verdict is None or verdict.decision == "cannot_tell":
        return None
    percents = range(MAX_PERCENT + 1)
    prices = [verdict.max_prompt_loss, *(percent / 100 for percent in percents)]
    choices = choose_at_prices(facts.front, prices, facts.alike, facts.config.score.resamples)
    said = [_say(choice) for choice in choices]
    answers = tuple(dict.fromkeys(said[1:]))
    return Prices(
        study=round(100 * verdict.max_prompt_loss, 6),
        answer=said[0],
        answers=answers,
        places=tuple(answers.index(answer) for answer in said[1:]),
    )


def _say(choice: Choice) -> tuple[str, str]:
    if choice.point is None:
        return headline_of(choice), "No arm was shown to gain style at this price, at any strength drawn."
    kept, style = percent_text(choice.point.retention), style_text(choice.point.style)
    return headline_of(choice), f"Keeps of the prompts: {kept}. Style: {style}."
