"""The layers that are adapted, Linear and convolution: found by name, with the rank, alpha and learning rate
that each has in an arm.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lorascope.arms import Arm, alpha_in_files
from lorascope.errors import AdapterError
from lorascope.sections import AdapterSection, TargetGroup


@dataclass(frozen=True)
class Target:
    """A layer to adapt, Linear or convolution, and the rank, alpha and learning rate it has in place of the
    arm's.
    """

    component: str  # `unet` or `text_encoder`
    path: str  # in the component
    down_shape: tuple[int, ...]  # of a row of A: (in,) or (in, kernel height, kernel width)
    out_features: int
    group: TargetGroup | None = None

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
    def size_per_rank(self) -> int:
        """Trainable parameters of A and B for each unit of rank."""
        return math.prod(self.down_shape) + self.out_features

    def size(self, arm: Arm) -> int:
        """Trainable parameters of this layer in an arm."""
        return self.rank(arm) * self.size_per_rank + (self.out_features if arm.kind == "dora" else 0)

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
    if isinstance(layer, nn.Linear):
        return Target(component, path, (layer.in_features,), layer.out_features)
    assert isinstance(layer, nn.Conv2d)
    if layer.groups != 1 or layer.padding_mode != "zeros":
        raise AdapterError(
            f"adapter.targets: {path} is a convolution in groups or with padding other than zeros: "
            "leave it out"
        )
    return Target(component, path, (layer.in_channels, *layer.kernel_size), layer.out_channels)


def resolve_section(components: Mapping[str, nn.Module], section: AdapterSection) -> list[Target]:
    """All layers that `adapter.targets` and `adapter.groups` name; a group takes a layer over from
    `adapter.targets`.

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
    return list(targets.values())


def count_parameters(targets: Sequence[Target], arm: Arm) -> int:
    """Trainable parameters of an adapter: r * (in + out) summed over its targets, kernels counted, and of
    DoRA a magnitude an output.
    """
    return sum(target.size(arm) for target in targets)
