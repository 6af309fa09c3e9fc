"""Adapters edited after training, to see by their pictures what the edit changes: intruder directions scaled
down, or a lower rank by SVD.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.lowrank import Target as CutTarget
from lorascope.adapters.lowrank import resize
from lorascope.adapters.modules import FullModule, LoraModule, Module
from lorascope.adapters.targets import Target
from lorascope.arms import Arm
from lorascope.diagnosis.weights import scale_intruders
from lorascope.evaluation.sweep_rows import SCALED_INTRUDERS, rank_of_cut


def edit_adapters(
    components: Mapping[str, nn.Module],
    targets: Sequence[Target],
    adapters: Mapping[str, Adapter],
    weights: str,
) -> dict[str, Adapter]:
    """The adapters with `weights` as a point of the sweep names them, of one rank and scale 1 throughout.

    `components` are the base's without a bank in place, `targets` the layers that were trained. Intruders
    take as long as measuring them does: `diagnosis.weights` says how long. Raises `ValueError` for weights
    that are no edit, and `AdapterError` as `scale_intruders` and `resize` do.
    """
    rank = rank_of_cut(weights)
    if rank is not None:
        edited = {name: _cut(adapter, targets, rank) for name, adapter in adapters.items()}
    elif weights == SCALED_INTRUDERS:
        edited = scale_intruders(components, adapters)
    else:
        raise ValueError(f"weights = {weights!r}: must be {SCALED_INTRUDERS!r} or cut to a rank")
    return {name: _evened(adapter) for name, adapter in edited.items()}


def arm_of(name: str, adapter: Adapter) -> Arm:
    """The arm as which an `AdapterBank` takes an edited adapter, on targets without groups."""
    rank = next(iter(adapter.modules.values())).rank
    return Arm(name=name, rank=rank, alpha=float(rank), lr=1.0, seed=0)


def _cut(adapter: Adapter, targets: Sequence[Target], rank: int) -> Adapter:
    """The adapter at a lower rank. Layers whose group sets a rank keep it, as in an arm of the lower rank;
    norms, which have none, are left out.
    """
    own = {target.name_in_files for target in targets if target.group is None or target.group.rank is None}
    layers = {
        path: item
        for path, item in adapter.modules.items()
        if not (isinstance(item, FullModule) and item.is_norm)
    }
    part = replace(adapter, modules={path: item for path, item in layers.items() if path in own})
    others = {path: item for path, item in layers.items() if path not in own}
    cut: dict[str, Module] = {**others, **resize(part, CutTarget(rank=rank)).adapter.modules}
    return replace(adapter, modules={path: cut[path] for path in adapter.modules if path in cut})


def _evened(adapter: Adapter) -> Adapter:
    """The same update with modules of one rank, filled up with zeros, and of scale 1."""
    modules = adapter.lora_modules("only LoRA can be edited")
    rank = max(module.rank for module in modules.values())
    return replace(adapter, modules={path: _filled(item, rank) for path, item in modules.items()})


def _filled(module: LoraModule, rank: int) -> LoraModule:
    down, up = module.full_down().float(), module.up.float() * module.scale
    more = rank - module.rank
    return LoraModule(
        down=torch.cat([down, down.new_zeros(more, *down.shape[1:])]),
        up=torch.cat([up, up.new_zeros(len(up), more, *up.shape[2:])], dim=1),
        alpha=float(rank),
    )


def on_all(targets: Sequence[Target], adapter: Adapter) -> Adapter:
    """An edited adapter with modules of zeros on those of `targets` that it does not have."""
    rank = next(iter(adapter.modules.values())).rank
    modules = {}
    for target in targets:
        down, up = torch.zeros(rank, *target.down_shape), torch.zeros(target.out_features, rank)
        zero = LoraModule(down, up.view(*up.shape, *[1] * (down.dim() - 2)), alpha=float(rank))
        modules[target.name_in_files] = adapter.modules.get(target.name_in_files, zero)
    return replace(adapter, modules=modules)
