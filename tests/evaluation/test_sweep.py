"""A sweep over strengths: its plan, its pictures, its rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorascope.adapters.bank import AdapterBank
from lorascope.adapters.targets import resolve_targets
from lorascope.arms import Arm
from lorascope.base.loading import Base
from lorascope.errors import StorageError
from lorascope.evaluation.prompts import Prompt
from lorascope.evaluation.sampling import latent_shape_of
from lorascope.evaluation.sweep import (
    Part,
    draw_sweep,
    first_of_each,
    is_drawn,
    plan_edits,
    plan_sweep,
    score_sweep,
)
from lorascope.evaluation.sweep_rows import SCALED_INTRUDERS, TRAINED, Epoch, Point, Slot, cut_to
from lorascope.run_folder import RunDir
from lorascope.sections import DiagnoseSection, SampleSection

PROMPTS = [
    *(Prompt("normal", index, text) for index, text in enumerate(("red", "green", "blue"))),
    *(Prompt("abstract", index, text) for index, text in enumerate(("luck", "joy"))),
]
ARMS = [Arm(name=f"r{rank}", rank=rank, alpha=2 * rank, lr=1e-3, seed=0) for rank in (2, 4)]
EPOCHS: dict[str, tuple[Epoch, ...]] = {"r2": ("last",), "r4": ("last", "best")}
SECTION = DiagnoseSection(strengths=(0.5, 1.0), num_prompts=2, steps=2, num_guidance_prompts=1)
EDITS = {"r2": (SCALED_INTRUDERS,), "r4": (SCALED_INTRUDERS, cut_to(2))}
SAMPLE = SampleSection(steps=30, batch_size=8)


class Encoder:
    """Features of a picture are the means of its thirds, those of a text its letters."""

    @property
    def identity(self) -> dict[str, Any]:
        return {"model": "means"}

    def encode_images(self, pictures: list[Path]) -> np.ndarray:
        rows = [np.asarray(Image.open(path), np.float32).reshape(4, -1).mean(axis=1) + 1 for path in pictures]
        return np.stack(rows) / np.linalg.norm(rows, axis=1, keepdims=True)

    def encode_images_and_hidden(self, pictures: list[Path]) -> tuple[np.ndarray, np.ndarray]:
        features = self.encode_images(pictures)
        return features, features[:, :2]

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        rows = [[1 + text.count(letter) for letter in "aeuk"] for text in texts]
        return np.asarray(rows, np.float32) / np.linalg.norm(rows, axis=1, keepdims=True)

    def count_truncated(self, texts: list[str]) -> int:
        return 0

    def digest_picture(self, picture: Path) -> str:
        return str(picture)

    def cached(self, path: Path) -> "Encoder":
        return self


def test_the_plan_holds_the_base_strengths_epochs_swaps_and_guidance_scales() -> None:
    parts = plan_sweep(EPOCHS, PROMPTS, SAMPLE, SECTION)
    assert [part.section.guidance for part in parts] == [7.5, 7.5, 1.0, 3.0]
    assert all(part.section.steps == 2 and part.section.scheduler == "dpmsolver++" for part in parts)
    assert parts[0].points == (
        Point("base", "last", 0.0, 7.5),
        *(Point("r2", "last", strength) for strength in (0.5, 1.0)),
        *(Point("r4", epoch, strength) for epoch in ("last", "best") for strength in (0.5, 1.0)),
    )
    assert parts[1].points == (Point("r2", unconditional="base"), Point("r4", unconditional="base"))
    assert parts[2].points == tuple(
        Point(arm, "last", strength, 1.0) for arm, strength in (("base", 0.0), ("r2", 1.0), ("r4", 1.0))
    )
    assert [len(part.jobs) for part in parts] == [4, 4, 2, 2]
    assert [part.num_pictures for part in parts] == [28, 8, 6, 6]


def test_without_guidance_there_is_no_branch_to_swap_and_no_scale_twice() -> None:
    parts = plan_sweep(EPOCHS, PROMPTS, SAMPLE.model_copy(update={"guidance": 1.0}), SECTION)
    assert [part.section.guidance for part in parts] == [1.0, 3.0]
    assert all(point.unconditional == "own" for part in parts for point in part.points)


def test_every_arm_is_drawn_with_its_intruders_scaled_and_those_above_the_lowest_rank_cut() -> None:
    assert plan_edits(ARMS, SECTION) == EDITS
    off = SECTION.model_copy(update={"scale_intruders": False})
    assert plan_edits(ARMS, off) == {"r2": (), "r4": (cut_to(2),)}
    off = SECTION.model_copy(update={"cut_rank": False})
    assert plan_edits(ARMS, off) == {"r2": (SCALED_INTRUDERS,), "r4": (SCALED_INTRUDERS,)}
    assert plan_edits([], SECTION) == {}


def test_edits_are_drawn_last_with_the_prompts_of_interventions() -> None:
    few = SECTION.model_copy(update={"num_intervention_prompts": 1, "seeds": (0, 1)})
    parts = plan_sweep(EPOCHS, PROMPTS, SAMPLE, few, EDITS)
    assert [part.weights for part in parts] == ["trained"] * 4 + [SCALED_INTRUDERS, cut_to(2)]
    assert parts[4].points == tuple(Point(arm, weights=SCALED_INTRUDERS) for arm in ("r2", "r4"))
    assert parts[5].points == (Point("r4", weights=cut_to(2)),)
    swapped, scaled, cut = parts[1], *parts[4:]
    assert swapped.jobs == scaled.jobs == cut.jobs
    assert {(job.prompt.text, job.seed) for job in cut.jobs} == {
        (text, seed) for text in ("red", "luck") for seed in (0, 1)
    }
    assert set(cut.jobs) < set(parts[0].jobs)  # each has its counterpart at strength 1
    many = SECTION.model_copy(update={"num_intervention_prompts": 50})
    assert plan_sweep(EPOCHS, PROMPTS, SAMPLE, many, EDITS)[5].jobs == parts_of(many)[0].jobs


def parts_of(section: DiagnoseSection) -> list[Part]:
    return plan_sweep(EPOCHS, PROMPTS, SAMPLE, section)


def test_an_arm_without_its_last_epoch_takes_no_part_in_what_that_is_drawn_for() -> None:
    parts = plan_sweep({"r2": ("best",), "r4": ("last",)}, PROMPTS, SAMPLE, SECTION, EDITS)
    drawn = {point.arm for part in parts[1:] for point in part.points}
    assert drawn == {"base", "r4"}
    assert [part.section.guidance for part in plan_sweep({}, PROMPTS, SAMPLE, SECTION, EDITS)] == [
        7.5,
        1.0,
        3.0,
    ]


def test_the_first_prompts_of_each_category_are_taken() -> None:
    assert [prompt.text for prompt in first_of_each(PROMPTS, 1)] == ["red", "luck"]
    assert first_of_each(PROMPTS, 3) == PROMPTS


@pytest.fixture
def drawn(base: Base, tmp_path: Path) -> tuple[RunDir, list[Part]]:
    """A sweep that is drawn; the adapter of the best epoch is the one of the last, stronger."""
    run, parts = RunDir(tmp_path), plan_sweep(EPOCHS, PROMPTS, SAMPLE, SECTION)
    bank = AdapterBank(base.components, resolve_targets(base.unet, ["to_q", "to_v"]), [*ARMS, ARMS[1]])
    for layer in bank.layers.values():
        layer.up.detach().normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    places: dict[Slot, int] = {
        ("r2", "last", TRAINED): 0,
        ("r4", "last", TRAINED): 1,
        ("r4", "best", TRAINED): 2,
    }
    bank.attach()
    draw_sweep(run, base, bank, places, parts, latent_shape_of(base, 32))
    bank.detach()
    return run, parts


def test_every_picture_is_drawn_and_has_its_row(drawn: tuple[RunDir, list[Part]]) -> None:
    run, parts = drawn
    assert all(is_drawn(run, part) for part in parts)
    assert len(list(run.sweep_dir.rglob("*.png"))) == sum(part.num_pictures for part in parts)
    rows, hidden = score_sweep(run, ARMS, parts, PROMPTS, Encoder())
    assert set(hidden) == {row.image for row in rows} and {len(row) for row in hidden.values()} == {2}
    points = [row for row in rows if row.kind == "point"]
    assert len(points) == sum(part.num_pictures for part in parts)
    assert all((run.path / row.image).is_file() for row in points)
    assert {(row.arm, row.rank, row.alpha) for row in rows} == {
        ("base", 0, None),
        ("r2", 2, 4.0),
        ("r4", 4, 8.0),
    }
    shuffled = [row for row in rows if row.kind == "shuffled"]
    assert [row.prompt for row in shuffled] == ["red", "green", "luck", "joy"]
    own = {row.place: row.clip_score for row in points if row.arm == "base" and row.guidance == 7.5}
    assert all(row.clip_score != own[row.place] for row in shuffled)


def test_models_share_the_initial_noise_and_differ_by_strength(drawn: tuple[RunDir, list[Part]]) -> None:
    run, _ = drawn
    name = "normal-000-0.png"
    pictures = {
        path.parent.relative_to(run.sweep_dir).as_posix(): path.read_bytes()
        for path in run.sweep_dir.rglob(name)
    }
    assert len(set(pictures.values())) == len(pictures) == 15


def test_a_missing_picture_is_named(drawn: tuple[RunDir, list[Part]]) -> None:
    run, parts = drawn
    (run.sweep_dir / "r4" / "best-s0.50-g7.5" / "abstract-001-0.png").unlink()
    assert [is_drawn(run, part) for part in parts] == [False, True, True, True]
    with pytest.raises(StorageError, match=r"abstract-001-0.png: not there: run `lorascope diagnose"):
        score_sweep(run, ARMS, parts, PROMPTS, Encoder())
