"""Batches: the same whoever draws them, ahead or not, from memory or from mapped files."""

import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lorascope.arms import Arm
from lorascope.base.loading import Base
from lorascope.data.encoding import Encoded
from lorascope.sections import DataSection, TrainSection
from lorascope.training.feed import Feed

ARMS = [
    Arm(name="r4", rank=4, alpha=8, lr=1e-3, seed=0),
    Arm(name="r8", rank=8, alpha=16, lr=2e-3, seed=0),
    Arm(name="r4-s1", rank=4, alpha=8, lr=1e-3, seed=1),
]
SECTION = TrainSection(batch_size=2, caption_dropout=0.3)


def make_feed(base: Base, pictures: Encoded, prefetch: bool = False) -> Feed:
    return Feed(base, pictures, ARMS, SECTION, DataSection(), 12, as_tokens=False, prefetch=prefetch)


def assert_equal(one: Feed, two: Feed, numbers: list[int]) -> None:
    for number in numbers:
        assert all(
            torch.equal(ours, theirs) for ours, theirs in zip(one.load(number), two.load(number), strict=True)
        )


def test_batches_drawn_ahead_are_those_drawn_when_needed(base: Base, pictures: Encoded) -> None:
    """In order, and after a jump as a resumed training makes."""
    assert_equal(make_feed(base, pictures, prefetch=True), make_feed(base, pictures), [0, 1, 2, 7, 8, 3, 11])


def test_a_fault_of_the_thread_reaches_the_caller(base: Base, pictures: Encoded) -> None:
    feed = make_feed(base, pictures, prefetch=True)
    feed.load(0)
    feed._ahead[1].result()
    feed.pictures = dataclasses.replace(pictures, latents=())
    feed.load(1)
    with pytest.raises(IndexError):
        feed.load(2)


def test_mapped_latents_give_the_same_batches(base: Base, pictures: Encoded, tmp_path: Path) -> None:
    safetensors.torch.save_file({"rows": torch.stack(pictures.latents)}, tmp_path / "rows.safetensors")
    mapped = tuple(safetensors.torch.load_file(tmp_path / "rows.safetensors")["rows"])
    assert_equal(
        make_feed(base, dataclasses.replace(pictures, latents=mapped), prefetch=True),
        make_feed(base, pictures),
        [0, 1, 5],
    )


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_latents_are_draws_of_the_posterior(base: Base, pictures: Encoded, spread: float) -> None:
    means = [row[0, 0] for row in pictures.latents]
    rows = tuple(torch.stack([mean, torch.full_like(mean, spread)])[None] for mean in means)
    latents = make_feed(base, dataclasses.replace(pictures, latents=rows)).load(0).latents
    for drawn in latents:
        assert any(torch.equal(drawn, mean) for mean in means) == (spread == 0)
        assert min(float((drawn - mean).std()) for mean in means) == pytest.approx(spread, abs=0.02)


@pytest.mark.parametrize("kept", [True, False])
def test_rows_are_arm_after_arm_and_the_same_for_one_seed(base: Base, pictures: Encoded, kept: bool) -> None:
    feed = make_feed(base, pictures if kept else dataclasses.replace(pictures, text_states=None))
    for part in feed.load(0):
        first, second, other = part.unflatten(0, (3, -1))
        assert torch.equal(first, second) and not torch.equal(first, other) and len(first) == 2


def test_batches_of_another_size_hold_the_same_pictures_noise_and_captions(
    base: Base, pictures: Encoded
) -> None:
    wide = SECTION.model_copy(update={"batch_size": 6})
    large = Feed(base, pictures, ARMS, wide, DataSection(), 4, as_tokens=False, prefetch=False).load(1)
    small = [make_feed(base, pictures).load(number) for number in (3, 4, 5)]
    for name, values in large._asdict().items():
        parts = [getattr(batch, name).unflatten(0, (len(ARMS), 2)) for batch in small]
        assert torch.equal(values.unflatten(0, (len(ARMS), 6)), torch.cat(parts, dim=1)), name
