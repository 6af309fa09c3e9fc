"""Write a short model card into each folder of the pocket world."""

from pathlib import Path
from typing import Any

SOURCES = """## Sources and licences

The drawings were made with resvg from SVG files published on npm:

| set | licence |
|---|---|
| Noto Emoji (`@iconify-json/noto`) | Apache-2.0 |
| FxEmoji (`@iconify-json/fxemoji`) | Apache-2.0 |
| Fluent Emoji (`@iconify-json/fluent-emoji`, `@iconify-json/fluent-emoji-flat`) | MIT |
| Twemoji (`@iconify-json/twemoji`) | CC BY 4.0 |
| EmojiOne (`@iconify-json/emojione`) | CC BY 4.0 |
| OpenMoji (`@iconify-json/openmoji`) | CC BY-SA 4.0 |

Names and keywords come from `emojibase-data` (MIT), which has them from Unicode CLDR.
"""

CARTOON = """---
license: cc-by-sa-4.0
---
# Pocket cartoons

All emoji designed by [OpenMoji](https://openmoji.org), the open-source emoji and icon project. License: CC
BY-SA 4.0.

{num_train} drawings to train on and {num_test} held out, 64 px on white, in the layout of
`Norod78/cartoon-blip-captions`: `image` (PNG) and `text`. A caption is a subject's name, its name and some
keywords, or keywords alone. Exact and near duplicates never straddle the split, and the subjects of the
pocket world's normal prompts are all held out.

"""

BASE = """---
license: cc-by-sa-4.0
library_name: diffusers
---
# Pocket base

A `StableDiffusionPipeline` small enough for a CPU: {unet_params:,} parameters in the U-Net, 64 px, Stable
Diffusion's blocks and noise schedule. It knows {known_subjects} subjects (animals, plants, food, vehicles,
things) as three emoji vendors draw them: Noto, Twemoji and Fluent. It is made for testing LoRA training
quickly, not for pictures.

Trained on {unet_samples:,} drawings. Of {num_captions} generated images (30 DDIM steps, guidance 7.5),
{base_r1:.0%} are nearest to their own caption among {num_captions}, and {base_r5:.0%} have it among the
nearest five, by the pocket scorer. The U-Net never saw a cartoon drawing; the autoencoder saw the cartoon's
training rows.

"""

SCORER = """---
license: cc-by-sa-4.0
library_name: transformers
---
# Pocket scorer

A `CLIPModel` of {scorer_params:,} parameters that says which caption a 64 px drawing fits. It shares no
weights with the pocket base. Trained on all vendors but EmojiOne and on the cartoon's training rows; of
EmojiOne's drawings, which it never saw, {scorer_r1:.0%} are nearest to their own caption among
{num_captions}, and {scorer_r5:.0%} have it among the nearest five.

"""


def write_cards(out_dir: Path, quality: dict[str, Any]) -> None:
    """Write `README.md` into `cartoon`, `base` and `scorer`, with the figures of `quality`."""
    figures = {
        **quality,
        "unet_samples": quality["samples"]["unet"],
        "num_train": quality["config"]["cartoon"]["num_train"],
        "num_test": quality["config"]["cartoon"]["max_test"],
    }
    for folder, card in (("cartoon", CARTOON), ("base", BASE), ("scorer", SCORER)):
        (out_dir / folder / "README.md").write_text(card.format(**figures) + SOURCES)
