"""Train the denoiser on cached latents and cached caption states.

Stage 5, nearly all of the recipe's time. The loop sees no image and no text: latents of every
drawing at both sizes and states of every caption are computed once.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from recipes.pocket.checkpoint import load_checkpoint, save_checkpoint
from recipes.pocket.config import IMAGE_SIZE_PX, TextConfig, UnetConfig


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule: scaled-linear betas over 1000 steps, noise prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def build_unet(config: UnetConfig, text: TextConfig) -> UNet2DConditionModel:
    """Allocate the denoiser: SD v1.5's kinds of blocks with one level less, (B, 4, 16, 16) latents."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE_PX // 4,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=config.channels,
        layers_per_block=1,
        attention_head_dim=config.num_heads,  # diffusers' old name: it is the number of heads
        cross_attention_dim=text.hidden_size,
        norm_num_groups=16,
    )


class SharedContextAttention:
    """Attention in which every caption's keys and values serve several images.

    The context has B captions, the images come as B * r rows, those of one caption side by side:
    with r = 1 this is plain attention. On small latents the 77 context tokens outnumber the
    pixels, so that sharing them saves much of a step. Written out instead of
    `scaled_dot_product_attention`, whose backward pass takes twice as long on a CPU.
    """

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: object
    ) -> Tensor:
        rows, num_pixels, channels = hidden_states.shape  # (B * r, N, C)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states  # (B, T, D)
        batch = len(context)
        query = attn.to_q(hidden_states).view(
            batch, -1, attn.heads, channels // attn.heads
        )  # (B, r * N, h, d)
        key = attn.to_k(context).view(batch, -1, attn.heads, channels // attn.heads)  # (B, T, h, d)
        value = attn.to_v(context).view(batch, -1, attn.heads, channels // attn.heads)
        scores = (query.transpose(1, 2) * attn.scale) @ key.permute(0, 2, 3, 1)  # (B, h, r * N, T)
        mixed = scores.softmax(-1).to(value.dtype) @ value.transpose(1, 2)  # (B, h, r * N, d)
        mixed = mixed.transpose(1, 2).reshape(rows, num_pixels, channels)
        return attn.to_out[0](mixed)


def train_unet(
    latents: dict[int, Tensor],
    subject_index: Tensor,
    states: Tensor,
    empty_state: Tensor,
    config: UnetConfig,
    text: TextConfig,
    seed: int,
    work_dir: Path,
    device: torch.device,
    log: Callable[..., None],
    start: UNet2DConditionModel | None = None,
) -> Iterator[tuple[int, UNet2DConditionModel]]:
    """Train, first at 8x8 latents and then at 16x16; yield (samples seen, averaged model) now and then.

    It begins with the weights of `start` where one is given, else with random ones.

    `latents[size]` is (N, 4, size, size), one row per drawing; `subject_index`, (N,), says what it
    shows; `states`, (S, V, 77, D), holds V captions of each subject; `empty_state` is (77, D).
    Interrupted, it goes on from its checkpoint: a step's batch depends on (seed, step) only.
    """
    torch.manual_seed(seed + 2)
    unet = build_unet(config, text).to(device)
    if start is not None:
        unet.load_state_dict(start.state_dict())
    average = build_unet(config, text).to(device).requires_grad_(False)
    average.load_state_dict(unet.state_dict())
    unet.set_attn_processor(SharedContextAttention())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate, weight_decay=0.01, fused=True)
    alphas = build_scheduler().alphas_cumprod.to(device)  # (1000,)
    by_subject = [torch.nonzero(subject_index == s)[:, 0] for s in range(len(states))]
    draft, final = sorted(latents)
    num_draft_steps = config.draft_samples // config.batch_size
    num_steps = num_draft_steps + config.final_samples // config.batch_size
    decay = 0.5 ** (config.batch_size / config.ema_half_life_samples)
    step = load_checkpoint(work_dir / "unet.ckpt", model=unet, average=average, optimizer=optimizer)
    started, losses = time.monotonic(), []
    while step < num_steps:
        generator = torch.Generator().manual_seed((seed + 2) * 1_000_003 + step)
        num_captions = config.batch_size // config.images_per_caption
        subjects = torch.randint(len(states), (num_captions,), generator=generator)
        variants = torch.randint(states.shape[1], (num_captions,), generator=generator)
        context = states[subjects, variants]  # (B, 77, D)
        dropped = torch.rand(num_captions, generator=generator) < config.caption_dropout
        context[dropped] = empty_state
        rows = torch.cat(
            [_draw_rows(by_subject[s], config.images_per_caption, generator) for s in subjects.tolist()]
        )
        clean = latents[draft if step < num_draft_steps else final][rows].to(device)  # (B * r, 4, h, w)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        timesteps = _stratified_timesteps(config.batch_size, len(alphas), generator).to(device)
        alpha = alphas[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_draft_steps, num_steps, config)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = unet(noisy, timesteps, context.to(device)).sample.float()
        snr = (alpha / (1 - alpha))[:, 0, 0, 0]
        weight = snr.clamp(max=config.snr_gamma) / snr  # min-SNR weighting of noise prediction
        loss = (weight * F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        step += 1
        _update_average(average, unet, min(decay, step / (step + 10)))
        losses.append(loss.item())
        if step % 100 == 0 or step == num_steps:
            mean_loss = sum(losses) / len(losses)
            log(stage="unet", samples=step * config.batch_size, size=clean.shape[-1], loss=mean_loss,
                lr=optimizer.param_groups[0]["lr"], seconds=time.monotonic() - started)  # fmt: skip
            losses.clear()
        if step % 100 == 0 or step == num_steps:
            save_checkpoint(work_dir / "unet.ckpt", step, model=unet, average=average, optimizer=optimizer)
        if step % 500 == 0 or step == num_steps:
            yield step * config.batch_size, average


def learning_rate(step: int, num_draft_steps: int, num_steps: int, config: UnetConfig) -> float:
    """Warm up, hold to the end of the drafts, fall by a cosine to a hundredth at the end."""
    warmup = min(1.0, (step + 1) * config.batch_size / config.warmup_samples)
    if step < num_draft_steps:
        return config.learning_rate * warmup
    done = (step - num_draft_steps) / max(1, num_steps - num_draft_steps)
    return config.final_learning_rate * warmup * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def _draw_rows(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` drawings of one subject, different ones while there are enough."""
    order = torch.randperm(len(rows), generator=generator)
    return rows[order.repeat(math.ceil(count / len(rows)))[:count]]


def _stratified_timesteps(count: int, num_timesteps: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of `count` equal intervals, in random order: a steadier loss than free draws."""
    places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (places * num_timesteps).long()[torch.randperm(count, generator=generator)]


@torch.no_grad()
def _update_average(average: UNet2DConditionModel, unet: UNet2DConditionModel, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - decay)
