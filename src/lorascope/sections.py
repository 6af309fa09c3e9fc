"""The tables of a study file, frozen: every key's type, default, range and meaning."""

import math
from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lorascope.errors import shown

REFERENCE_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
MAX_ARMS = 1024
LOWEST, HIGHEST = 1e-12, 1e20  # of positive real numbers


def _off_or_of_use(value: float) -> float:
    if 0 < value < 1e-12:
        raise ValueError("must be 0, which turns it off, or at least 1e-12")
    return value


def _without_nan(value: Any) -> Any:
    level = [value]
    while level:
        if any(isinstance(item, float) and math.isnan(item) for item in level):
            raise ValueError("must hold no NaN: give a number")
        level = [
            item
            for table in level
            if isinstance(table, dict | list)
            for item in (table.values() if isinstance(table, dict) else table)
        ]
    return value


def _without_repeats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if repeated := sorted(value for value, count in Counter(values).items() if count > 1):
        raise ValueError(f"must not repeat a value, but {shown(repeated[0])} stands there more than once")
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
# Far from where float32, in which adapters are trained, turns to 0 or infinity: also multiplied by a rank,
# and one as a multiple of another.
PositiveReal = Annotated[Real, Field(ge=LOWEST, le=HIGHEST)]
Share = Annotated[Real, Field(ge=0, le=1)]
Beta = Annotated[Real, Field(ge=0, lt=1)]
Seed = Annotated[Whole, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Ranks = Annotated[tuple[Rank, ...], Field(min_length=1), AfterValidator(_without_repeats)]
BatchSizes = Annotated[tuple[BatchSize, ...], Field(min_length=1), AfterValidator(_without_repeats)]
SeveralEpochs = Annotated[tuple[Epochs, ...], Field(min_length=1), AfterValidator(_without_repeats)]
Dropout = Annotated[Real, Field(ge=0, le=0.9)]
Dropouts = Annotated[tuple[Dropout, ...], Field(min_length=1), AfterValidator(_without_repeats)]
PositiveReals = Annotated[tuple[PositiveReal, ...], Field(min_length=1), AfterValidator(_without_repeats)]
Strength = Annotated[Real, Field(ge=0.01, le=2)]
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
    folder_repeats: Flag = Field(
        default=True,
        description=(
            "take the number in a folder's name such as `10_name` for repeats, and the name for a caption "
            "where there is none, as kohya's scripts do"
        ),
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
        default=None, description="alpha of these layers; the arm's scale is kept when absent"
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
    optimizer_args: Annotated[dict[str, Any], AfterValidator(_without_nan)] = Field(
        default={}, description="further arguments of an optimizer other than `adamw`"
    )
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="AdamW's decay rates")
    eps: Real = Field(default=1e-8, ge=1e-30, le=1e6, description="AdamW's epsilon")
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
    max_grad_norm: Annotated[Real, AfterValidator(_off_or_of_use)] = Field(
        default=0.0, ge=0, le=1e20, description="clip each arm's gradient to this norm; 0 leaves it alone"
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
            "`pocket`, `sd15`, a text file with sections [normal] and [abstract], one prompt a line, or "
            "`captions`: the first `num_prompts` of the training pictures and as many of the held-out ones"
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

    @model_validator(mode="after")
    def _captions_are_counted(self) -> Self:
        if self.prompts == "captions" and self.num_prompts is None:
            raise ValueError(
                'prompts = "captions": how many of them is not said: set sample.num_prompts, such as 20'
            )
        return self


class ScoreSection(Section):
    """The CLIP model that scores, and the intervals."""

    model: Text = Field(
        default="pocket",
        description="`pocket`, a CLIP folder, or a hub id such as `openai/clip-vit-large-patch14`",
    )
    revision: Text | None = Field(default=None, description="branch, tag or commit of a hub id")
    style_model: Text | None = Field(
        default=None,
        description="a model whose features measure style in place of the scorer's: a DINOv2 or CLIP folder, "
        "or a hub id such as `facebook/dinov2-base`",
    )
    batch_size: BatchSize = Field(default=64, description="pictures scored at once")
    resamples: Whole = Field(
        default=10_000, ge=100, le=1_000_000, description="bootstrap resamples over prompts"
    )


class DiagnoseSection(Section):
    """What is drawn and measured after training to find out why an arm wins or fails."""

    enabled: Flag = Field(
        default=True, description="diagnose at the end of a study; `lorascope diagnose` does it later"
    )
    strengths: Annotated[tuple[Strength, ...], Field(min_length=1), AfterValidator(_without_repeats)] = Field(
        default=(0.25, 0.5, 0.75, 1.0), description="factors on an adapter at which pictures are drawn"
    )
    epochs: Annotated[
        tuple[Literal["last", "best"], ...], Field(min_length=1), AfterValidator(_without_repeats)
    ] = Field(
        default=("last", "best"),
        description="adapters to draw with: of the last epoch, of the one with the lowest held-out loss",
    )
    num_prompts: Positive = Field(
        default=12, description="the first so many of the study's prompts in each category"
    )
    seeds: Seeds = Field(default=(0,), description="seeds of the initial noise")
    steps: Whole = Field(default=15, ge=1, le=1000, description="denoising steps")
    scheduler: Literal["ddim", "euler", "dpmsolver++"] = Field(default="dpmsolver++", description="sampler")
    guidances: tuple[Annotated[Real, Field(ge=0, le=100)], ...] = Field(
        default=(1.0, 3.0), description="guidance scales beside `sample.guidance`, at strength 1"
    )
    num_guidance_prompts: Positive = Field(
        default=3, description="prompts of each category for those guidance scales"
    )
    swap_unconditional: Flag = Field(
        default=True,
        description=(
            "draw with the base's prediction for the empty caption too, at strength 1: what that brings "
            "back was lost there"
        ),
    )
    scale_intruders: Flag = Field(
        default=True,
        description=(
            "draw with the adapter's intruder directions at three quarters of their size too, at strength 1: "
            "what that brings back was lost by them"
        ),
    )
    cut_rank: Flag = Field(
        default=True,
        description=(
            "draw with arms above the study's lowest rank cut to it by SVD too, at strength 1: whether a "
            "lower rank would do"
        ),
    )
    num_intervention_prompts: Positive = Field(
        default=12,
        description="prompts of each category, of those drawn, for `swap_unconditional`, `scale_intruders` "
        "and `cut_rank`",
    )


class VerdictSection(Section):
    """Which arm, epoch and strength are kept."""

    max_prompt_loss: Share = Field(
        default=0.1,
        description="the share of the base's prompt fidelity that style may cost: 0 is none, 1 all",
    )


class ExportSection(Section):
    """Adapter files for other programs."""

    formats: tuple[Literal["kohya", "diffusers"], ...] = Field(
        default=("kohya",),
        description="files left beside each adapter: `kohya` for WebUI, Forge and ComfyUI, `diffusers`",
    )
    dtype: Literal["fp32", "fp16", "bf16"] = Field(default="fp16", description="dtype of those files")
