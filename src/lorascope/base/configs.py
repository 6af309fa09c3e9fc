"""What a base is without its weights: configurations and tokenizer, completed and held against each other.

Models are built from configurations before a weight is looked at, so numbers and lists that no base has are
refused first.
"""

import functools
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from lorascope.base.family import WANTED, family_of_unet
from lorascope.base.ldm import build_component
from lorascope.base.location import PARTS, WEIGHT_STEMS, locate, weight_files
from lorascope.base.weights import PICKLE_SUFFIXES, read_header
from lorascope.errors import BaseModelError, first_line
from lorascope.sections import BaseSection
from lorascope.store import read_regular

# Stable Diffusion v1.5's configurations and tokenizer, without weights.
SD15_DIR = Path(str(resources.files("lorascope") / "base" / "sd15"))
# Metadata of our checkpoint files that are not SD v1.5's: {path in the diffusers layout: content}.
CONFIGS_KEY = "lorascope.configs"
_CONFIG_FILE = re.compile(rf"({'|'.join(PARTS)})/[a-z_]+\.(json|txt)")
_CONFIG_LIMIT = 10_000_000  # bytes
# Numbers and lists of a configuration that may not be long.
_COUNTS = {
    "layers_per_block",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "num_hidden_layers",
}
_MAX_COUNT = 64
_MAX_LAYERS = 256  # the product of such numbers and the number of blocks
_MAX_FACTOR = 1e6

for _logging in (diffusers_logging, transformers_logging):  # their bars for loading weights would break ours
    _logging.disable_progress_bar()
    _logging.set_verbosity_error()


def read_configs(section: BaseSection) -> dict[str, dict[str, Any]]:
    """The configurations of the base's `unet`, `vae` and `text_encoder`, held against each other and the
    headers of its weights, of which no data is read; raises `BaseModelError`.
    """
    place = locate(section)
    with config_folder(place) as folder:
        return checked_configs(folder, place)


def load_tokenizer(section: BaseSection) -> CLIPTokenizer:
    """The base's tokenizer alone, to count the tokens of captions."""
    with config_folder(locate(section)) as folder:
        return load_part(CLIPTokenizer, folder, "tokenizer")


def count_tokens(tokenizer: CLIPTokenizer, text: str) -> int:
    """How many tokens a text has, with those of its start and end, cut nowhere."""
    return len(tokenizer(text, verbose=False).input_ids)


@contextmanager
def config_folder(place: Path) -> Iterator[Path]:
    """The folder with configurations and tokenizer of the base at `place`, as long as the context lasts: its
    own, or for a file SD v1.5's with what the file carries in their place.
    """
    if place.is_dir():
        yield place
    elif files := _carried_configs(place):
        with tempfile.TemporaryDirectory(prefix="lorascope-") as name:
            folder = Path(shutil.copytree(SD15_DIR, Path(name) / "configs"))
            for part in {path.split("/")[0] for path in files}:
                shutil.rmtree(folder / part)
                (folder / part).mkdir()
            for path, content in files.items():
                (folder / path).write_text(content, encoding="utf-8")
            yield folder
    else:
        yield SD15_DIR


def _carried_configs(place: Path) -> dict[str, str]:
    """The configuration files in a checkpoint file's metadata, by their path in the diffusers layout."""
    if place.suffix.lower() in PICKLE_SUFFIXES:
        return {}
    own = read_header(place).metadata.get(CONFIGS_KEY)
    if own is None:
        return {}
    try:
        files: dict[str, str] = json.loads(own)
        if unknown := [
            name
            for name, content in files.items()
            if not _CONFIG_FILE.fullmatch(name) or not isinstance(content, str)
        ]:
            raise ValueError(f"{unknown[0]!r} is no configuration")
    except (ValueError, AttributeError, RecursionError) as error:
        raise BaseModelError(
            f"{place}: its metadata {CONFIGS_KEY} is damaged ({first_line(error)}): get the file again"
        ) from error
    return files


def read_part_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The configurations of `unet`, `vae` and `text_encoder` in a folder; raises `BaseModelError` for numbers
    and lists that no base has.
    """
    configs = {part: read_config(folder / part / "config.json") for part in WEIGHT_STEMS}
    for part, config in configs.items():
        _check_counts(folder / part, config)
    return configs


def _check_counts(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `BaseModelError` where a configuration means more layers than any base has."""
    for key, value in config.items():
        items = value if isinstance(value, list) else [value]
        counts = items if key in _COUNTS and value is not None else []
        is_short = len(items) <= _MAX_COUNT
        if not is_short or not all(type(count) is int and 0 < count <= _MAX_COUNT for count in counts):
            raise BaseModelError(
                f"{folder}: {key[:80]!r} = {repr(value)[:80]}: must be at most {_MAX_COUNT}: {WANTED}"
            )
    num_layers = max([1, *(len(value) for value in config.values() if isinstance(value, list))])
    for counts in (config[key] for key in _COUNTS if config.get(key)):
        num_layers *= max(counts) if isinstance(counts, list) else counts
    if num_layers > _MAX_LAYERS:
        raise BaseModelError(
            f"{folder}: means {num_layers:,} layers, at most {_MAX_LAYERS} are built: {WANTED}"
        )


def read_config(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises `BaseModelError` where there is none."""
    try:
        config = json.loads(read_regular(path, BaseModelError, _CONFIG_LIMIT).decode())
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(
            f"{path}: cannot be read ({first_line(error)}): the folder is damaged"
        ) from error
    return config


def checked_configs(folder: Path, place: Path) -> dict[str, dict[str, Any]]:
    """The configurations in `folder` of the base at `place`; raises `BaseModelError` where they are not those
    of its weights, or of models that work together.
    """
    configs = read_part_configs(folder)
    _check_fit(configs, place)
    if place.is_dir():
        for part in WEIGHT_STEMS:
            _check_size(place, part, configs[part])
    if fault := _fault_together(json.dumps(configs)):
        raise BaseModelError(f"{place}: the parts of this base do not work together ({fault}): {WANTED}")
    return configs


def _check_fit(configs: Mapping[str, Mapping[str, Any]], place: Path) -> None:
    """Raise `BaseModelError` where the parts of a base do not belong together by their numbers alone."""
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    if family := family_of_unet(unet):
        raise BaseModelError(f"{place}: is {family}: {WANTED}")
    fits = (
        (
            "the U-Net takes {} channels and the VAE gives {}",
            unet.get("in_channels", 4),
            vae.get("latent_channels", 4),
        ),
        (
            "the U-Net attends to text of width {} and the text encoder gives {}",
            unet.get("cross_attention_dim"),
            text.get("hidden_size"),
        ),
    )
    for what, taken, given in fits:
        if taken != given:
            raise BaseModelError(f"{place}: {what.format(repr(taken)[:80], repr(given)[:80])}: {WANTED}")
    factor = vae.get("scaling_factor", 0.18215)
    if not isinstance(factor, int | float) or not 0 < factor < _MAX_FACTOR:
        raise BaseModelError(
            f"{place}: scaling_factor = {repr(factor)[:80]} of the VAE: must be a number above 0: {WANTED}"
        )


def _check_size(folder: Path, part: str, config: Mapping[str, Any]) -> None:
    """Raise `BaseModelError` where a part's configuration means another model than its weights are, before
    anything of that size is built; passes what has no weights.
    """
    shapes = {
        name: info.shape
        for file in weight_files(folder, part)
        for name, info in read_header(file).tensors.items()
    }
    if not shapes:
        return
    remedy = "configuration and weights are of two models: get the base again"
    with torch.device("meta"):
        state = build_component(part, config).state_dict()
    if unlike := [
        name for name in state if name in shapes and state[name].numel() != math.prod(shapes[name])
    ]:
        name = unlike[0]
        raise BaseModelError(
            f"{folder / part}: {name} has shape {list(shapes[name])}, by the configuration it is "
            f"{list(state[name].shape)}: {remedy}"
        )
    meant, held = sum(t.numel() for t in state.values()), sum(math.prod(shape) for shape in shapes.values())
    if meant > 2 * held:  # fewer that are missing are named when they are loaded
        raise BaseModelError(
            f"{folder / part}: its configuration means {meant:,} weights, its files hold {held:,}: {remedy}"
        )


@functools.lru_cache(maxsize=4)
def _fault_together(configs: str) -> str | None:
    """What goes wrong when a picture goes through models of these configurations, as JSON, without data; or
    None.
    """
    own = json.loads(configs)
    with torch.device("meta"), torch.no_grad():
        parts: dict[str, Any] = {part: build_component(part, own[part]) for part in WEIGHT_STEMS}
        side = 2 ** (len(parts["vae"].config.block_out_channels) - 1) * 64
        try:
            tokens = torch.zeros(1, parts["text_encoder"].config.max_position_embeddings, dtype=torch.long)
            text = parts["text_encoder"](tokens).last_hidden_state
            latents = parts["vae"].encode(torch.zeros(1, 3, side, side)).latent_dist.mean
            noise = parts["unet"](latents, tokens[:, 0], text).sample
            pixels = parts["vae"].decode(latents).sample
        except Exception as error:  # models of strange configurations raise anything
            return first_line(error)
    if noise.shape != latents.shape or pixels.shape != (1, 3, side, side):
        return (
            f"latents of {list(latents.shape[1:])} give noise of {list(noise.shape[1:])} and pixels of "
            f"{list(pixels.shape[1:])}"
        )
    return None


def check_tokenizer(tokenizer: CLIPTokenizer, text: Mapping[str, Any], place: Path) -> None:
    """Raise `BaseModelError` where such a text encoder does not know what the tokenizer gives."""
    length, positions = tokenizer.model_max_length, text.get("max_position_embeddings", 77)
    if not (type(length) is int and type(positions) is int and 0 < length <= positions):
        raise BaseModelError(
            f"{place}: the tokenizer's model_max_length is {repr(length)[:80]} and the text encoder has "
            f"{repr(positions)[:80]} positions: parts of two bases"
        )
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if len(tokenizer) != text.get("vocab_size") or highest >= len(tokenizer):
        raise BaseModelError(
            f"{place}: the tokenizer has {len(tokenizer)} tokens up to number {highest} and the text "
            f"encoder knows {repr(text.get('vocab_size'))[:80]}: parts of two bases"
        )


def load_part(kind: Any, folder: Path, part: str, **options: Any) -> Any:
    """A part of a folder by the `from_pretrained` of its class, without the hub; raises `BaseModelError`."""
    try:
        return kind.from_pretrained(folder / part, local_files_only=True, **options)
    except Exception as error:  # the libraries raise anything here, from KeyError to SafetensorError
        raise BaseModelError(
            f"{folder / part}: cannot be loaded as {kind.__name__} ({first_line(error)}): the folder is "
            "damaged or of another family"
        ) from error
