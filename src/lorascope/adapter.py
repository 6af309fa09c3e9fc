"""LoRA over the U-Net's Linear layers: several adapters stacked in one bank and computed in one pass.

Dimensions: N adapters, S slices of a batch (each under one adapter at one strength), r the largest rank, T tokens of a
slice over all its samples. Adapter n adds scale_n * B_n A_n to the weight of each target, scale = alpha / rank
(Hu et al. 2021). Smaller ranks are padded with zeros: a padded row of A meets a zero column of B and the reverse, so
both keep exactly zero gradients and need no mask.
"""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorascope.config import Arm
from lorascope.errors import AdapterError, WeightsError
from lorascope.objective import seeded
from lorascope.store import write_json
from lorascope.weights import load_tensors, save_tensors

PEFT_PREFIX = "base_model.model."

# The bank's gradients are rows of one buffer, so their strides span it; autograd calls that layout unusual, and it is meant.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


@dataclass(frozen=True)
class Target:
    """A Linear layer to adapt, by its path in the U-Net."""

    path: str
    in_features: int
    out_features: int


def resolve_targets(unet: nn.Module, names: Sequence[str]) -> list[Target]:
    """The Linear layers whose path is or ends with one of `names`, in the U-Net's order.

    Raises `AdapterError` for a name that matches nothing, or a module that is not a Linear.
    """
    modules = dict(unet.named_modules())
    targets = []
    for name in names:
        paths = [path for path in modules if path == name or path.endswith("." + name)]
        if not paths:
            raise AdapterError(f"adapter.targets: {name!r} matches no module of the U-Net: use name endings such as to_q or ff.net.2")
        for path in paths:
            if not isinstance(modules[path], nn.Linear):
                below = [f"{name}.{child}" for child, module in modules[path].named_modules() if isinstance(module, nn.Linear)]
                remedy = f": use {' or '.join(repr(item) for item in below[:3])}" if below else ": name a Linear layer"
                raise AdapterError(f"adapter.targets: {name!r} is a {type(modules[path]).__name__} ({path}), not a Linear{remedy}")
    endings = tuple(names)
    for path, module in modules.items():
        if isinstance(module, nn.Linear) and any(path == name or path.endswith("." + name) for name in endings):
            targets.append(Target(path, module.in_features, module.out_features))
    return targets


def count_parameters(targets: Sequence[Target], rank: int) -> int:
    """Trainable parameters of an adapter: r * (in + out) summed over its targets."""
    return sum(rank * (target.in_features + target.out_features) for target in targets)


@dataclass(frozen=True)
class Slice:
    """One slice of a batch: which adapter acts on it, and how strongly. Strength 0 is exactly the base."""

    adapter: int
    strength: float = 1.0


class AdapterBank:
    """N adapters in one pass over one frozen U-Net.

    All parameters of adapter n lie in row n of `parameters`, float32 [N, P], and its gradients in row n of `gradients`,
    so that norms, clipping and AdamW are row-wise arithmetic on one buffer. While attached, a batch is read
    slice-major: [S * samples of a slice, ...].
    """

    def __init__(self, unet: nn.Module, targets: Sequence[Target], arms: Sequence[Arm]) -> None:
        self.unet = unet
        self.targets = list(targets)
        self.arms = list(arms)
        device = next(unet.parameters()).device
        self.max_rank = max(arm.rank for arm in arms)
        self.scales = torch.tensor([arm.scale for arm in arms], device=device)
        size = count_parameters(self.targets, self.max_rank)
        self.parameters = torch.zeros(len(self.arms), size, device=device)
        self.gradients = torch.zeros_like(self.parameters)
        self.layers: dict[str, StackedLinear] = {}
        offset = 0
        for target in self.targets:
            linear = unet.get_submodule(target.path)
            assert isinstance(linear, nn.Linear)
            down = self._leaf(offset, self.max_rank, target.in_features)
            offset += self.max_rank * target.in_features
            up = self._leaf(offset, target.out_features, self.max_rank)
            offset += self.max_rank * target.out_features
            self.layers[target.path] = StackedLinear(linear, down, up)
        self.initialize()
        self.select_all()

    def _leaf(self, offset: int, rows: int, columns: int) -> torch.Tensor:
        """A leaf [N, rows, columns] whose values and gradients live in the bank's buffers."""
        span, shape = slice(offset, offset + rows * columns), (len(self.arms), rows, columns)
        leaf = self.parameters[:, span].unflatten(1, shape[1:]).detach().requires_grad_()
        leaf.grad = self.gradients[:, span].unflatten(1, shape[1:])
        return leaf

    @torch.no_grad()
    def initialize(self) -> None:
        """A Kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(in), 1/sqrt(in)), and B zero, as the reference and PEFT have it.

        Drawn by (arm's seed, layer), row by row, so a smaller rank starts as the first rows of a larger one.
        """
        self.parameters.zero_()
        for target in self.targets:
            for index, arm in enumerate(self.arms):
                uniform = torch.rand(arm.rank, target.in_features, generator=seeded("adapter", arm.seed, target.path))
                down = (uniform * 2 - 1) / math.sqrt(target.in_features)
                self.layers[target.path].down[index, : arm.rank].copy_(down)

    def attach(self) -> "AdapterBank":
        """Put the adapted layers in place of the U-Net's Linear layers."""
        for path, layer in self.layers.items():
            self.unet.set_submodule(path, layer)
        return self

    def detach(self) -> None:
        """Put the U-Net's own layers back."""
        for path, layer in self.layers.items():
            self.unet.set_submodule(path, layer.linear)

    def select_all(self) -> None:
        """Slice n of a batch goes through adapter n at full strength: the layout of training."""
        for layer in self.layers.values():
            layer.selection = None
            layer.factors = self.scales.view(-1, 1, 1)

    def select(self, slices: Sequence[Slice]) -> None:
        """The layout of the next batches: slice s goes through `slices[s]`."""
        selection = torch.tensor([item.adapter for item in slices], device=self.scales.device)
        strengths = torch.tensor([item.strength for item in slices], device=self.scales.device)
        factors = (self.scales[selection] * strengths).view(-1, 1, 1)
        for layer in self.layers.values():
            layer.selection, layer.factors = selection, factors

    def gradient_norms(self) -> torch.Tensor:
        """The l2 norm of each adapter's gradient: float32 [N]."""
        return torch.linalg.vector_norm(self.gradients, dim=1)

    def state_dict(self, index: int) -> dict[str, torch.Tensor]:
        """Adapter `index` under PEFT's names, float32, without padding, on the CPU."""
        arm = self.arms[index]
        state = {}
        for path, layer in self.layers.items():
            state[f"{PEFT_PREFIX}{path}.lora_A.weight"] = layer.down.detach()[index, : arm.rank].cpu().contiguous()
            state[f"{PEFT_PREFIX}{path}.lora_B.weight"] = layer.up.detach()[index, :, : arm.rank].cpu().contiguous()
        return state

    @torch.no_grad()
    def load_state_dict(self, index: int, state: dict[str, torch.Tensor]) -> None:
        """Set adapter `index` from PEFT's names; raise `AdapterError` for a missing, unknown or misshapen tensor."""
        arm = self.arms[index]
        expected = {name: tensor.shape for name, tensor in self.state_dict(index).items()}
        if unknown := sorted(set(state) ^ set(expected)):
            raise AdapterError(
                f"adapter {arm.name!r}: {len(unknown)} tensors do not match the targets, the first is {unknown[0]!r}: "
                "train it again or set adapter.targets as it was"
            )
        for name, tensor in state.items():
            if tensor.shape != expected[name]:
                raise AdapterError(
                    f"adapter {arm.name!r}: {name} has shape {list(tensor.shape)}, expected {list(expected[name])}: wrong base or rank"
                )
        for path, layer in self.layers.items():
            layer.down[index, : arm.rank].copy_(state[f"{PEFT_PREFIX}{path}.lora_A.weight"])
            layer.up[index, :, : arm.rank].copy_(state[f"{PEFT_PREFIX}{path}.lora_B.weight"])

    @torch.no_grad()
    def update_of(self, index: int, path: str) -> torch.Tensor:
        """scale * B A of one adapter at one layer: float32 [out, in]."""
        layer = self.layers[path]
        update: torch.Tensor = (layer.up[index] @ layer.down[index]) * self.scales[index]
        return update


class StackedLinear(nn.Module):
    """A frozen Linear with the bank's adapters beside it."""

    selection: torch.Tensor | None  # int64 [S]: which adapter each slice uses; None is 0..N-1
    factors: torch.Tensor  # float32 [S, 1, 1]: strength * scale of each slice

    def __init__(self, linear: nn.Linear, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.down = down  # A, [N, r, in]
        self.up = up  # B, [N, out, r]
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        """x [S * samples, ..., in] -> [S * samples, ..., out]."""
        y = self.linear(x)
        down, up = (self.down, self.up) if self.selection is None else (self.down[self.selection], self.up[self.selection])
        num_slices = len(self.factors)
        down, up = down.to(x.dtype), (up * self.factors).to(x.dtype)
        hidden = torch.bmm(x.reshape(num_slices, -1, self.in_features), down.mT)  # (S, T, r)
        return torch.baddbmm(y.view(num_slices, -1, self.out_features), hidden, up.mT).view_as(y)


def save_peft(bank: AdapterBank, index: int, folder: Path, targets: Sequence[str], base_model: str) -> int:
    """Write adapter `index` as a PEFT folder and return the size of its weights in bytes.

    `PeftModel.from_pretrained(unet, folder)` loads it, and so does diffusers' `unet.load_lora_adapter(folder,
    weight_name="adapter_model.safetensors", prefix="base_model.model")`, which reads alpha from the file's metadata.
    """
    arm = bank.arms[index]
    alpha = int(arm.alpha) if arm.alpha == int(arm.alpha) else arm.alpha
    lora = {
        "r": arm.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": list(targets),
        "init_lora_weights": True,
    }
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({PEFT_PREFIX + key: value for key, value in lora.items()}, sort_keys=True),
    }
    weights = folder / "adapter_model.safetensors"
    save_tensors(weights, bank.state_dict(index), metadata)
    kind = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": base_model, "inference_mode": True, "fan_in_fan_out": False}
    write_json(folder / "adapter_config.json", {**kind, **lora, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None})
    return weights.stat().st_size


def load_peft(folder: Path) -> tuple[dict[str, torch.Tensor], int, float]:
    """Tensors, rank and alpha of a PEFT folder; raise `AdapterError` if it is missing or damaged."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        state = load_tensors(folder / "adapter_model.safetensors")
        return state, int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, WeightsError) as error:
        raise AdapterError(f"{folder}: not a readable PEFT adapter ({error}): train the arm again") from error


@torch.no_grad()
def merge(unet: nn.Module, bank: AdapterBank, index: int) -> None:
    """Add adapter `index` to the weights of `unet` in place: W + scale * B A, computed in float32.

    `unet` must be a copy of the base without an attached bank; raises `AdapterError` if a layer is missing or adapted.
    """
    for target in bank.targets:
        linear = unet.get_submodule(target.path)
        if not isinstance(linear, nn.Linear):
            raise AdapterError(f"{target.path}: is a {type(linear).__name__}, not a plain Linear: merge into an unadapted copy of the base")
        linear.weight.copy_(linear.weight.float() + bank.update_of(index, target.path))
