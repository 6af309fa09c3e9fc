"""Train the base's text encoder beside a throw-away image tower.

Stage 4. The image tower is thrown away; the text encoder is frozen from here on.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from recipes.pocket.checkpoint import load_checkpoint, save_checkpoint
from recipes.pocket.config import MAX_TOKENS, TextConfig
from recipes.pocket.contrastive import augment, contrastive_loss


def build_text_encoder(config: TextConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Allocate the text encoder: (B, 77) token ids to (B, 77, hidden_size) states."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size,
            projection_dim=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager",
        )
    )


class ImageTower(nn.Sequential):
    """A small convolutional network: (B, 3, 32, 32) in 0..1 to (B, hidden_size)."""

    def __init__(self, width: int, hidden_size: int) -> None:
        def block(before: int, after: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]

        super().__init__(
            *block(3, width, 1),
            *block(width, width, 2),
            *block(width, 2 * width, 1),
            *block(2 * width, 2 * width, 2),
            *block(2 * width, 4 * width, 2),
            *block(4 * width, 4 * width, 1),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * width, hidden_size),
        )


def train_text_encoder(
    tokenizer: CLIPTokenizer,
    pixels: Tensor,
    subject_index: Tensor,
    captions: list[str],
    fits: Tensor,
    config: TextConfig,
    seed: int,
    work_dir: Path,
    device: torch.device,
    log: Callable[..., None],
) -> CLIPTextModel:
    """Train on (N, 3, 64, 64) uint8 drawings of subjects `subject_index`, (N,).

    `captions` holds the same number of captions for each subject, subject by subject, and `fits`,
    (len(captions), num_subjects) bool, says which subjects each one fits.
    """
    torch.manual_seed(seed + 1)
    encoder = build_text_encoder(config, tokenizer)
    model = nn.ModuleDict(
        {
            "text": encoder,
            "image": ImageTower(config.image_width, config.hidden_size),
            "head": nn.Linear(config.hidden_size, config.hidden_size),
        }
    ).to(device)
    log_scale = nn.Parameter(torch.tensor(math.log(15.0), device=device))
    model.register_parameter("log_scale", log_scale)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.05, fused=True)
    num_steps = config.num_samples // config.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, num_steps + 1, pct_start=0.1
    )
    # What follows a caption's end cannot change its pooled state: the encoder is causal.
    tokens = tokenizer(captions, padding=True, return_tensors="pt").input_ids
    small = F.avg_pool2d(pixels.float() / 255, pixels.shape[-1] // config.image_size_px)  # (N, 3, 32, 32)
    num_variants = len(captions) // fits.shape[1]
    step = load_checkpoint(work_dir / "text.ckpt", model=model, optimizer=optimizer, schedule=schedule)
    start = time.monotonic()
    while step < num_steps:
        generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + step)
        rows = torch.randint(len(small), (config.batch_size,), generator=generator)
        variant = torch.randint(num_variants, (config.batch_size,), generator=generator)
        caption = subject_index[rows] * num_variants + variant
        images = augment(small[rows], generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            image = model["image"](images)
            text = model["head"](encoder(tokens[caption].to(device)).pooler_output)
        pairs = fits[caption][:, subject_index[rows]].to(device)
        loss = contrastive_loss(
            F.normalize(text.float(), dim=1),
            F.normalize(image.float(), dim=1),
            log_scale.exp().clamp(max=50),
            pairs,
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        step += 1
        if step % 50 == 0 or step == num_steps:
            log(
                stage="text",
                samples=step * config.batch_size,
                loss=loss.item(),
                seconds=time.monotonic() - start,
            )
        if step % 200 == 0 or step == num_steps:
            save_checkpoint(work_dir / "text.ckpt", step, model=model, optimizer=optimizer, schedule=schedule)
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def encode_captions(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str], device: torch.device
) -> Tensor:
    """States of captions as a pipeline computes them: (len(captions), 77, hidden_size) float32."""
    tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    return torch.cat(
        [encoder(chunk.to(device)).last_hidden_state.float().cpu() for chunk in tokens.split(64)]
    )
