"""The passes that train a study on this device: its models counted without data, its arms packed into the
memory that is free.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.utils.flop_counter import FlopCounterMode

from lorascope.adapters.targets import Target, resolve_section
from lorascope.arms import Arm
from lorascope.base.configs import SD15_DIR, read_configs
from lorascope.base.ldm import build_component
from lorascope.base.location import is_hub_id
from lorascope.machine.device import choose_device
from lorascope.machine.memory import free_bytes
from lorascope.schema import StudyConfig
from lorascope.sections import BaseSection
from lorascope.training.footprint import FREE_SHARE, Estimate, attend_as_on, estimate_pass, weights_bytes
from lorascope.training.packing import Packing, most_workers, pack_arms, way_of

_MANY_PICTURES = 1000
_PROCESS_BYTES = 500 * 2**20  # of a worker beside the base: Python and its libraries


@dataclass(frozen=True)
class Counts:
    """What is known of a study's models from their configurations alone."""

    components: dict[str, torch.nn.Module]  # `unet`, `text_encoder` and `vae`, without data
    targets: list[Target]
    latent_shape: tuple[int, int, int]  # of a square picture
    flops: dict[str, int]  # of one picture or caption: `encode`, `text`, `unet` and `decode`, forward
    passes: dict[Any, Estimate] = field(default_factory=dict, compare=False)  # that were asked for already


def count_models(config: StudyConfig) -> Counts:
    """Count on models without data; a hub id, whose files are not fetched, is taken for SD v1.5.

    The U-Net's dtype is that of training, as far as it is known before it is timed.
    """
    configs = read_configs(BaseSection(model=str(SD15_DIR)) if is_hub_id(config.base.model) else config.base)
    with torch.device("meta"):
        components = {name: build_component(name, configs[name]) for name in ("unet", "text_encoder", "vae")}
    key = (json.dumps(configs, sort_keys=True, default=str), config.data.resolution_px)
    if key not in _COUNTED:
        _COUNTED[key] = _count_flops(components, config.data.resolution_px)
    latent_shape, flops = _COUNTED[key]
    unet: Any = components["unet"]
    device_type = choose_device(config.device).type
    if config.train.precision == "bf16" or (config.train.precision == "auto" and device_type == "cuda"):
        unet.to(torch.bfloat16)
    attend_as_on(device_type, unet)
    return Counts(
        components,
        resolve_section(components, config.adapter, config.expand_arms()),
        latent_shape,
        dict(flops),
    )


# By the models' configurations and the pictures' sides, since a study asks at every start.
_COUNTED: dict[tuple[str, int], tuple[tuple[int, int, int], dict[str, int]]] = {}


def _count_flops(
    components: Mapping[str, torch.nn.Module], side: int
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The shape of a square picture's latents, and the FLOPs of each model on it."""
    unet, text_encoder, vae = (cast(Any, components[name]) for name in ("unet", "text_encoder", "vae"))
    flops = {}
    with torch.device("meta"), torch.no_grad():
        tokens = torch.zeros(1, text_encoder.config.max_position_embeddings, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            latents = vae.encode(torch.empty(1, 3, side, side)).latent_dist.mean
        flops["encode"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            text = text_encoder(tokens).last_hidden_state
        flops["text"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            unet(latents, tokens[:, 0], text)
        flops["unet"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            vae.decode(latents)
        flops["decode"] = counter.get_total_flops()
    return tuple(latents.shape[1:]), flops


def plan_passes(
    config: StudyConfig,
    device: torch.device,
    counts: Counts,
    num_entries: int | None,
    loaded: Mapping[str, torch.nn.Module] | None = None,
) -> Packing:
    """Which arms are trained together and how many passes side by side, for the memory that is free now.

    `num_entries` is the number of pictures in an epoch, many when absent. `loaded` are the parts of the base
    if they lie on the device already.
    """
    free = free_bytes(device)
    most = most_workers(
        config, device.type, torch.cuda.device_count(), counts.flops["unet"], num_entries or _MANY_PICTURES
    )
    return pack_arms(
        config,
        device.type,
        most,
        lambda arms, num_workers: pass_memory(config, device, counts, arms, num_workers, free, loaded)[1],
    )


def pass_memory(
    config: StudyConfig,
    device: torch.device,
    counts: Counts,
    arms: Sequence[Arm],
    num_workers: int,
    free: int,
    loaded: Mapping[str, torch.nn.Module] | None = None,
) -> tuple[Estimate, bool]:
    """What a pass takes, and whether it fits into its share of `free` bytes.

    Passes side by side on a CPU each hold the base, and activations are not computed again so that more of
    them fit.
    """
    budget, components, checkpointing = (
        FREE_SHARE * free,
        loaded or counts.components,
        config.train.gradient_checkpointing,
    )
    if device.type == "cpu" and num_workers > 1:
        budget, checkpointing = (
            budget / num_workers - _PROCESS_BYTES - weights_bytes(components),
            bool(checkpointing),
        )
    elif loaded is None:
        budget -= weights_bytes(components)
    # All arms of a pass cost as much as the widest: of hundreds of arms most passes cost the same.
    batch_size = arms[0].batch_size
    widest = max(arm.rank for arm in arms), way_of(arms[0]), arms[0].kind, arms[0].layers
    key = (*widest, len(arms), batch_size, checkpointing, budget, loaded is None)
    if (estimate := counts.passes.get(key)) is None:
        estimate = counts.passes[key] = estimate_pass(
            components, counts.targets, arms, batch_size, counts.latent_shape, checkpointing, budget
        )
    return estimate, estimate.training_bytes <= budget
