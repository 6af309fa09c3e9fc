"""Blind votes: pairs in a seeded order on seeded sides, each answer kept at once, and what they come to."""

import json
import math
import os
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from scipy.special import betaincinv

from lorascope.errors import ConfigError
from lorascope.evaluation.scores import BASE
from lorascope.evaluation.statistics import MIN_PROMPTS, bootstrap_interval
from lorascope.shapes import Shape, find_fault
from lorascope.store import digest_json, storage_errors

Answer = Literal["left", "tie", "right"]
ANSWERS: tuple[Answer, ...] = ("left", "tie", "right")
_KEYS = (
    "session",
    "place",
    "prompt",
    "left",
    "right",
    "left_picture",
    "right_picture",
    "answer",
    "time",
)
_VOTE: Shape = {**dict.fromkeys(_KEYS, str), "seed": int}
_LEVEL = 0.95
_writing = threading.Lock()


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt from one noise. `place` names prompt and noise, `left` and `right` what drew
    them.
    """

    place: str
    prompt: str
    left: str
    right: str
    left_picture: str
    right_picture: str

    def swapped(self) -> "Pair":
        """The same with sides changed."""
        return Pair(self.place, self.prompt, self.right, self.left, self.right_picture, self.left_picture)


@dataclass(frozen=True)
class Session:
    """Pairs in the order in which they are asked, all of one seed."""

    id: str
    seed: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Vote:
    """One answer, as a line of `votes.jsonl` has it. `time` is ISO 8601, UTC."""

    session: str
    seed: int
    place: str
    prompt: str
    left: str
    right: str
    left_picture: str
    right_picture: str
    answer: Answer
    time: str

    @property
    def preferred(self) -> str | None:
        """What was preferred; None for a tie."""
        return {"left": self.left, "right": self.right}.get(self.answer)


def plan_session(pairs: Sequence[Pair], seed: int, count: int) -> Session:
    """`count` of the pairs in a random order on random sides: a function of pairs and seed.

    Raises `ConfigError` where there is no pair.
    """
    if not pairs or pairs[0].left == pairs[0].right:
        raise ConfigError(
            "a vote needs two different columns with pictures of the same prompts: choose others"
        )
    generator = random.Random(seed)
    order = list(pairs)
    generator.shuffle(order)
    sided = [pair.swapped() if generator.random() < 0.5 else pair for pair in order[: max(1, count)]]
    return Session(digest_json([seed, [asdict(pair) for pair in sided]])[:12], seed, tuple(sided))


def next_place(session: Session, votes: Sequence[Vote]) -> int | None:
    """The first pair that has no answer yet; None once all have one."""
    done = {vote.place for vote in votes if vote.session == session.id}
    return next((index for index, pair in enumerate(session.pairs) if pair.place not in done), None)


def cast(path: Path, session: Session, index: int, answer: str, time: str) -> None:
    """Append an answer to `votes.jsonl`, on the disk when this returns; a pair that was answered keeps its
    first answer.

    Raises `ConfigError` for what is no answer or no pair, and `StorageError` where it cannot be written.
    """
    if answer not in ANSWERS:
        raise ConfigError(f"{answer[:40]!r} is no answer: choose left, tie or right")
    if not 0 <= index < len(session.pairs):
        raise ConfigError(f"pair {index + 1}: there are {len(session.pairs)} in this vote: start it again")
    pair = session.pairs[index]
    vote = Vote(session.id, session.seed, **asdict(pair), answer=answer, time=time)
    with _writing:
        known, _ = read_votes(path)
        if any((other.session, other.place) == (vote.session, vote.place) for other in known):
            return
        _append(path, json.dumps(asdict(vote), ensure_ascii=False))


def _append(path: Path, line: str) -> None:
    """Append a line in one write, on a line of its own even where a crash cut the last one."""
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            is_cut = False
            if length := file.seek(0, os.SEEK_END):
                file.seek(length - 1)
                is_cut = file.read(1) != b"\n"
            file.write(b"\n" * is_cut + line.encode() + b"\n")
            os.fsync(file.fileno())


def read_votes(path: Path) -> tuple[list[Vote], int]:
    """All votes, and how many lines hold none."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return [], 0
    votes, num_damaged = [], 0
    for line in filter(None, lines):
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or find_fault(record, _VOTE) or record["answer"] not in ANSWERS:
            num_damaged += 1
        else:
            votes.append(Vote(**{key: record[key] for key in (*_KEYS, "seed")}))
    return votes, num_damaged


# -- what they come to ---------------------------------------------------------------------------------------


def exact_interval(wins: int, count: int, level: float = _LEVEL) -> tuple[float, float] | None:
    """The exact binomial interval of a share (Clopper and Pearson 1934); None of no votes."""
    if count == 0:
        return None
    tail = (1 - level) / 2
    low = float(betaincinv(wins, count - wins + 1, tail)) if wins else 0.0
    high = float(betaincinv(wins + 1, count - wins, 1 - tail)) if wins < count else 1.0
    return low, high


@dataclass(frozen=True)
class Result:
    """The votes on two columns: how often each was preferred, with the exact 95 % interval of `first`'s share
    among votes that were no tie; and the difference of their scores on the prompts that were voted on.
    """

    first: str
    second: str
    wins: int
    losses: int
    ties: int
    num_sessions: int
    interval: tuple[float, float] | None
    difference: float | None
    difference_interval: tuple[float, float] | None
    num_scored: int

    @property
    def count(self) -> int:
        """All votes."""
        return self.wins + self.losses + self.ties

    @property
    def sentences(self) -> tuple[str, ...]:
        """What the votes and the scores say, in words."""
        return (self._of_votes(), *self._of_scores())

    def _of_votes(self) -> str:
        if self.interval is None:
            return "The one vote was a tie." if self.count == 1 else f"All {self.count} votes were ties."
        decided = self.wins + self.losses
        low, high = (100 * bound for bound in self.interval)
        if low > 50 or high < 50:
            meaning = f"{self.first if low > 50 else self.second} is preferred"
        else:
            meaning = "no preference is shown"
        ties = f"; {self.ties} {'tie' if self.ties == 1 else 'ties'}" if self.ties else ""
        return (
            f"{self.first} was preferred in {self.wins} of {decided} votes without a tie: "
            f"{100 * self.wins / decided:.0f} % (exact binomial 95 % interval {low:.0f} to {high:.0f} %), "
            f"so {meaning}{ties}."
        )

    def _of_scores(self) -> tuple[str, ...]:
        if self.difference is None:
            return ()
        prompts = f"{self.num_scored} {'prompt' if self.num_scored == 1 else 'prompts'}"
        way = "above" if self.difference >= 0 else "below"
        if self.difference_interval is None:
            bounds = f"too few prompts for an interval, which takes {MIN_PROMPTS}"
        else:
            low, high = self.difference_interval
            bounds = f"95 % interval of the difference {low:+.2f} to {high:+.2f}"
            if low <= 0 <= high:
                bounds += ", so no difference is shown"
        return (
            f"The CLIP score of {self.first} on the same {prompts} is {abs(self.difference):.2f} {way} that "
            f"of {self.second} ({bounds}).",
        )


def results(votes: Sequence[Vote], scores: Mapping[str, float]) -> list[Result]:
    """A result for each two columns that were voted on, the last voted on first. `scores` are by picture."""
    groups: dict[tuple[str, str], list[Vote]] = {}
    for vote in votes:
        groups.setdefault(_named(vote.left, vote.right), []).append(vote)
    found = [_result(*names, group, scores) for names, group in groups.items()]
    last = {names: max(vote.time for vote in group) for names, group in groups.items()}
    return sorted(found, key=lambda item: last[item.first, item.second], reverse=True)


def _named(one: str, other: str) -> tuple[str, str]:
    """Two columns in an order that does not depend on sides: the base last."""
    first, second = sorted((one, other), key=lambda name: (name == BASE, name))
    return first, second


def _result(first: str, second: str, votes: Sequence[Vote], scores: Mapping[str, float]) -> Result:
    wins = sum(vote.preferred == first for vote in votes)
    losses = sum(vote.preferred == second for vote in votes)
    differences = {}
    for vote in votes:
        left, right = scores.get(vote.left_picture), scores.get(vote.right_picture)
        if left is not None and right is not None:
            differences[vote.place] = left - right if vote.left == first else right - left
    values = [value for value in differences.values() if math.isfinite(value)]
    return Result(
        first,
        second,
        wins,
        losses,
        len(votes) - wins - losses,
        len({vote.session for vote in votes}),
        exact_interval(wins, wins + losses),
        sum(values) / len(values) if values else None,
        bootstrap_interval(values) if values else None,
        len(values),
    )
