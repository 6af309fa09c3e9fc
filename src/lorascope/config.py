"""A study as data: TOML read into frozen Pydantic models, which are also the source of the help and the docs table.

Layers, from weakest to strongest: preset < study file < `LORASCOPE_*` environment < `--set` overrides.
"""

import difflib
import itertools
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lorascope.errors import ConfigError
from lorascope.store import digest_json

REFERENCE_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
ENVIRONMENT_PREFIX = "LORASCOPE_"
_PRESETS = resources.files("lorascope") / "presets"

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Rank = Annotated[int, Field(ge=1, le=1024)]
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Section(BaseModel):
    """A frozen table of the study file; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class BaseSection(Section):
    model: str = Field("pocket", description="`pocket`, a diffusers folder, or a hub id such as `stable-diffusion-v1-5/stable-diffusion-v1-5`")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")


class DataSection(Section):
    source: str = Field("pocket", description="`pocket`, a Parquet file or folder with columns image and text, a picture folder with captions, or a hub data set id")
    image_column: str = Field("image", description="Parquet column that holds the picture")
    caption_column: str = Field("text", description="Parquet column that holds the caption")
    resolution_px: int = Field(64, ge=16, le=4096, multiple_of=8, description="side of the centre-cropped square picture, in pixels")
    num_train: Positive | None = Field(None, description="use at most this many training pictures; all when absent")
    num_heldout: Positive | None = Field(None, description="hold out at most this many pictures; all of the held-out share when absent")
    heldout_share: float = Field(0.1, gt=0, lt=1, description="share of the pictures held out of training where the source has no test split of its own")
    near_duplicate_bits: int = Field(3, ge=0, le=32, description="pictures whose 64-bit perceptual hashes differ in at most this many bits are near duplicates")
    max_refused_share: Share = Field(0.1, description="stop before training when more than this share of the rows cannot be used")


class AdapterSection(Section):
    targets: tuple[str, ...] = Field(REFERENCE_TARGETS, min_length=1, description="name endings of the U-Net's Linear layers to adapt")


class ArmGrid(Section):
    """One table of `[[arms]]`: every key may be one value or a list, and the product of the lists is trained."""

    name: Name | None = Field(None, description="name of the arm, only for a table that makes one arm; `r<rank>` and what varies when absent")
    rank: Rank | tuple[Rank, ...] = Field(16, description="rank r of the adapter")
    alpha: PositiveReal | tuple[PositiveReal, ...] | None = Field(None, description="alpha; the update is scaled by alpha / rank. Give this or `alpha_per_rank`")
    alpha_per_rank: PositiveReal | tuple[PositiveReal, ...] | None = Field(None, description="alpha as a multiple of the rank: the scale alpha / rank itself")
    lr: PositiveReal | tuple[PositiveReal, ...] = Field(1e-4, description="learning rate")
    seed: Seed | tuple[Seed, ...] = Field(0, description="training seed: initial weights, order, noise, timesteps and caption dropout")

    @model_validator(mode="after")
    def _one_alpha(self) -> Self:
        if self.alpha is not None and self.alpha_per_rank is not None:
            raise ValueError("alpha and alpha_per_rank exclude each other: give one of them")
        return self


class TrainSection(Section):
    epochs: Positive = Field(10, description="passes over the training pictures")
    batch_size: Positive = Field(4, description="pictures per step and arm")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW's decay rates")
    eps: PositiveReal = Field(1e-8, description="AdamW's epsilon")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW's decoupled weight decay")
    warmup_steps: NonNegative = Field(0, description="steps over which the learning rate rises linearly from 0")
    max_grad_norm: float = Field(0.0, ge=0, description="clip each arm's gradient to this norm; 0 leaves it alone")
    caption_dropout: Share = Field(0.0, description="share of training captions replaced by the empty one")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="dtype of the frozen base: `auto` is bf16 on a GPU and fp32 on a CPU; adapters are always fp32")
    checkpoint_every_steps: Positive = Field(250, description="steps between checkpoints that an interrupted run goes on from")
    max_stacked_arms: Positive = Field(4, description="arms trained in one pass at most; more need more memory")
    num_probe: Positive = Field(32, description="pictures of each split on which the denoising loss is measured at fixed noise")


class SampleSection(Section):
    prompts: str = Field("pocket", description="`pocket`, `sd15`, or a text file with sections [normal] and [abstract], one prompt a line")
    num_prompts: Positive | None = Field(None, description="use the first so many prompts of each category; all when absent")
    steps: int = Field(30, ge=1, le=1000, description="denoising steps")
    guidance: float = Field(7.5, ge=0, le=100, description="classifier-free guidance scale; 1 leaves guidance off")
    scheduler: Literal["ddim", "euler", "dpmsolver++"] = Field("ddim", description="sampler")
    seeds: tuple[Seed, ...] = Field((0,), min_length=1, description="seeds of the initial noise, shared by the base and every arm")
    batch_size: Positive = Field(36, description="pictures denoised at once, over all arms")


class ScoreSection(Section):
    model: str = Field("pocket", description="`pocket`, a CLIP folder, or a hub id such as `openai/clip-vit-large-patch14`")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    batch_size: Positive = Field(64, description="pictures scored at once")
    resamples: int = Field(10_000, ge=100, le=1_000_000, description="bootstrap resamples over prompts")


class Arm(Section):
    """One adapter to train, with every choice resolved."""

    name: str
    rank: int
    alpha: float
    lr: float
    seed: int

    @property
    def scale(self) -> float:
        """alpha / rank, the factor on B A."""
        return self.alpha / self.rank


class StudyConfig(Section):
    """A whole study."""

    name: Name = Field("study", description="name of the study; the run folder is `runs/<name>`")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto` takes the GPU if there is one")
    base: BaseSection = BaseSection()
    data: DataSection = DataSection()
    adapter: AdapterSection = AdapterSection()
    arms: tuple[ArmGrid, ...] = Field((ArmGrid(rank=(16, 64), alpha_per_rank=2.0, lr=5e-4),), min_length=1, description="the adapters to compare")
    train: TrainSection = TrainSection()
    sample: SampleSection = SampleSection()
    score: ScoreSection = ScoreSection()

    @model_validator(mode="after")
    def _distinct_arms(self) -> Self:
        names = [arm.name for arm in self.expand_arms()]
        for name in names:
            if name == "base":
                raise ValueError("an arm is called 'base', which is the name of the unadapted model: choose another")
            if names.count(name) > 1:
                raise ValueError(f"two arms are called {name!r}: give them names, or vary rank, alpha, lr or seed")
        return self

    def expand_arms(self) -> tuple[Arm, ...]:
        """All arms in the order of the file, each grid expanded, with their default names."""
        settings = [(grid, dict(zip(("rank", "alpha", "lr", "seed"), values, strict=True))) for grid in self.arms for values in _product(grid)]
        varying = {key for key in ("alpha", "lr", "seed") for rank in {s["rank"] for _, s in settings} if len({s[key] for _, s in settings if s["rank"] == rank}) > 1}
        arms = []
        for grid, setting in settings:
            if grid.name is not None and len(list(_product(grid))) > 1:
                raise ValueError(f"arms.name = {grid.name!r} stands on a table that makes several arms: leave it out, or give single values")
            parts = [f"r{setting['rank']}"]
            parts += [f"{letter}{setting[key]:g}" for key, letter in (("alpha", "a"), ("lr", "lr"), ("seed", "s")) if key in varying]
            arms.append(Arm(name=grid.name or "-".join(parts), **setting))
        return tuple(arms)

    def to_toml(self) -> str:
        """The study as a TOML file with every key, absent ones left out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def digest(self, *sections: str) -> str:
        """SHA-256 over the named sections, or over everything that can change a result when none is named."""
        values = self.model_dump(mode="json")
        return digest_json({key: values[key] for key in (sections or values) if key != "name"})


def _product(grid: ArmGrid) -> Iterator[tuple[int, float, float, int]]:
    """All (rank, alpha, lr, seed) of one table."""
    scalings: Sequence[tuple[float, bool]]
    if grid.alpha is not None:
        scalings = [(alpha, False) for alpha in _several(grid.alpha)]
    else:
        scalings = [(ratio, True) for ratio in _several(1.0 if grid.alpha_per_rank is None else grid.alpha_per_rank)]
    for rank, (value, per_rank), lr, seed in itertools.product(_several(grid.rank), scalings, _several(grid.lr), _several(grid.seed)):
        yield rank, value * rank if per_rank else value, lr, seed


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in _PRESETS.iterdir() if entry.name.endswith(".toml"))


def preset_text(name: str) -> str:
    """The TOML text of a preset; raise `ConfigError` if there is none of that name."""
    if name not in preset_names():
        raise ConfigError(f"preset {name!r}: not one of {', '.join(preset_names())}{_did_you_mean(name, preset_names())}")
    return (_PRESETS / f"{name}.toml").read_text(encoding="utf-8")


def load_study(
    path: Path | None = None,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> StudyConfig:
    """Read a study from its layers.

    `path` is a TOML file, whose key `preset` may name the preset it starts from. `overrides` are `key=value` with a
    dotted key and a TOML value (a bare word is a string). Raises `ConfigError` with file, key, value, constraint and
    the nearest known key.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    layers: list[tuple[str, dict[str, Any]]] = []
    if path is not None:
        table = _parse_toml(_read_text(path), str(path))
        preset = preset or table.pop("preset", None)
        table.pop("preset", None)
        table.setdefault("name", path.stem)
        layers.append((str(path), table))
    if preset is not None or path is None:
        chosen = preset or "pocket"
        layers.insert(0, (f"preset {chosen}", _parse_toml(preset_text(str(chosen)), f"preset {chosen}")))
    layers.append(("environment", _from_environment(os.environ if environment is None else environment)))
    layers.extend(("--set", _parse_override(text)) for text in overrides)
    for origin, table in layers:
        _merge(values, table, origin, origins)
    try:
        return StudyConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, origins)) from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such study file: check the path, or use --preset with one of {', '.join(preset_names())}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder: name the study's TOML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): check its permissions") from error


def _parse_toml(text: str, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin}: not valid TOML: {error}") from error


def _parse_override(text: str) -> dict[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {text!r}: must be key=value, for example --set train.epochs=2")
    return _nest(key.strip().split("."), _toml_value(value.strip()))


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """`LORASCOPE_TRAIN_EPOCHS=2` sets `train.epochs`; names that match no key are left to other parts of the program."""
    table: dict[str, Any] = {}
    for section, field in StudyConfig.model_fields.items():
        kind = field.annotation
        names = [[section]] if not _is_section(kind) else [[section, key] for key in kind.model_fields]  # type: ignore[union-attr]
        for keys in names:
            value = environment.get(ENVIRONMENT_PREFIX + "_".join(keys).upper())
            if value is not None and section != "arms":
                _merge(table, _nest(keys, _toml_value(value)), "environment", {})
    return table


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _nest(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value  # type: ignore[no-any-return]


def _merge(values: dict[str, Any], table: dict[str, Any], origin: str, origins: dict[str, str], prefix: str = "") -> None:
    """Lay `table` over `values`; `arms.0.rank` reaches into the list of arms; every other list is replaced whole."""
    for key, value in table.items():
        place = f"{prefix}{key}"
        origins[place] = origin
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value, origin, origins, f"{place}.")
        elif isinstance(value, dict) and isinstance(values.get(key), list) and all(index.isdigit() for index in value):
            for index, item in value.items():
                if int(index) >= len(values[key]):
                    raise ConfigError(f"{origin}: {place}.{index}: there are only {len(values[key])} tables of {key}, counted from 0")
                if not isinstance(item, dict):
                    raise ConfigError(f"{origin}: {place}.{index}: needs a key, for example {place}.{index}.rank=4")
                _merge(values[key][int(index)], item, origin, origins, f"{place}.{index}.")
        else:
            values[key] = value


def _explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    """The first problem as one line: origin, key, value, constraint, nearest match."""
    first = min(error.errors(include_url=False), key=lambda item: (item["type"] != "extra_forbidden", len(item["loc"])))
    keys = [str(part) for part in first["loc"] if not str(part).startswith(("constrained-", "tuple[", "function-", "int", "float"))]
    place = ".".join(keys)
    origin = next((origins[p] for p in (".".join(keys[:n]) for n in range(len(keys), 0, -1)) if p in origins), "study")
    if first["type"] == "extra_forbidden":
        known = _known_keys(keys[:-1])
        return f"{origin}: {place}: unknown key; known here: {', '.join(known)}{_did_you_mean(keys[-1], known)}"
    message = first["msg"].removeprefix("Value error, ")
    if not keys:
        return f"{origin}: {message}"
    return f"{origin}: {place} = {json.dumps(first['input'], default=str)}: {message[0].lower()}{message[1:]}"


def _known_keys(parents: Sequence[str]) -> list[str]:
    model: Any = StudyConfig
    for key in parents:
        if key.isdigit():
            continue
        model = ArmGrid if key == "arms" else model.model_fields[key].annotation
    return list(model.model_fields)


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" - did you mean {near[0]!r}?" if near else ""


def reference_table() -> str:
    """The table of all keys for the docs, in Markdown, made from the schema."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for section, field in StudyConfig.model_fields.items():
        kind: Any = ArmGrid if section == "arms" else field.annotation
        if not _is_section(kind):
            lines.append(_reference_row(section, field))
            continue
        lines.extend(_reference_row(f"{section}.{key}", item) for key, item in kind.model_fields.items())
    return "\n".join(lines) + "\n"


def _reference_row(key: str, field: Any) -> str:
    annotation = str(StudyConfig.model_json_schema and _type_name(field.annotation))
    default = field.default if not isinstance(field.default, tuple) else list(field.default)
    shown = "" if default is None else json.dumps(default)
    return f"| `{key}` | {annotation} | {f'`{shown}`' if shown else ''} | {field.description} |"


def _type_name(annotation: Any) -> str:
    from typing import get_args, get_origin

    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "list of " + _type_name(get_args(annotation)[0])
    if args := get_args(annotation):
        return " or ".join(_type_name(arg) for arg in args if arg is not type(None))
    return {"str": "text", "int": "whole number", "float": "number"}.get(getattr(annotation, "__name__", ""), str(annotation))
