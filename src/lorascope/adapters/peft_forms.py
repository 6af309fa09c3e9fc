"""LoHa and LoKr in the form in which PEFT builds them: its layers have tensors of certain shapes, which
follow from rank and options.

PEFT splits the sides of every layer's weight by one rule (`decompose_factor`), makes a product of w2 where
the rank is below half of its longer side, and gives all 3x3 convolutions Tucker cores or none. So w1 is
written whole, which adds a few hundred numbers, and w2 is multiplied out where PEFT would have it whole.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lorascope.adapters.adapter import weight_shape
from lorascope.adapters.modules import LohaModule, LokrModule
from lorascope.adapters.peft_config import kronecker_factors, lycoris_options
from lorascope.errors import AdapterError


def loha_options(component: str, modules: Mapping[str, LohaModule]) -> dict[str, Any]:
    """PEFT's configuration for the LoHa modules of one component, by path within it.

    Raises `AdapterError` where PEFT has no such cores.
    """
    has_cores = any(module.t1 is not None for module in modules.values())
    for name, module in modules.items():
        is_wide = math.prod(weight_shape(f"{component}.{name}", module)[2:]) > 1
        if has_cores and is_wide != (module.t1 is not None):
            what = "a convolution without a core beside others with one" if is_wide else "a core of 1x1"
            raise AdapterError(
                f"{component}.{name}: LoHa has {what}, PEFT has cores in all larger convolutions or in none: "
                "write kohya"
            )
    ranks = {name: module.rank for name, module in modules.items()}
    alphas = {name: module.effective_alpha for name, module in modules.items()}
    return {**lycoris_options("loha", ranks, alphas), "use_effective_conv2d": has_cores}


def lokr_options(component: str, modules: Mapping[str, LokrModule]) -> dict[str, Any]:
    """PEFT's configuration for modules that `lokr_for_peft` gave.

    Raises `AdapterError` where no one `decompose_factor` splits all sides as they are split.
    """
    sides: set[tuple[int, int]] = set()
    ranks, alphas = {}, {}
    for name, module in modules.items():
        split = _split(f"{component}.{name}", module)
        sides |= {(split.rows, split.more_rows), (split.columns, split.more_columns)}
        ranks[name] = module.rank if module.has_scale else split.least_whole_rank
        alphas[name] = module.effective_alpha if module.has_scale else float(ranks[name])
    largest = max(first for first, _ in sides)
    for factor in (-1, *range(1, 2 * largest + 2)):
        if all(kronecker_factors(first * second, factor) == (first, second) for first, second in sides):
            break
    else:
        raise AdapterError(
            f"{component}: LoKr splits its layers by no one decompose_factor, which PEFT needs: write kohya"
        )
    return {
        **lycoris_options("lokr", ranks, alphas),
        "use_effective_conv2d": any(module.t2 is not None for module in modules.values()),
        "decompose_both": False,
        "decompose_factor": factor,
        "rank_dropout_scale": False,
    }


def lokr_for_peft(modules: Mapping[str, LokrModule]) -> tuple[dict[str, LokrModule], int]:
    """LoKr modules by path as PEFT builds them, float32 where they were multiplied out, and how many were."""
    splits = {path: _split(path, module) for path, module in modules.items()}
    has_cores = any(
        module.t2 is not None and splits[path].is_product_for(module) for path, module in modules.items()
    )
    changed = {path: _for_peft(module, splits[path], has_cores) for path, module in modules.items()}
    return changed, sum(changed[path] is not module for path, module in modules.items())


@dataclass(frozen=True)
class _Split:
    """The sides of a layer's weight as LoKr has them: out is rows * more_rows."""

    rows: int
    columns: int
    more_rows: int
    more_columns: int  # without the kernel
    kernel: tuple[int, ...]

    @property
    def least_whole_rank(self) -> int:
        """The least rank at which PEFT has w2 whole."""
        return -(-max(self.more_rows, self.more_columns) // 2)

    def is_product_for(self, module: LokrModule) -> bool:
        """Whether PEFT has w2 as a product at the rank of the module's own."""
        return module.w2_b is not None and module.rank < max(self.more_rows, self.more_columns) / 2


def _split(path: str, module: LokrModule) -> _Split:
    (rows, columns), (more_rows, more_columns) = module.sizes
    kernel = weight_shape(path, module)[2:]
    if more_columns % math.prod(kernel):
        kernel = ()
    return _Split(rows, columns, more_rows, more_columns // math.prod(kernel), kernel)


def _for_peft(module: LokrModule, split: _Split, has_cores: bool) -> LokrModule:
    first, second = module.w1, module.w2
    is_wide = math.prod(split.kernel) > 1
    if split.is_product_for(module) and (module.t2 is not None) == (has_cores and is_wide):
        return module if first is not None else replace(module, w1=module.whole()[0], w1_a=None, w1_b=None)
    whole = (split.more_rows, split.more_columns, *split.kernel)
    if first is not None and second is not None:
        return module if second.shape == whole else replace(module, w2=second.reshape(whole))
    first, second = module.whole()
    return LokrModule(alpha=None, w1=first * module.scale, w2=second.reshape(whole))


def lycoris_tensors(module: LohaModule | LokrModule) -> dict[str, torch.Tensor]:
    """The tensors by LyCORIS' own names, which PEFT has too: `hada_w1_a`, `lokr_w1` and so on."""
    prefix = "hada" if isinstance(module, LohaModule) else "lokr"
    return {f"{prefix}_{name}": tensor.contiguous() for name, tensor in module.tensors().items()}
