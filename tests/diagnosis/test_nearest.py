"""The nearest training and held-out pictures of an arm's drawings: compared, chosen, kept."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorascope.diagnosis.nearest import MAX_PAIRS, Nearest, compare, keep_nearest, read_nearest
from lorascope.errors import StorageError
from lorascope.evaluation.copying import copy_ratio
from lorascope.evaluation.sweep_rows import SweepRow
from lorascope.run_folder import RunDir
from lorascope.store import read_json, write_json
from synthetic_run import make_run


def noise(seed: int, count: int, side_px: int = 8) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return list(generator.integers(0, 256, (count, side_px, side_px, 3), np.uint8))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "two", num_prompts=4, num_steps=8, side_px=16, stages=("data",))


def rows_of(count: int) -> list[SweepRow]:
    first = SweepRow(
        kind="point",
        arm="r16",
        rank=16,
        alpha=32.0,
        lr=1e-3,
        training_seed=0,
        epoch="last",
        strength=1.0,
        guidance=7.5,
        unconditional="own",
        category="normal",
        prompt_index=0,
        prompt="a red bicycle",
        seed=3,
        clip_score=20.0,
        style=None,
        image="",
        image_digest="",
    )
    return [replace(first, prompt_index=n, image=f"sweep/r16/normal-{n:03d}-3.png") for n in range(count)]


def test_drawings_are_compared_with_as_many_of_either_kind_and_of_their_size() -> None:
    drawn, training, heldout = noise(0, 3), noise(1, 6), noise(2, 4)
    training.insert(2, noise(3, 1, side_px=4)[0])
    found = compare(drawn, training, heldout)
    assert found.places == ((0, 1, 3, 4), (0, 1, 2, 3)) and found.reason is None
    chosen = np.stack([training[place] for place in found.places[0]])
    expected = copy_ratio(np.stack(drawn), chosen)
    assert found.training is not None and found.training.ratios.tolist() == expected.ratios.tolist()


@pytest.mark.parametrize(
    ("drawn", "heldout", "reason"),
    [
        ([], noise(2, 4), "nothing was drawn at full strength"),
        (noise(0, 2), noise(2, 1), "3 training and 1 held-out pictures of the drawings' size, 8 x 8: it"),
    ],
)
def test_why_nothing_was_compared(
    drawn: list[np.ndarray], heldout: list[np.ndarray], reason: str, run: RunDir
) -> None:
    training = noise(1, 3)
    found = compare(drawn, training, heldout)
    assert found.training is None and (found.reason or "").startswith(reason)
    keep_nearest(run, {"r16": rows_of(len(drawn))}, {"r16": found}, training, heldout)
    assert read_nearest(run) == {"r16": Nearest(len(drawn), reason=found.reason)}
    assert not run.copying_dir.exists()


def test_the_smallest_ratios_are_kept_with_the_pictures_they_name(run: RunDir) -> None:
    drawn, training, heldout = noise(0, 6), noise(1, 5), noise(2, 5)
    drawn[4] = training[3].copy()
    drawn[4][0, 0, 0] ^= 1
    found = compare(drawn, training, heldout)
    keep_nearest(run, {"r16": rows_of(6)}, {"r16": found}, training, heldout)
    kept = read_nearest(run)
    assert kept is not None and found.training is not None
    nearest = kept["r16"]
    assert (nearest.num_drawings, nearest.num_pictures) == (6, 5)
    assert (nearest.training_share, nearest.heldout_share) == (1 / 6, 0.0)
    ratios = [pair.training.ratio for pair in nearest.pairs]
    assert ratios == sorted(found.training.ratios.tolist())[:MAX_PAIRS]
    first = nearest.pairs[0]
    assert (first.drawing, first.prompt, first.seed) == ("sweep/r16/normal-004-3.png", "a red bicycle", 3)
    assert first.training.is_copied and not first.heldout.is_copied
    data = run.data()
    assert first.training.id == data["train"][3]["id"]
    assert first.training.picture == f"copying/{data['train'][3]['digest'][:16]}.png"
    for pair in nearest.pairs:
        for neighbour, examples, pictures in (
            (pair.training, data["train"], training),
            (pair.heldout, data["heldout"], heldout),
        ):
            place = [example["id"] for example in examples].index(neighbour.id)
            assert np.array_equal(np.asarray(Image.open(run.path / neighbour.picture)), pictures[place])


def test_large_pictures_are_kept_smaller(run: RunDir) -> None:
    drawn, pictures = noise(0, 1, 300), noise(1, 2, 300)
    found = compare(drawn, pictures, pictures)
    keep_nearest(run, {"r16": rows_of(1)}, {"r16": found}, pictures, pictures)
    assert {np.asarray(Image.open(path)).shape for path in run.copying_dir.iterdir()} == {(256, 256, 3)}


def test_a_run_without_the_file_and_a_damaged_or_later_one(run: RunDir) -> None:
    assert read_nearest(run) is None
    drawn, pictures = noise(0, 2), noise(1, 4)
    keep_nearest(run, {"r16": rows_of(2)}, {"r16": compare(drawn, pictures, pictures)}, pictures, pictures)
    values = read_json(run.copying_json)
    for broken, words in (
        ({**values, "format": 2}, "is of format 2, this version reads up to 1: update lorascope"),
        (
            {**values, "arms": {"r16": {}}},
            "damaged .no `arms.r16.num_drawings`.*delete it and diagnosis.json",
        ),
        ({**values, "arms": {}}, "damaged .its content is not what was written, by its digest"),
    ):
        write_json(run.copying_json, broken)
        with pytest.raises(StorageError, match=words):
            read_nearest(run)
    run.copying_json.write_text(json.dumps([]))
    with pytest.raises(StorageError, match="damaged"):
        read_nearest(run)
