"""A study as data: TOML read into frozen Pydantic models, which are also the source of the help and the docs
table.

Layers, from weakest to strongest: defaults < preset < study file < `LORASCOPE_*` environment < `--set`
overrides.
"""

import difflib
import itertools
import json
import math
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from lorascope.errors import ConfigError, first_line
from lorascope.store import digest_json, read_regular

REFERENCE_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
ENVIRONMENT_PREFIX = "LORASCOPE_"
_LINE_BREAKS = "[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]"  # what str.splitlines takes for the end of a line
MAX_ARMS = 1024
_MAX_FILE_BYTES = 2**22  # a preset has 2 kB
_MAX_DEPTH = 16  # tables in tables; the schema has 4
_PRESETS = resources.files("lorascope") / "presets"


def _without_repeats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if repeated := sorted(value for value, count in Counter(values).items() if count > 1):
        raise ValueError(f"must not repeat a value, but {_shown(repeated[0])} stands there more than once")
    return values


Text = Annotated[str, Field(min_length=1)]
Whole = Annotated[int, Field(strict=True)]  # strict: neither true nor "1" is a number
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[Whole, Field(ge=1, le=1_000_000_000)]
NonNegative = Annotated[Whole, Field(ge=0, le=1_000_000_000)]
BatchSize = Annotated[Whole, Field(ge=1, le=65_536)]
ArmCount = Annotated[Whole, Field(ge=1, le=MAX_ARMS)]
Epochs = Annotated[Whole, Field(ge=1, le=1_000_000)]
Rank = Annotated[Whole, Field(ge=1, le=1024)]
PositiveReal = Annotated[Real, Field(gt=0)]
Share = Annotated[Real, Field(ge=0, le=1)]
Beta = Annotated[Real, Field(ge=0, lt=1)]
Seed = Annotated[Whole, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Ranks = Annotated[tuple[Rank, ...], Field(min_length=1), AfterValidator(_without_repeats)]
BatchSizes = Annotated[tuple[BatchSize, ...], Field(min_length=1), AfterValidator(_without_repeats)]
SeveralEpochs = Annotated[tuple[Epochs, ...], Field(min_length=1), AfterValidator(_without_repeats)]
PositiveReals = Annotated[tuple[PositiveReal, ...], Field(min_length=1), AfterValidator(_without_repeats)]
Factor = Annotated[Real, Field(ge=0, le=1e3)]
Flag = Annotated[bool, Field(strict=True)]
Targets = Annotated[tuple[Text, ...], AfterValidator(_without_repeats)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_without_repeats)]


class Section(BaseModel):
    """A frozen table of the study file; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseSection(Section):
    """The frozen base model."""

    model: Text = Field(
        default="pocket",
        description="`pocket`, a diffusers folder, one checkpoint file in the original layout "
        "(`.safetensors`, `.ckpt`), or a hub id such as `stable-diffusion-v1-5/stable-diffusion-v1-5`",
    )
    revision: Text | None = Field(default=None, description="branch, tag or commit of a hub id")
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = Field(
        default="auto",
        description=(
            "what the U-Net predicts; `auto` takes what the base says of itself, and `epsilon` for a "
            "single file"
        ),
    )


class DataSection(Section):
    """The pictures and captions, and how they are split."""

    source: Text = Field(
        default="pocket",
        description=(
            "`pocket`, a Parquet file or folder, a picture folder with captions, WebDataset tar files, "
            "or a hub data set id"
        ),
    )
    revision: Text | None = Field(default=None, description="branch, tag or commit of a hub data set")
    image_column: Text = Field(
        default="image",
        description="column (Parquet) or file ending (tar) that holds the picture, found if absent",
    )
    caption_column: Text = Field(
        default="text", description="column (Parquet, metadata) or file ending (tar) that holds the caption"
    )
    resolution_px: Whole = Field(
        default=64,
        ge=16,
        le=4096,
        multiple_of=8,
        description=(
            "side of the centre-cropped square picture, in pixels; with buckets the side of a square "
            "of the same area"
        ),
    )
    buckets: Flag = Field(
        default=False,
        description=(
            "keep each picture's aspect ratio: group pictures of like shape instead of the centre crop"
        ),
    )
    bucket_step_px: Whole = Field(
        default=64, ge=8, le=512, multiple_of=8, description="sides of buckets are multiples of this"
    )
    bucket_max_ratio: Real = Field(
        default=2.0,
        ge=1,
        le=8,
        description="longest side of a bucket over its shortest; what is longer is cropped",
    )
    flip: Flag = Field(
        default=False,
        description="mirror every second draw of a picture, by chance; for sets without text or fixed sides",
    )
    repeats: Epochs = Field(
        default=1, description="times a picture is seen in an epoch, times that of its `10_name` folder"
    )
    caption_prefix: Text | None = Field(
        default=None, description="text put before every caption as it stands"
    )
    trigger_word: Text | None = Field(
        default=None,
        description="word put first in every caption that lacks it; stays first when tags are shuffled",
    )
    shuffle_tags: Flag = Field(
        default=False, description="shuffle the comma-separated tags of a caption at every draw"
    )
    keep_tags: NonNegative = Field(
        default=0, description="leave the first so many tags in place when shuffling"
    )
    num_train: Positive | None = Field(
        default=None, description="use at most this many training pictures; all when absent"
    )
    num_heldout: Positive | None = Field(
        default=None, description="hold out at most this many pictures; all of the held-out share when absent"
    )
    heldout_share: Real = Field(
        default=0.1,
        gt=0,
        lt=1,
        description=(
            "share of the pictures held out of training where the source has no test split of its own"
        ),
    )
    near_duplicate_bits: Whole = Field(
        default=3,
        ge=0,
        le=32,
        description=(
            "pictures whose 64-bit perceptual hashes differ in at most this many bits are near duplicates, "
            "and above 0 shifted, mirrored, brighter and bordered copies too"
        ),
    )
    max_refused_share: Share = Field(
        default=0.1, description="stop before training when more than this share of the rows cannot be used"
    )


class TargetGroup(Section):
    """One table of `[[adapter.groups]]`: further layers, with a rank, alpha and learning rate of their
    own.
    """

    component: Literal["unet", "text_encoder"] = Field(
        default="unet", description="part of the base that holds the layers"
    )
    targets: Targets = Field(
        default=(),
        min_length=1,
        validate_default=True,
        description="as `adapter.targets`, which need not name them",
    )
    rank: Rank | None = Field(default=None, description="rank of these layers; the arm's when absent")
    alpha: PositiveReal | None = Field(
        default=None, description="alpha of these layers; the arm's alpha / rank is kept when absent"
    )
    lr: PositiveReal | None = Field(
        default=None, description="learning rate of these layers; the arm's when absent"
    )


class AdapterSection(Section):
    """Which layers are adapted."""

    targets: Targets = Field(
        default=REFERENCE_TARGETS,
        min_length=1,
        description=(
            "layers of the U-Net to adapt, Linear or convolution: name endings, or patterns such as "
            "`mid_block.*.conv1`"
        ),
    )
    groups: tuple[TargetGroup, ...] = Field(
        default=(), description="layers with a rank, alpha or learning rate of their own"
    )


class ArmGrid(Section):
    """One table of `[[arms]]`: every key may be one value or a list, and the product of the lists is
    trained.
    """

    name: Name | None = Field(
        default=None,
        description=(
            "name of the arm, only for a table that makes one; made from rank and what varies when absent"
        ),
    )
    rank: Rank | Ranks = Field(default=16, description="rank r of the adapter")
    alpha: PositiveReal | PositiveReals | None = Field(
        default=None,
        description=(
            "alpha; the update is scaled by alpha / rank. Give this or `alpha_per_rank`; alpha is the "
            "rank when both are absent"
        ),
    )
    alpha_per_rank: PositiveReal | PositiveReals | None = Field(
        default=None, description="alpha as a multiple of the rank: the scale alpha / rank itself"
    )
    lr: PositiveReal | PositiveReals = Field(default=1e-4, description="learning rate")
    seed: Seed | Seeds = Field(
        default=0, description="training seed: initial weights, order, noise, timesteps and caption dropout"
    )
    batch_size: BatchSize | BatchSizes | None = Field(
        default=None, description="pictures per step; `train.batch_size` when absent"
    )
    epochs: Epochs | SeveralEpochs | None = Field(
        default=None, description="passes over the training pictures; `train.epochs` when absent"
    )

    @field_validator("alpha_per_rank")
    @classmethod
    def _one_alpha(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("alpha") is not None:
            raise ValueError(f"excludes alpha = {_shown(info.data['alpha'])}: give one of the two")
        return value

    @model_validator(mode="after")
    def _name_of_one(self) -> Self:
        if self.name is not None and (count := self.count()) > 1:
            raise ValueError(
                f"the name {self.name!r} stands on a table that makes {count} arms: leave the name out, "
                "or give single values"
            )
        return self

    def count(self) -> int:
        """How many arms this table makes."""
        scalings = self.alpha_per_rank if self.alpha is None else self.alpha
        values = (self.rank, scalings, self.lr, self.seed, self.batch_size, self.epochs)
        return math.prod(len(_several(value)) for value in values)

    def settings(self) -> list[dict[str, Any]]:
        """Rank, alpha, lr, seed, batch size and epochs of every arm of this table; the last two are None
        where `train`'s hold.
        """
        key = "alpha_per_rank" if self.alpha is None else "alpha"
        scalings = _several(getattr(self, key) or 1.0)
        return [
            {"rank": rank, "alpha": value if key == "alpha" else value * rank, **others}
            for rank, value in itertools.product(_several(self.rank), scalings)
            for others in self._products("lr", "seed", "batch_size", "epochs")
        ]

    def _products(self, *keys: str) -> list[dict[str, Any]]:
        return [
            dict(zip(keys, values, strict=True))
            for values in itertools.product(*(_several(getattr(self, key)) for key in keys))
        ]


class TrainSection(Section):
    """What all arms share in training."""

    epochs: Epochs = Field(default=10, description="passes over the training pictures")
    batch_size: BatchSize = Field(default=4, description="pictures per step and arm")
    accumulation_steps: BatchSize = Field(
        default=1, description="batches whose gradients are averaged for one step"
    )
    optimizer: Text = Field(
        default="adamw",
        description="`adamw`, the name of a `torch.optim` class such as `SGD`, or `prodigy` (with its extra)",
    )
    optimizer_args: dict[str, Any] = Field(
        default={}, description="further arguments of an optimizer other than `adamw`"
    )
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="AdamW's decay rates")
    eps: PositiveReal = Field(default=1e-8, description="AdamW's epsilon")
    weight_decay: Real = Field(default=0.01, ge=0, le=1, description="AdamW's decoupled weight decay")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description=(
            "course of the learning rate after the warm-up: constant, or falling to 0 at the last step"
        ),
    )
    warmup_steps: NonNegative = Field(
        default=0, description="steps over which the learning rate rises linearly from 0"
    )
    loss: Literal["mse", "huber"] = Field(
        default="mse", description="distance of prediction and target; `huber` is linear beyond `huber_delta`"
    )
    huber_delta: PositiveReal = Field(
        default=0.1, description="distance at which the Huber loss turns from square to linear"
    )
    min_snr_gamma: PositiveReal | None = Field(
        default=None, description="weight timesteps by min(SNR, gamma) / SNR; 5 is usual, off when absent"
    )
    noise_offset: Share = Field(
        default=0.0,
        description="size of a constant added to each channel's noise, for darker and lighter pictures",
    )
    gradient_checkpointing: Flag | None = Field(
        default=None,
        description=(
            "compute activations again instead of keeping them: a third slower; only where memory is "
            "short when absent"
        ),
    )
    max_grad_norm: Real = Field(
        default=0.0, ge=0, description="clip each arm's gradient to this norm; 0 leaves it alone"
    )
    caption_dropout: Share = Field(
        default=0.0, description="share of training captions replaced by the empty one"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description=(
            "dtype of the frozen base: `auto` is the fastest here, timed at the start; adapters are "
            "always fp32"
        ),
    )
    cuda_graph: Flag = Field(
        default=True, description="on a GPU, record the kernels of a step once and replay them"
    )
    compile: Flag = Field(
        default=False, description="compile the U-Net with torch.compile: minutes at the start, faster steps"
    )
    checkpoint_every_steps: Positive = Field(
        default=250, description="steps between checkpoints that an interrupted run goes on from"
    )
    max_stacked_arms: ArmCount | None = Field(
        default=None, description="arms trained in one pass at most; as many as memory holds when absent"
    )
    num_probe: BatchSize = Field(
        default=32,
        description="pictures of each split on which the denoising loss is measured at fixed noise",
    )
    keep_best: Flag = Field(
        default=True,
        description="keep the adapter of the epoch with the lowest held-out loss beside the last",
    )


class SampleSection(Section):
    """How pictures are drawn for the scores."""

    prompts: Text = Field(
        default="pocket",
        description=(
            "`pocket`, `sd15`, or a text file with sections [normal] and [abstract], one prompt a line"
        ),
    )
    prompt_prefix: Text | None = Field(
        default=None,
        description=(
            "text put before every prompt that is drawn, such as a trigger word; scores are against "
            "the prompt without it"
        ),
    )
    num_prompts: Positive | None = Field(
        default=None, description="use the first so many prompts of each category; all when absent"
    )
    steps: Whole = Field(default=30, ge=1, le=1000, description="denoising steps")
    guidance: Real = Field(
        default=7.5, ge=0, le=100, description="classifier-free guidance scale; 1 leaves guidance off"
    )
    scheduler: Literal["ddim", "euler", "dpmsolver++"] = Field(default="ddim", description="sampler")
    seeds: Seeds = Field(
        default=(0,), description="seeds of the initial noise, shared by the base and every arm"
    )
    batch_size: BatchSize = Field(default=36, description="pictures denoised at once, over all arms")
    preview_every_epochs: Epochs | None = Field(
        default=None, description="draw previews during training, every so many epochs; none when absent"
    )
    num_previews: BatchSize = Field(
        default=4, description="prompts of each preview, taken from all categories in turn, seed 0"
    )


class ScoreSection(Section):
    """The CLIP model that scores, and the intervals."""

    model: Text = Field(
        default="pocket",
        description="`pocket`, a CLIP folder, or a hub id such as `openai/clip-vit-large-patch14`",
    )
    revision: Text | None = Field(default=None, description="branch, tag or commit of a hub id")
    batch_size: BatchSize = Field(default=64, description="pictures scored at once")
    resamples: Whole = Field(
        default=10_000, ge=100, le=1_000_000, description="bootstrap resamples over prompts"
    )


class ExportSection(Section):
    """Adapter files for other programs."""

    formats: tuple[Literal["kohya", "diffusers"], ...] = Field(
        default=("kohya",),
        description="files left beside each adapter: `kohya` for WebUI, Forge and ComfyUI, `diffusers`",
    )
    dtype: Literal["fp32", "fp16", "bf16"] = Field(default="fp16", description="dtype of those files")


class Arm(Section):
    """One adapter to train, with every choice resolved."""

    name: str
    rank: int
    alpha: float
    lr: float
    seed: int
    batch_size: int = TrainSection().batch_size
    epochs: int = TrainSection().epochs

    @property
    def scale(self) -> float:
        """alpha / rank, the factor on B A."""
        return self.alpha / self.rank


class StudyConfig(Section):
    """A whole study."""

    name: Name = Field(default="study", description="name of the study; the run folder is `runs/<name>`")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto", description="`auto` takes the GPU if there is one; `mps` is that of a Mac, in fp32"
    )
    workers: ArmCount | None = Field(
        default=None,
        description=(
            "groups of arms trained side by side; one a GPU, or on a CPU one a core and two arms, when absent"
        ),
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        default=(),
        description="send losses, learning rates and previews to these too; each needs its package",
    )
    base: BaseSection = BaseSection()
    data: DataSection = DataSection()
    adapter: AdapterSection = AdapterSection()
    arms: tuple[ArmGrid, ...] = Field(
        default=(ArmGrid(rank=(16, 64), alpha_per_rank=2.0, lr=5e-4),),
        min_length=1,
        description="the adapters to compare",
    )
    train: TrainSection = TrainSection()
    sample: SampleSection = SampleSection()
    score: ScoreSection = ScoreSection()
    export: ExportSection = ExportSection()

    @model_validator(mode="after")
    def _distinct_arms(self) -> Self:
        if (num_arms := sum(grid.count() for grid in self.arms)) > MAX_ARMS:
            raise ValueError(f"make {num_arms:,} arms: at most {MAX_ARMS:,}: leave values out")
        seen: dict[Any, Arm] = {}
        for arm in self.expand_arms():
            folder = arm.name.casefold()  # some file systems do not tell r16 from R16
            if folder == "base":
                raise ValueError(
                    f"an arm is called {arm.name!r}, which is kept for the unadapted model: choose "
                    "another name"
                )
            if other := seen.get(folder):
                same = (
                    "two arms are called"
                    if other.name == arm.name
                    else f"arm names differ only in case: {other.name!r} and"
                )
                raise ValueError(
                    f"{same} {arm.name!r}: give them names of their own, or vary rank, alpha, lr, seed, "
                    "batch_size or epochs"
                )
            choices = (arm.rank, arm.alpha, arm.lr, arm.seed, arm.batch_size, arm.epochs)
            if other := seen.get(choices):
                raise ValueError(
                    f"arms {other.name!r} and {arm.name!r} have the same rank, alpha, lr, seed, batch "
                    "size and epochs: leave one out"
                )
            seen[folder] = seen[choices] = arm
        return self

    def expand_arms(self) -> tuple[Arm, ...]:
        """All arms in the order of the file, each table's lists multiplied out.

        An arm without a name is called `r<rank>`, followed by those of alpha, lr, batch size, epochs and seed
        in which arms of one rank differ: `r16`, `r16-s1`, `r16-a32-lr0.0005-b8-e20-s1`.
        """
        settings = [(grid.name, self._resolve(setting)) for grid in self.arms for setting in grid.settings()]
        by_rank: dict[int, list[dict[str, Any]]] = {}
        for _, setting in settings:
            by_rank.setdefault(setting["rank"], []).append(setting)
        keys = ("alpha", "lr", "batch_size", "epochs", "seed")
        varying = {
            key for key in keys for group in by_rank.values() if len({setting[key] for setting in group}) > 1
        }
        return tuple(
            Arm(name=name or _default_name(setting, varying), **setting) for name, setting in settings
        )

    def _resolve(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        """A setting of an arm with `train`'s batch size and epochs where it has none of its own."""
        return {key: getattr(self.train, key) if value is None else value for key, value in setting.items()}

    def to_toml(self) -> str:
        """The study as a TOML file with every key, absent ones left out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def digest(self, *sections: str) -> str:
        """SHA-256 over the named sections, or over everything that can change a result when none is named."""
        values = self.model_dump(mode="json")
        return digest_json({key: values[key] for key in (sections or values) if key != "name"})


def _default_name(setting: Mapping[str, Any], varying: set[str]) -> str:
    parts = [f"r{setting['rank']}"]
    parts += [f"{letter}{setting[key]:g}" for key, letter in (("alpha", "a"), ("lr", "lr")) if key in varying]
    parts += [
        f"{letter}{setting[key]}"
        for key, letter in (("batch_size", "b"), ("epochs", "e"), ("seed", "s"))
        if key in varying
    ]
    return "-".join(parts).replace("+", "")  # 1e+06: a plus has no place in a folder's name


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(
        entry.name.removesuffix(".toml") for entry in _PRESETS.iterdir() if entry.name.endswith(".toml")
    )


def preset_text(name: str) -> str:
    """The TOML text of a preset; raise `ConfigError` if there is none of that name."""
    if name not in preset_names():
        raise ConfigError(
            f"preset {name!r}: must be one of "
            f"{', '.join(preset_names())}{_did_you_mean(name, preset_names())}"
        )
    return (_PRESETS / f"{name}.toml").read_text(encoding="utf-8")


def load_study(
    path: Path | str | None = None,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> StudyConfig:
    """Read a study from its layers.

    `path` is a TOML file, whose key `preset` may name the preset it starts from; `preset` wins over that key,
    and with neither file nor preset the study is `pocket`. `environment` stands for `os.environ`. `overrides`
    are `key=value` with a dotted key and a TOML value; a bare word is text, and nothing after the `=` takes
    the key away. Raises `ConfigError`, one line with origin, key, value, constraint and the nearest known
    word.
    """
    try:
        return _load(path, preset, overrides, os.environ if environment is None else environment)
    except ConfigError as error:  # names and keys of files may hold ends of lines
        shown = re.sub(_LINE_BREAKS, lambda found: found[0].encode("unicode_escape").decode(), str(error))
        raise ConfigError(shown) from error.__cause__


def _load(
    path: Path | str | None, preset: str | None, overrides: Sequence[str], environment: Mapping[str, str]
) -> StudyConfig:
    layers: list[tuple[str, dict[str, Any]]] = []
    if path is not None:
        path = Path(path)
        table = _parse_toml(_read_text(path), str(path))
        in_file = table.pop("preset", None)
        if in_file is not None and in_file not in preset_names():
            near = _did_you_mean(str(in_file), preset_names())
            raise ConfigError(
                f"{path}: preset = {_shown(in_file)}: must be one of {', '.join(preset_names())}{near}"
            )
        preset = preset or in_file
        table.setdefault("name", _name_of_file(path))
        layers.append((str(path), table))
    elif preset is None:
        preset = "pocket"
    if preset is not None:
        layers.insert(0, (f"preset {preset}", _parse_toml(preset_text(preset), f"preset {preset}")))
    layers.extend(_from_environment(environment))
    layers.extend(("--set", _parse_override(text)) for text in overrides)

    values = StudyConfig().model_dump(mode="json", exclude_none=True)
    origins: dict[str, str] = {}
    for origin, table in layers:
        _require_shallow(table, origin)
        _lay(values, table, origin, origins)
    try:
        return StudyConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, values, origins)) from None


def _require_shallow(table: Mapping[str, Any], origin: str) -> None:
    """Raise `ConfigError` where tables and lists stand in each other so deep that nothing here would take
    them.
    """
    level: list[Any] = [table]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise ConfigError(
        f"{origin}: tables and lists stand in each other more than {_MAX_DEPTH} deep: no key takes that, see "
        "`lorascope keys`"
    )


def _name_of_file(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("._-")[:64] or "study"


def _read_text(path: Path) -> str:
    try:  # some editors write a byte order mark
        return read_regular(path, ConfigError, _MAX_FILE_BYTES).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: no such study file: check the path, or use --preset with one of "
            f"{', '.join(preset_names())}"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error


def _parse_toml(text: str, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: not valid TOML: {first_line(error)}") from error


def _parse_override(text: str) -> dict[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {text}: must be key=value, for example --set train.epochs=2")
    keys = key.strip().split(".")
    if keys == ["preset"]:
        raise ConfigError(
            f"--set {text}: a preset cannot be set over other layers: use --preset {value.strip()}"
        )
    return _nest(keys, _parse_value(keys, value.strip()))


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A layer for each variable: `LORASCOPE_TRAIN_EPOCHS=2` sets `train.epochs`, `LORASCOPE_ARMS_0_LR` sets
    `arms.0.lr`.

    Variables that name neither a section nor a top-level key are left to other parts of the program.
    """
    for variable in sorted(environment):
        section, *rest = variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("_", 1)
        if not variable.startswith(ENVIRONMENT_PREFIX) or section not in StudyConfig.model_fields:
            continue
        keys = [section, *rest[0].split("_", 1)] if section == "arms" and rest else [section, *rest]
        yield f"environment {variable}", _nest(keys, _parse_value(keys, environment[variable].strip()))


def _parse_value(keys: Sequence[str], text: str) -> Any:
    """A TOML value; what is not TOML is text, as is everything for a key that holds text, such as a commit of
    digits.
    """
    if text == "":
        return None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
    return (
        text if _alternatives(_schema(keys)) == [str] and not isinstance(value, str | list | dict) else value
    )


def _nest(keys: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def _lay(
    values: Any, table: Mapping[str, Any], origin: str, origins: dict[str, str], prefix: str = ""
) -> None:
    """Lay `table` over `values`, a table or a list: tables are merged and `0`, `1`, .. reach into lists; all
    else is replaced.

    Of `alpha` and `alpha_per_rank`, which exclude each other, a layer that gives one takes a weaker layer's
    other away.
    """
    for key, other in (("alpha", "alpha_per_rank"), ("alpha_per_rank", "alpha")):
        if (
            isinstance(values, dict)
            and key in table
            and _layer(origins.get(f"{prefix}{other}", "")) != _layer(origin)
        ):
            values.pop(other, None)
    for key, value in table.items():
        place = f"{prefix}{key}"
        index: Any = key
        if isinstance(values, list):
            if not (key.isascii() and key.isdigit() and int(key) < len(values)):
                last = f"; the last here is {prefix}{len(values) - 1}" if values else "; there is none here"
                raise ConfigError(f"{origin}: {place}: items are counted from 0{last}")
            index = int(key)
        old = values.get(key) if isinstance(values, dict) else values[index]
        if isinstance(value, dict) and isinstance(old, dict | list):
            origins[place] = origin
            _lay(old, value, origin, origins, f"{place}.")
        else:
            values[index] = value
            origins.update(dict.fromkeys(_places(value, place), origin))


def _layer(origin: str) -> str:
    return origin.partition(f" {ENVIRONMENT_PREFIX}")[0]  # all variables of the environment are one layer


def _places(value: Any, place: str) -> Iterator[str]:
    """`place` and the dotted keys of everything in `value`."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, f"{place}.{key}")


_CONSTRAINTS = {
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "finite_number": "a finite number",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "1 to 64 letters, digits, '.', '_' and '-', the first a letter or digit",
    "too_short": "a list with at least one item",
}


def _explain(error: ValidationError, values: Any, origins: Mapping[str, str]) -> str:
    """The first problem as one line: origin, key, value, constraint, nearest match."""
    problems = [(_keys(item["loc"], values), item) for item in error.errors(include_url=False)]
    # A list with a wrong item is also called too short, and "one or a list" fails as both: what counts is the
    # innermost place, and there the constraint rather than the type. An unknown key goes first, since it
    # often explains the rest.
    outer = {tuple(keys[:end]) for keys, _ in problems for end in range(len(keys))}
    innermost = [(keys, item) for keys, item in problems if tuple(keys) not in outer]
    order: dict[tuple[str, ...], int] = {}
    for keys, _ in innermost:
        order.setdefault(tuple(keys), len(order))
    keys, item = min(
        innermost,
        key=lambda problem: (
            problem[1]["type"] != "extra_forbidden",
            order[tuple(problem[0])],
            problem[1]["type"].endswith("_type"),
        ),
    )
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "missing":  # too few items where their number is fixed; `value` is the list
        keys = keys[:-1]
    place = ".".join(key if len(key) <= 80 else f"{key[:77]}..." for key in keys)
    origin = next(
        (
            origins[name]
            for name in (".".join(keys[:end]) for end in range(len(keys), 0, -1))
            if name in origins
        ),
        "study",
    )
    given = f"{origin}: {place}{'' if isinstance(value, dict) else f' = {_shown(value)}'}"
    match kind:
        case "extra_forbidden":
            known = [*_schema(keys[:-1]).model_fields, *(["preset"] if len(keys) == 1 else [])]
            return (
                f"{origin}: {place}: unknown key; known here: "
                f"{', '.join(known)}{_did_you_mean(keys[-1], known)}"
            )
        case "value_error":
            return (
                f"{given}: {context['error']}"
                if keys
                else f"{origins.get('arms', 'study')}: {context['error']}"
            )
        case "literal_error":
            choices = get_args(_schema(keys))
            constraint = f"one of {', '.join(choices)}{_did_you_mean(str(value), choices)}"
        case _ if kind in _CONSTRAINTS:
            constraint = _CONSTRAINTS[kind].format_map(
                {
                    name: f"{limit:.15g}" if isinstance(limit, float) else limit
                    for name, limit in context.items()
                }
            )
        case _:
            names = _type_name(_schema(keys)).split(" or ")
            constraint = " or ".join(name if name == "text" else f"a {name}" for name in names)
    return f"{origin}: {place} = {_shown(value)}: must be {constraint}"


def _keys(location: Sequence[str | int], values: Any) -> list[str]:
    """Pydantic's place of a problem as keys of the study: without the names it puts in between for the
    branches of unions.
    """
    keys = []
    for part in location:
        if isinstance(part, int) or (isinstance(values, dict) and part in values):
            keys.append(str(part))
            values = values[part] if isinstance(part, str) or part < len(values) else None
    return keys


def _shown(value: Any) -> str:
    """A received value for an error message, cut where it is long."""
    try:
        text = "nothing" if value is None else json.dumps(value, default=str, ensure_ascii=False)
    except ValueError:  # Python writes no numbers of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" - did you mean {near[0]!r}?" if near else ""


def reference_table() -> str:
    """The table of all keys for the docs, in Markdown, made from the schema."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for section, field in StudyConfig.model_fields.items():
        lines.extend(_reference_rows(section, field))
    return "\n".join(lines) + "\n"


def _reference_rows(key: str, field: FieldInfo) -> Iterator[str]:
    """A row for a key, or for every key of a table or of a list of tables."""
    kind: Any = _schema([*key.split("."), "0"]) or field.annotation
    if not _is_section(kind):
        default = "" if field.default is None else f"`{json.dumps(field.default)}`"
        yield f"| `{key}` | {_type_name(field.annotation)} | {default} | {field.description} |"
        return
    for name, item in kind.model_fields.items():
        yield from _reference_rows(f"{key}.{name}", item)


def _schema(keys: Sequence[str]) -> Any:
    """The annotation of what stands at a dotted key; None where nothing is known to stand."""
    kind: Any = StudyConfig
    for key in keys:
        if _is_section(kind):
            kind = kind.model_fields[key].annotation if key in kind.model_fields else None
        else:
            kind = next(
                (get_args(branch)[0] for branch in _alternatives(kind) if get_origin(branch) is tuple), None
            )
    return kind


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _alternatives(annotation: Any) -> list[Any]:
    """The types an annotation allows, without constraints and None."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [
            kind
            for branch in get_args(annotation)
            if branch is not NoneType
            for kind in _alternatives(branch)
        ]
    return [annotation]


def _type_name(annotation: Any) -> str:
    return " or ".join(_plain_name(kind) for kind in _alternatives(annotation))


def _plain_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is tuple:
        item, *others = get_args(kind)
        count = "" if Ellipsis in others else f"{1 + len(others)} "
        plural = _type_name(item)
        return f"list of {count}{f'{plural}s' if plural.endswith(('number', 'table')) else plural}"
    if _is_section(kind) or get_origin(kind) is dict:
        return "table"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}[kind]
