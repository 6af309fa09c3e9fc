"""Everything that decides the pocket world's outcome, in one place.

Amounts of training are counted in samples (drawings shown), so that a preset
means the same on a CPU and on a GPU, whatever the batch.
"""

from dataclasses import dataclass, field

NPM_PACKAGES = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/fxemoji": "1.2.2",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/openmoji": "1.2.29",
    "emojibase-data": "17.0.0",
}

CARTOON_VENDOR = "openmoji"
VENDORS = ("noto", "twemoji", "emojione", "fxemoji", "fluent-emoji", "fluent-emoji-flat", "openmoji")
SCORER_TEST_VENDOR = "emojione"
"""The scorer never sees this vendor's drawings: its retrieval figures come from them."""

IMAGE_SIZE_PX = 64
DRAFT_SIZE_PX = 32
"""The U-Net takes most of its steps on drawings of this size, at a quarter of the cost."""

MAX_TOKENS = 77
NUM_CAPTIONS_PER_SUBJECT = 8


@dataclass(frozen=True)
class CartoonConfig:
    num_train: int = 1500
    max_test: int = 400
    near_hamming: int = 6  # bits of a 64-bit difference hash
    near_difference: float = 0.03  # mean absolute difference, pixel range 0..1


@dataclass(frozen=True)
class VaeConfig:
    channels: tuple[int, int, int] = (24, 48, 96)
    num_samples: int = 55_200
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    kl_weight: float = 1e-4
    gradient_weight: float = 0.5
    colour_weight: float = 1.0


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int = 3000
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 4
    num_samples: int = 153_600
    batch_size: int = 256
    learning_rate: float = 1e-3
    image_size_px: int = 32
    image_width: int = 48


@dataclass(frozen=True)
class UnetConfig:
    channels: tuple[int, int, int] = (64, 128, 192)
    num_heads: int = 4
    vendors: tuple[str, ...] = ("noto", "twemoji", "fluent-emoji-flat")
    simple_only: bool = True
    """Leave out people, signs, scenes and whatever a small model cannot draw in a short time."""
    draft_samples: int = 180_000
    final_samples: int = 165_600
    batch_size: int = 72
    images_per_caption: int = 3
    learning_rate: float = 1e-3
    final_learning_rate: float = 8e-4
    warmup_samples: int = 10_000
    caption_dropout: float = 0.1
    snr_gamma: float = 5.0
    ema_half_life_samples: int = 12_000
    goes_on: bool = False
    """Begin with the denoiser in `--out` instead of a random one."""


@dataclass(frozen=True)
class ScorerConfig:
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 4
    patch_size_px: int = 8
    text_hidden_size: int = 128
    text_num_layers: int = 3
    vocab_size: int = 3000
    projection_size: int = 128
    num_samples: int = 460_800
    full_share: float = 0.2  # of the samples, at the end, with all patches
    strength: float = 1.0  # of the distortions; they start at 0.3
    known_weight: float = 6.0  # how much oftener a subject is drawn that the base knows
    batch_size: int = 128
    learning_rate: float = 1.2e-3


@dataclass(frozen=True)
class PocketConfig:
    seed: int = 20261123
    cartoon: CartoonConfig = field(default_factory=CartoonConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    text: TextConfig = field(default_factory=TextConfig)
    unet: UnetConfig = field(default_factory=UnetConfig)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)


CPU = PocketConfig()
"""About three hours on one core: 314 subjects of three vendors."""

CPU_LONGER = PocketConfig(
    unet=UnetConfig(
        draft_samples=0,
        final_samples=500_000,
        final_learning_rate=6e-4,
        warmup_samples=4_000,
        ema_half_life_samples=12_000,
        goes_on=True,
    )
)
"""More of the denoiser's training at full size: `--preset cpu-longer --stages unet evaluate` after the first.
"""

GPU = PocketConfig(
    vae=VaeConfig(num_samples=640_000, batch_size=64),
    text=TextConfig(num_samples=1_000_000),
    unet=UnetConfig(
        draft_samples=2_000_000,
        final_samples=2_000_000,
        batch_size=288,
        simple_only=False,
        ema_half_life_samples=60_000,
    ),
    scorer=ScorerConfig(num_samples=3_000_000, batch_size=512, strength=1.25),
)
"""The same recipe with more of everything, for a machine with an accelerator. Not yet run."""
