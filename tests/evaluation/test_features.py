"""CLIP features against torchmetrics and transformers themselves; cache, errors, and a whole scoring of a run
folder.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.multimodal import clip_score as reference_clip_score
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from lorascope.base.weights import load_tensors, save_tensors
from lorascope.errors import BaseModelError, HubError, RunError, StorageError
from lorascope.evaluation.features import (
    CachedEncoder,
    ClipEncoder,
    StyleEncoder,
    check_style_encoder,
    load_encoder,
    load_style_encoder,
)
from lorascope.evaluation.prompts import Prompt
from lorascope.evaluation.scores import BASE, NOISE, REAL, SHUFFLED, Generated, read_scores
from lorascope.evaluation.scoring import clip_score, score_run
from lorascope.run_folder import RunDir
from lorascope.schema import StudyConfig
from lorascope.sections import ScoreSection

CPU = torch.device("cpu")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = ["a man reading", "waiting", "cat", "the sea"]


class PlainCLIP(CLIPModel):
    """CLIP whose features are tensors, as torchmetrics still expects of transformers."""

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        return super().get_image_features(*args, **kwargs).pooler_output

    def get_text_features(self, *args: Any, **kwargs: Any) -> Any:
        return super().get_text_features(*args, **kwargs).pooler_output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP model of a few thousand weights with a letter-by-letter tokenizer of 16 tokens."""
    path = tmp_path_factory.mktemp("clip")
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)
    inner = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 24,
    }
    ends = {
        "bos_token_id": vocab["<|startoftext|>"],
        "eos_token_id": vocab["<|endoftext|>"],
        "pad_token_id": vocab["<|endoftext|>"],
    }
    config = CLIPConfig(
        text_config={**inner, **ends, "vocab_size": len(vocab), "max_position_embeddings": 16},
        vision_config={**inner, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(path)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> ClipEncoder:
    return load_encoder(ScoreSection(model=str(folder), batch_size=3), CPU)


def draw(count: int, seed: int = 0) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(count)]


def flip_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


ROUNDING = 1e-6  # fp32: 1.2e-7 of numbers below 1, times some for the sums of a tiny CLIP
SCORE_ROUNDING = 100 * ROUNDING  # a score is 100 cosines


def test_features_are_float32_of_unit_norm(encoder: ClipEncoder) -> None:
    images, texts = encoder.encode_images(draw(5)), encoder.encode_texts(TEXTS)
    assert images.dtype == texts.dtype == np.float32
    assert images.shape == (5, 24)
    assert texts.shape == (4, 24)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([images, texts]), axis=1), 1, atol=ROUNDING)
    assert encoder.encode_images([]).shape == (0, 24)
    assert encoder.encode_texts([]).shape == (0, 24)


def test_scores_match_torchmetrics(encoder: ClipEncoder, folder: Path) -> None:
    model, processor = PlainCLIP.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    images = draw(4)
    ours = clip_score(encoder.encode_images(images), encoder.encode_texts(TEXTS))
    for image, text, score in zip(images, TEXTS, ours.clip(min=0), strict=True):  # as torchmetrics has it
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        theirs = reference_clip_score(pixels, text, model_name_or_path=lambda: (model, processor)).item()
        assert score == pytest.approx(theirs, abs=2 * SCORE_ROUNDING)


def test_scores_match_the_model_called_by_hand(encoder: ClipEncoder, folder: Path) -> None:
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    images = draw(4)
    inputs = processor(text=TEXTS, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits_per_image / model.logit_scale.exp()
    ours = clip_score(encoder.encode_images(images), encoder.encode_texts(TEXTS))
    np.testing.assert_allclose(ours, 100 * logits.diagonal().numpy(), atol=SCORE_ROUNDING)


def test_batches_change_nothing_but_float_noise(encoder: ClipEncoder) -> None:
    images = draw(7)
    together = encoder.encode_images(images)
    np.testing.assert_array_equal(encoder.encode_images(images), together)
    np.testing.assert_allclose(
        np.concatenate([encoder.encode_images([image]) for image in images]), together, atol=ROUNDING
    )
    np.testing.assert_allclose(encoder.encode_images(images[::-1])[::-1], together, atol=ROUNDING)
    alone = np.concatenate([encoder.encode_texts([text]) for text in TEXTS])
    np.testing.assert_allclose(alone, encoder.encode_texts(TEXTS), atol=ROUNDING)


def test_paths_arrays_and_pil_images_give_one_feature(encoder: ClipEncoder, tmp_path: Path) -> None:
    image = draw(1)[0]
    image.save(tmp_path / "a.png")
    features = encoder.encode_images([tmp_path / "a.png", image, np.asarray(image)])
    np.testing.assert_allclose(features, np.broadcast_to(features[0], features.shape), atol=ROUNDING)
    assert encoder.digest_picture(image) == encoder.digest_picture(np.asarray(image))
    assert encoder.digest_picture(tmp_path / "a.png") != encoder.digest_picture(image)


@pytest.mark.parametrize(("layer", "taken"), [(0, 0), (1, 1), (2, 2), (9, 2)])
def test_hidden_features_match_the_model_called_by_hand(
    encoder: ClipEncoder, folder: Path, layer: int, taken: int
) -> None:
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPImageProcessorPil.from_pretrained(folder)
    images = draw(4)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
    patches = states[taken][:, 1:].numpy()
    expected = np.concatenate([patches.mean(axis=1), patches.std(axis=1)], axis=1)
    ours = encoder.encode_hidden(images, layer)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, atol=10 * ROUNDING)
    assert encoder.hidden_layer(layer) == taken
    assert encoder.encode_hidden([], layer).shape == (0, 64)


def test_one_pass_gives_both_kinds_of_features_to_the_bit(encoder: ClipEncoder) -> None:
    images = draw(4)
    both = encoder.encode_images_and_hidden(images, 1)
    np.testing.assert_array_equal(both[0], encoder.encode_images(images))
    np.testing.assert_array_equal(both[1], encoder.encode_hidden(images, 1))
    assert not any(block._forward_hooks for block in encoder._model.vision_model.encoder.layers)


def test_a_negative_layer_is_refused(encoder: ClipEncoder) -> None:
    with pytest.raises(ValueError, match="layer -1: must be 0"):
        encoder.encode_hidden(draw(1), -1)


def test_long_texts_are_cut_and_counted(encoder: ClipEncoder) -> None:
    long = "abcdefghijklmn"  # 14 letters, start and end: exactly 16 tokens
    assert encoder.count_truncated(["cat", long, f"{long}o"]) == 1
    np.testing.assert_array_equal(encoder.encode_texts([f"{long}o"]), encoder.encode_texts([f"{long}pqr"]))


def test_identity_says_what_made_a_feature(encoder: ClipEncoder, folder: Path) -> None:
    identity = encoder.identity
    assert identity["model"] == str(folder)
    assert len(identity["digest"]) == 64
    assert identity["dtype"] == "float32"
    assert identity["scale"] == "100 x cosine"
    assert identity["preprocessing"]["size_px"] == {"shortest_edge": 32}
    assert identity["preprocessing"]["resample"] == "bicubic"
    assert identity["preprocessing"]["mean"][0] == pytest.approx(0.48145466)
    assert json.loads(json.dumps(identity)) == identity


def test_unreadable_and_broken_pictures_are_named(folder: Path, tmp_path: Path) -> None:
    encoder = load_encoder(ScoreSection(model=str(folder), batch_size=2), CPU)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(RunError, match=r"bad\.png: cannot be read as a picture .*: delete it and run"):
        encoder.encode_images([*draw(2), tmp_path / "bad.png"])
    draw(1)[0].save(tmp_path / "flipped.png")
    flip_bit(tmp_path / "flipped.png", 2000)  # of the pixels: only the checksum tells
    with pytest.raises(RunError, match=r"flipped\.png: cannot be read as a picture"):
        encoder.encode_images([tmp_path / "flipped.png"])
    with torch.no_grad():
        encoder._model.visual_projection.weight.fill_(torch.nan)
    draw(1)[0].save(tmp_path / "third.png")
    with pytest.raises(RunError, match=r"picture 0 of the list: its CLIP feature .* is not finite"):
        encoder.encode_images([*draw(2), tmp_path / "third.png"])
    with pytest.raises(RunError, match=r"third\.png: its CLIP feature"):
        encoder.encode_images([tmp_path / "third.png"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_the_place_of_a_picture_or_of_the_cache_is_not_opened(
    encoder: ClipEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(RunError, match=r"pipe\.png: is a named pipe, where a file is needed"):
        encoder.encode_images([tmp_path / "pipe.png"])
    with pytest.raises(StorageError, match=r"pipe\.png: is a named pipe, where a file is needed"):
        encoder.digest_picture(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "features.safetensors")
    with caplog.at_level("WARNING", logger="lorascope"):
        encoder.cached(tmp_path / "features.safetensors").encode_images(draw(1))
    assert "is a named pipe" in caplog.text
    assert (tmp_path / "features.safetensors").is_file()


def write_config(path: Path, **values: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(values))
    return path


def drop_weights(path: Path, folder: Path) -> Path:
    model = CLIPModel.from_pretrained(folder)
    for file in folder.iterdir():
        if file.suffix == ".json":
            path.mkdir(exist_ok=True)
            (path / file.name).write_bytes(file.read_bytes())
    state = {
        name: value for name, value in model.state_dict().items() if not name.startswith("visual_projection")
    }
    model.save_pretrained(path, state_dict=state)
    return path


def copy_without_tokenizer(path: Path, folder: Path) -> Path:
    path.mkdir()
    for file in folder.iterdir():
        if "tokenizer" not in file.name:
            (path / file.name).write_bytes(file.read_bytes())
    return path


def break_tokenizer(path: Path, folder: Path) -> Path:
    copy_without_tokenizer(path, folder)
    (path / "tokenizer.json").write_text("{")
    return path


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda path, folder: path, "no such file or folder"),
        (lambda path, folder: path.mkdir() or path, "no readable config.json"),
        (
            lambda path, folder: write_config(path, model_type="siglip"),
            "holds a model of type 'siglip', must be 'clip'",
        ),
        (lambda path, folder: write_config(path, model_type="clip"), "cannot be loaded as CLIP"),
        (drop_weights, "lacks 1 weights of a CLIP model, such as visual_projection.weight"),
        (copy_without_tokenizer, "its tokenizer has no vocabulary"),
        (break_tokenizer, "its tokenizer cannot be loaded"),
    ],
)
def test_what_is_no_clip_folder_is_refused(
    build: Callable[[Path, Path], Path], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(BaseModelError, match=message) as error:
        load_encoder(ScoreSection(model=str(build(tmp_path / "scorer", folder))), CPU)
    assert "\n" not in str(error.value)
    assert "give" in str(error.value)


def test_an_unreachable_hub_is_one_line() -> None:
    with pytest.raises(HubError, match="score.model = 'someone/clip': not complete in the cache") as error:
        load_encoder(ScoreSection(model="someone/clip"), CPU)
    assert "\n" not in str(error.value)


def make_dinov2(path: Path, num_registers: int) -> Path:
    """A random DINOv2 of a few thousand weights: pictures of 28 px in 2 x 2 patches."""
    torch.manual_seed(1)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,  # as on the hub, larger than what the preprocessing gives
        "patch_size": 14,
    }
    if num_registers:
        config = Dinov2WithRegistersConfig(**sizes, num_register_tokens=num_registers)
        Dinov2WithRegistersModel(config).save_pretrained(path)
    else:
        Dinov2Model(Dinov2Config(**sizes)).save_pretrained(path)
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(
        path
    )
    return path


def load_style(folder: Path) -> StyleEncoder:
    encoder = load_style_encoder(ScoreSection(style_model=str(folder), batch_size=3), CPU)
    assert encoder is not None
    return encoder


@pytest.mark.parametrize("num_registers", [0, 2])
@pytest.mark.parametrize("layer", [0, 2, 7])
def test_style_features_match_dinov2_called_by_hand(tmp_path: Path, num_registers: int, layer: int) -> None:
    encoder = load_style(make_dinov2(tmp_path, num_registers))
    model_class = Dinov2WithRegistersModel if num_registers else Dinov2Model
    model, images = model_class.from_pretrained(tmp_path).eval(), draw(4)
    pixels = BitImageProcessorPil.from_pretrained(tmp_path)(images=images, return_tensors="pt")
    with torch.no_grad():
        states = model(**pixels, output_hidden_states=True).hidden_states
    patches = states[min(layer, 3)][:, 1 + num_registers :].numpy()
    assert patches.shape == (4, 4, 16)
    expected = np.concatenate([patches.mean(axis=1), patches.std(axis=1)], axis=1)
    np.testing.assert_allclose(encoder.encode_hidden(images, layer), expected, atol=10 * ROUNDING)
    assert encoder.hidden_layer(layer) == min(layer, 3)
    assert encoder.identity["model"] == str(tmp_path)
    assert encoder.identity["preprocessing"]["crop_px"]["height"] == 28


def test_a_clip_folder_gives_the_style_features_of_its_own_tower(encoder: ClipEncoder, folder: Path) -> None:
    images = draw(4)
    np.testing.assert_array_equal(load_style(folder).encode_hidden(images), encoder.encode_hidden(images))


def test_style_features_are_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, images, path = load_style(folder), draw(4), tmp_path / "style.safetensors"
    expected = encoder.cached(path).encode_hidden(images)
    again = encoder.cached(path)
    monkeypatch.setattr(again, "_tower", None)  # the model is not asked
    monkeypatch.setattr(again, "hidden_layer", lambda layer: layer)
    np.testing.assert_array_equal(again.encode_hidden(images), expected)
    np.testing.assert_array_equal(encoder.encode_hidden(images), expected)


def test_without_a_second_model_there_is_none() -> None:
    assert check_style_encoder(ScoreSection()) is None
    assert load_style_encoder(ScoreSection(), CPU) is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda path: path, "no such file or folder"),
        (lambda path: path.mkdir() or path, "no readable config.json there"),
        (
            lambda path: write_config(path, model_type="siglip"),
            "holds a model of type 'siglip', must be 'clip' or 'dinov2' or 'dinov2_with_registers'",
        ),
        (lambda path: write_config(path, model_type=["clip"]), r"type \['clip'\], must be"),
        (lambda path: write_config(path, model_type="dinov2"), "cannot be loaded as DINOv2"),
    ],
)
def test_what_is_no_style_model_is_refused(
    build: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    section = ScoreSection(style_model=str(build(tmp_path / "style")))
    with pytest.raises(BaseModelError, match=rf"score\.style_model = .*: .*{message}") as error:
        load_style_encoder(section, CPU)
    assert "\n" not in str(error.value)
    assert "give" in str(error.value)


def test_style_models_are_read_from_safetensors_alone(tmp_path: Path) -> None:
    make_dinov2(tmp_path, 0)
    weights = tmp_path / "model.safetensors"
    torch.save(Dinov2Model.from_pretrained(tmp_path).state_dict(), tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(
        BaseModelError, match="cannot be loaded as DINOv2 .*: give a folder with a Dinov2Model"
    ):
        load_style(tmp_path)


def test_a_style_model_with_missing_or_broken_weights_is_refused(tmp_path: Path) -> None:
    make_dinov2(tmp_path, 0)
    weights = dict(load_tensors(tmp_path / "model.safetensors"))
    weights["layernorm.bias"][:] = torch.nan  # it is not in the way of hidden layers
    weights["encoder.layer.1.mlp.fc1.bias"][:] = torch.nan
    save_tensors(tmp_path / "model.safetensors", weights, {"format": "pt"})
    encoder = load_style(tmp_path)
    assert np.isfinite(encoder.encode_hidden(draw(1), 1)).all()
    with pytest.raises(RunError, match="picture 0 of the list: its feature by .* is not finite: check the"):
        encoder.encode_hidden(draw(1))
    del weights["layernorm.bias"]
    save_tensors(tmp_path / "model.safetensors", weights, {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"lacks 1 weights of a DINOv2 model, such as layernorm\.bias"):
        load_style(tmp_path)


class Counting:
    """Counts the pictures that really pass through the model."""

    def __init__(self, encoder: ClipEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = 0
        inner = encoder._project

        def project(pixels: torch.Tensor) -> torch.Tensor:
            self.images += len(pixels)
            return inner(pixels)

        monkeypatch.setattr(encoder, "_project", project)


def test_cache_gives_the_same_features_without_the_model(
    encoder: ClipEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, path = draw(4), tmp_path / "features.safetensors"
    expected = encoder.encode_images(images)
    counting = Counting(encoder, monkeypatch)
    first = encoder.cached(path)
    np.testing.assert_array_equal(first.encode_images(images), expected)
    texts = first.encode_texts(TEXTS)
    content = path.read_bytes()
    second = encoder.cached(path)
    np.testing.assert_array_equal(second.encode_images(images), expected)
    np.testing.assert_array_equal(second.encode_texts(TEXTS), texts)
    assert counting.images == 4
    assert path.read_bytes() == content
    second.encode_images(images[:2] + draw(1, seed=9))
    assert counting.images == 7  # a list is encoded whole or not at all
    np.testing.assert_array_equal(encoder.cached(path).encode_images(images), expected)
    assert second.encode_images([]).shape == (0, 24)


def test_hidden_features_are_kept_beside_those_of_an_older_file(
    encoder: ClipEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, path = draw(4), tmp_path / "features.safetensors"
    features, hidden = encoder.encode_images_and_hidden(images, 1)
    encoder.cached(path).encode_images(images)  # what the score stage leaves
    counting = Counting(encoder, monkeypatch)
    both = encoder.cached(path).encode_images_and_hidden(images, 1)
    assert counting.images == 4
    again = encoder.cached(path)
    assert again.hidden_layer(9) == 2
    for images_kept, hidden_kept in (both, again.encode_images_and_hidden(images, 1)):
        np.testing.assert_array_equal(images_kept, features)
        np.testing.assert_array_equal(hidden_kept, hidden)
    np.testing.assert_array_equal(again.encode_hidden(images, 1), hidden)
    np.testing.assert_array_equal(again.encode_images(images), features)
    assert counting.images == 4
    last = again.encode_hidden(images, 2)
    assert counting.images == 8
    np.testing.assert_array_equal(again.encode_hidden(images, 9), last)  # the same layer
    assert again.encode_images_and_hidden([])[1].shape == (0, 64)
    assert counting.images == 8


def test_cache_of_another_encoder_or_damaged_is_recomputed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(ScoreSection(model=str(folder), batch_size=3), CPU)
    images, path = draw(3), tmp_path / "features.safetensors"
    expected = encoder.cached(path).encode_images(images)
    encoder.identity = {**encoder.identity, "digest": "other"}
    counting = Counting(encoder, monkeypatch)
    CachedEncoder(encoder, path).encode_images(images)
    assert counting.images == 3
    path.write_bytes(path.read_bytes()[:50])
    np.testing.assert_array_equal(CachedEncoder(encoder, path).encode_images(images), expected)
    assert counting.images == 6


@pytest.mark.parametrize("place", [-1, -2000, 200, 3])
def test_a_flipped_bit_in_the_cache_is_told_and_features_are_computed_again(
    encoder: ClipEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: int,
) -> None:
    images, path = draw(30), tmp_path / "features.safetensors"
    expected = encoder.cached(path).encode_images(images)
    content = path.read_bytes()
    counting = Counting(encoder, monkeypatch)
    flip_bit(path, place)
    with caplog.at_level("WARNING", logger="lorascope"):
        np.testing.assert_array_equal(encoder.cached(path).encode_images(images), expected)
    assert counting.images == 30
    assert f"{path}: damaged (" in caplog.text
    assert path.read_bytes() == content


def test_a_cache_of_0_1_0_without_a_digest_is_computed_again(
    encoder: ClipEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images, path = draw(2), tmp_path / "features.safetensors"
    cached = encoder.cached(path)
    expected = cached.encode_images(images)
    facts = json.dumps({"key": cached.file._key, "scorer": encoder.identity})
    wrong = {name: torch.from_numpy(-feature) for name, feature in cached.file._features.items()}
    save_tensors(path, wrong, {"lorascope": facts})
    counting = Counting(encoder, monkeypatch)
    np.testing.assert_array_equal(encoder.cached(path).encode_images(images), expected)
    assert counting.images == 2
    assert not caplog.records


PROMPTS = [Prompt("normal", n, text) for n, text in enumerate(["a cat", "a dog", "the sea"])]
PROMPTS += [
    Prompt("abstract", n, text) for n, text in enumerate(["waiting", "hope", "abcdefghijklmnopqrstuvwxyz"])
]


def build_run(path: Path) -> tuple[RunDir, list[Generated]]:
    """Pictures of the base and two arms, six prompts and two seeds each."""
    run, generated = RunDir(path), []
    for arm, rank in (("r16", 16), (BASE, 0), ("r4", 4)):
        settings = (None, None, None) if arm == BASE else (2.0 * rank, 5e-4, 0)
        pictures = iter(draw(12, seed=rank))
        for prompt in PROMPTS:
            for seed in (0, 1):
                name = f"images/{arm}/{prompt.category}-{prompt.index:03d}-{seed}.png"
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                next(pictures).save(path / name)
                generated.append(
                    Generated(arm, rank, *settings, prompt.category, prompt.index, prompt.text, seed, name)
                )
    return run, generated


CONFIG = StudyConfig.model_validate({"data": {"resolution_px": 32}})


def test_score_run_writes_every_row(encoder: ClipEncoder, tmp_path: Path) -> None:
    run, generated = build_run(tmp_path)
    heldout = [
        (picture, f"caption {letter}") for picture, letter in zip(draw(3, seed=7), LETTERS, strict=False)
    ]
    scores = score_run(run, CONFIG, encoder, generated, heldout, PROMPTS)
    assert read_scores(run) == scores
    assert scores.arms == ("r4", "r16")
    assert scores.scorer == encoder.identity
    assert scores.num_truncated == 1
    assert [len(scores.of(name)) for name in (BASE, "r4", "r16", NOISE, SHUFFLED, REAL)] == [
        12,
        12,
        12,
        6,
        12,
        3,
    ]
    row = next(row for row in scores.of("r4", "normal") if (row.prompt_index, row.seed) == (1, 1))
    by_hand = clip_score(encoder.encode_images([tmp_path / row.image]), encoder.encode_texts(["a dog"]))
    assert row.clip_score == pytest.approx(float(by_hand[0]), abs=SCORE_ROUNDING)
    assert row.image == "images/r4/normal-001-1.png"
    assert row.image_digest == encoder.digest_picture(tmp_path / row.image)
    real = clip_score(
        encoder.encode_images([picture for picture, _ in heldout]),
        encoder.encode_texts([text for _, text in heldout]),
    )
    assert [row.clip_score for row in scores.of(REAL)] == pytest.approx(real, abs=SCORE_ROUNDING)
    assert [row.prompt for row in scores.of(REAL)] == [text for _, text in heldout]
    shuffled = scores.of(SHUFFLED)[0]
    picture = next(row for row in scores.of(BASE) if row.image == shuffled.image)
    assert shuffled.prompt != picture.prompt
    assert shuffled.category == picture.category
    by_hand = clip_score(
        encoder.encode_images([tmp_path / shuffled.image]), encoder.encode_texts([shuffled.prompt])
    )
    assert shuffled.clip_score == pytest.approx(float(by_hand[0]), abs=SCORE_ROUNDING)


def test_a_resumed_scoring_gives_the_same_bytes(encoder: ClipEncoder, tmp_path: Path) -> None:
    contents = []
    for name, kept in (("whole", None), ("resumed", BASE), ("repeated", "all")):
        run, generated = build_run(tmp_path / name)
        if kept == BASE:  # what an interruption after the base leaves behind
            cached = encoder.cached(run.features_safetensors)
            cached.encode_texts([prompt.text for prompt in PROMPTS])
            cached.encode_images([run.path / item.image for item in generated if item.arm == BASE])
        if kept == "all":
            score_run(run, CONFIG, encoder, generated[::-1], [], PROMPTS)
        score_run(run, CONFIG, encoder, generated, [], PROMPTS)
        contents.append(run.scores_parquet.read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_score_run_refuses_what_cannot_be_compared(encoder: ClipEncoder, tmp_path: Path) -> None:
    run, generated = build_run(tmp_path)
    with pytest.raises(RunError, match="no pictures to score"):
        score_run(run, CONFIG, encoder, [], [], PROMPTS)
    with pytest.raises(RunError, match="r4 has no picture of abstract prompt 2, seed 1, which base has"):
        score_run(run, CONFIG, encoder, generated[:-1], [], PROMPTS)
    with pytest.raises(RunError, match="normal prompt 0 is not in the study's list"):
        score_run(run, CONFIG, encoder, generated, [], PROMPTS[1:])
    assert not run.scores_parquet.exists()


def test_an_arm_or_the_base_without_pictures_is_absent(encoder: ClipEncoder, tmp_path: Path) -> None:
    run, generated = build_run(tmp_path)
    scores = score_run(run, CONFIG, encoder, [item for item in generated if item.arm == "r4"], [], PROMPTS)
    assert scores.arms == ("r4",)
    assert not scores.of(BASE)
    assert not scores.of(SHUFFLED)
    assert len(scores.of(NOISE)) == 6
