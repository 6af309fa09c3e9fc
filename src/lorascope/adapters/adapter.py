"""What an adapter is in memory, whatever file it came from.

Modules are named by their path in diffusers' models, the component in front:
`unet.down_blocks.0.attentions.0.proj_in`, `text_encoder.text_model.encoder.layers.0.mlp.fc1`. Text-encoder
paths keep `text_model.`, as all files do, though transformers 5 dropped it from the names of live modules.
Dimensions: r rank, in and out the channels of the adapted layer, kh and kw a convolution's kernel.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from lorascope.adapters.schedule import RankSchedule
from lorascope.base.layers import stable_diffusion_layers
from lorascope.errors import AdapterError


@dataclass(frozen=True)
class LoraModule:
    """One adapted layer: its update is up @ down * scale, scale = alpha / rank, or 1 where the file gives no
    alpha.
    """

    down: torch.Tensor  # [r, in], or [r, in, kh, kw] of a convolution
    up: torch.Tensor  # [out, r], or [out, r, 1, 1]
    alpha: float | None
    mid: torch.Tensor | None = None  # LoCon's Tucker core, [r, r, kh, kw]; down is then [r, in, 1, 1]
    dora_scale: torch.Tensor | None = (
        None  # DoRA's norms of the adapted weight, [out, 1(, 1, 1)], or [1, in(, 1, 1)] of old LyCORIS
    )

    @property
    def rank(self) -> int:
        """r, as the tensors have it."""
        return self.down.shape[0]

    @property
    def effective_alpha(self) -> float:
        """alpha, or the rank where the file gives none."""
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """The factor on up @ down."""
        return self.effective_alpha / self.rank

    def full_down(self) -> torch.Tensor:
        """`down` with the Tucker core folded in: [r, in] or [r, in, kh, kw]; the update is up @ full_down *
        scale.
        """
        if self.mid is None:
            return self.down
        return torch.einsum("abhw,bi->aihw", self.mid.float(), self.down.float().flatten(1)).to(
            self.down.dtype
        )

    def update(self) -> torch.Tensor:
        """What is added to the layer's weight: float32 [out, in] or [out, in, kh, kw]. DoRA's normalisation
        is left out.
        """
        down = replace(self, down=self.down.float()).full_down()
        return (self.up.float().flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:]) * self.scale

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight it adapts: (out, in) or (out, in, kh, kw)."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by field name."""
        return {
            name: value
            for name in ("down", "up", "mid", "dora_scale")
            if (value := getattr(self, name)) is not None
        }

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> "LoraModule":
        """The same module with tensors of another dtype, as `tensors` names them."""
        return LoraModule(
            tensors["down"], tensors["up"], self.alpha, tensors.get("mid"), tensors.get("dora_scale")
        )


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, whatever file it came from."""

    modules: dict[str, LoraModule]  # by path, see the head of this file
    # what the file was: "kohya", "peft", "diffusers", "diffusers lora.down/up", or several joined by " + "
    layout: str
    metadata: dict[str, str]  # of the safetensors header
    leftover: tuple[str, ...] = ()  # keys that belong to no module
    faults: tuple[str, ...] = ()  # what is wrong with it, a sentence each; `load_adapter` raises the first
    notes: tuple[str, ...] = ()  # what else of it a user should know, a sentence each
    schedule: RankSchedule | None = None  # of T-LoRA: how many components act at a timestep

    def at_strength(self, strength: float) -> "Adapter":
        """The same adapter with `strength` in its alphas: at weight 1 it does what this does at `strength`.

        Raises `AdapterError` for DoRA, whose update is no multiple of alpha.
        """
        if any(module.dora_scale is not None for module in self.modules.values()):
            raise AdapterError(
                "DoRA: its update does not grow with alpha, so alpha holds no strength: leave it at 1 and "
                "give the weight to the program that draws"
            )
        modules = {
            path: replace(module, alpha=module.effective_alpha * strength)
            for path, module in self.modules.items()
        }
        return replace(self, modules=modules)

    def require_unscheduled(self, remedy: str) -> None:
        """Raise `AdapterError` for T-LoRA, which has no single update; `remedy` says what to do."""
        if self.schedule is not None:
            raise AdapterError(
                f"T-LoRA: {self.schedule.min_rank} to {self.schedule.rank} components act by timestep, so no "
                f"single weight holds it: {remedy}"
            )

    def as_lora(self) -> "Adapter":
        """The same weights as LoRA of the full rank: of T-LoRA that is what programs make of it that do not
        know it.
        """
        if self.schedule is None:
            return self
        note = "T-LoRA written as LoRA: all components act at every timestep, as they did not in training"
        return replace(self, schedule=None, notes=(*self.notes, note))

    def components(self) -> dict[str, dict[str, LoraModule]]:
        """The modules of `unet` and `text_encoder`, by path within the component; a component without modules
        is left out.
        """
        parts: dict[str, dict[str, LoraModule]] = {}
        for path, module in self.modules.items():
            component, _, rest = path.partition(".")
            parts.setdefault(component, {})[rest] = module
        return parts


def misfits(adapter: Adapter) -> list[str]:
    """The paths of modules that Stable Diffusion v1.5 does not have, or has in another shape."""
    shapes = stable_diffusion_layers()
    return [path for path, module in adapter.modules.items() if shapes.get(path) != module.weight_shape]
