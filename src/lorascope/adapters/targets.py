"""The layers that are adapted, Linear and convolution, and of full fine-tuning norms too: found by name, with
the parameters, rank, alpha and learning rate that each has in an arm.
"""

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lorascope.adapters.peft_config import kronecker_factors
from lorascope.arms import Arm, alpha_in_files
from lorascope.errors import AdapterError
from lorascope.sections import AdapterSection, TargetGroup


@dataclass(frozen=True)
class Target:
    """A layer to adapt, and the rank, alpha and learning rate it has in place of the arm's."""

    component: str  # `unet` or `text_encoder`
    path: str  # in the component
    down_shape: tuple[
        int, ...
    ]  # of a row of its weight: (in,), (in, kernel height, kernel width), of a norm ()
    out_features: int
    group: TargetGroup | None = None
    has_bias: bool = False
    is_for_full: bool = False  # whether only full fine-tuning trains it

    @property
    def name(self) -> str:
        """Component and path."""
        return f"{self.component}.{self.path}"

    @property
    def name_in_files(self) -> str:
        """Component and path as files have them: transformers 5 dropped `text_model` from its modules' names,
        files keep it.
        """
        dropped = self.component == "text_encoder" and not self.path.startswith("text_model.")
        return f"{self.component}.{'text_model.' if dropped else ''}{self.path}"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of its weight: (out, in), (out, in, kernel height, kernel width) or of a norm (out,)."""
        return (self.out_features, *self.down_shape)

    @property
    def is_norm(self) -> bool:
        """Whether its weight is a vector."""
        return not self.down_shape

    def is_of(self, arm: Arm) -> bool:
        """Whether an arm trains it."""
        if arm.kind != "full":
            return not self.is_for_full
        return self.component == "unet" and any(_matches(self.path, name) for name in arm.layers)

    def parts(self, arm: Arm) -> dict[str, tuple[int, ...]]:
        """The shapes of what an arm trains of this layer, by name; `adapters.modules` says what is what."""
        rank, inputs = self.rank(arm), math.prod(self.down_shape)
        if not self.is_of(arm):
            return {}
        match arm.kind:
            case "full":
                bias = {"bias": (self.out_features,)} if self.has_bias else {}
                return {"weight": self.weight_shape, **bias}
            case "loha":
                left, right = (self.out_features, rank), (rank, inputs)
                return {"w1_a": left, "w1_b": right, "w2_a": left, "w2_b": right}
            case "lokr":
                return self._kronecker_parts(rank)
            case _:
                parts = {"down": (rank, *self.down_shape), "up": (self.out_features, rank)}
                parts |= {"magnitudes": (self.out_features,)} if arm.kind == "dora" else {}
                return parts | ({"values": (rank,)} if arm.has_values else {})

    def _kronecker_parts(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Of LoKr: w1 whole, and w2 too where two factors of this rank would be no smaller, as LyCORIS."""
        (rows, more_rows), (columns, more_columns) = (
            kronecker_factors(size, -1) for size in (self.out_features, self.down_shape[0])
        )
        kernel = self.down_shape[1:]
        first = {"w1": (rows, columns)}
        if rank >= max(more_rows, more_columns) / 2:
            return {**first, "w2": (more_rows, more_columns, *kernel)}
        return {**first, "w2_a": (more_rows, rank), "w2_b": (rank, more_columns * math.prod(kernel))}

    def size(self, arm: Arm) -> int:
        """Trainable parameters of this layer in an arm."""
        return sum(map(math.prod, self.parts(arm).values()))

    def stored_size(self, arm: Arm) -> int:
        """What it takes of a bank's row: what is trained, and what it started from where that is
        subtracted.
        """
        factors = ("down", "up") if arm.is_anchored else ()
        parts = self.parts(arm)
        return self.size(arm) + sum(math.prod(parts[name]) for name in factors if name in parts)

    def rank(self, arm: Arm) -> int:
        """Rank of this layer in an arm."""
        return (self.group and self.group.rank) or arm.rank

    def alpha(self, arm: Arm) -> float:
        """Alpha of this layer in an arm as files have it, so that alpha / rank is its scale; what gives the
        arm's own scale where the layer's group says nothing.
        """
        if self.group is not None and self.group.alpha is not None:
            return alpha_in_files(self.group.alpha, self.rank(arm), arm.scaling)
        return arm.alpha if self.rank(arm) == arm.rank else arm.scale * self.rank(arm)

    def lr(self, arm: Arm) -> float:
        """Learning rate of this layer in an arm."""
        return (self.group and self.group.lr) or arm.lr


def resolve_targets(module: nn.Module, names: Sequence[str], component: str = "unet") -> list[Target]:
    """The Linear and Conv2d layers whose path is or ends with one of `names`, or matches it as a pattern, in
    the module's order.

    A pattern has `*`, `?` or `[` in it and is matched against the whole path. Raises `AdapterError` for a
    name that matches nothing, or only modules that are neither.
    """
    modules = dict(module.named_modules())
    found: dict[str, Target] = {}
    for name in names:
        paths = [path for path in modules if _matches(path, name)]
        if not paths:
            raise AdapterError(
                f"adapter.targets: {name!r} matches no module of the {component}: use name endings such "
                "as to_q or ff.net.2, or a pattern such as *.resnets.*.conv1"
            )
        layers = {path: modules[path] for path in paths if isinstance(modules[path], nn.Linear | nn.Conv2d)}
        if not layers or (len(layers) < len(paths) and not _is_pattern(name)):
            path = next(path for path in paths if path not in layers)
            below = [
                f"{name}.{child}"
                for child, inner in modules[path].named_modules()
                if isinstance(inner, nn.Linear)
            ]
            remedy = (
                f": use {' or '.join(repr(item) for item in below[:3])}"
                if below
                else ": name a Linear or Conv2d layer"
            )
            raise AdapterError(
                f"adapter.targets: {name!r} is a {type(modules[path]).__name__} ({path}), not a Linear "
                f"or Conv2d{remedy}"
            )
        found |= {path: _target(component, path, layer) for path, layer in layers.items()}
    return [found[path] for path in modules if path in found]


def _is_pattern(name: str) -> bool:
    return any(character in name for character in "*?[")


def _matches(path: str, name: str) -> bool:
    return fnmatch.fnmatchcase(path, name) if _is_pattern(name) else path == name or path.endswith("." + name)


def _target(component: str, path: str, layer: nn.Module) -> Target:
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return Target(component, path, (layer.in_features,), layer.out_features, has_bias=has_bias)
    assert isinstance(layer, nn.Conv2d)
    if layer.groups != 1 or layer.padding_mode != "zeros":
        raise AdapterError(
            f"adapter.targets: {path} is a convolution in groups or with padding other than zeros: "
            "leave it out"
        )
    return Target(
        component, path, (layer.in_channels, *layer.kernel_size), layer.out_channels, has_bias=has_bias
    )


def resolve_section(
    components: Mapping[str, nn.Module], section: AdapterSection, arms: Sequence[Arm] = ()
) -> list[Target]:
    """All layers that `adapter.targets` and `adapter.groups` name; a group takes a layer over from
    `adapter.targets`. Where one of `arms` is full fine-tuning, the layers that it trains come after them.

    Raises `AdapterError` as `resolve_targets` does, and for a layer named by two groups.
    """
    targets = {target.name: target for target in resolve_targets(components["unet"], section.targets)}
    for group in section.groups:
        for target in resolve_targets(components[group.component], group.targets, group.component):
            if target.name in targets and targets[target.name].group is not None:
                raise AdapterError(
                    f"adapter.groups: {target.name} is named by two groups: leave it out of one"
                )
            targets[target.name] = replace(target, group=group)
    full = [arm for arm in arms if arm.kind == "full"]
    if full:
        for target in _all_layers(components["unet"]):
            if target.name not in targets and any(target.is_of(arm) for arm in full):
                targets[target.name] = target
    for arm in full:
        if not any(target.is_of(arm) for target in targets.values()):
            raise AdapterError(
                f"arms.layers = {list(arm.layers)}: match no layer of the U-Net: use name endings such as "
                'to_q, or a pattern such as "*.attentions.*"'
            )
    return list(targets.values())


def _all_layers(unet: nn.Module) -> Iterator[Target]:
    """Every layer of a U-Net with weights, for full fine-tuning."""
    for path, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            yield replace(_target("unet", path, layer), is_for_full=True)
        elif isinstance(layer, nn.GroupNorm | nn.LayerNorm) and layer.weight is not None:
            yield Target(
                "unet", path, (), len(layer.weight), has_bias=layer.bias is not None, is_for_full=True
            )


def count_parameters(targets: Sequence[Target], arm: Arm) -> int:
    """Trainable parameters of an arm, summed over its targets: of LoRA r * (in + out), kernels counted."""
    return sum(target.size(arm) for target in targets)
