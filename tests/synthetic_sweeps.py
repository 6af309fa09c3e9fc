"""Sweeps made from arithmetic, for the tests of the front and of the verdict."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorascope.evaluation.scores import BASE
from lorascope.evaluation.sweep_rows import StyleFacts, Sweep, SweepRow, order_rows

STYLED = StyleFacts(auc=0.95, layer=2, num_real=40, reason=None)
Drawn = tuple[Sequence[float], Sequence[float | None]]  # CLIP score and style of each prompt


def point_rows(
    arm: str, strength: float, drawn: Drawn, kind: str = "point", seed: int = 0, **values: Any
) -> list[SweepRow]:
    """A row a prompt, half of them normal and half abstract; rank and training seed by the arm's name."""
    rank = 0 if arm == BASE else int(arm.lstrip("r").split("-")[0])
    run = None if arm == BASE else int(arm.partition("-s")[2] or 0)
    half = (len(drawn[0]) + 1) // 2
    return [
        SweepRow(
            **{
                "kind": kind,
                "arm": arm,
                "rank": rank,
                "alpha": 2.0 * rank if rank else None,
                "lr": 5e-4 if rank else None,
                "training_seed": run,
                "epoch": "last",
                "strength": strength,
                "guidance": 7.5,
                "unconditional": "own",
                "category": "normal" if n < half else "abstract",
                "prompt_index": n % half,
                "prompt": f"prompt {n}",
                "seed": seed,
                "clip_score": float(clip),
                "style": None if style is None else float(style),
                "image": f"sweep/{arm}/{strength}/{n}-{seed}.png",
                "image_digest": "d",
                **values,
            }
        )
        for n, (clip, style) in enumerate(zip(*drawn, strict=True))
    ]


def make_sweep(rows: Sequence[SweepRow], style: StyleFacts = STYLED, **values: Any) -> Sweep:
    return Sweep(order_rows(rows), {"model": "pocket"}, style, **values)


def simple_sweep(
    points: Mapping[tuple[str, float], tuple[float, float]],
    num_prompts: int = 24,
    clip_std: float = 1.0,
    style_std: float = 0.05,
    base_style_std: float = 0.05,
    style: StyleFacts = STYLED,
    epochs: Mapping[tuple[str, float], str] | None = None,
) -> Sweep:
    """A base at CLIP 30 over a floor of 10, and points that keep a share of that and gain style, on average
    exactly.
    """
    rng = np.random.default_rng(5)

    def spread(std: float) -> np.ndarray:
        values = rng.normal(0, 1, num_prompts)
        return std * (values - values.mean())

    base = 30 + spread(3)
    base_style = spread(base_style_std)
    rows = point_rows(BASE, 0.0, (base, base_style))
    rows += point_rows(BASE, 0.0, (10 + spread(1), base_style), kind="shuffled")
    for (arm, strength), (kept, gained) in points.items():
        drawn = base - 20 * (1 - kept) + spread(clip_std), base_style + gained + spread(style_std)
        epoch = (epochs or {}).get((arm, strength), "last")
        rows += point_rows(arm, strength, drawn, epoch=epoch)
    return make_sweep(rows, style)
