"""Put the parts together as a `StableDiffusionPipeline` folder, and draw with it."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from recipes.pocket.checkpoint import save_half
from recipes.pocket.tokenizer import save_tokenizer
from recipes.pocket.unet import build_scheduler

NUM_STEPS, GUIDANCE = 30, 7.5


def build_pipeline(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """Assemble the parts, in single precision, without a safety checker."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_base(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write the whole folder in half precision; each file is replaced in one step."""
    part = folder.with_name(folder.name + ".part")
    pipeline.save_pretrained(part)  # the index, the scheduler, and weights that the next lines replace
    for name in ("vae", "text_encoder", "unet"):
        save_half(getattr(pipeline, name), part / name)
    save_tokenizer(pipeline.tokenizer, part / "tokenizer")
    for path in sorted(part.rglob("*")):
        target = folder / path.relative_to(part)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            path.replace(target)
    for path in sorted(part.rglob("*"), reverse=True):
        path.rmdir()
    part.rmdir()


@torch.no_grad()
def draw_prompts(
    pipeline: StableDiffusionPipeline, prompts: list[str], seed: int, size_px: int, batch_size: int = 25
) -> list[Image.Image]:
    """One image per prompt at 30 DDIM steps and guidance 7.5; prompt i starts from the noise of `seed +
    i`.
    """
    images: list[Image.Image] = []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(batch))]
        images += pipeline(
            batch, num_inference_steps=NUM_STEPS, guidance_scale=GUIDANCE, height=size_px, width=size_px,
            generator=generators,
        ).images  # fmt: skip
    return images


def contact_sheet(images: list[Image.Image], num_columns: int, cell_px: int) -> Image.Image:
    """All images in a grid, for eyes."""
    num_rows = -(-len(images) // num_columns)
    sheet = Image.new("RGB", (num_columns * cell_px, num_rows * cell_px), "white")
    for i, image in enumerate(images):
        sheet.paste(image.resize((cell_px, cell_px)), (i % num_columns * cell_px, i // num_columns * cell_px))
    return sheet
