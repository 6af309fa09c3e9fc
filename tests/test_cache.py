"""The cache: equal to encoding, never stale, and nothing is encoded twice."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from conftest import make_pictures, make_pipeline_folder, write_parquet
from lorascope.base import Base, load_base
from lorascope.cache import encode_dataset
from lorascope.config import BaseSection, DataSection
from lorascope.data import Dataset, prepare_data
from lorascope.errors import CacheError


def dataset_of(path: Path, resolution_px: int = 32) -> Dataset:
    return prepare_data(DataSection(source=str(path), resolution_px=resolution_px, heldout_share=0.2), lambda caption: 5)


@pytest.fixture
def dataset(picture_parquet: Path) -> Dataset:
    return dataset_of(picture_parquet)


def test_it_holds_the_posterior_and_the_text_states(base: Base, dataset: Dataset, tmp_path: Path) -> None:
    train, heldout, num_encoded = encode_dataset(dataset, base, tmp_path)
    assert (len(train), len(heldout), num_encoded) == (16, 4, 20)
    pixels = torch.from_numpy(np.stack([dataset.load_pixels(example) for example in dataset.heldout]))
    mean, std = base.encode_pixels(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
    torch.testing.assert_close(heldout.mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(heldout.std, std, rtol=1e-4, atol=1e-5)
    rows = torch.tensor([2, 0])
    expected = base.encode_text([dataset.train[2].caption, ""])
    torch.testing.assert_close(train.text(rows, torch.tensor([False, True])), expected, rtol=1e-5, atol=1e-6)
    assert train.digests == tuple(example.digest for example in dataset.train)


def test_a_second_run_encodes_nothing_and_gets_the_same(
    base: Base, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, _ = encode_dataset(dataset, base, tmp_path)
    monkeypatch.setattr(Base, "encode_pixels", None)
    monkeypatch.setattr(Base, "encode_text", None)
    second, _, num_encoded = encode_dataset(dataset, base, tmp_path)
    assert num_encoded == 0
    assert torch.equal(first.mean, second.mean) and torch.equal(first.text_states, second.text_states)


def test_another_encoder_picture_caption_or_resolution_is_encoded_anew(base: Base, dataset: Dataset, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    rows = make_pictures(20)
    encode_dataset(dataset, base, cache)
    other_picture = write_parquet(tmp_path / "p.parquet", [*rows[:-1], make_pictures(1, seed=9)[0]])
    other_caption = write_parquet(tmp_path / "c.parquet", [*rows[:-1], (rows[-1][0], "another caption")])
    for changed in (dataset_of(other_picture), dataset_of(other_caption), dataset_of(tmp_path / "c.parquet", resolution_px=40)):
        assert encode_dataset(changed, base, cache)[2] == 20
    other_base = load_base(BaseSection(model=str(make_pipeline_folder(tmp_path / "other", seed=1))), base.device)
    assert encode_dataset(dataset, other_base, cache)[2] == 20
    assert encode_dataset(dataset, base, cache)[2] == 0


def test_an_entry_of_other_inputs_is_refused(base: Base, dataset: Dataset, tmp_path: Path) -> None:
    encode_dataset(dataset, base, tmp_path)
    [path] = tmp_path.glob("*.safetensors")
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata={"key": "0" * 64, "manifest": "{}"})
    with pytest.raises(CacheError, match="made from other pictures, captions, resolution or encoders"):
        encode_dataset(dataset, base, tmp_path)


def test_a_damaged_entry_is_refused(base: Base, dataset: Dataset, tmp_path: Path) -> None:
    encode_dataset(dataset, base, tmp_path)
    [path] = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CacheError, match=r"damaged .*delete it and run again"):
        encode_dataset(dataset, base, tmp_path)
