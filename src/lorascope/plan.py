"""What a study would do, from its configuration alone: arms, steps, pictures, rough time and disk."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from lorascope.adapter import Target, count_parameters, resolve_section
from lorascope.base import SD15_DIR, choose_device, is_hub_id, read_configs
from lorascope.config import BaseSection, StudyConfig
from lorascope.console import duration, size
from lorascope.group import section_of
from lorascope.optimizers import check_optimizer
from lorascope.prompts import load_prompts
from lorascope.trackers import require_trackers
from lorascope.train import count_steps
from lorascope.trials import TRAIN_TO_FORWARD_FLOPS, TrialGroup, TrialPlan, describe_passes, most_workers, plan_trials

_CHECKPOINTING_FLOPS = 1.46  # a second forward pass: (2.17 + 1) / 2.17
_MANY_PICTURES = 1000
_EFFICIENCY = {"cpu": 0.25, "cuda": 0.3}  # share of a matrix product's speed that U-Nets reach: a rough guess


@dataclass(frozen=True)
class Plan:
    """The plan of a study; what is not known before the data is read is None."""

    name: str
    base: str
    arms: list[dict[str, Any]]  # every choice of each arm, with its scale and number of parameters
    modules: int
    num_train: int | None
    accumulation_steps: int
    steps: int | None  # of the arm with the most
    passes: list[list[str]]  # names of the arms that are trained together
    side_by_side: int  # passes at the same time
    pictures: int  # previews not counted
    denoising_steps: int
    guidance: float
    estimated_s: float | None
    estimated_bytes: int

    def as_text(self) -> str:
        """The plan for people, several lines."""
        lines = [f"study {self.name}: {len(self.arms)} arms on {self.base}, {self.modules} adapted layers"]
        vary = len({(arm["batch_size"], arm["epochs"]) for arm in self.arms}) > 1
        for arm in self.arms:
            count = arm["parameters"]
            parameters = f"{count:,} parameters, {size(4 * count)}"
            choices = f"rank {arm['rank']:<4} alpha {arm['alpha']:<6g} scale {arm['scale']:<6g} lr {arm['lr']:<8g} seed {arm['seed']}"
            choices += f"  batch {arm['batch_size']:<3} epochs {arm['epochs']:<3}" if vary else ""
            lines.append(f"  {arm['name']:<16} {choices}  {parameters}")
        shown = f"at most {self.num_train:,} pictures" if self.num_train else "all pictures of the source"
        steps = f"{'at most ' if vary else ''}{self.steps:,} steps" if self.steps else "steps known once the data is read"
        batch = "epochs and batch of each arm" if vary else f"{self.arms[0]['epochs']} epochs, batch {self.arms[0]['batch_size']}"
        batch += f" x {self.accumulation_steps}" if self.accumulation_steps > 1 else ""
        lines.append(f"training   {shown} x {batch}: {steps}")
        lines += [f"           {line}" for line in describe_passes(self.passes, self.side_by_side)]
        lines.append(f"sampling   {self.pictures:,} pictures, {self.denoising_steps} steps, guidance {self.guidance:g}")
        known = self.estimated_s is not None
        lines.append(f"time       {f'about {duration(self.estimated_s or 0)} (rough)' if known else 'known once the data is read'}")
        lines.append(f"disk       about {size(self.estimated_bytes)}")
        return "\n".join(lines)


def plan_study(config: StudyConfig) -> Plan:
    """The plan behind `--dry-run`: loads no weights, downloads nothing.

    Time is FLOPs counted on a model without weights, at a fixed share of the speed of a timed matrix product. Raises
    `ConfigError` for an optimizer or tracker with which the study would not start.
    """
    check_optimizer(config)
    require_trackers(config.trackers)
    arms, train, sample = config.expand_arms(), config.train, config.sample
    num_pictures = len(load_prompts(sample.prompts, sample.num_prompts)) * len(sample.seeds) * (len(arms) + 1)
    num_previews = (
        sample.num_previews * (sum(arm.epochs // sample.preview_every_epochs for arm in arms) + 1) if sample.preview_every_epochs else 0
    )
    num_train, device = config.data.num_train, choose_device(config.device)
    entries = num_train * config.data.repeats if num_train else None
    steps = [count_steps(section_of(config, TrialGroup((arm,))), entries) for arm in arms] if entries else None
    flops, targets = count_flops(config)
    passes = plan_passes(config, device, flops, entries)
    seconds = None
    if steps:
        batches = sum(number * arm.batch_size for number, arm in zip(steps, arms, strict=True))
        training = TRAIN_TO_FORWARD_FLOPS * flops * batches * train.accumulation_steps
        training *= _CHECKPOINTING_FLOPS if train.gradient_checkpointing else 1
        sampling = flops * sample.steps * (1 if sample.guidance == 1 else 2) * (num_pictures + num_previews)
        seconds = (training + sampling) / (_matmul_flops_per_s(device) * _EFFICIENCY[device.type])
    counts = [count_parameters(targets, arm) for arm in arms]
    latent_bytes = (num_train or 0) * (2 if config.data.flip else 1) * 2 * 4 * 4 * (config.data.resolution_px // 8) ** 2
    picture_bytes = (num_pictures + num_previews) * 2 * config.data.resolution_px**2
    copy_bytes = 4 * (2 if train.keep_best else 1) + (4 if config.export.dtype == "fp32" else 2) * len(config.export.formats)
    checkpoint_bytes = 3 * 4 * max(counts) * sum(sorted(len(group.arms) for group in passes.groups)[-passes.num_workers :])
    return Plan(
        name=config.name,
        base=config.base.model,
        arms=[{**arm.model_dump(), "scale": arm.scale, "parameters": count} for arm, count in zip(arms, counts, strict=True)],
        modules=len(targets),
        num_train=num_train,
        accumulation_steps=train.accumulation_steps,
        steps=max(steps) if steps else None,
        passes=[group.names for group in passes.groups],
        side_by_side=passes.num_workers,
        pictures=num_pictures,
        denoising_steps=sample.steps,
        guidance=sample.guidance,
        estimated_s=seconds,
        estimated_bytes=copy_bytes * sum(counts) + checkpoint_bytes + picture_bytes + latent_bytes,
    )


def plan_passes(config: StudyConfig, device: torch.device, forward_flops: float, num_entries: int | None) -> TrialPlan:
    """Which arms are trained together and how many passes side by side, for the memory that is free now.

    `forward_flops` is what the U-Net takes for a picture; `num_entries` is the number of pictures in an epoch, many when absent.
    """
    most = most_workers(config, device.type, torch.cuda.device_count(), forward_flops, num_entries or _MANY_PICTURES)
    return plan_trials(config, device.type, most, lambda arms, num_workers: True)


def count_flops(config: StudyConfig) -> tuple[int, list[Target]]:
    """FLOPs of one U-Net forward pass, and the adapted layers; a hub id, whose files are not fetched, is taken for SD v1.5."""
    configs = read_configs(BaseSection(model=str(SD15_DIR)) if is_hub_id(config.base.model) else config.base)
    side = config.data.resolution_px // 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs["unet"])
        text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"]))
        sample, text = torch.empty(1, unet.config.in_channels, side, side), torch.empty(1, 77, unet.config.cross_attention_dim)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(sample, torch.zeros((), dtype=torch.long), text)
    return counter.get_total_flops(), resolve_section({"unet": unet, "text_encoder": text_encoder}, config.adapter)


def _matmul_flops_per_s(device: torch.device) -> float:
    """Speed of a large matrix product, median of three, in the precision of training."""
    side, dtype = (1024, torch.float32) if device.type == "cpu" else (8192, torch.bfloat16)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    rates = []
    for _ in range(4):
        started = time.perf_counter()
        (matrix @ matrix).sum().item()
        rates.append(2 * side**3 / (time.perf_counter() - started))
    return float(np.median(rates[1:]))
