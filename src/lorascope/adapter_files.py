"""Adapter files of other programs, read into one form and written from it.

Layouts: `kohya` (WebUI, Forge, ComfyUI, sd-scripts), `peft` (a folder), `diffusers` (one file).
Dimensions: r rank, in and out the channels of the adapted layer, kh and kw a convolution's kernel.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoraModule:
    """One adapted layer: its update is up @ down * scale, scale = alpha / rank, or 1 where the file gives no alpha."""

    down: torch.Tensor  # [r, in], or [r, in, kh, kw] of a convolution
    up: torch.Tensor  # [out, r], or [out, r, 1, 1]
    alpha: float | None
    mid: torch.Tensor | None = None  # LoCon's Tucker core, [r, r, kh, kw]; down is then [r, in, 1, 1]
    dora_scale: torch.Tensor | None = None  # DoRA's norms of the adapted weight, [out, 1(, 1, 1)], or [1, in(, 1, 1)] of old LyCORIS

    @property
    def rank(self) -> int:
        """r, as the tensors have it."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """The factor on up @ down."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def update(self) -> torch.Tensor:
        """What is added to the layer's weight: float32 [out, in] or [out, in, kh, kw]. DoRA's normalisation is left out."""
        down, up = self.down.float(), self.up.float().flatten(1)  # (r, in, ...), (out, r)
        if self.mid is not None:
            down = torch.einsum("abhw,bi->aihw", self.mid.float(), down.flatten(1))
        return (up @ down.flatten(1)).unflatten(1, down.shape[1:]) * self.scale


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, whatever file it came from."""

    modules: dict[str, LoraModule]  # by path: "unet.<diffusers path>" or "text_encoder.text_model.encoder...."
    layout: str  # what the file was: "kohya", "peft", "diffusers", "diffusers attention processors", "mixed", ...
    metadata: dict[str, str]  # of the safetensors header; of a PEFT folder its adapter_config.json under "adapter_config"
    leftover: tuple[str, ...]  # keys that belong to no module
