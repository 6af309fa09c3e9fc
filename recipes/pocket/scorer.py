"""Train the scorer: a second, independent CLIP that judges what the base draws.

Stage 6. It shares no weights with the base and never sees EmojiOne's drawings nor OpenMoji's
held-out rows, so that its figures on them are honest.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from recipes.pocket.checkpoint import load_checkpoint, save_checkpoint, save_half
from recipes.pocket.config import IMAGE_SIZE_PX, MAX_TOKENS, ScorerConfig
from recipes.pocket.contrastive import augment, contrastive_loss
from recipes.pocket.tokenizer import save_tokenizer

PIXEL_MEAN, PIXEL_STD = 0.5, 0.5


def build_scorer(config: ScorerConfig, tokenizer: CLIPTokenizer) -> CLIPModel:
    """Allocate the two towers and their projections."""
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model_config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": config.text_hidden_size,
            "intermediate_size": 4 * config.text_hidden_size,
            "num_hidden_layers": config.text_num_layers,
            "num_attention_heads": config.num_heads,
            "max_position_embeddings": MAX_TOKENS,
            **tokens,
        },
        vision_config={
            "hidden_size": config.hidden_size,
            "intermediate_size": 4 * config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "image_size": IMAGE_SIZE_PX,
            "patch_size": config.patch_size_px,
        },
        projection_dim=config.projection_size,
        logit_scale_init_value=math.log(15.0),
        attn_implementation="eager",
    )
    return CLIPModel(model_config)


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """Images are resized to 64 px with Pillow, without a crop, and brought to -1..1."""
    images = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX},
        do_center_crop=False,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def train_scorer(
    tokenizer: CLIPTokenizer,
    pixels: Tensor,
    subject_index: Tensor,
    row_weights: Tensor,
    captions: list[str],
    fits: Tensor,
    config: ScorerConfig,
    seed: int,
    work_dir: Path,
    device: torch.device,
    log: Callable[..., None],
) -> CLIPModel:
    """Train on (N, 3, 64, 64) uint8 drawings, drawn with `row_weights`, (N,).

    The other arguments are `text.train_text_encoder`'s. Until `config.full_share` of the samples
    is left, the image tower sees a random half of the patches: twice the speed, and a check on
    learning drawings by heart (arXiv:2212.00794).
    """
    torch.manual_seed(seed + 3)
    model = build_scorer(config, tokenizer).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.1, fused=True)
    num_steps = config.num_samples // config.batch_size
    tokens = tokenizer(captions, padding=True, return_tensors="pt").input_ids
    num_variants = len(captions) // fits.shape[1]
    step = load_checkpoint(work_dir / "scorer.ckpt", model=model, optimizer=optimizer)
    start = time.monotonic()
    while step < num_steps:
        generator = torch.Generator().manual_seed((seed + 3) * 1_000_003 + step)
        rows = torch.multinomial(row_weights, config.batch_size, generator=generator)
        variant = torch.randint(num_variants, (config.batch_size,), generator=generator)
        caption = subject_index[rows] * num_variants + variant
        strength = min(
            config.strength, 0.3 + 2 * step / num_steps
        )  # easy drawings first: a transformer starts slowly
        images = augment(pixels[rows].float() / 255, generator, strength)
        for group in optimizer.param_groups:
            warmup, done = min(1.0, (step + 1) / 100), step / num_steps
            group["lr"] = config.learning_rate * warmup * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
        with torch.autocast(device.type, torch.bfloat16):
            keep = 1.0 if step >= (1 - config.full_share) * num_steps else 0.5
            image = _encode_patches(model, ((images - PIXEL_MEAN) / PIXEL_STD).to(device), keep, generator)
            length = int((tokens[caption] != tokenizer.eos_token_id).sum(1).max()) + 1
            text = model.text_projection(model.text_model(tokens[caption, :length].to(device)).pooler_output)
        pairs = fits[caption][:, subject_index[rows]].to(device)
        scale = model.logit_scale.exp().clamp(max=60)
        loss = contrastive_loss(
            F.normalize(text.float(), dim=1), F.normalize(image.float(), dim=1), scale, pairs
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0 or step == num_steps:
            log(
                stage="scorer",
                samples=step * config.batch_size,
                loss=loss.item(),
                scale=scale.item(),
                seconds=time.monotonic() - start,
            )
        if step % 50 == 0 or step == num_steps:
            save_checkpoint(work_dir / "scorer.ckpt", step, model=model, optimizer=optimizer)
    return model.eval()


def _encode_patches(model: CLIPModel, images: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """`get_image_features` of a random share of the patches, the same ones for the whole batch."""
    tower = model.vision_model
    tokens = tower.embeddings(images)  # (B, 1 + P, D), the class token first
    num_patches = tokens.shape[1] - 1
    if keep < 1:
        kept = torch.randperm(num_patches, generator=generator)[: round(keep * num_patches)].sort().values + 1
        tokens = torch.cat([tokens[:, :1], tokens[:, kept.to(tokens.device)]], 1)
    states = tower.encoder(inputs_embeds=tower.pre_layrnorm(tokens)).last_hidden_state
    return model.visual_projection(tower.post_layernorm(states[:, 0]))


@torch.no_grad()
def embed_images(model: CLIPModel, images: Tensor) -> Tensor:
    """Unit vectors, (N, D), of (N, 3, 64, 64) uint8 images."""
    parts = []
    for chunk in images.split(128):
        values = (chunk.float() / 255 - PIXEL_MEAN) / PIXEL_STD
        parts.append(model.visual_projection(model.vision_model(values).pooler_output))
    return F.normalize(torch.cat(parts), dim=1)


@torch.no_grad()
def embed_captions(model: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Unit vectors, (N, D), of captions."""
    tokens = tokenizer(captions, padding=True, return_tensors="pt").input_ids
    return F.normalize(model.text_projection(model.text_model(tokens).pooler_output), dim=1)


def save_scorer(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write model and processor; the weights in half precision."""
    save_half(model, folder)
    build_processor(tokenizer).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
