"""The cache: equal to encoding, never stale, and nothing is encoded twice."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file

from conftest import make_pictures, make_pipeline_folder, write_parquet
from lorascope.base.autoencoder import Autoencoder
from lorascope.base.loading import Base, load_base
from lorascope.base.weights import read_header
from lorascope.data.dataset import Dataset, prepare_data
from lorascope.data.encoding import Encoded, _gather, _Store, encode_dataset
from lorascope.errors import CacheError, DataError
from lorascope.sections import BaseSection, DataSection


def dataset_of(path: Path, resolution_px: int = 32) -> Dataset:
    return prepare_data(
        DataSection(source=str(path), resolution_px=resolution_px, heldout_share=0.2), lambda caption: 5
    )


@pytest.fixture
def dataset(picture_parquet: Path) -> Dataset:
    return dataset_of(picture_parquet)


def all_latents(encoded: Encoded) -> torch.Tensor:
    return torch.stack(encoded.latents)


# Of a base in float64 batches of any size give the same fp32, but for a last bit now and then, 1.2e-7.
SAME = {"rtol": 1e-6, "atol": 1e-7}


def test_it_holds_the_posterior_and_the_text_states(
    exact_base: Base, dataset: Dataset, tmp_path: Path
) -> None:
    base = exact_base
    train, heldout, num_encoded = encode_dataset(dataset, base, tmp_path)
    assert (len(train), len(heldout), num_encoded) == (16, 4, 20)
    pixels = torch.from_numpy(np.stack([dataset.load_pixels(example) for example in dataset.heldout]))
    expected = base.encode_pixels(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
    found = heldout.posterior(torch.arange(4), torch.zeros(4, dtype=torch.bool))
    torch.testing.assert_close(found, expected, **SAME)
    rows = torch.tensor([2, 0])
    states = base.encode_text([dataset.train[2].caption, ""])
    torch.testing.assert_close(train.text(rows, torch.tensor([False, True])), states, **SAME)
    assert train.digests == tuple(example.digest for example in dataset.train)
    assert train.captions == tuple(example.caption for example in dataset.train)


def test_mirrored_views_are_the_mirrored_pictures_posteriors(
    exact_base: Base, dataset: Dataset, tmp_path: Path
) -> None:
    base = exact_base
    train, _, _ = encode_dataset(dataset, base, tmp_path, flip=True)
    mirrored = np.stack([dataset.load_pixels(example)[:, ::-1] for example in dataset.train[:3]])
    expected = base.encode_pixels(torch.from_numpy(mirrored.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1)
    found = train.posterior(torch.arange(3), torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(found, expected, **SAME)
    plain, _, _ = encode_dataset(dataset, base, tmp_path)
    assert not torch.allclose(
        found[0], plain.posterior(torch.arange(3), torch.ones(3, dtype=torch.bool))[0], atol=1e-2
    )


def test_a_second_run_encodes_nothing_and_gets_the_same(
    base: Base, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, _ = encode_dataset(dataset, base, tmp_path)
    monkeypatch.setattr(Base, "encode_pixels", None)
    monkeypatch.setattr(Base, "encode_text", None)
    shown: list[int] = []
    second, _, num_encoded = encode_dataset(dataset, base, tmp_path, progress=shown.append)
    assert num_encoded == 0 and sum(shown) == 20
    assert torch.equal(all_latents(first), all_latents(second))
    assert (
        first.text_states is not None
        and second.text_states is not None
        and torch.equal(first.text_states, second.text_states)
    )


def test_a_set_that_grew_has_only_its_new_pictures_and_captions_encoded(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kohya_ss #2277: latents that were cached are cached again on each run."""
    cache, rows = tmp_path / "cache", make_pictures(20)
    before, _, _ = encode_dataset(dataset_of(write_parquet(tmp_path / "a.parquet", rows)), base, cache)
    grown = write_parquet(
        tmp_path / "b.parquet", [*rows[1:-1], *make_pictures(3, seed=9), (rows[-1][0], "another caption")]
    )
    captions: list[str] = []
    encode_text = Base.encode_text
    monkeypatch.setattr(
        Base, "encode_text", lambda self, texts: captions.extend(texts) or encode_text(self, texts)
    )
    after, heldout, num_encoded = encode_dataset(dataset_of(grown), base, cache)
    assert num_encoded == 3 and captions == ["another caption"]
    again = {
        digest: latents
        for part in (after, heldout)
        for digest, latents in zip(part.digests, part.latents, strict=True)
    }
    shared = [
        (digest, latents)
        for digest, latents in zip(before.digests, before.latents, strict=True)
        if digest in again
    ]
    assert len(shared) > 10 and all(torch.equal(latents, again[digest]) for digest, latents in shared)


def test_latents_are_the_same_to_the_bit_whatever_was_encoded_with_them(
    picture_parquet: Path, tmp_path: Path
) -> None:
    """On the packaged base, whose convolutions round otherwise in batches of another size."""
    pocket = load_base(BaseSection(), torch.device("cpu"))
    few = DataSection(
        source=str(picture_parquet), resolution_px=64, heldout_share=0.2, num_train=3, num_heldout=1
    )
    found = []
    for section in (few, few.model_copy(update={"num_train": None, "num_heldout": None})):
        train, _, _ = encode_dataset(
            prepare_data(section, lambda caption: 5),
            pocket,
            tmp_path / str(section.num_train),
            keep_text=False,
        )
        found.append(dict(zip(train.digests, train.latents, strict=True)))
    assert len(found[0]) == 3 and all(
        torch.equal(latents, found[1][digest]) for digest, latents in found[0].items()
    )


def test_another_encoder_size_or_mirroring_is_encoded_anew(
    base: Base, dataset: Dataset, picture_parquet: Path, tmp_path: Path
) -> None:
    encode_dataset(dataset, base, tmp_path)
    assert encode_dataset(dataset_of(picture_parquet, resolution_px=40), base, tmp_path)[2] == 20
    assert encode_dataset(dataset, base, tmp_path, flip=True)[2] == 20
    other_base = load_base(
        BaseSection(model=str(make_pipeline_folder(tmp_path / "other", seed=1))), base.device
    )
    assert encode_dataset(dataset, other_base, tmp_path)[2] == 20
    assert encode_dataset(dataset, base, tmp_path)[2] == 0


def test_an_interrupted_encoding_goes_on_and_ends_in_the_same_bytes(
    base: Base, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorascope.data.encoding._SHARD_ROWS", 8)
    whole, _, _ = encode_dataset(dataset, base, tmp_path / "whole")
    done: list[int] = []

    def stop(count: int) -> None:
        done.append(count)
        if len(done) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_dataset(dataset, base, tmp_path / "parts", progress=stop)
    again, _, num_encoded = encode_dataset(dataset, base, tmp_path / "parts")
    assert num_encoded == 4 and torch.equal(all_latents(whole), all_latents(again))
    files = [
        sorted((path.name, path.read_bytes()) for path in (tmp_path / name).rglob("*.safetensors"))
        for name in ("whole", "parts")
    ]
    assert files[0] == files[1]


def test_text_states_too_large_to_keep_are_left_out(
    base: Base, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorascope.data.encoding.MAX_RESIDENT_BYTES", 2**16)
    train, heldout, _ = encode_dataset(dataset, base, tmp_path)
    assert train.text_states is None and heldout.text_states is None
    assert encode_dataset(dataset, base, tmp_path, keep_text=False)[0].text_states is None


def test_buckets_hold_pictures_of_one_shape_repeated_ones_so_often() -> None:
    shapes = [(4, 8), (8, 4), (4, 8), (4, 4)]
    encoded = Encoded(
        latents=tuple(torch.zeros(1, 2, 4, *shape) for shape in shapes),
        captions=("",) * 4,
        digests=("",) * 4,
        repeats=(1, 2, 3, 1),
        caption_index=torch.zeros(4, dtype=torch.int64),
        text_states=None,
    )
    assert [bucket.tolist() for bucket in encoded.buckets()] == [[3], [0, 2, 2, 2], [1, 1]]
    assert encoded.num_entries == 7 and encoded.first(2).num_entries == 3 and len(encoded.first(9)) == 4
    chosen = encoded.subset([2, 0])
    assert chosen.repeats == (3, 1) and [tuple(row.shape[3:]) for row in chosen.latents] == [(4, 8), (4, 8)]
    assert len(encoded.subset([])) == 0 and encoded.subset([]).buckets() == []


def test_a_shard_of_another_base_is_refused(base: Base, dataset: Dataset, tmp_path: Path) -> None:
    encode_dataset(dataset, base, tmp_path)
    path = next(tmp_path.rglob("*.safetensors"))  # latents or text
    rows = load_file(path)
    keys = json.dumps(["a"] * len(rows["rows"]))
    save_file(rows, path, metadata={"identity": "0" * 64, "keys": keys})
    with pytest.raises(CacheError, match="made from another base or size: delete it"):
        encode_dataset(dataset, base, tmp_path)


def flip_a_bit(path: Path) -> None:
    """The lowest bit of the last number: a change of 1e-7 of its size."""
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


def with_rows(path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Other rows under the metadata that the shard has."""
    metadata = read_header(path).metadata
    rows = change(load_file(path)["rows"].clone())
    save_file({"rows": rows}, path, metadata=metadata)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        flip_a_bit,
        lambda path: path.write_bytes(path.read_bytes().replace(b'"rows"', b'"raws"')),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"identity"', b'"jdentity"')),
        lambda path: with_rows(path, lambda rows: rows.roll(1, 0)),
        lambda path: with_rows(path, lambda rows: rows.log()),  # NaN where a number was below 0
        lambda path: with_rows(path, lambda rows: rows[1:]),
    ],
    ids=["truncated", "one bit", "other name", "other key", "exchanged", "NaN", "a row less"],
)
@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_damaged_shard_is_encoded_again(
    base: Base,
    dataset: Dataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], object],
    kind: str,
) -> None:
    first, _, _ = encode_dataset(dataset, base, tmp_path)
    latents, text = sorted(tmp_path.rglob("*.safetensors"), key=lambda path: -path.stat().st_size)
    if read_header(latents).tensors["rows"].shape[1:] == (77, 32):
        latents, text = text, latents
    path = latents if kind == "latents" else text
    whole, all_of_first = path.read_bytes(), all_latents(first).clone()
    damage(path)
    assert path.read_bytes() != whole
    again, _, num_encoded = encode_dataset(dataset, base, tmp_path)
    assert num_encoded == (20 if kind == "latents" else 0)
    assert f"{path}: damaged (" in caplog.text and caplog.text.count("it is encoded again") == 1
    assert path.read_bytes() == whole
    assert torch.equal(all_latents(again), all_of_first)
    assert torch.equal(again.text_states, first.text_states)
    caplog.clear()
    assert encode_dataset(dataset, base, tmp_path)[2] == 0 and not caplog.text


def test_a_shard_of_0_1_0_without_a_digest_is_read_but_for_NaN(
    base: Base, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encode_dataset(dataset, base, tmp_path)
    paths = list(tmp_path.rglob("*.safetensors"))
    for path in paths:
        metadata = read_header(path).metadata
        del metadata["lorascope.digest"]
        save_file(load_file(path), path, metadata=metadata)
    assert encode_dataset(dataset, base, tmp_path)[2] == 0 and not caplog.text
    for path in paths:
        with_rows(path, lambda rows: rows.log())
    assert encode_dataset(dataset, base, tmp_path)[2] == 20
    assert caplog.text.count("it holds NaN or infinity") == 2


def test_a_picture_of_which_the_vae_makes_nan_is_named(
    base: Base, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = base.vae.quant_conv.bias
    monkeypatch.setattr(bias, "data", bias.data * float("nan"))
    with pytest.raises(DataError, match=r"^\S+: the base's VAE makes NaN or infinity of this picture: leave"):
        encode_dataset(dataset, base, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_half_precision_encoded_is_kept_apart_from_fp32(
    base: Base, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base.vae.set_attn_processor(AttnProcessor())  # torch's own kernel in bf16 goes by the processor
    full, _, _ = encode_dataset(dataset, base, tmp_path)
    monkeypatch.setattr("lorascope.data.encoding.Autoencoder", lambda base: Autoencoder(base, torch.bfloat16))
    half, _, num_encoded = encode_dataset(dataset, base, tmp_path)
    assert num_encoded == 20 and encode_dataset(dataset, base, tmp_path)[2] == 0
    assert not torch.equal(all_latents(half), all_latents(full))
    error = all_latents(half) - all_latents(full)
    # bf16 rounds at 2^-9, in each of some twenty layers: sqrt(20) * 2^-9 = 0.9 %
    assert error.norm() <= 0.03 * all_latents(full).norm()


def test_a_picture_that_is_gone_is_named_and_what_was_encoded_before_it_is_kept(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorascope.data.encoding._SHARD_ROWS", 8)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, (picture, caption) in enumerate(make_pictures(20)):
        (folder / f"{index:02d}.png").write_bytes(picture)
        (folder / f"{index:02d}.txt").write_text(caption)
    dataset = dataset_of(folder)
    (folder / "13.png").unlink()
    with pytest.raises(DataError, match="13.png"):
        encode_dataset(dataset, base, tmp_path / "cache")
    (folder / "13.png").write_bytes(make_pictures(20)[13][0])
    assert encode_dataset(dataset, base, tmp_path / "cache")[2] == 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_size_is_one_tensor_where_it_fits(
    base: Base, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, heldout, _ = encode_dataset(dataset, base, tmp_path)
    store = _Store(
        tmp_path, {"kind": "latents", "base": base.digest, "width_px": 32, "height_px": 32, "flip": False}
    )
    assert not store.missing([example.digest for example in dataset.train])
    for free, device in ((2**30, "cuda"), (0, "cpu")):
        monkeypatch.setattr("lorascope.data.encoding.free_bytes", lambda device, free=free: free)
        rows = _gather({(32, 32): store}, {(32, 32): dataset.train}, torch.device("cuda"))
        assert {row.device.type for row in rows.values()} == {device}
    assert all(
        torch.equal(rows[example.id], row) for example, row in zip(dataset.train, train.latents, strict=True)
    )
    assert len(heldout) == 4
