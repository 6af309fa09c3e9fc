"""CLIP features of pictures and texts, and pictures' features in a hidden layer, kept by content digest.

A text is padded to the model's full length and every batch is cut from the list as given, so features are a
function of the list alone; among other lists a row differs by float noise at most.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import (
    AutoTokenizer,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
)

from lorascope.base.location import resolve_model
from lorascope.base.weights import load_sealed, save_sealed
from lorascope.console import log
from lorascope.data.pictures import RefusedError, open_picture
from lorascope.errors import BaseModelError, RunError, WeightsError, first_line
from lorascope.machine.arithmetic import full_fp32
from lorascope.sections import ScoreSection
from lorascope.store import digest_bytes, digest_file, digest_folder, digest_json, kept_digest, read_regular

SCALE = "100 x cosine"
# Early layers hold strokes, colours and textures, late ones what is shown.
STYLE_LAYER = 2
_READERS = 4  # threads that decode pictures

Picture: TypeAlias = Path | Image.Image | NDArray[np.uint8]
Features: TypeAlias = NDArray[np.float32]

_IMAGE_PATTERNS = [
    "config.json",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "processor_config.json",
]
_PATTERNS = [
    *_IMAGE_PATTERNS,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
]
# What each model type of a folder is read by: the model and its preprocessing.
_SCORERS = {"clip": (CLIPModel, CLIPImageProcessorPil)}
_STYLE_MODELS = _SCORERS | {
    "dinov2": (Dinov2Model, BitImageProcessorPil),
    "dinov2_with_registers": (Dinov2WithRegistersModel, BitImageProcessorPil),
}


class ClipEncoder:
    """A CLIP model in fp32 with its own preprocessing. `identity` says what made a feature."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        tokenizer: Any,
        identity: dict[str, Any],
        device: torch.device,
        batch_size: int,
    ) -> None:
        self.identity = identity
        self.batch_size = batch_size
        self.device = device
        self._model = model.eval().requires_grad_(False).to(device)
        self._processor = processor
        self._tokenizer = tokenizer
        self._max_tokens = min(
            int(tokenizer.model_max_length), int(model.config.text_config.max_position_embeddings)
        )

    def encode_images(self, pictures: Sequence[Picture]) -> Features:
        """Features of pictures (paths, PIL images or uint8 arrays [height, width, 3]): float32 [n, d] of unit
        norm.

        Raises `RunError`, naming the picture, if one cannot be read or its feature is not finite.
        """

        def encode(part: Sequence[Picture], start: int) -> torch.Tensor:
            return self._project(_pixels(self._processor, part, start))

        return self._encode(pictures, encode, lambda n: _name(pictures[n], n), self._num_features)

    def encode_hidden(self, pictures: Sequence[Picture], layer: int = STYLE_LAYER) -> Features:
        """Features of pictures in a hidden layer of the image tower: float32 [n, 2 w], not of unit norm.

        The mean of each of the layer's w channels over the picture's patches, then their standard deviations,
        without the class token. Layer 0 is the tower's input, `hidden_layer` says which layer is taken.
        Raises as `encode_images` does, and ValueError for a negative layer.
        """
        return self.encode_images_and_hidden(pictures, layer)[1]

    def encode_images_and_hidden(
        self, pictures: Sequence[Picture], layer: int = STYLE_LAYER
    ) -> tuple[Features, Features]:
        """What `encode_images` and `encode_hidden` give, in one pass through the model."""
        tower, taken = self._model.vision_model, self.hidden_layer(layer)

        def encode(part: Sequence[Picture], start: int) -> torch.Tensor:
            with _catching(tower, taken) as caught:
                features = self._project(_pixels(self._processor, part, start))
            return torch.cat([features, _over_patches(caught.pop())], dim=1)

        width = self._num_features + 2 * int(self._model.config.vision_config.hidden_size)
        both = self._encode(pictures, encode, lambda n: _name(pictures[n], n), width)
        return both[:, : self._num_features].copy(), both[:, self._num_features :].copy()

    def hidden_layer(self, layer: int = STYLE_LAYER) -> int:
        """The hidden layer that stands for `layer`: the last one where the image tower has fewer."""
        return _within(layer, self._model.vision_model)

    def encode_texts(self, texts: Sequence[str]) -> Features:
        """Features of texts, cut at the model's length: float32 [n, d] of unit norm."""

        def encode(part: Sequence[str], start: int) -> torch.Tensor:
            tokens = self._tokenizer(
                list(part),
                padding="max_length",
                max_length=self._max_tokens,
                truncation=True,
                return_tensors="pt",
            )
            ids, mask = (
                tokens["input_ids"].to(self.device),
                tokens["attention_mask"].to(self.device),
            )  # (N, T)
            return _unit(_projected(self._model.get_text_features(input_ids=ids, attention_mask=mask)))

        return self._encode(texts, encode, lambda n: f"text {texts[n]!r}", self._num_features)

    @property
    def _num_features(self) -> int:
        return int(self._model.config.projection_dim)

    def _project(self, pixels: torch.Tensor) -> torch.Tensor:
        return _unit(_projected(self._model.get_image_features(pixel_values=pixels.to(self.device))))

    def _encode(
        self,
        items: Sequence[Any],
        encode: Callable[[Sequence[Any], int], torch.Tensor],
        name: Callable[[int], str],
        width: int,
    ) -> Features:
        def refuse(position: int) -> RunError:
            return RunError(
                f"{name(position)}: its CLIP feature by {self.identity['model']} is not finite: "
                "check the scorer's weights, or use another score.model"
            )

        return _in_batches(items, self.batch_size, encode, width, refuse)

    def count_truncated(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the model reads."""
        return sum(
            len(self._tokenizer(text, verbose=False)["input_ids"]) > self._max_tokens for text in texts
        )

    def digest_picture(self, picture: Picture) -> str:
        """SHA-256 of a file's bytes, or of the RGB pixels of a picture in memory."""
        return _digest(picture)

    def cached(self, path: Path) -> "CachedEncoder":
        """This encoder with its features kept in the file `path`."""
        return CachedEncoder(self, path)


class FeatureFile:
    """Features in a safetensors file, each under a name with the digest of what it was made from.

    The unit is the whole list of a call: it is encoded afresh unless all of it is in the file, and what the
    file holds is never replaced. So a call gives the same bytes after an interruption as without one. A file
    that is damaged to a bit, which a warning tells, or made by another encoder, device type or batch size, is
    started anew; so is one of 0.1.0, which holds no digest to tell damage by.
    """

    def __init__(self, path: Path, identity: dict[str, Any], device: torch.device, batch_size: int) -> None:
        self.path = path
        self._identity = identity
        self._key = digest_json([identity, device.type, batch_size])
        self._features = self._read()

    def take(
        self, lists: Sequence[Sequence[str]], encode: Callable[[], Sequence[Features]]
    ) -> list[Features]:
        """The features of each list of names; what `encode` gives for all lists where any is not there."""
        if not lists[0]:
            return list(encode())
        if any(name not in self._features for names in lists for name in names):
            for names, features in zip(lists, encode(), strict=True):
                for name, feature in zip(names, features, strict=True):
                    self._features.setdefault(name, feature)
            self._write()
        return [np.stack([self._features[name] for name in names]) for names in lists]

    def _read(self) -> dict[str, Features]:
        if not self.path.exists():
            return {}
        try:
            tensors, metadata = load_sealed(self.path)
        except WeightsError as error:
            reason = str(error).removeprefix(f"{self.path}: ")
            log.warning("score    %s: damaged (%s): features are computed again", self.path, reason)
            return {}
        if metadata.get("key") != self._key:
            return {}
        # copies: the file cannot be replaced on Windows while tensors are mapped from it
        return {name: tensor.numpy().copy() for name, tensor in tensors.items()}

    def _write(self) -> None:
        scorer = json.dumps(self._identity, sort_keys=True, ensure_ascii=False)
        tensors = {name: torch.from_numpy(feature) for name, feature in self._features.items()}
        save_sealed(self.path, tensors, {"key": self._key, "scorer": scorer})


class CachedEncoder:
    """An encoder whose features are kept in a `FeatureFile` under `image:<digest>`, `text:<digest>` and
    `hidden-<layer>:<digest>`.
    """

    def __init__(self, encoder: ClipEncoder, path: Path) -> None:
        self.encoder = encoder
        self.identity = encoder.identity
        self.file = FeatureFile(path, encoder.identity, encoder.device, encoder.batch_size)

    def encode_images(self, pictures: Sequence[Picture]) -> Features:
        """As `ClipEncoder.encode_images`."""
        names = [f"image:{_digest(picture)}" for picture in pictures]
        return self.file.take([names], lambda: [self.encoder.encode_images(pictures)])[0]

    def encode_texts(self, texts: Sequence[str]) -> Features:
        """As `ClipEncoder.encode_texts`."""
        names = [f"text:{digest_bytes(text.encode())}" for text in texts]
        return self.file.take([names], lambda: [self.encoder.encode_texts(texts)])[0]

    def encode_hidden(self, pictures: Sequence[Picture], layer: int = STYLE_LAYER) -> Features:
        """As `ClipEncoder.encode_hidden`."""
        names = [f"hidden-{self.hidden_layer(layer)}:{_digest(picture)}" for picture in pictures]
        return self.file.take([names], lambda: [self.encoder.encode_hidden(pictures, layer)])[0]

    def encode_images_and_hidden(
        self, pictures: Sequence[Picture], layer: int = STYLE_LAYER
    ) -> tuple[Features, Features]:
        """As `ClipEncoder.encode_images_and_hidden`."""
        digests = [_digest(picture) for picture in pictures]
        kinds = ("image", f"hidden-{self.hidden_layer(layer)}")
        names = [[f"{kind}:{digest}" for digest in digests] for kind in kinds]
        images, hidden = self.file.take(names, lambda: self.encoder.encode_images_and_hidden(pictures, layer))
        return images, hidden

    def hidden_layer(self, layer: int = STYLE_LAYER) -> int:
        """As `ClipEncoder.hidden_layer`."""
        return self.encoder.hidden_layer(layer)

    def count_truncated(self, texts: Sequence[str]) -> int:
        """As `ClipEncoder.count_truncated`."""
        return self.encoder.count_truncated(texts)

    def digest_picture(self, picture: Picture) -> str:
        """As `ClipEncoder.digest_picture`."""
        return self.encoder.digest_picture(picture)

    def cached(self, path: Path) -> "CachedEncoder":
        """As `ClipEncoder.cached`."""
        return CachedEncoder(self.encoder, path)


class StyleEncoder:
    """The image tower of a second model in fp32, CLIP's or DINOv2, for its hidden features alone.

    A witness beside the scorer's own: what both say of a style is not the liking of one model.
    """

    def __init__(
        self, model: Any, processor: Any, identity: dict[str, Any], device: torch.device, batch_size: int
    ) -> None:
        self.identity = identity
        self.batch_size = batch_size
        self.device = device
        self._tower = getattr(model, "vision_model", model).eval().requires_grad_(False).to(device)
        self._processor = processor
        # The class token, and DINOv2's registers where it has some.
        self._num_others = 1 + int(getattr(self._tower.config, "num_register_tokens", 0))
        self._file: FeatureFile | None = None

    def encode_hidden(self, pictures: Sequence[Picture], layer: int = STYLE_LAYER) -> Features:
        """As `ClipEncoder.encode_hidden`; registers are left out as the class token is."""
        if self._file is None:
            return self._encode(pictures, layer)
        names = [f"hidden-{self.hidden_layer(layer)}:{_digest(picture)}" for picture in pictures]
        return self._file.take([names], lambda: [self._encode(pictures, layer)])[0]

    def hidden_layer(self, layer: int = STYLE_LAYER) -> int:
        """The hidden layer that stands for `layer`: the last one where the model has fewer."""
        return _within(layer, self._tower)

    def cached(self, path: Path) -> "StyleEncoder":
        """This encoder with its features kept in the `FeatureFile` at `path`, no other encoder's."""
        encoder = copy.copy(self)
        encoder._file = FeatureFile(path, self.identity, self.device, self.batch_size)
        return encoder

    def _encode(self, pictures: Sequence[Picture], layer: int) -> Features:
        taken = self.hidden_layer(layer)

        def encode(part: Sequence[Picture], start: int) -> torch.Tensor:
            with _catching(self._tower, taken) as caught:
                self._tower(pixel_values=_pixels(self._processor, part, start).to(self.device))
            return _over_patches(caught.pop(), self._num_others)

        def refuse(position: int) -> RunError:
            return RunError(
                f"{_name(pictures[position], position)}: its feature by {self.identity['model']} is not "
                "finite: check the model's weights, or use another score.style_model"
            )

        width = 2 * int(self._tower.config.hidden_size)
        return _in_batches(pictures, self.batch_size, encode, width, refuse)


_REMEDY = "give a folder with a CLIPModel in safetensors, its tokenizer and its preprocessing"
_STYLE_REMEDY = "give a folder with a Dinov2Model or CLIPModel in safetensors and its preprocessing"


def check_encoder(section: ScoreSection) -> Path:
    """The folder of the scorer, downloaded if it must be; loads no weights.

    Raises `BaseModelError` for a missing folder, an unreachable hub, or a folder of another kind of model.
    """
    folder = resolve_model(section.model, section.revision, "scorer", _PATTERNS, "score.model")
    _model_type(folder, f"score.model = {section.model!r}: {folder}", _SCORERS, _REMEDY)
    return folder


def check_style_encoder(section: ScoreSection) -> Path | None:
    """As `check_encoder`, of the second model for style; None where the study names none."""
    if section.style_model is None:
        return None
    folder = resolve_model(section.style_model, None, "scorer", _IMAGE_PATTERNS, "score.style_model")
    _model_type(
        folder, f"score.style_model = {section.style_model!r}: {folder}", _STYLE_MODELS, _STYLE_REMEDY
    )
    return folder


def load_encoder(section: ScoreSection, device: torch.device) -> ClipEncoder:
    """Load the scorer: the package's own (`pocket`), a CLIP folder, or a hub snapshot; safetensors weights
    only.

    Raises `BaseModelError` as `check_encoder` does, and for a folder that holds no whole CLIP model.
    """
    folder = check_encoder(section)
    whose = f"score.model = {section.model!r}: {folder}"
    model, processor = _load(folder, whose, _SCORERS, _REMEDY)
    tokenizer = _load_tokenizer(folder, whose)
    identity = _identity(section.model, folder, processor) | {"scale": SCALE}
    return ClipEncoder(model, processor, tokenizer, identity, device, section.batch_size)


def load_style_encoder(section: ScoreSection, device: torch.device) -> StyleEncoder | None:
    """Load the second model for style, as `load_encoder` loads the scorer; None where the study names none.

    Raises `BaseModelError` as `check_style_encoder` does, and for a folder that holds no whole model.
    """
    folder = check_style_encoder(section)
    if folder is None or section.style_model is None:
        return None
    whose = f"score.style_model = {section.style_model!r}: {folder}"
    model, processor = _load(folder, whose, _STYLE_MODELS, _STYLE_REMEDY)
    identity = _identity(section.style_model, folder, processor)
    return StyleEncoder(model, processor, identity, device, section.batch_size)


def _model_type(folder: Path, whose: str, known: Mapping[str, Any], remedy: str) -> str:
    """The type of model a folder says it holds, one of `known`."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{whose}: no readable config.json there: {remedy}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in known:
        wanted = " or ".join(repr(name) for name in known)
        raise BaseModelError(f"{whose}: holds a model of type {kind!r}, must be {wanted}: {remedy}")
    return kind


def _load(folder: Path, whose: str, known: Mapping[str, Any], remedy: str) -> tuple[Any, Any]:
    """The model of a folder in fp32, from safetensors, and its preprocessing."""
    kind = _model_type(folder, whose, known, remedy)
    model_class, processor_class = known[kind]
    name = "CLIP" if kind == "clip" else "DINOv2"
    try:
        options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
        model, loading = model_class.from_pretrained(folder, output_loading_info=True, **options)
        processor = processor_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the libraries raise anything here, from KeyError to SafetensorError
        raise BaseModelError(
            f"{whose}: cannot be loaded as {name} ({first_line(error)}): {remedy}"
        ) from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise BaseModelError(
            f"{whose}: lacks {len(missing)} weights of a {name} model, such as {missing[0]}: {remedy}"
        )
    return model, processor


def _load_tokenizer(folder: Path, whose: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises anything here, from KeyError to OSError
        raise BaseModelError(
            f"{whose}: its tokenizer cannot be loaded ({first_line(error)}): {_REMEDY}"
        ) from error
    # Without files the library makes one that takes every word for unknown, and says nothing.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise BaseModelError(f"{whose}: its tokenizer has no vocabulary: {_REMEDY}")
    return tokenizer


def _identity(model: str, folder: Path, processor: Any) -> dict[str, Any]:
    """What makes features: the model, by name and content, and how pictures become its input."""
    return {
        "model": model,
        "digest": digest_folder(folder, digest=kept_digest),
        "dtype": "float32",
        "preprocessing": _preprocessing(processor),
    }


def _preprocessing(processor: Any) -> dict[str, Any]:
    """How a picture becomes the model's input: sizes in pixels, `None` where a step is left out."""
    return {
        "size_px": dict(processor.size) if processor.do_resize else None,
        "crop_px": dict(processor.crop_size) if processor.do_center_crop else None,
        "resample": Image.Resampling(processor.resample).name.lower() if processor.do_resize else None,
        "mean": [float(value) for value in processor.image_mean] if processor.do_normalize else None,
        "std": [float(value) for value in processor.image_std] if processor.do_normalize else None,
        "library": "pillow",
    }


def _projected(output: Any) -> torch.Tensor:
    """Features from what `get_image_features` gives: transformers 5 wraps them as the pooled output."""
    features: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return features


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Rows of unit norm, float32 on the CPU."""
    rows = features.cpu().double()  # (N, D)
    return (rows / rows.norm(dim=-1, keepdim=True)).float()


@torch.inference_mode()
def _in_batches(
    items: Sequence[Any],
    batch_size: int,
    encode: Callable[[Sequence[Any], int], torch.Tensor],
    width: int,
    refuse: Callable[[int], RunError],
) -> Features:
    """What `encode` makes of each batch and the position of its first item, float32 [n, width]."""
    parts = [np.empty((0, width), np.float32)]
    for start in range(0, len(items), batch_size):
        with full_fp32(deterministic=True):
            features = encode(items[start : start + batch_size], start)  # (N, D)
        broken = (~features.isfinite().all(dim=-1)).nonzero().flatten().tolist()
        if broken:
            raise refuse(start + broken[0])
        parts.append(features.numpy())
    return np.concatenate(parts)


def _blocks(tower: Any) -> torch.nn.ModuleList:
    """The blocks of an image tower, the only list of modules in it."""
    return next(module for module in tower.modules() if isinstance(module, torch.nn.ModuleList))


def _within(layer: int, tower: Any) -> int:
    if layer < 0:
        raise ValueError(f"layer {layer}: must be 0, the tower's input, or a block counted from 1")
    return min(layer, len(_blocks(tower)))


@contextmanager
def _catching(tower: Any, layer: int) -> Iterator[list[torch.Tensor]]:
    """Within, each pass through the tower leaves hidden layer `layer` [n, tokens, w] in the list.

    What transformers gives as `output_hidden_states` holds all layers at once.
    """
    caught: list[torch.Tensor] = []
    blocks = _blocks(tower)
    if layer == 0:
        handle = blocks[0].register_forward_pre_hook(lambda block, inputs: caught.append(inputs[0]))
    else:
        handle = blocks[layer - 1].register_forward_hook(lambda block, inputs, output: caught.append(output))
    try:
        yield caught
    finally:
        handle.remove()


def _over_patches(tokens: torch.Tensor, num_others: int = 1) -> torch.Tensor:
    """Mean and standard deviation over patches, float32 [n, 2 w] on the CPU, of tokens [n, t, w].

    The first `num_others` tokens are no patches.
    """
    std, mean = torch.std_mean(tokens[:, num_others:].cpu().double(), dim=1, correction=0)
    return torch.cat([mean, std], dim=1).float()


def _pixels(processor: Any, pictures: Sequence[Picture], start: int) -> torch.Tensor:
    """Pictures as a model takes them, float32 [n, 3, side, side]; the first has position `start`."""
    with ThreadPoolExecutor(_READERS) as readers:
        images = list(readers.map(_open, pictures, range(start, start + len(pictures))))
    pixels: torch.Tensor = processor(images=images, return_tensors="pt")["pixel_values"]
    return pixels


def _digest(picture: Picture) -> str:
    if isinstance(picture, Path):
        return digest_file(picture)
    pixels = np.asarray(_open(picture, 0))
    return digest_bytes(repr(pixels.shape).encode(), pixels.tobytes())


def _open(picture: Picture, position: int) -> Image.Image:
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture).convert("RGB")
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    try:
        return open_picture(read_regular(picture, RunError))
    except (FileNotFoundError, RefusedError) as error:
        raise RunError(
            f"{_name(picture, position)}: cannot be read as a picture ({first_line(error)}): delete it and "
            "run `lorascope sample` again"
        ) from error


def _name(picture: Picture, position: int) -> str:
    return str(picture) if isinstance(picture, Path) else f"picture {position} of the list"
