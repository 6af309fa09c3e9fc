"""What an adapter does to one layer: LoRA, LoHa, LoKr or a full difference, as tensors in memory.

Dimensions: r rank, in and out the channels of the adapted layer, kh and kw a convolution's kernel. LoHa, LoKr
and full differences are LyCORIS' (Yeh et al. 2024), under the names that its files give their tensors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

import torch

ModuleKind = Literal["lora", "loha", "lokr", "full"]
KIND_NAMES: dict[ModuleKind, str] = {
    "lora": "LoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "full": "a full difference",
}


class _Module:
    """What modules of all kinds have in common; their fields are tensors, but for alpha."""

    kind: ClassVar[ModuleKind]
    alpha: float | None
    dora_scale: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """r, as the tensors have it."""
        raise NotImplementedError

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in * kh * kw) of the weight it is for."""
        raise NotImplementedError

    @property
    def kernel(self) -> tuple[int, ...] | None:
        """(kh, kw) of the weight it is for, () of a Linear layer's, None where the tensors do not show it."""
        raise NotImplementedError

    @property
    def num_numbers(self) -> int:
        """Of the largest tensor on the way to its update: a few small ones can mean a huge one."""
        return math.prod(self.matrix_shape)

    @property
    def has_scale(self) -> bool:
        """Whether alpha acts on it at all."""
        return True

    @property
    def effective_alpha(self) -> float:
        """alpha, or the rank where the file gives none or alpha does not act."""
        return float(self.rank) if self.alpha is None or not self.has_scale else self.alpha

    @property
    def scale(self) -> float:
        """The factor on the product of the tensors: alpha / rank, 1 where alpha does not act."""
        return self.effective_alpha / self.rank

    def update(self) -> torch.Tensor:
        """What is added to the layer's weight: float32 [out, ...], of the size of the weight. DoRA's
        normalisation is left out.
        """
        raise NotImplementedError

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it is for a weight of this shape; a 1x1 convolution's is a Linear layer's."""
        (rows, columns), kernel = self.matrix_shape, self.kernel
        if kernel is None:
            return (rows, columns) == (shape[0], math.prod(shape[1:]))
        own = (rows, columns // math.prod(kernel), *kernel)
        return _without_kernel_of_one(own) == _without_kernel_of_one(shape)

    def at_strength(self, strength: float) -> Self:
        """The module that does at weight 1 what this does at `strength`."""
        changed: Any = replace(self, alpha=self.effective_alpha * strength)  # type: ignore[type-var]
        return changed

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by field name."""
        named = ((item.name, getattr(self, item.name)) for item in fields(self))  # type: ignore[arg-type]
        return {name: value for name, value in named if isinstance(value, torch.Tensor)}

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Self:
        """The same module with other tensors, such as of another dtype, by field name; those left out are
        gone.
        """
        gone = dict.fromkeys(set(self.tensors()) - set(tensors))
        changed: Any = replace(self, **gone, **tensors)  # type: ignore[type-var]
        return changed


@dataclass(frozen=True)
class LoraModule(_Module):
    """LoRA: its update is up @ down * scale, scale = alpha / rank, or 1 where the file gives no alpha."""

    kind = "lora"
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
        """As of every module: [out, in] or [out, in, kh, kw]."""
        down = replace(self, down=self.down.float()).full_down()
        return (self.up.float().flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:]) * self.scale

    @property
    def kernel(self) -> tuple[int, ...]:
        """As of every module."""
        return tuple(self.down.shape[2:] if self.mid is None else self.mid.shape[2:])

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight it adapts: (out, in) or (out, in, kh, kw)."""
        return (self.up.shape[0], self.down.shape[1], *self.kernel)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """As of every module."""
        return self.up.shape[0], self.down.shape[1] * math.prod(self.kernel)


@dataclass(frozen=True)
class LohaModule(_Module):
    """LoHa: its update is (w1_a @ w1_b) * (w2_a @ w2_b) * scale, element by element.

    With Tucker cores, which some convolutions have, w_a is [r, out], w_b [r, in], and each product that of
    the core with both.
    """

    kind = "loha"
    w1_a: torch.Tensor  # [out, r]
    w1_b: torch.Tensor  # [r, in * kh * kw]
    w2_a: torch.Tensor  # [out, r]
    w2_b: torch.Tensor  # [r, in * kh * kw]
    alpha: float | None
    t1: torch.Tensor | None = None  # Tucker core, [r, r, kh, kw]
    t2: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """r, as the tensors have it."""
        return self.w1_b.shape[0]

    def update(self) -> torch.Tensor:
        """As of every module: [out, in * kh * kw], with cores [out, in, kh, kw]."""
        first = _product(self.w1_a, self.w1_b, self.t1)
        return first * _product(self.w2_a, self.w2_b, self.t2) * self.scale

    @property
    def kernel(self) -> tuple[int, ...] | None:
        """As of every module; only cores show it."""
        return None if self.t1 is None else tuple(self.t1.shape[2:])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """As of every module."""
        return _size_of_product(self.w1_a, self.w1_b, self.t1)

    @property
    def num_numbers(self) -> int:
        """As of every module."""
        inner = 0 if self.kernel is None else self.rank * self.matrix_shape[0] * math.prod(self.kernel)
        return max(super().num_numbers, inner)


@dataclass(frozen=True)
class LokrModule(_Module):
    """LoKr: its update is the Kronecker product of w1 and w2, times scale; each is whole or w_a @ w_b.

    out is l * k and in is m * n. alpha acts only where one of the two is a product, as LyCORIS has it.
    """

    kind = "lokr"
    alpha: float | None
    w1: torch.Tensor | None = None  # [l, m]
    w1_a: torch.Tensor | None = None  # [l, r]
    w1_b: torch.Tensor | None = None  # [r, m]
    w2: torch.Tensor | None = None  # [k, n(, kh, kw)]
    w2_a: torch.Tensor | None = None  # [k, r]; with a core [r, k]
    w2_b: torch.Tensor | None = None  # [r, n * kh * kw]; with a core [r, n]
    t2: torch.Tensor | None = None  # Tucker core, [r, r, kh, kw]

    @property
    def rank(self) -> int:
        """r, as the tensors have it; 1 where both are whole."""
        small = self.w2_b if self.w1_b is None else self.w1_b
        return 1 if small is None else small.shape[0]

    @property
    def has_scale(self) -> bool:
        """As of every module: not where both are whole."""
        return self.w1 is None or self.w2 is None

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """w1 [l, m] and w2 [k, n * kh * kw], float32."""
        parts = []
        for own, left, right, core in (
            (self.w1, self.w1_a, self.w1_b, None),
            (self.w2, self.w2_a, self.w2_b, self.t2),
        ):
            if own is not None:
                parts.append(own.float().flatten(1))
            else:
                assert left is not None
                assert right is not None
                parts.append(_product(left, right, core).flatten(1))
        return parts[0], parts[1]

    def update(self) -> torch.Tensor:
        """As of every module: [out, in * kh * kw]."""
        return torch.kron(*self.whole()) * self.scale

    def at_strength(self, strength: float) -> "LokrModule":
        """As of every module."""
        if self.w1 is not None and not self.has_scale:
            return replace(self, w1=self.w1 * strength)
        return super().at_strength(strength)

    @property
    def kernel(self) -> tuple[int, ...] | None:
        """As of every module; w2 shows it where it is whole and of a convolution, or has a core."""
        if self.t2 is not None:
            return tuple(self.t2.shape[2:])
        return None if self.w2 is None or self.w2.ndim == 2 else tuple(self.w2.shape[2:])

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(l, m) of w1 and (k, n * kh * kw) of w2."""
        return (
            _size_of_factor(self.w1, self.w1_a, self.w1_b, None),
            _size_of_factor(self.w2, self.w2_a, self.w2_b, self.t2),
        )

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """As of every module."""
        first, second = self.sizes
        return first[0] * second[0], first[1] * second[1]

    @property
    def num_numbers(self) -> int:
        """As of every module."""
        inner = 0 if self.t2 is None else self.rank * self.sizes[1][0] * math.prod(self.t2.shape[2:])
        return max(super().num_numbers, inner)


@dataclass(frozen=True)
class FullModule(_Module):
    """A full difference: what is added to the layer's weight and bias. Norms are adapted by it alone."""

    kind = "full"
    weight: torch.Tensor  # of the weight's shape: [out, in], [out, in, kh, kw], or [out] of a norm
    bias: torch.Tensor | None = None  # [out]
    alpha: None = None

    @property
    def rank(self) -> int:
        """The most that a matrix of this size can have."""
        return min(self.weight.shape[0], self.weight[0].numel())

    @property
    def has_scale(self) -> bool:
        """As of every module: there is no alpha."""
        return False

    def update(self) -> torch.Tensor:
        """As of every module."""
        return self.weight.float()

    def at_strength(self, strength: float) -> "FullModule":
        """As of every module."""
        return replace(
            self, weight=self.weight * strength, bias=None if self.bias is None else self.bias * strength
        )

    @property
    def is_norm(self) -> bool:
        """Whether it is a norm's, whose weight is a vector."""
        return self.weight.ndim == 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """As of every module."""
        return tuple(self.weight.shape[2:])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """As of every module; (out, 1) of a norm."""
        return self.weight.shape[0], self.weight[0].numel()

    def fits(self, shape: Sequence[int]) -> bool:
        """As of every module."""
        return _without_kernel_of_one(self.weight.shape) == _without_kernel_of_one(shape)


Module = LoraModule | LohaModule | LokrModule | FullModule


def _product(left: torch.Tensor, right: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    """left @ right, or the core with both, float32."""
    if core is None:
        return left.float() @ right.float()
    return torch.einsum("abhw,ao,bi->oihw", core.float(), left.float(), right.float())


def _size_of_product(left: torch.Tensor, right: torch.Tensor, core: torch.Tensor | None) -> tuple[int, int]:
    """Rows and columns of what `_product` gives, as a matrix."""
    if core is None:
        return left.shape[0], right.shape[1]
    return left.shape[1], right.shape[1] * math.prod(core.shape[2:])


def _size_of_factor(
    whole: torch.Tensor | None,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    core: torch.Tensor | None,
) -> tuple[int, int]:
    """Rows and columns of one of LoKr's two, as a matrix."""
    if whole is not None:
        return whole.shape[0], math.prod(whole.shape[1:])
    assert left is not None
    assert right is not None
    return _size_of_product(left, right, core)


def _without_kernel_of_one(shape: Sequence[int]) -> tuple[int, ...]:
    """A 1x1 convolution's weight is a Linear layer's: [out, in]."""
    return tuple(shape[:2]) if math.prod(shape[2:]) == 1 else tuple(shape)
