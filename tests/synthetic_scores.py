"""Tables of scores made from arithmetic, for the tests of scores and of the verdict."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorascope.evaluation.scores import BASE, NOISE, REAL, SHUFFLED, ScoreRow, Scores

SCORER = {
    "model": "pocket",
    "digest": "c" * 64,
    "dtype": "float32",
    "preprocessing": {"size_px": 64},
    "scale": "100 x cosine",
}


def make_row(
    arm: str, prompt: int, score: float, category: str = "normal", seed: int = 0, **values: Any
) -> ScoreRow:
    rank = 0 if arm == BASE else int(arm.lstrip("r").split("-")[0])
    settings = (None, None, None) if arm == BASE else (2.0 * rank, 5e-4, 0)
    row = ScoreRow(
        "arm",
        arm,
        rank,
        *settings,
        category,
        prompt,
        f"{category} {prompt}",
        seed,
        score,
        f"images/{arm}/{prompt}.png",
        "d",
    )
    return dataclasses.replace(row, **values)


def make_scores(columns: Mapping[str, Sequence[float]], seeds: int = 1, **values: Any) -> Scores:
    """One score per prompt and arm, half normal and half abstract; further seeds add -1, +1, ... around
    it.
    """
    rows = []
    for arm, scores in columns.items():
        for n, score in enumerate(scores):
            half = (len(scores) + 1) // 2
            category, prompt = ("normal", n) if n < half else ("abstract", n - half)
            for seed in range(seeds):
                rows.append(make_row(arm, prompt, score + (seed - (seeds - 1) / 2), category, seed, **values))
    return Scores.from_rows(rows, SCORER)


def draws(mean: float, count: int = 50, std: float = 3.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, std, count)


def probe(arm: str, difference: float, half: float = 0.002, epoch: int = 10, **values: Any) -> dict[str, Any]:
    bounds = {"difference_low": difference - half, "difference_high": difference + half}
    what = {"kind": "probe", "arm": arm, "split": "heldout", "band": "all", "conditional": True}
    return {
        **what,
        "step": epoch * 100,
        "epoch": epoch,
        "loss": 0.1,
        "difference": difference,
        **bounds,
        "count": 32,
        **values,
    }


def with_calibration(scores: Scores) -> Scores:
    def row(name: str, n: int, score: float, category: str = "normal") -> ScoreRow:
        return ScoreRow(
            "calibration", name, None, None, None, None, category, n, f"prompt {n}", 0, score, "", "d"
        )

    rows = [row(name, n, 10.0 + n) for name in (NOISE, SHUFFLED) for n in range(3)]
    rows += [row(REAL, n, 30.0 + n, "captions") for n in range(3)]
    return Scores.from_rows([*scores.rows, *rows], SCORER, num_truncated=2)


EASY = draws(26)


def shifted(**shifts: float) -> Scores:
    """The base and arms that lie `shift` from it, with a spread of 1 per prompt."""
    columns = {BASE: EASY}
    for n, (arm, shift) in enumerate(shifts.items()):
        noise = draws(0, std=1, seed=n + 10)
        columns[arm] = EASY + shift + noise - noise.mean()
    return make_scores(columns)
