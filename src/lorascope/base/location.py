"""Where a base lies: a folder, one checkpoint file, a repository of the hub, or the package's own."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from lorascope.base.family import WANTED, family_of_folder
from lorascope.base.hub import fetch_snapshot
from lorascope.base.weights import PICKLE_SUFFIXES
from lorascope.errors import BaseModelError
from lorascope.sections import BaseSection
from lorascope.store import require_regular

# The parts that have weights, and what their files are called in the diffusers layout.
WEIGHT_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
PARTS = (*WEIGHT_STEMS, "tokenizer", "scheduler")
_WEIGHT_ENDINGS = (".safetensors", "-?????-of-?????.safetensors")
# What is loaded of a folder, and so fetched and digested: not the other precisions, pickles and pipelines
# beside it.
PATTERNS = [
    "model_index.json",
    *(f"{part}/config.json" for part in WEIGHT_STEMS),
    *(f"{part}/{stem}{ending}" for part, stem in WEIGHT_STEMS.items() for ending in _WEIGHT_ENDINGS),
    *(f"{part}/{stem}.safetensors.index.json" for part, stem in WEIGHT_STEMS.items()),
    *("tokenizer/*.json", "tokenizer/*.txt", "scheduler/scheduler_config.json"),
]
_FILE_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)


def is_hub_id(model: str) -> bool:
    """Whether `model` can only be meant as a hub id: owner/name, and no such file or folder here."""
    is_path = model.startswith((".", "/", "~")) or Path(model).suffix.lower() in _FILE_SUFFIXES
    return model.count("/") == 1 and not is_path and not Path(model).exists()


def resolve_model(
    model: str, revision: str | None, packaged: str, patterns: Sequence[str], what: str
) -> Path:
    """The folder of a model: the package's own for `pocket`, an existing folder, or a hub snapshot
    (downloaded once).

    `packaged` names the folder below `lorascope/pocket`; `patterns` limit what is downloaded; `what` is the
    key that messages start with. Raises `BaseModelError`, and `HubError` where the hub does not give it.
    """
    if model == "pocket":
        return Path(str(resources.files("lorascope") / "pocket" / packaged))
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(model):
        state = "is a file" if folder.exists() else "no such file or folder"
        raise BaseModelError(
            f"{what} = {model!r}: {state}: give `pocket`, a model folder, or a hub id owner/name"
        )
    return fetch_snapshot(
        model, kind="model", revision=revision, patterns=patterns, what=f"{what} = {model!r}"
    )


def locate(section: BaseSection) -> Path:
    """The folder or file of the base, fetched if it must be; a folder is complete and, by its configurations,
    SD v1's. Raises `BaseModelError`, and `HubError` where the hub does not give it.
    """
    try:
        return _locate_readable(section)
    except OSError as error:  # no right to look into it, or no path at all
        raise BaseModelError(
            f"base.model = {section.model[:200]!r}: cannot be read ({error.strerror}): check the path "
            "and its permissions"
        ) from error


def _locate_readable(section: BaseSection) -> Path:
    path = Path(section.model).expanduser()
    if path.exists() and not path.is_dir():
        require_regular(path, BaseModelError)
        if path.suffix.lower() not in _FILE_SUFFIXES:
            raise BaseModelError(
                f"base.model = {section.model!r}: a file of this kind holds no base: give a "
                ".safetensors or .ckpt file"
            )
        return path
    folder = resolve_model(section.model, section.revision, "base", PATTERNS, "base.model")
    if family := family_of_folder(folder):
        raise BaseModelError(f"{folder}: is {family}: {WANTED}")
    if missing := [part for part in PARTS if not (folder / part).is_dir()]:
        raise BaseModelError(
            f"{folder}: lacks {', '.join(missing)}: give a complete Stable Diffusion folder in the "
            "diffusers layout"
        )
    # The libraries would open whatever stands there.
    for file in (*folder.glob("*.json"), *folder.glob("*/*")):
        if file.exists() and not file.is_dir():
            require_regular(file, BaseModelError)
    return folder


def weight_files(folder: Path, part: str) -> list[Path]:
    """The files of a part's weights in a folder: one, or shards."""
    patterns = [WEIGHT_STEMS[part] + ending for ending in _WEIGHT_ENDINGS]
    return sorted(path for pattern in patterns for path in (folder / part).glob(pattern))
