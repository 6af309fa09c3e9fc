"""Losses after training: strength 0 is the base, training and damage move them the right way."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lorascope.adapters.bank import AdapterBank, Slice
from lorascope.adapters.targets import resolve_targets
from lorascope.arms import Arm
from lorascope.base.loading import Base
from lorascope.console import track
from lorascope.data.encoding import Encoded
from lorascope.diagnosis.loss_figures import Losses, Measured, loss_figures
from lorascope.diagnosis.losses import (
    choose_pictures,
    count_probes,
    encode_drawings,
    measure_tables,
)
from lorascope.errors import RunError
from lorascope.sections import REFERENCE_TARGETS, TrainSection
from lorascope.seeding import seeded
from lorascope.store import digest_file
from lorascope.training.trainer import Trainer

R4 = Arm(name="r4", rank=4, alpha=8, lr=2e-3, seed=0)
R8 = Arm(name="r8", rank=8, alpha=16, lr=2e-3, seed=0)
SAME = 1e-6  # float64 leaves far less than the losses' float32 rounds


def make_bank(base: Base, *arms: Arm) -> AdapterBank:
    return AdapterBank(base.components, resolve_targets(base.unet, REFERENCE_TARGETS), arms)


def scatter(bank: AdapterBank, index: int, size: float) -> None:
    """Give an adapter random B, as no training would."""
    with torch.no_grad():
        for name, layer in bank.layers.items():
            rank = bank.arms[index].rank
            draw = seeded("damage", bank.arms[index].name, name)
            layer.up[index, :, :rank] = size * torch.randn(layer.up.shape[1], rank, generator=draw)


@pytest.fixture
def sets(pictures: Encoded) -> tuple[Encoded, Encoded, Encoded]:
    """Three training pictures, seven held-out ones, and all ten again as if the base had drawn them."""
    return pictures.subset(range(3)), pictures.subset(range(3, 10)), pictures


def measure(
    base: Base, bank: AdapterBank, slices: dict[str, Slice], sets: tuple[Encoded, Encoded, Encoded]
) -> Losses:
    total = count_probes(len(slices), *sets)
    bank.attach()
    try:
        with track("diagnose", total, "pictures") as tally:
            losses = measure_tables(base, bank, slices, *sets, tally)
            assert tally.completed == total
    finally:
        bank.detach()
    return losses


def test_strength_0_is_the_base_and_damage_is_seen(
    exact_base: Base, sets: tuple[Encoded, Encoded, Encoded]
) -> None:
    base = exact_base
    bank = make_bank(base, R4, R8)
    scatter(bank, 1, 1.0)
    slices = {"off": Slice(1, 0.0), "fresh": Slice(0), "damaged": Slice(1)}
    bank.attach()
    with track("diagnose", 1, "pictures") as tally:
        losses = measure_tables(base, bank, slices, *sets, tally)
    figures = {name: loss_figures(losses, name) for name in slices}
    bank.detach()
    for name in ("off", "fresh"):
        same = figures[name]
        zero = Measured(0.0, 0.0, 0.0, 7)
        assert (same.num_train, same.num_heldout, same.num_drawings) == (3, 7, 10)
        assert same.heldout == same.heldout_uncaptioned == same.heldout_bands["0-250"] == zero
        assert (same.train_gap.value, same.member_auc.value, same.member_p) == (0.0, 0.5, 1.0)
        assert same.guidance_cosine.value == pytest.approx(1, abs=SAME)
    damaged = figures["damaged"]
    assert damaged.guidance_cosine.high is not None and damaged.guidance_cosine.high < 0.5
    assert damaged.heldout.value and damaged.heldout_bands["0-250"].value


def test_training_lowers_the_losses_and_the_number_of_arms_is_of_no_account(
    exact_base: Base, pictures: Encoded, sets: tuple[Encoded, Encoded, Encoded]
) -> None:
    """Against what it learned, at strength -1, the trained arm is worse than the base."""
    bank = make_bank(exact_base, R8)
    bank.attach()
    section = TrainSection(epochs=6, batch_size=2)
    for _ in Trainer(exact_base, bank, pictures, section).run():
        pass
    bank.detach()
    sets = (sets[0], sets[1].subset(range(3)), sets[2].subset(range(2)))
    alone = measure(exact_base, bank, {"r8": Slice(0), "against": Slice(0, -1.0)}, sets)
    for losses in (alone.heldout.captioned, alone.heldout.uncaptioned, alone.train.captioned):
        of_base, trained, against = losses.mean(axis=(1, 2))
        assert trained < 0.99 * of_base and against > 1.005 * of_base
    beside = make_bank(exact_base, R4, R8)
    scatter(beside, 0, 0.5)
    beside.load_unpadded(beside.parameters, 1, bank.unpadded(bank.parameters, 0))
    others = {f"other {number}": Slice(0, number / 8) for number in range(8)}  # more than go at once
    many = measure(exact_base, beside, {**others, "r8": Slice(1)}, sets)
    for ours, theirs in ((alone.train, many.train), (alone.heldout, many.heldout)):
        np.testing.assert_allclose(ours.captioned[:2], theirs.captioned[[0, -1]], rtol=SAME)
        np.testing.assert_allclose(ours.uncaptioned[:2], theirs.uncaptioned[[0, -1]], rtol=SAME)
    np.testing.assert_allclose(alone.cosines[:2], many.cosines[[0, -1]], atol=SAME)
    np.testing.assert_allclose(many.cosines[:2], 1, atol=SAME)
    assert many.bands == ("0-250", "250-500", "500-750", "750-1000")


def test_drawings_without_a_caption_have_no_guidance(base: Base, sets: tuple[Encoded, ...]) -> None:
    train, heldout, drawings = sets
    drawings = dataclasses.replace(drawings, caption_index=torch.tensor([0, 0, *[1] * 8]))
    losses = measure(base, make_bank(base, R4), {"r4": Slice(0)}, (train, heldout, drawings))
    assert np.isnan(losses.cosines[:, :2]).all() and not np.isnan(losses.cosines[:, 2:]).any()
    assert np.array_equal(losses.drawings.captioned[:, :2], losses.drawings.uncaptioned[:, :2])


def test_sets_without_pictures_are_measured_as_nothing(
    base: Base, sets: tuple[Encoded, Encoded, Encoded]
) -> None:
    train, _, _ = sets
    nothing = train.subset([])
    losses = measure(base, make_bank(base, R4), {"r4": Slice(0)}, (train, nothing, nothing))
    assert losses.train.captioned.shape == (2, 3, 4) and losses.heldout.captioned.shape == (2, 0, 4)
    assert losses.cosines.shape == (2, 0, 4)


def test_as_many_training_as_held_out_pictures_by_digest_each_once(pictures: Encoded) -> None:
    digests = tuple("fbadcebgha")
    named = dataclasses.replace(pictures, digests=digests)
    train, heldout, drawings = choose_pictures(named, named.subset([0, 1, 2, 9]), named, num_drawings=5)
    assert heldout.digests == ("a", "b", "f") and train.digests == ("a", "b", "c")
    assert drawings.digests == ("a", "b", "c", "d", "e")
    assert [caption[-1] for caption in drawings.captions] == ["2", "1", "4", "3", "0"]
    assert choose_pictures(named, named.subset([]), named)[0].digests == tuple("abcdefgh")
    many = Encoded(
        latents=pictures.latents[:1] * 130,
        captions=("",) * 130,
        digests=tuple(f"{index:03d}" for index in range(130)),
        repeats=(1,) * 130,
        caption_index=torch.zeros(130, dtype=torch.int64),
        text_states=None,
    )
    assert [len(part) for part in choose_pictures(many, many, many)] == [100, 100, 16]
    assert count_probes(2, many, many, many, num_drawings=3) == 3 * 203


def test_drawings_are_encoded_with_their_captions(base: Base, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    captions = ["red", "", "red"]
    encoded = encode_drawings(base, paths, captions, keep_text=True)
    pixels = torch.from_numpy(np.array(Image.open(paths[1]))).permute(2, 0, 1)[None] / 127.5 - 1
    mean, std = base.encode_pixels(pixels)
    assert encoded.digests == tuple(digest_file(path) for path in paths)
    torch.testing.assert_close(encoded.latents[1], torch.stack([mean, std], dim=1))
    assert encoded.caption_index.tolist() == [1, 0, 1] and encoded.text_states is not None
    torch.testing.assert_close(encoded.text_states, base.encode_text(["", "red", ""])[:2].clone())
    assert encode_drawings(base, paths, captions, keep_text=False).text_states is None
    losses = measure(base, make_bank(base, R4), {"r4": Slice(0)}, (encoded, encoded.subset([]), encoded))
    assert losses.drawings.captioned.shape == (2, 3, 4)
    without_caption = sorted(encoded.digests).index(encoded.digests[1])
    assert np.isnan(losses.cosines[:, without_caption]).all() and np.isnan(losses.cosines).sum() == 8


@pytest.mark.parametrize("content", [b"no picture", None])
def test_a_drawing_that_cannot_be_read_is_one_line(base: Base, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=r"broken.png: cannot be read as a picture \(.*`lorascope diagnose`"):
        encode_drawings(base, [path], ["red"], keep_text=True)
