"""Blind votes: seeded order and sides, kept at once, lost by no crash, and told with their interval."""

import json
from pathlib import Path
from threading import Thread

import pytest
from scipy.stats import binomtest

from lorascope.errors import ConfigError
from lorascope.web.votes import (
    Pair,
    Vote,
    cast,
    exact_interval,
    next_place,
    plan_session,
    read_votes,
    results,
)

TIME = "2026-01-01T00:00:00+00:00"


def pairs(count: int) -> list[Pair]:
    return [
        Pair(f"normal-{n:03d}-0", f"prompt {n}", "r4", "base", f"images/r4/{n}.png", f"images/base/{n}.png")
        for n in range(count)
    ]


def votes(answers: str) -> list[Vote]:
    """Votes on r4, always left, against the base: l, t or r each."""
    words = {"l": "left", "t": "tie", "r": "right"}
    return [
        Vote("s", 1, *vars(pair).values(), words[letter], TIME)  # type: ignore[arg-type]
        for pair, letter in zip(pairs(len(answers)), answers, strict=True)
    ]


def test_order_and_sides_are_a_function_of_the_seed() -> None:
    session = plan_session(pairs(40), 5, 30)
    assert session == plan_session(pairs(40), 5, 30)
    assert len(session.pairs) == 30 and session.pairs != plan_session(pairs(40), 6, 30).pairs
    assert {pair.left for pair in session.pairs} == {"r4", "base"}
    assert [pair.place for pair in session.pairs] != sorted(pair.place for pair in session.pairs)
    for pair in session.pairs:
        assert pair.left_picture == f"images/{pair.left}/{int(pair.place[7:10])}.png"


def test_each_answer_is_kept_at_once_and_once(tmp_path: Path) -> None:
    path, session = tmp_path / "votes.jsonl", plan_session(pairs(4), 1, 4)
    assert next_place(session, read_votes(path)[0]) == 0
    for index, answer in enumerate(("left", "tie", "right")):
        cast(path, session, index, answer, TIME)
        cast(path, session, index, "tie", TIME)  # sent twice: the first counts
        assert next_place(session, read_votes(path)[0]) == index + 1
    found, num_damaged = read_votes(path)
    assert [vote.answer for vote in found] == ["left", "tie", "right"] and num_damaged == 0
    assert found[0].preferred == session.pairs[0].left and found[1].preferred is None
    cast(path, session, 3, "left", TIME)
    assert next_place(session, read_votes(path)[0]) is None
    assert set(json.loads(path.read_text().splitlines()[0])) >= {
        "session", "seed", "prompt", "left", "right", "answer", "time"
    }  # fmt: skip


def test_a_line_that_a_crash_cut_loses_no_other(tmp_path: Path) -> None:
    path, session = tmp_path / "votes.jsonl", plan_session(pairs(3), 1, 3)
    cast(path, session, 0, "left", TIME)
    with path.open("ab") as file:
        file.write(b'{"session": "cut')
    cast(path, session, 1, "right", TIME)
    with path.open("ab") as file:
        file.write(b'{"answer": "left"}\n[1]\n')
    found, num_damaged = read_votes(path)
    assert [vote.answer for vote in found] == ["left", "right"] and num_damaged == 3


def test_votes_of_several_browsers_at_once_are_all_kept(tmp_path: Path) -> None:
    path, session = tmp_path / "votes.jsonl", plan_session(pairs(24), 1, 24)
    threads = [Thread(target=cast, args=(path, session, index, "tie", TIME)) for index in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_votes(path)[0]) == 24


def test_what_is_no_vote_is_refused(tmp_path: Path) -> None:
    session = plan_session(pairs(1), 1, 1)
    for index, answer in ((0, "both"), (1, "left"), (-1, "left")):
        with pytest.raises(ConfigError):
            cast(tmp_path / "votes.jsonl", session, index, answer, TIME)
    same = Pair("a", "a", "r4", "r4", "x", "x")
    for wrong in ([], [same]):
        with pytest.raises(ConfigError, match="two different columns"):
            plan_session(wrong, 1, 10)
    assert not (tmp_path / "votes.jsonl").exists()


@pytest.mark.parametrize(("wins", "count"), [(0, 1), (0, 12), (12, 12), (3, 10), (25, 50), (199, 200)])
def test_the_interval_is_scipys_exact_one(wins: int, count: int) -> None:
    reference = binomtest(wins, count).proportion_ci(method="exact")
    assert exact_interval(wins, count) == pytest.approx((reference.low, reference.high), abs=1e-9)
    assert exact_interval(0, 0) is None


def test_counts_ties_interval_and_scores_in_words() -> None:
    cast_votes = votes("llllllllrt")
    scores = {f"images/r4/{n}.png": 20.0 + n / 10 for n in range(10)} | {
        f"images/base/{n}.png": 19.0 for n in range(10)
    }
    [found] = results(cast_votes, scores)
    assert (found.first, found.second) == ("r4", "base")
    assert (found.wins, found.losses, found.ties, found.count) == (8, 1, 1, 10)
    assert found.difference == pytest.approx(1.45)
    assert found.sentences[0] == (
        "r4 was preferred in 8 of 9 votes without a tie: 89 % (exact binomial 95 % interval 52 to 100 %), so "
        "r4 is preferred; 1 tie."
    )
    assert "r4 on the same 10 prompts is 1.45 above that of base (95 % interval" in found.sentences[1]
    [open_] = results(votes("lr"), {})
    assert "so no preference is shown." in open_.sentences[0] and len(open_.sentences) == 1
    assert results(votes("tt"), {})[0].sentences == ("All 2 votes were ties.",)
    [few] = results(votes("rrrrrrr"), {"images/r4/0.png": 1.0, "images/base/0.png": 2.0})
    assert "so base is preferred" in few.sentences[0] and "1 prompt is 1.00 below" in few.sentences[1]
    assert "too few prompts" in few.sentences[1]
