"""The training steps of other programs, on our layers, batches and initial weights, for `lorascope bench`.

Written from what their loops do, with the libraries' own modules. Facts of the sources: diffusers,
examples/text_to_image/train_text_to_image_lora.py at `DIFFUSERS_COMMIT`; kohya's sd-scripts, train_network.py
and networks/lora.py at `KOHYA_COMMIT`, whose modules are not part of this package:
`benchmarks/fetch_peers.py` fetches them.
"""

import importlib.util
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn
from torch.nn import functional

from lorascope.adapters.bank import AdapterBank
from lorascope.adapters.schedule import schedule_of
from lorascope.adapters.targets import Target
from lorascope.base.loading import Base, is_sd15
from lorascope.data.encoding import Encoded
from lorascope.sections import TrainSection
from lorascope.store import digest_file
from lorascope.training.objective import batch_indices, draw

DIFFUSERS_COMMIT = "c56add8081be60b7e8794e011f1790d0e37aeced"
KOHYA_COMMIT = "48d368fa557731ad0488c07304dfeba8c07910eb"
KOHYA_FILES = {  # what a step runs through, and their SHA-256
    "networks/lora.py": "1c9150d50e523aa03192f3f3c48a51efd967e23541ba39777fe3c6390d02807e",
    "library/original_unet.py": "4366c1a9b7a60467e0a8be96a5fb38b2bb0a57bc0da695463cd77eea64383dd2",
}


@dataclass(frozen=True)
class Batch:
    """All that a step reads, on the device; B pictures."""

    pixels: torch.Tensor  # float32 [B, 3, H, W], in [-1, 1]
    tokens: torch.Tensor  # int64 [B, tokens]
    mean: torch.Tensor  # float32 [B, c, h, w]: of the scaled latents' posterior
    std: torch.Tensor
    posterior_noise: torch.Tensor  # float32 [B, c, h, w], standard normal
    noise: torch.Tensor
    timesteps: torch.Tensor  # int64 [B]
    text: torch.Tensor  # float32 [B, tokens, width]


@dataclass(frozen=True)
class Workload:
    """The pictures of a benchmark, as they are and encoded."""

    pixels: torch.Tensor  # uint8 [n, 3, H, W]
    tokens: torch.Tensor  # int64 [n, tokens]
    encoded: Encoded

    def batch(self, number: int, base: Base, section: TrainSection, seed: int) -> Batch:
        """Batch `number` (from 0) as `Trainer` draws it for arms of `seed`."""
        encoded, size = self.encoded, section.batch_size
        [bucket] = encoded.buckets()
        indices = batch_indices(seed, 0, bucket, number, size)
        shape = tuple(encoded.latents[0].shape[2:])
        draws = draw(
            seed, range(number * size, (number + 1) * size), shape, len(base.alphas_cumprod), section
        )
        mean, std = encoded.posterior(indices, draws.flipped)
        text = encoded.text(indices, draws.dropped)
        pixels = self.pixels[indices].float() / 127.5 - 1
        parts = (
            pixels,
            self.tokens[indices],
            mean,
            std,
            draws.posterior_noise,
            draws.noise,
            draws.timesteps,
            text,
        )
        return Batch(*(part.to(base.device) for part in parts))


class Step(Protocol):
    """One adapter under training: `weights` are by the name of their layer its `down`, `up` and, of DoRA,
    `magnitude`, or of full fine-tuning the layer's `weight` and `bias`.
    """

    weights: dict[str, dict[str, nn.Parameter]]
    norm: torch.Tensor | None  # of the last step's gradient before clipping; None where nothing is clipped

    def step(self, batch: Batch) -> torch.Tensor:
        """Take one optimizer step and return its loss; gradients stay until the next."""
        ...


def gradient_norm(step: Step) -> float:
    """The l2 norm of the last step's gradient, before clipping."""
    if step.norm is not None:
        return float(step.norm)
    gradients = [
        weight.grad.float()
        for own in step.weights.values()
        for weight in own.values()
        if weight.grad is not None
    ]
    return float(torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt())


# The reference ----------------------------------------------------------------------------------------------


class PlainLinear(nn.Module):
    """LoRA as Hu et al. 2021 write it, W x + scale * B A x, with T-LoRA's mask where `kept` is set."""

    kept: torch.Tensor | None = None  # [B, 1, r], of the samples of a batch

    def __init__(self, layer: nn.Linear, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        y: torch.Tensor = self.layer(x)
        hidden = x @ self.down.T
        return y + self.scale * ((hidden if self.kept is None else hidden * self.kept) @ self.up.T)


class PlainDora(PlainLinear):
    """DoRA as Liu et al. 2024 write it: m (W + scale * B A) / |W + scale * B A| x, the norm held for
    constant.
    """

    def __init__(self, layer: nn.Linear, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
        super().__init__(layer, down, up, scale)
        self.magnitude = nn.Parameter(layer.weight.detach().norm(dim=1))

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        weight = self.layer.weight + self.scale * (self.up @ self.down)
        weight = (self.magnitude / weight.detach().norm(dim=1))[:, None] * weight
        return functional.linear(x, weight, self.layer.bias)


class ReferenceStep:
    """The plain step that all others must agree with: fp32, attention written out, AdamW parameter by
    parameter.
    """

    def __init__(self, base: Base, bank: AdapterBank, section: TrainSection) -> None:
        self.base, self.section = base, section
        base.unet.set_attn_processor(AttnProcessor())
        self.norm: torch.Tensor | None = None
        self.modules: list[PlainLinear] = []
        self.schedule = schedule_of(bank.arms[0], training=True)
        is_full = bank.arms[0].kind == "full"
        self.weights = own_weights(base, bank) if is_full else self._adapt(bank)
        self.parameters = [weight for own in self.weights.values() for weight in own.values()]
        self.optimizer = build_adamw(self.parameters, bank.arms[0].lr, section, foreach=False)

    def _adapt(self, bank: AdapterBank) -> dict[str, dict[str, nn.Parameter]]:
        """Put plain adapted layers in place; their weights."""
        kind, weights = PlainDora if bank.arms[0].kind == "dora" else PlainLinear, {}
        for target, down, up, scale in initial_weights(bank):
            layer: Any = self.base.unet.get_submodule(target.path)
            module = kind(layer, down, up, scale)
            self.base.unet.set_submodule(target.path, module)
            self.modules.append(module)
            weights[target.name] = dict(module.named_parameters(recurse=False))
        return weights

    def step(self, batch: Batch) -> torch.Tensor:
        """As `Step.step`."""
        base = self.base
        self.optimizer.zero_grad()
        latents = batch.mean + batch.std * batch.posterior_noise
        alphas = base.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
        noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * batch.noise
        target = (
            batch.noise
            if base.prediction_type == "epsilon"
            else alphas.sqrt() * batch.noise - (1 - alphas).sqrt() * latents
        )
        if self.schedule is not None:
            table = torch.tensor(self.schedule.table(self.schedule.rank), device=base.device)
            acting = table[batch.timesteps]
            ranks = torch.arange(self.schedule.rank, device=base.device)
            for module in self.modules:
                module.kept = (ranks < acting[:, None])[:, None].float()
        loss = (base.unet(noisy, batch.timesteps, batch.text).sample - target).square().mean()
        loss.backward()
        if self.section.max_grad_norm:
            self.norm = nn.utils.clip_grad_norm_(self.parameters, self.section.max_grad_norm)
        self.optimizer.step()
        return loss.detach()


class FullStep:
    """Full fine-tuning as a careful user of torch would write it: cached latents and text states, AdamW
    fused, the weights in fp32 and in half precision autocast around the U-Net.
    """

    def __init__(self, base: Base, bank: AdapterBank, section: TrainSection) -> None:
        self.base, self.section, self.dtype = base, section, base.unet.dtype
        base.unet.float()
        base.unet.set_attn_processor(diffusers_attention(base))
        self.norm: torch.Tensor | None = None
        self.weights = own_weights(base, bank)
        self.parameters = [weight for own in self.weights.values() for weight in own.values()]
        self.optimizer = build_adamw(self.parameters, bank.arms[0].lr, section, fused=True)
        self.scheduler = DDPMScheduler.from_config(base.scheduler_config)

    def step(self, batch: Batch) -> torch.Tensor:
        """As `Step.step`."""
        base, is_half = self.base, self.dtype != torch.float32
        self.optimizer.zero_grad()
        latents = batch.mean + batch.std * batch.posterior_noise
        noisy = self.scheduler.add_noise(latents, batch.noise, batch.timesteps)
        target = batch.noise
        if base.prediction_type != "epsilon":
            target = self.scheduler.get_velocity(latents, batch.noise, batch.timesteps)
        with torch.autocast(base.device.type, self.dtype, enabled=is_half):
            prediction = base.unet(noisy, batch.timesteps, batch.text).sample
        loss = functional.mse_loss(prediction.float(), target)
        loss.backward()
        if self.section.max_grad_norm:
            self.norm = nn.utils.clip_grad_norm_(self.parameters, self.section.max_grad_norm)
        self.optimizer.step()
        return loss.detach()


def own_weights(base: Base, bank: AdapterBank) -> dict[str, dict[str, nn.Parameter]]:
    """The U-Net's own weights, made trainable, by the names of the bank's layers."""
    base.unet.requires_grad_()
    return {
        target.name: dict(base.unet.get_submodule(target.path).named_parameters(recurse=False))
        for target in bank.targets
    }


def initial_weights(bank: AdapterBank) -> Iterator[tuple[Target, torch.Tensor, torch.Tensor, float]]:
    """Target, A [r, in], B [out, r] (copies, fp32) and scale of the bank's first arm, layer by layer."""
    arm = bank.arms[0]
    for target in bank.targets:
        layer = bank.layers[target.name]
        yield (
            target,
            layer.down.detach()[0].clone(),
            layer.up.detach()[0].clone(),
            target.alpha(arm) / target.rank(arm),
        )


def build_adamw(
    parameters: list[nn.Parameter], lr: float, section: TrainSection, **how: bool
) -> torch.optim.AdamW:
    """torch's AdamW with the section's settings; `how` is `foreach` or `fused`, torch's own choice when
    absent.
    """
    return torch.optim.AdamW(
        parameters, lr=lr, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay, **how
    )


# diffusers and PEFT -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a PEFT user's step goes about its work; the base's dtype is that of its U-Net."""

    cached: bool  # latents and text states come encoded; else VAE and text encoder run at every step
    autocast: bool = False  # bf16 autocast around the U-Net
    fp32_adapters: bool = True  # else in the base's dtype, as `add_adapter` makes them
    clips: bool = (
        True  # the example's clipping gets an iterator that the optimizer has used up: it clips nothing
    )
    channels_last: bool = False
    compiled: bool = False
    fused: bool = False  # AdamW


class PeftStep:
    """diffusers' example's step (our transcription of its loop) where nothing is cached; with `cached` that
    of a careful user.
    """

    def __init__(self, base: Base, bank: AdapterBank, section: TrainSection, recipe: Recipe) -> None:
        from peft import LoraConfig

        self.base, self.section, self.recipe = base, section, recipe
        unet, dtype = base.unet, base.unet.dtype
        unet.set_attn_processor(diffusers_attention(base))
        if recipe.channels_last:
            unet.to(memory_format=torch.channels_last)
        if not recipe.cached:
            base.vae.to(dtype)
            base.text_encoder.to(dtype)
        arm = bank.arms[0]
        targets = [target.path for target in bank.targets]
        unet.add_adapter(
            LoraConfig(
                r=arm.rank,
                lora_alpha=arm.alpha,
                init_lora_weights="gaussian",
                target_modules=targets,
                use_dora=arm.kind == "dora",
            )
        )
        self.weights: dict[str, dict[str, nn.Parameter]] = {}
        self.norm: torch.Tensor | None = None
        for target, down, up, _ in initial_weights(bank):
            layer: Any = unet.get_submodule(target.path)
            pair = (layer.lora_A["default"], layer.lora_B["default"])
            for module, value in zip(pair, (down, up), strict=True):
                module.to(torch.float32 if recipe.fp32_adapters else dtype)
                module.weight.data.copy_(value)
            self.weights[target.name] = {"down": pair[0].weight, "up": pair[1].weight}
            if arm.kind == "dora":
                magnitude = layer.lora_magnitude_vector["default"]
                magnitude.to(torch.float32 if recipe.fp32_adapters else dtype)
                self.weights[target.name]["magnitude"] = magnitude.weight
        self.parameters = [weight for own in self.weights.values() for weight in own.values()]
        how = {"fused": True} if recipe.fused else {}
        self.optimizer = build_adamw(self.parameters, arm.lr, section, **how)
        self.scheduler = DDPMScheduler.from_config(base.scheduler_config)
        self.unet = torch.compile(unet) if recipe.compiled else unet
        unet.train()

    def step(self, batch: Batch) -> torch.Tensor:
        """As `Step.step`."""
        base, recipe = self.base, self.recipe
        self.optimizer.zero_grad()
        if recipe.cached:
            latents, text = batch.mean + batch.std * batch.posterior_noise, batch.text.to(base.unet.dtype)
        else:
            posterior = base.vae.encode(batch.pixels.to(base.vae.dtype)).latent_dist
            latents = (
                posterior.mean + posterior.std * batch.posterior_noise
            ) * base.vae.config.scaling_factor
            latents = latents.to(base.vae.dtype)
            text = base.text_encoder(batch.tokens, return_dict=False)[0]
        noise = batch.noise.to(latents.dtype)
        noisy = self.scheduler.add_noise(latents, noise, batch.timesteps).to(base.unet.dtype)
        target = (
            noise
            if base.prediction_type == "epsilon"
            else self.scheduler.get_velocity(latents, noise, batch.timesteps)
        )
        if recipe.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast(base.device.type, torch.bfloat16, enabled=recipe.autocast):
            prediction = self.unet(noisy, batch.timesteps, text, return_dict=False)[0]
        loss = functional.mse_loss(prediction.float(), target.float())
        loss.backward()
        if recipe.clips and self.section.max_grad_norm:
            self.norm = nn.utils.clip_grad_norm_(self.parameters, self.section.max_grad_norm)
        self.optimizer.step()
        if not recipe.cached:
            loss.item()  # the example logs every step
        return loss.detach()


def diffusers_attention(base: Base) -> AttnProcessor | AttnProcessor2_0:
    """diffusers' default (SDPA), but plain attention for bf16 on a CPU, where SDPA's backward pass is very
    slow.
    """
    return (
        AttnProcessor()
        if base.device.type == "cpu" and base.unet.dtype == torch.bfloat16
        else AttnProcessor2_0()
    )


# kohya ------------------------------------------------------------------------------------------------------


class KohyaStep:
    """The step of kohya's train_network.py with its own LoRA modules: cached latents, text encoded anew,
    SDPA.

    On Stable Diffusion v1.5 its own U-Net runs, on other bases diffusers' (its sizes are constants). Its
    adapters on `proj_in` and `proj_out` are left out, so that the layers are those of the other arms.
    """

    def __init__(self, base: Base, bank: AdapterBank, section: TrainSection, folder: Path) -> None:
        self.base, self.section = base, section
        lora, original_unet = load_kohya(folder, with_unet=is_sd15(base))
        arm, dtype = bank.arms[0], base.unet.dtype
        if original_unet is None:
            base.unet.set_attn_processor(AttnProcessor2_0())
            self.unet: Any = base.unet
        else:
            config = base.unet.config
            self.unet = original_unet.UNet2DConditionModel(
                sample_size=64,
                attention_head_dim=config.attention_head_dim,
                cross_attention_dim=config.cross_attention_dim,
            )
            self.unet.load_state_dict(base.unet.state_dict())
            self.unet.to(base.device, dtype).requires_grad_(False)
            self.unet.set_use_sdpa(True)
        base.text_encoder.to(dtype)
        network = lora.LoRANetwork([], self.unet, lora_dim=arm.rank, alpha=arm.alpha)
        paths = {id(module): path for path, module in self.unet.named_modules()}
        owners = {paths[id(module.org_module)]: module for module in network.unet_loras}
        network.unet_loras = [owners[target.path] for target in bank.targets]
        network.apply_to([], self.unet, apply_text_encoder=False)
        network.to(base.device)
        network.prepare_grad_etc(None, self.unet)
        self.weights: dict[str, dict[str, nn.Parameter]] = {}
        self.norm: torch.Tensor | None = None
        for target, down, up, _ in initial_weights(bank):
            module = owners[target.path]
            module.lora_down.weight.data.copy_(down)
            module.lora_up.weight.data.copy_(up)
            self.weights[target.name] = {"down": module.lora_down.weight, "up": module.lora_up.weight}
        self.parameters = [weight for own in self.weights.values() for weight in own.values()]
        self.optimizer = build_adamw(self.parameters, arm.lr, section)
        self.scheduler = DDPMScheduler.from_config(base.scheduler_config)
        self.network = network.train()

    def step(self, batch: Batch) -> torch.Tensor:
        """As `Step.step`."""
        base = self.base
        autocast = torch.autocast(base.device.type, torch.bfloat16, enabled=base.unet.dtype == torch.bfloat16)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad(), autocast:
            text = base.text_encoder(batch.tokens, return_dict=False)[0]
        latents = batch.mean + batch.std * batch.posterior_noise
        noisy = self.scheduler.add_noise(latents, batch.noise, batch.timesteps)
        with autocast:
            prediction = self.unet(noisy, batch.timesteps, text).sample
        velocity = base.prediction_type == "v_prediction"
        target = (
            self.scheduler.get_velocity(latents, batch.noise, batch.timesteps) if velocity else batch.noise
        )
        losses = functional.mse_loss(prediction.float(), target.float(), reduction="none")
        loss = losses.mean(dim=(1, 2, 3)).mean()
        loss.backward()
        if self.section.max_grad_norm:
            self.norm = nn.utils.clip_grad_norm_(self.parameters, self.section.max_grad_norm)
        self.optimizer.step()
        loss.item()  # it logs every step
        return loss.detach()


def load_kohya(folder: Path, with_unet: bool) -> tuple[types.ModuleType, types.ModuleType | None]:
    """Its modules `networks/lora.py` and, `with_unet`, `library/original_unet.py` from the folder they were
    fetched to.

    What they import of its other files takes no part in a step: a logger's set-up and a class to recognise
    SDXL by.
    """
    stand_ins: Mapping[str, dict[str, Any]] = {
        "library": {"__path__": []},
        "library.utils": {"setup_logging": lambda: None},
        "library.sdxl_original_unet": {"SdxlUNet2DConditionModel": type("SdxlUNet2DConditionModel", (), {})},
    }
    with _modules(stand_ins):
        lora, unet = (folder / file for file in KOHYA_FILES)
        return _load_file(lora), _load_file(unet) if with_unet else None


def missing_for(kind: str, folder: Path, base: str) -> str | None:
    """What a peer of this kind lacks here, with the remedy; None where nothing does. `folder` is that of
    kohya's modules.
    """
    needed = {"peft": ("peft",), "kohya": ("einops",) if base == "sd15" else ()}.get(kind, ())
    for package in needed:
        if importlib.util.find_spec(package) is None:
            return f'{package} is not installed: pip install "lorascope[bench]"'
    if kind == "kohya":
        for file, digest in KOHYA_FILES.items():
            if not (folder / file).is_file() or digest_file(folder / file) != digest:
                return (
                    f"{folder / file} is not there as of commit {KOHYA_COMMIT[:12]}: run python "
                    "benchmarks/fetch_peers.py"
                )
    return None


@contextmanager
def _modules(stand_ins: Mapping[str, dict[str, Any]]) -> Iterator[None]:
    """Modules with these contents, for as long as the block lasts."""
    for name, contents in stand_ins.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(contents)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _load_file(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"lorascope_peer_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
