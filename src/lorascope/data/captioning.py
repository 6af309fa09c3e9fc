"""Captions for a folder of pictures by BLIP: beside each picture, or in `metadata.jsonl`.

What is there is kept and what is written is whole, so the same command again goes on where it stopped.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

from lorascope.base.hub import fetch_snapshot
from lorascope.data.captions import MAX_CAPTION_BYTES, caption_in, has_words
from lorascope.data.metadata import MetadataFile
from lorascope.data.names import is_unicode, shown
from lorascope.data.pictures import MAX_FILE_BYTES, SUFFIXES, RefusedError, open_picture
from lorascope.errors import BaseModelError, DataError, first_line
from lorascope.store import open_regular, write_text

DEFAULT_MODEL = "Salesforce/blip-image-captioning-base"
SAVE_EVERY_S = 30.0
"""`metadata.jsonl` is written anew this often, since each writing is one of the whole file."""

_PATTERNS = ["config.json", "model*.safetensors", "model.safetensors.index.json", "preprocessor_config.json"]
_PATTERNS += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"]
_READERS = 4


class Captioner:
    """A BLIP model in fp32 with its own preprocessing, that says what a picture shows."""

    def __init__(
        self, model: Any, processor: Any, tokenizer: Any, prompt: str, max_tokens: int, device: torch.device
    ) -> None:
        self._model = model.eval().requires_grad_(False).to(device)
        self._processor = processor
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._device = device
        # The first token is the start of a text and the last its end, which the model takes away.
        self._prompt = torch.tensor([tokenizer(prompt).input_ids], device=device)

    @torch.inference_mode()
    def caption(self, pictures: Sequence[Image.Image]) -> list[str]:
        """A caption for each RGB picture, the prompt included; empty where the model adds nothing to the
        prompt.

        The whole picture is squeezed into the model's square, as the model was trained. Decoding is greedy: a
        caption follows from the picture, and from the others of its batch by no more than float noise.
        """
        pixels = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(
            self._device
        )  # (N, 3, S, S)
        tokens = self._model.generate(
            pixel_values=pixels,
            input_ids=self._prompt.repeat(len(pictures), 1),
            max_new_tokens=self._max_tokens,
            do_sample=False,
            num_beams=1,
        )  # (N, prompt and at most max_tokens more)
        num_given = self._prompt.shape[1] - 1
        added = self._tokenizer.batch_decode(tokens[:, num_given:], skip_special_tokens=True)
        whole = self._tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)
        return [" ".join(text.split()) if new.strip() else "" for text, new in zip(whole, added, strict=True)]


def load_captioner(
    model: str, revision: str | None, prompt: str, max_tokens: int, device: torch.device
) -> Captioner:
    """The BLIP captioner of a hub id or a model folder; captions begin with `prompt` and have at most
    `max_tokens` more.

    Raises `BaseModelError` for a model that is no BLIP captioner or a length it cannot write, and `HubError`.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise BaseModelError(
                f"--model {model!r}: no model folder: give a folder, or a hub id such as {DEFAULT_MODEL}"
            )
        folder = fetch_snapshot(
            model, kind="model", revision=revision, patterns=_PATTERNS, what=f"--model {model!r}"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        family = config.get("model_type")
        blip, loading = BlipForConditionalGeneration.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        processor = BlipImageProcessorPil.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the libraries raise anything here
        raise BaseModelError(
            f"{folder}: cannot be loaded as a BLIP captioner ({first_line(error)}): give one like "
            f"{DEFAULT_MODEL}, with safetensors weights"
        ) from error
    if family != "blip" or loading["missing_keys"]:
        lacks = f"{len(loading['missing_keys'])} of a captioner's weights missing"
        raise BaseModelError(f"{folder}: a {family} model with {lacks}: give one like {DEFAULT_MODEL}")
    limit = blip.config.text_config.max_position_embeddings - len(tokenizer(prompt).input_ids)
    if not 1 <= max_tokens <= limit:
        raise BaseModelError(
            f"--max-tokens {max_tokens}: must be 1 to {limit}, which the model can write after this prompt"
        )
    return Captioner(blip, processor, tokenizer, prompt, max_tokens, device)


@dataclass
class CaptionResult:
    """What became of the pictures of a folder; names are relative to it.

    `num_written` have a new caption and `num_kept` had one. For `empty` the model had nothing to say;
    `skipped` could not be read or written beside, as {picture, reason}. Neither has a caption.
    """

    folder: str
    out: str
    num_pictures: int
    num_written: int = 0
    num_kept: int = 0
    empty: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether every picture has a caption."""
        return not self.empty and not self.skipped

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """A line of counts, and one for each picture without a caption."""
        lines = [
            (
                f"{self.folder}: {self.num_pictures} pictures: {self.num_written} captioned, "
                f"{self.num_kept} kept their captions"
            )
        ]
        if not self.is_complete:
            lines[0] += f", {len(self.empty) + len(self.skipped)} have none"
        lines += [
            f"  {name}: the model gave no words: caption it by hand, or with another --prompt"
            for name in self.empty
        ]
        lines += [f"  {entry['picture']}: {entry['reason']}" for entry in self.skipped]
        return "\n".join(lines)


def caption_folder(
    folder: Path,
    caption: Callable[[Sequence[Image.Image]], list[str]],
    *,
    out: Literal["sidecar", "jsonl"] = "sidecar",
    batch_size: int = 8,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> CaptionResult:
    """Caption the pictures in a folder, at any depth, in the order of their names.

    `sidecar` writes `1.txt` beside `1.png` as each batch ends; `jsonl` writes `metadata.jsonl` with
    `file_name` and `text`, where all else it holds stays as it was, every `SAVE_EVERY_S` seconds and at the
    end, an interruption included. A caption that is there (in `1.txt`, `1.caption` or `metadata.jsonl`) is
    kept unless `overwrite`; into `metadata.jsonl` captions beside the pictures are copied, since they are not
    read where there is one. Pictures are treated as they are for training. `progress` is called with the
    pictures done, those to do, and the last caption.

    Raises `DataError` where the folder has no pictures, or metadata files that do not go with `out`.
    """
    pictures = _pictures(folder)
    _check_metadata(folder, out)
    result = CaptionResult(str(folder), out, len(pictures))
    store = _Metadata(folder) if out == "jsonl" else _Sidecars(folder)
    todo = _choose(pictures, store, overwrite, result)
    done = 0
    try:
        with ThreadPoolExecutor(_READERS) as readers:
            for start in range(0, len(todo), batch_size):
                batch = todo[start : start + batch_size]
                opened = dict(zip(batch, readers.map(partial(_open, folder), batch), strict=True))
                last = _caption_batch(opened, caption, store, overwrite, result)
                done += len(batch)
                if progress:
                    progress(done, len(todo), last)
    finally:
        store.save()
    result.skipped.sort(key=lambda entry: entry["picture"])
    return result


def _choose(
    pictures: Sequence[str], store: "_Metadata | _Sidecars", overwrite: bool, result: CaptionResult
) -> list[str]:
    """The pictures to caption; the result says which captions are kept, and which pictures are left out."""
    todo = []
    for name in pictures:
        if not is_unicode(name):
            reason = "the file name is not UTF-8: rename the file"
            result.skipped.append({"picture": shown(name), "reason": reason})
            continue
        try:
            store.claim(name)
            if not overwrite and store.has(name):
                result.num_kept += 1
            else:
                todo.append(name)
        except RefusedError as error:
            result.skipped.append({"picture": name, "reason": str(error)})
    return todo


def _caption_batch(
    opened: Mapping[str, Image.Image | str],
    caption: Callable[[Sequence[Image.Image]], list[str]],
    store: "_Metadata | _Sidecars",
    overwrite: bool,
    result: CaptionResult,
) -> str:
    """Caption the pictures of a batch by name; those that could not be opened stand there with the reason.

    Gives the last caption, empty if there is none.
    """
    readable = {name: picture for name, picture in opened.items() if isinstance(picture, Image.Image)}
    captions = dict(zip(readable, caption(list(readable.values())), strict=True)) if readable else {}
    result.skipped += [
        {"picture": name, "reason": why} for name, why in opened.items() if isinstance(why, str)
    ]
    result.empty += [name for name, text in captions.items() if not text]
    for name, text in captions.items():
        if text and not overwrite and _has_now(store, name):
            result.num_kept += 1
        elif text:
            store.put(name, text)
            result.num_written += 1
    return next(reversed(captions.values()), "")


def _has_now(store: "_Metadata | _Sidecars", name: str) -> bool:
    """Whether somebody has written a caption while the model looked; one that cannot be read is kept too."""
    try:
        return store.has(name)
    except RefusedError:
        return True


def _pictures(folder: Path) -> list[str]:
    """Names of the pictures, relative to the folder, sorted; none that is hidden."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder: give a folder with pictures")
    names = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    names = sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))
    if not names:
        raise DataError(f"{folder}: no pictures ({', '.join(sorted(SUFFIXES))}): give a folder with pictures")
    return names


def _check_metadata(folder: Path, out: str) -> None:
    """Captions are read from metadata files alone where there are any: a new place beside them would not be
    read.
    """
    found = sorted(
        path.relative_to(folder).as_posix()
        for name in ("metadata.jsonl", "metadata.csv")
        for path in folder.rglob(name)
    )
    other = [name for name in found if name != "metadata.jsonl"]
    if out == "sidecar" and found:
        raise DataError(
            f"{folder / found[0]}: is there, so captions beside the pictures would not be read: use "
            "--out jsonl, or move it away"
        )
    if other:
        remedy = (
            "turn it into metadata.jsonl"
            if other[0].endswith(".csv")
            else f"caption {(folder / other[0]).parent} by itself"
        )
        raise DataError(f"{folder / other[0]}: holds captions too: {remedy}, or move it away")


def _open(folder: Path, name: str) -> Image.Image | str:
    """The picture as RGB on white, upright, or the reason why it cannot be used."""
    try:
        with (folder / name).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            return f"the image file has more bytes than the limit of {MAX_FILE_BYTES}"
        return open_picture(content)
    except RefusedError as error:
        return str(error)
    except OSError as error:
        return f"the image file cannot be read ({error.strerror})"


class _Sidecars:
    """A text file beside each picture."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._owners: dict[Path, str] = {}

    def claim(self, name: str) -> None:
        path = (self._folder / name).with_suffix(".txt")
        if (owner := self._owners.setdefault(path, name)) != name:
            raise RefusedError(f"would share {path.name} with {owner}: rename one of them")

    def has(self, name: str) -> bool:
        return bool(_beside(self._folder / name))

    def put(self, name: str, caption: str) -> None:
        write_text((self._folder / name).with_suffix(".txt"), f"{caption}\n")

    def save(self) -> None:
        """Every caption is on disk already."""


class _Metadata:
    """`metadata.jsonl` of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = MetadataFile(folder / "metadata.jsonl")
        self._saved = time.monotonic()

    def claim(self, name: str) -> None:
        """Names are distinct here."""

    def has(self, name: str) -> bool:
        if has_words(self._file.caption(name)):
            return True
        if text := _beside(self._folder / name):
            self.put(name, text)
        return bool(text)

    def put(self, name: str, caption: str) -> None:
        self._file.put(name, caption)
        if time.monotonic() - self._saved >= SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        self._file.save()
        self._saved = time.monotonic()


def _beside(picture: Path) -> str:
    """The caption in the text file beside a picture, as training would read it; empty where there is none."""
    path = next(
        (path for suffix in (".txt", ".caption") if (path := picture.with_suffix(suffix)).exists()), None
    )
    if path is None:
        return ""
    try:
        with open_regular(path, DataError) as file:
            text = caption_in(file.read(MAX_CAPTION_BYTES + 1))[0].strip()
    except RefusedError as error:
        raise RefusedError(f"{path.name}: {error}, or delete it") from error
    except (DataError, OSError) as error:
        raise RefusedError(first_line(error)) from error
    return text if has_words(text) else ""
