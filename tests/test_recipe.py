"""The pocket recipe's exact parts: the fold of the latents' shift, the split, the captions."""

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import make_vae
from lorascope.data.dataset import prepare_data
from lorascope.evaluation.prompts import load_prompts
from lorascope.sections import DataSection

pytest.importorskip(
    "resvg_py", reason="the recipe's drawing library is an extra: pip install 'lorascope[pocket]'"
)

from recipes.pocket.captions import subject_captions
from recipes.pocket.cartoon import write_cartoon
from recipes.pocket.config import CARTOON_VENDOR, CartoonConfig, PocketConfig
from recipes.pocket.drawings import Drawings, Subject
from recipes.pocket.vae import normalize_latents

ROOT = Path(__file__).parents[1]


def test_the_latents_shift_and_scale_fold_into_the_vae_exactly() -> None:
    torch.manual_seed(0)
    vae = make_vae().eval()
    pixels = torch.rand(6, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist
        drawn = vae.decode(before.mean).sample
        normalize_latents(vae, before.mean)
        after = vae.encode(pixels).latent_dist
        deviation = before.mean.std((0, 2, 3), keepdim=True)
        torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
        torch.testing.assert_close(after.std * deviation, before.std, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(vae.decode(after.mean).sample, drawn, rtol=1e-3, atol=1e-4)


def make_drawings(count: int) -> Drawings:
    """Blocky drawings, of which every fifth is a copy of the one before and every seventh nearly so."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    for index in range(1, count):
        if index % 5 == 0:
            pixels[index] = pixels[index - 1]
        elif index % 7 == 0:
            pixels[index] = np.clip(pixels[index - 1].astype(int) + 1, 0, 255)
    subjects = {
        f"{index:x}": Subject(f"{index:x}", f"thing {index}", ("object", "toy"), 7, 82)
        for index in range(count)
    }
    return Drawings(subjects, pixels, [CARTOON_VENDOR] * count, list(subjects))


def test_the_cartoon_set_has_no_copies_and_no_near_duplicate_on_both_sides(tmp_path: Path) -> None:
    config = PocketConfig(cartoon=CartoonConfig(num_train=60, max_test=20))
    write_cartoon(make_drawings(110), config, ("thing 3", "thing 8"), tmp_path, tmp_path)
    dataset = prepare_data(DataSection(source=str(tmp_path / "cartoon")), lambda caption: 5)
    assert (len(dataset.train), len(dataset.heldout)) == (60, 20)
    assert all(
        note["kind"] == "near" and "dropped" not in note["action"] for note in dataset.summary["duplicates"]
    )
    shown = {example.caption.split(",")[0] for example in dataset.train}
    assert not {"thing 3", "thing 8"} & shown


def test_the_shipped_cartoon_set_is_1500_rows_to_train_on_and_others_held_out() -> None:
    dataset = prepare_data(DataSection(), lambda caption: len(caption.split()) + 2)
    assert len(dataset.train) == 1500
    assert len(dataset.heldout) >= 300
    assert dataset.summary["refused"] == []
    names = {example.caption.split(",")[0] for example in dataset.train}
    normal = [
        prompt.text.split(",")[0] for prompt in load_prompts("pocket", None) if prompt.category == "normal"
    ]
    assert len(normal) == 25
    assert not names & set(normal)


def test_captions_are_the_same_each_time_and_never_empty() -> None:
    subject = Subject("1f680", "rocket", ("launch", "space", "travel"), 5, 56)
    captions = subject_captions(subject, 1)
    assert captions == subject_captions(subject, 1)
    assert all(captions)
    assert "rocket" in captions
    assert any("rocket" not in caption for caption in captions)
    assert subject_captions(Subject("x", "thing", (), 0, 0), 1) == ["thing"] * len(captions)
