"""CLIP features of pictures and texts, kept by content digest.

A text is padded to the model's full length and every batch is cut from the list as given, so features are a
function of the list alone; among other lists a row differs by float noise at most.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from lorascope.base.location import resolve_model
from lorascope.base.weights import load_sealed, save_sealed
from lorascope.console import log
from lorascope.data.pictures import RefusedError, open_picture
from lorascope.errors import BaseModelError, RunError, WeightsError, first_line
from lorascope.machine.arithmetic import full_fp32
from lorascope.schema import ScoreSection
from lorascope.store import digest_bytes, digest_file, digest_folder, digest_json, kept_digest, read_regular

SCALE = "100 x cosine"
_READERS = 4  # threads that decode pictures

Picture: TypeAlias = Path | Image.Image | NDArray[np.uint8]
Features: TypeAlias = NDArray[np.float32]

_PATTERNS = [
    "config.json",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
]
_PATTERNS += [
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
]


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
            with ThreadPoolExecutor(_READERS) as readers:
                images = list(readers.map(_open, part, range(start, start + len(part))))
            pixels = self._processor(images=images, return_tensors="pt")["pixel_values"]  # (N, 3, S, S)
            return _projected(self._model.get_image_features(pixel_values=pixels.to(self.device)))

        return self._encode(pictures, encode, lambda n: _name(pictures[n], n))

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
            return _projected(self._model.get_text_features(input_ids=ids, attention_mask=mask))

        return self._encode(texts, encode, lambda n: f"text {texts[n]!r}")

    @torch.inference_mode()
    def _encode(
        self,
        items: Sequence[Any],
        encode: Callable[[Sequence[Any], int], torch.Tensor],
        name: Callable[[int], str],
    ) -> Features:
        parts = [np.empty((0, int(self._model.config.projection_dim)), np.float32)]
        for start in range(0, len(items), self.batch_size):
            with full_fp32(deterministic=True):
                features = encode(items[start : start + self.batch_size], start).cpu().double()  # (N, D)
            unit = (features / features.norm(dim=-1, keepdim=True)).float()
            broken = (~unit.isfinite().all(dim=-1)).nonzero().flatten().tolist()
            if broken:
                raise RunError(
                    f"{name(start + broken[0])}: its CLIP feature by {self.identity['model']} is not finite: "
                    "check the scorer's weights, or use another score.model"
                )
            parts.append(unit.cpu().numpy())
        return np.concatenate(parts)

    def count_truncated(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the model reads."""
        return sum(
            len(self._tokenizer(text, verbose=False)["input_ids"]) > self._max_tokens for text in texts
        )

    def digest_picture(self, picture: Picture) -> str:
        """SHA-256 of a file's bytes, or of the RGB pixels of a picture in memory."""
        if isinstance(picture, Path):
            return digest_file(picture)
        pixels = np.asarray(_open(picture, 0))
        return digest_bytes(repr(pixels.shape).encode(), pixels.tobytes())

    def cached(self, path: Path) -> "CachedEncoder":
        """This encoder with its features kept in the file `path`."""
        return CachedEncoder(self, path)


class CachedEncoder:
    """An encoder whose features are kept in a safetensors file under `image:<digest>` and `text:<digest>`.

    The unit is the whole list of a call: it is encoded afresh unless all of it is in the file, and what the
    file holds is never replaced. So a call gives the same bytes after an interruption as without one. A file
    that is damaged to a bit, which a warning tells, or made by another encoder, device type or batch size, is
    started anew; so is one of 0.1.0, which holds no digest to tell damage by.
    """

    def __init__(self, encoder: ClipEncoder, path: Path) -> None:
        self.encoder = encoder
        self.path = path
        self.identity = encoder.identity
        self._key = digest_json([encoder.identity, encoder.device.type, encoder.batch_size])
        self._features = self._read()

    def encode_images(self, pictures: Sequence[Picture]) -> Features:
        """As `ClipEncoder.encode_images`."""
        return self._encode(
            [f"image:{self.digest_picture(picture)}" for picture in pictures],
            lambda: self.encoder.encode_images(pictures),
        )

    def encode_texts(self, texts: Sequence[str]) -> Features:
        """As `ClipEncoder.encode_texts`."""
        return self._encode(
            [f"text:{digest_bytes(text.encode())}" for text in texts],
            lambda: self.encoder.encode_texts(texts),
        )

    def count_truncated(self, texts: Sequence[str]) -> int:
        """As `ClipEncoder.count_truncated`."""
        return self.encoder.count_truncated(texts)

    def digest_picture(self, picture: Picture) -> str:
        """As `ClipEncoder.digest_picture`."""
        return self.encoder.digest_picture(picture)

    def cached(self, path: Path) -> "CachedEncoder":
        """As `ClipEncoder.cached`."""
        return CachedEncoder(self.encoder, path)

    def _encode(self, names: Sequence[str], encode: Callable[[], Features]) -> Features:
        if not names:
            return encode()
        if any(name not in self._features for name in names):
            for name, feature in zip(names, encode(), strict=True):
                self._features.setdefault(name, feature)
            self._write()
        return np.stack([self._features[name] for name in names])

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
        scorer = json.dumps(self.identity, sort_keys=True, ensure_ascii=False)
        tensors = {name: torch.from_numpy(feature) for name, feature in self._features.items()}
        save_sealed(self.path, tensors, {"key": self._key, "scorer": scorer})


_REMEDY = "give a folder with a CLIPModel in safetensors, its tokenizer and its preprocessing"


def check_encoder(section: ScoreSection) -> Path:
    """The folder of the scorer, downloaded if it must be; loads no weights.

    Raises `BaseModelError` for a missing folder, an unreachable hub, or a folder of another kind of model.
    """
    folder = resolve_model(section.model, section.revision, "scorer", _PATTERNS, "score.model")
    whose = f"score.model = {section.model!r}: {folder}"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{whose}: no readable config.json there: {_REMEDY}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "clip":
        raise BaseModelError(f"{whose}: holds a model of type {kind!r}, must be 'clip': {_REMEDY}")
    return folder


def load_encoder(section: ScoreSection, device: torch.device) -> ClipEncoder:
    """Load the scorer: the package's own (`pocket`), a CLIP folder, or a hub snapshot; safetensors weights
    only.

    Raises `BaseModelError` as `check_encoder` does, and for a folder that holds no whole CLIP model.
    """
    folder = check_encoder(section)
    whose = f"score.model = {section.model!r}: {folder}"
    try:
        options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
        model, loading = CLIPModel.from_pretrained(folder, output_loading_info=True, **options)
        processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the libraries raise anything here, from KeyError to SafetensorError
        raise BaseModelError(f"{whose}: cannot be loaded as CLIP ({first_line(error)}): {_REMEDY}") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise BaseModelError(
            f"{whose}: lacks {len(missing)} weights of a CLIP model, such as {missing[0]}: {_REMEDY}"
        )
    identity = {
        "model": section.model,
        "digest": digest_folder(folder, digest=kept_digest),
        "dtype": "float32",
        "preprocessing": _preprocessing(processor),
        "scale": SCALE,
    }
    return ClipEncoder(model, processor, tokenizer, identity, device, section.batch_size)


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
