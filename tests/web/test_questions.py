"""Three answers make a study that is right, with a reason for each choice and a size that fits the time."""

import itertools
from typing import Any

import pytest

from lorascope.errors import ConfigError
from lorascope.schema import StudyConfig
from lorascope.web.drafts import write_toml
from lorascope.web.questions import GOALS, POCKET, SD15, Answers, Pace, answer, fit, propose, sizes_for


def answers_of(goal: str = "style", base: str = SD15, pictures: int | None = 200, **others: Any) -> Answers:
    values = {"minutes": 60, "word": "", "num_shown": None, **others}
    return answer("mine", "pictures/mine", pictures, base, goal, **values)


def steps_of(config: StudyConfig) -> int:
    assert config.data.num_train is not None
    return config.train.epochs * config.data.num_train * config.data.repeats // config.train.batch_size


@pytest.mark.parametrize(
    ("goal", "base", "pictures"),
    list(itertools.product(GOALS, (SD15, POCKET), (2, 12, 60, 240, 3000, None))),
)
def test_every_answer_and_size_makes_a_right_study(goal: str, base: str, pictures: int | None) -> None:
    answers = answers_of(goal, base, pictures)
    for size in sizes_for(answers.goal):
        proposal = propose(answers, size)
        config = proposal.config
        assert config == StudyConfig.model_validate(proposal.table)
        assert all(choice.reason.endswith(".") for choice in proposal.choices)
        assert (config.score.model == "pocket", config.data.resolution_px) == (
            base == POCKET,
            64 if base == POCKET else 512,
        )
        if pictures is None:
            assert config.data.num_train is None
        elif pictures > 2:
            assert config.data.num_train is not None and 1 <= config.data.num_train < pictures


@pytest.mark.parametrize(
    ("goal", "pictures", "least", "most"),
    [
        ("style", 20, 1400, 1600),
        ("style", 240, 1500, 3000),
        ("style", 2000, 1500, 3200),
        ("subject", 5, 400, 600),
        ("subject", 30, 1000, 2100),
        ("everything", 1500, 3000, 4100),
    ],
)
def test_steps_are_those_that_are_usual(goal: str, pictures: int, least: int, most: int) -> None:
    answers = answers_of(goal, pictures=pictures)
    assert least <= steps_of(propose(answers, sizes_for(answers.goal)[0]).config) <= most


def test_losses_are_measured_about_ten_times_and_no_set_is_too_large() -> None:
    few = propose(answers_of(pictures=20), sizes_for("style")[0]).config
    assert few.train.epochs == 10 and few.data.repeats > 1
    many = propose(answers_of(pictures=50_000), sizes_for("style")[-1])
    assert many.config.train.epochs == 1
    assert steps_of(many.config) <= 1600
    assert "As many as the steps see" in next(c.reason for c in many.choices if c.key == "data.num_train")


def test_numbers_in_folders_names_are_taken_into_account() -> None:
    once = propose(answers_of(pictures=40), sizes_for("style")[0]).config
    tenfold = propose(answers_of(pictures=40, num_shown=400), sizes_for("style")[0]).config
    assert tenfold.data.repeats * tenfold.train.epochs * 10 == pytest.approx(
        once.data.repeats * once.train.epochs, rel=0.2
    )


def test_a_subject_is_named_and_has_t_lora_beside_lora() -> None:
    config = propose(answers_of("subject", pictures=12, word="sks"), sizes_for("subject")[0]).config
    assert (config.data.trigger_word, config.sample.prompt_prefix) == ("sks", "sks, ")
    assert {arm.kind for arm in config.expand_arms()} == {"lora", "tlora"}


def test_the_pocket_pictures_need_no_count() -> None:
    for goal, count in (("style", 600), ("subject", 1), ("everything", 1500)):
        answers = answer("p", POCKET, None, POCKET, goal, 10)
        assert propose(answers, sizes_for(answers.goal)[0]).config.data.num_train == count


def test_a_study_as_text_says_why() -> None:
    proposal = propose(answers_of(), sizes_for("style")[0])
    text = write_toml(proposal.table, {choice.key: choice.reason for choice in proposal.choices})
    assert "# One for all: then the best learning rate hardly moves" in text
    assert "rank = [8, 16, 32]\n" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"goal": "fun"}, "what shall it learn = 'fun': must be one of style, subject, everything"),
        ({"minutes": 0.5}, "must be from 1 minute"),
        ({"pictures": 1}, "holds 1 pictures: at least 2 are needed"),
    ],
)
def test_answers_with_which_no_study_can_be_made_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        answers_of(**change)


class Planner:
    """Plans of a machine that takes 2 s for 1,000 pictures trained, 0.1 s a step of drawing."""

    def __init__(self, known: bool = True, slower: float = 1.0) -> None:
        self.known, self.slower, self.asked = known, slower, 0

    def __call__(self, config: StudyConfig) -> dict[str, Any]:
        self.asked += 1
        arms, sample = config.expand_arms(), config.sample
        training = (
            0.002 * sum(arm.epochs for arm in arms) * (config.data.num_train or 1) * config.data.repeats
        )
        drawn = 0.1 * (len(arms) + 1) * (sample.num_prompts or 25) * len(sample.seeds) * sample.steps
        tried = 0.05 * len(arms) * config.diagnose.num_prompts * config.diagnose.steps
        total = training + drawn + tried
        return {
            "estimated_s": self.slower * total if self.known else None,
            "sampling_share": drawn / total if self.known else None,
            "diagnosis_share": tried / total if self.known else None,
        }


def test_the_largest_study_that_fits_is_taken() -> None:
    sizes = []
    for minutes in (60 * 24, 40, 20, 8, 4):
        planner = Planner()
        proposal, plan = fit(answers_of(minutes=minutes), planner)
        assert plan["estimated_s"] <= 60 * minutes
        assert planner.asked <= 4
        assert " of the " in proposal.note
        sizes.append(sizes_for("style").index(proposal.size))
    assert sizes == sorted(sizes) and sizes[0] == 0 and sizes[-1] > 2
    assert fit(answers_of(minutes=60 * 24), Planner())[0].note.startswith("All that is useful fits")


def test_what_does_not_fit_is_said() -> None:
    proposal, plan = fit(answers_of(minutes=1), Planner(slower=10))
    assert plan["estimated_s"] > 60
    assert proposal.size == sizes_for("style")[-1]
    assert proposal.note.startswith("It does not fit: the smallest study that says something takes about")
    unknown, _ = fit(answers_of(pictures=None), Planner(known=False))
    assert unknown.note.startswith("How long it takes is known once")
    assert Pace.of(unknown.config, Planner(known=False)(unknown.config)) is None
