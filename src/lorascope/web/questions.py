"""From three answers to a study: what there is, what is to be learned, how long it may take.

Every choice has its reason in words. A study is made in several sizes, and the largest is taken whose plan
fits into the time.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lorascope.console import duration
from lorascope.errors import ConfigError
from lorascope.schema import StudyConfig

Goal = Literal["style", "subject", "everything"]
GOALS: dict[Goal, str] = {
    "style": "A style: how these pictures look, whatever they show",
    "subject": "A subject: one character, person or thing, to be drawn anywhere",
    "everything": "Let me compare everything: five ranks, with training repeated",
}
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
POCKET = "pocket"
MIN_PICTURES = 2
_POCKET_PICTURES: dict[Goal, int] = {"style": 600, "subject": 1, "everything": 1500}
_EPOCHS = 10  # how often losses are measured; pictures are repeated within an epoch for that
_MAX_TRIES = 3


@dataclass(frozen=True)
class Answers:
    """What was answered. `num_pictures` is how many the source holds, None where that is not known, and
    `num_shown` how many an epoch shows of them, by the numbers in folders' names.

    `word` stands in every caption, empty for none.
    """

    name: str
    source: str
    num_pictures: int | None
    base: str
    goal: Goal
    minutes: float
    word: str = ""
    num_shown: int | None = None

    @property
    def is_pocket(self) -> bool:
        """Whether the base is the small one of the package."""
        return self.base == POCKET

    @property
    def num_train(self) -> int | None:
        """How many pictures are trained on, once a tenth of them is held out."""
        if self.source == POCKET:
            return _POCKET_PICTURES[self.goal]
        if self.num_pictures is None:
            return None
        return self.num_pictures - max(1, round(0.1 * self.num_pictures))


@dataclass(frozen=True)
class Size:
    """How much a study does. Prompts are of each of two categories; `share` is of the usual steps."""

    ranks: tuple[int, ...]
    tlora: tuple[int, ...] = ()
    training_seeds: int = 1
    share: float = 1.0
    drawing_seeds: int = 1
    prompts: int = 25
    diagnosed: int = 12


_SIZES: dict[Goal, tuple[Size, ...]] = {
    "style": (
        Size((8, 16, 32), training_seeds=2, drawing_seeds=2),
        Size((8, 16, 32), drawing_seeds=2),
        Size((8, 16, 32)),
        Size((8, 32), prompts=12, diagnosed=8),
        Size((8, 32), share=0.7, prompts=12, diagnosed=6),
        Size((16,), share=0.7, prompts=10, diagnosed=5),
        Size((16,), share=0.5, prompts=6, diagnosed=3),
    ),
    "subject": (
        Size((4, 16, 64), tlora=(16, 64), drawing_seeds=2, prompts=10, diagnosed=10),
        Size((4, 16, 64), tlora=(64,), prompts=10, diagnosed=10),
        Size((4, 16), tlora=(16,), prompts=10, diagnosed=8),
        Size((4, 16), share=0.7, prompts=8, diagnosed=5),
        Size((16,), share=0.7, prompts=8, diagnosed=4),
        Size((16,), share=0.5, prompts=5, diagnosed=3),
    ),
    "everything": (
        Size((4, 8, 16, 32, 64), training_seeds=3, drawing_seeds=2),
        Size((4, 8, 16, 32, 64), training_seeds=2, drawing_seeds=2),
        Size((4, 16, 64), training_seeds=3),
        Size((4, 16, 64), training_seeds=2),
        Size((4, 16, 64), drawing_seeds=2, share=0.7),
        Size((4, 16, 64), share=0.7, prompts=12, diagnosed=6),
        Size((4, 64), share=0.5, prompts=8, diagnosed=4),
    ),
}


@dataclass(frozen=True)
class Choice:
    """A value at a key of the study file, and why it is that."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Proposal:
    """A study made of answers. `note` says what had to be left out for the time, or that it does not fit."""

    answers: Answers
    size: Size
    choices: tuple[Choice, ...]
    note: str = ""

    @property
    def table(self) -> dict[str, Any]:
        """The study as TOML's tables."""
        table: dict[str, Any] = {}
        for choice in self.choices:
            *path, key = choice.key.split(".")
            place: Any = table
            for index, part in enumerate(path):
                if part.isdigit():
                    continue
                if index + 1 < len(path) and path[index + 1].isdigit():
                    tables = place.setdefault(part, [])
                    while len(tables) <= int(path[index + 1]):
                        tables.append({})
                    place = tables[int(path[index + 1])]
                else:
                    place = place.setdefault(part, {})
            place[key] = choice.value
        return table

    @property
    def config(self) -> StudyConfig:
        """The study."""
        return StudyConfig.model_validate(self.table)


def answer(
    name: str,
    source: str,
    num_pictures: int | None,
    base: str,
    goal: str,
    minutes: float,
    word: str = "",
    num_shown: int | None = None,
) -> Answers:
    """Answers that a study can be made of; raise `ConfigError` for one with which none can."""
    known = get_args(Goal)
    if goal not in known:
        raise ConfigError(f"what shall it learn = {goal!r}: must be one of {', '.join(known)}")
    if not 1 <= minutes <= 60 * 24 * 365:
        raise ConfigError(f"how long may it take = {minutes:g} minutes: must be from 1 minute to a year")
    if source != POCKET and num_pictures is not None and num_pictures < MIN_PICTURES:
        raise ConfigError(
            f"{source}: holds {num_pictures} pictures: at least {MIN_PICTURES} are needed, for one is held "
            "out of training to see whether what is learned holds for others too"
        )
    checked: Goal = next(item for item in known if item == goal)
    return Answers(name, source, num_pictures, base.strip(), checked, minutes, word.strip(), num_shown)


def sizes_for(goal: Goal) -> tuple[Size, ...]:
    """The sizes of a study, the largest first."""
    return _SIZES[goal]


def propose(answers: Answers, size: Size) -> Proposal:
    """The study of this size that the answers ask for."""
    choices = [
        Choice("name", answers.name, "The run folder is called so too."),
        *_data_choices(answers, size),
        *_arm_choices(answers, size),
        *_train_choices(answers, size),
        *_sample_choices(answers, size),
    ]
    return Proposal(answers, size, tuple(choices))


def _data_choices(answers: Answers, size: Size) -> list[Choice]:
    pocket = answers.is_pocket
    base = (
        "A small Stable Diffusion that comes with lorascope: minutes instead of hours, to learn how it goes."
        if pocket
        else "What the adapters are trained on, and what they fit afterwards; it stays as it is."
    )
    choices = [Choice("base.model", answers.base, base)]
    choices.append(Choice("data.source", answers.source, "Your pictures with their captions."))
    side, why = (64, "The pocket base draws 64 pixels.") if pocket else (512, "What the base was made for.")
    choices.append(Choice("data.resolution_px", side, why))
    if not pocket:
        choices.append(
            Choice(
                "data.buckets",
                True,
                "Pictures keep their shape instead of being cut to the square in the middle.",
            )
        )
    if (most := _num_train(answers, size)) is not None:
        why = f"All there are, but for about a tenth, which is held out: {_counted(answers)}."
        if answers.source == POCKET:
            why = "Of the 1,500 that come with lorascope."
        if most < (answers.num_train or 0):
            why = f"As many as the steps see; {_counted(answers)}."
        choices.append(Choice("data.num_train", most, why))
    if answers.source == POCKET and answers.goal == "subject":
        choices.append(Choice("data.num_heldout", 40, "Others to hold the one picture against."))
    repeats = _schedule(answers, size)[0]
    if repeats > 1:
        choices.append(
            Choice(
                "data.repeats",
                repeats,
                "Each picture is seen so often in an epoch, so that there are about ten epochs: losses are "
                "measured after each.",
            )
        )
    if answers.word:
        choices.append(
            Choice(
                "data.trigger_word",
                answers.word,
                "Put first in every caption that lacks it: the name of what is new.",
            )
        )
    return choices


def _num_train(answers: Answers, size: Size) -> int | None:
    """Pictures to train on: not more than the steps see once."""
    if answers.num_train is None:
        return None
    return min(answers.num_train, math.ceil(usual_steps(answers) * size.share * batch_size(answers)))


def _counted(answers: Answers) -> str:
    return f"{answers.num_pictures:,} pictures were counted" if answers.num_pictures else "not counted"


def _arm_choices(answers: Answers, size: Size) -> list[Choice]:
    lr, why = (5e-4, "What the pocket base learns from in few steps without collapsing.")
    if not answers.is_pocket:
        lr, why = 1e-4, "Where most trainers for this base start, and right for an alpha that stays the same."
    ranks = (
        "The size of the file. They are compared, since a small one often does as well as a large one."
        if len(size.ranks) > 1
        else "A size that does for most; there is no time to compare several."
    )
    alpha = "One for all: then the best learning rate hardly moves with the rank, and ranks can be compared."
    choices = [
        Choice("arms.0.rank", _one_or_list(size.ranks), ranks),
        Choice("arms.0.alpha", 16, alpha),
        Choice("arms.0.lr", lr, why),
    ]
    if size.training_seeds > 1:
        choices.append(
            Choice(
                "arms.0.seed",
                list(range(size.training_seeds)),
                "Each rank is trained so often: a single run cannot tell its effect from luck.",
            )
        )
    if size.tlora:
        choices += [
            Choice(
                "arms.1.kind",
                "tlora",
                "T-LoRA, made for single subjects: it learns less where there is much noise, and so copies "
                "less of where and how the subject stood.",
            ),
            Choice("arms.1.rank", _one_or_list(size.tlora), "Beside LoRA of the same rank."),
            Choice(
                "arms.1.mask_when",
                "training",
                "So that its file is a LoRA like any other, for every program.",
            ),
            Choice("arms.1.alpha", 16, "As the others."),
            Choice("arms.1.lr", lr, "As the others."),
        ]
    return choices


def _one_or_list(values: tuple[int, ...]) -> int | list[int]:
    return values[0] if len(values) == 1 else list(values)


def batch_size(answers: Answers) -> int:
    """Pictures a step: few where there are few."""
    few = answers.num_train or 100
    if answers.goal == "subject":
        return 1 if few < 8 else 2
    return min(4, few)


def usual_steps(answers: Answers) -> int:
    """Steps of one arm that are usual for so many pictures, at the batch size of `batch_size`."""
    count = answers.num_train or 200
    if answers.goal == "subject":
        most = 1200 if answers.is_pocket else 2000
        return min(max(100 * count // batch_size(answers), 400), most)
    if answers.is_pocket:
        return min(max(3 * count // 4, 300), 1125)
    most = 3750 if answers.goal == "everything" else 3000
    return min(max(10 * count, 1500), most)


def _schedule(answers: Answers, size: Size) -> tuple[int, int, int]:
    """Repeats and epochs for the steps of this size, and the steps that they make."""
    count = _num_train(answers, size)
    shown = count or 200
    if count and answers.num_pictures and answers.num_shown:
        shown = max(1, round(answers.num_shown * count / answers.num_pictures))
    batch = batch_size(answers)
    passes = usual_steps(answers) * size.share * batch / shown
    repeats = max(1, round(passes / _EPOCHS))
    epochs = max(1, round(passes / repeats))
    return repeats, epochs, math.ceil(epochs * repeats * shown / batch)


def _train_choices(answers: Answers, size: Size) -> list[Choice]:
    _, epochs, steps = _schedule(answers, size)
    batch = batch_size(answers)
    usual = {
        "subject": "100 for each picture, some 400 to 2,000, are usual for a subject",
        "style": "1,500 to 3,000 are usual for a style",
        "everything": "1,500 to 3,750 are usual",
    }[answers.goal]
    if answers.is_pocket:
        usual = "enough for the pocket base"
    cut = "" if size.share == 1 else f", {size.share:.0%} of what is usual for the time that there is"
    counted = (
        "for 200 pictures, since how many there are is not known" if answers.num_train is None else usual
    )
    warmup = min(100, max(10, steps // 20))
    return [
        Choice("train.epochs", epochs, f"About {steps:,} steps{cut}: {counted}."),
        Choice(
            "train.batch_size", batch, "Pictures a step; fewer for few pictures, so that there are steps."
        ),
        Choice(
            "train.schedule", "cosine", "The learning rate falls to 0 at the end, so that details settle."
        ),
        Choice(
            "train.warmup_steps", warmup, "The learning rate rises in the first steps, so that nothing jumps."
        ),
        Choice("train.max_grad_norm", 1.0, "A single odd batch cannot throw the training off."),
        Choice(
            "train.caption_dropout",
            0.1,
            "Every tenth caption is left out, so that guidance, which draws without one too, stays right.",
        ),
    ]


def _sample_choices(answers: Answers, size: Size) -> list[Choice]:
    pocket = answers.is_pocket
    choices = [
        Choice(
            "sample.prompts",
            POCKET if pocket else "sd15",
            "Prompts of ours, half of things and half of ideas: what the base could draw must not be lost.",
        )
    ]
    if answers.word:
        choices.append(
            Choice(
                "sample.prompt_prefix",
                f"{answers.word}, ",
                "The word calls up what was learned, in every prompt.",
            )
        )
    choices += [
        Choice(
            "sample.num_prompts",
            size.prompts,
            f"Of each kind, {2 * size.prompts} in all: the more, the smaller the differences that show.",
        ),
        Choice("sample.steps", 20 if pocket else 30, "Usual for this sampler."),
        Choice(
            "sample.seeds",
            list(range(size.drawing_seeds)),
            "Each prompt is drawn twice, from other noise."
            if size.drawing_seeds > 1
            else "Each prompt is drawn once, from the same noise by the base and every arm.",
        ),
        Choice(
            "sample.preview_every_epochs",
            max(1, _schedule(answers, size)[1] // 4),
            "A few pictures while it trains, to see it come.",
        ),
        Choice(
            "score.model",
            POCKET if pocket else "openai/clip-vit-large-patch14",
            "Looks how well a picture fits its prompt; one for the pocket world's pictures."
            if pocket
            else "Looks how well a picture fits its prompt; the model whose scores are quoted most.",
        ),
        Choice(
            "diagnose.num_prompts",
            size.diagnosed,
            "Prompts of each kind that are drawn at several strengths, to find the one to keep.",
        ),
    ]
    if size.diagnosed < 8:
        strengths = Choice("diagnose.strengths", [0.5, 0.75, 1.0], "Fewer, for the time.")
        choices += [strengths, Choice("diagnose.guidances", [], "Left out, for the time.")]
    return choices


# -- the time ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """What a study's plan says of this machine: seconds for a unit of each kind of work."""

    training: float
    sampling: float
    diagnosis: float

    @classmethod
    def of(cls, config: StudyConfig, plan: Mapping[str, Any]) -> "Pace | None":
        """The pace behind a plan; None where the plan knows no time."""
        seconds = plan["estimated_s"]
        if seconds is None:
            return None
        drawn, tried = plan["sampling_share"], plan["diagnosis_share"]
        shares = (1 - drawn - tried, drawn, tried)
        work = _work(config)
        return cls(*(seconds * share / unit for share, unit in zip(shares, work, strict=True)))

    def seconds(self, config: StudyConfig) -> float:
        """About how long another study of the same base would take."""
        return sum(
            unit * rate
            for unit, rate in zip(_work(config), (self.training, self.sampling, self.diagnosis), strict=True)
        )


def _work(config: StudyConfig) -> tuple[float, float, float]:
    """Units of training, of drawing and of the diagnosis, as far as sizes differ in them."""
    arms, data, sample = config.expand_arms(), config.data, config.sample
    training = sum(arm.epochs for arm in arms) * (data.num_train or 1) * data.repeats
    drawn = (len(arms) + 1) * (sample.num_prompts or 25) * len(sample.seeds) * sample.steps
    points = 1 + len(arms) * (2 * len(config.diagnose.strengths) + 3)
    return training, drawn, points * config.diagnose.num_prompts * config.diagnose.steps


def fit(
    answers: Answers, plan_of: Callable[[StudyConfig], Mapping[str, Any]]
) -> tuple[Proposal, Mapping[str, Any]]:
    """The largest study whose plan fits into the time, with that plan; the smallest where none does.

    `plan_of` gives the plan of a study, as `lorascope study --dry-run --json` prints it.
    """
    sizes = sizes_for(answers.goal)
    budget = 60 * answers.minutes
    place, proposal = 0, propose(answers, sizes[0])
    plan = plan_of(proposal.config)
    for _ in range(_MAX_TRIES):
        pace = Pace.of(proposal.config, plan)
        if pace is None or plan["estimated_s"] <= budget or place == len(sizes) - 1:
            break
        later = range(place + 1, len(sizes))
        place = next(
            (at for at in later if pace.seconds(propose(answers, sizes[at]).config) <= budget), later[-1]
        )
        proposal = propose(answers, sizes[place])
        plan = plan_of(proposal.config)
    return replace(proposal, note=_note(answers, place, plan["estimated_s"])), plan


def _note(answers: Answers, place: int, seconds: float | None) -> str:
    budget = 60 * answers.minutes
    if seconds is None:
        return (
            "How long it takes is known once the pictures have been read: how many there are cannot be seen "
            "from here."
        )
    about = f"about {duration(seconds)} of the {duration(budget)} that it may take"
    if seconds > budget:
        smaller = "" if answers.is_pocket else ", or try it with the pocket base first"
        return (
            f"It does not fit: the smallest study that says something takes about {duration(seconds)} here, "
            f"and {duration(budget)} are given. Give it more time{smaller}."
        )
    if place == 0:
        return f"All that is useful fits: {about}."
    return f"Made to fit: {about}. Given longer, more ranks, runs or prompts are compared."
