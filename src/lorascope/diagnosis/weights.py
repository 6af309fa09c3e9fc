"""What an adapter's update looks like beside the base's weights: its size, its rank and its intruders.

An intruder is a leading left singular vector of W + dW that has no counterpart among those of W: the largest
absolute cosine with any of them is below a threshold (Shuttleworth et al. 2024, arXiv 2410.21228, who found
that language models with many of them forget more of what they knew). Where W's own leading singular values
lie close together even a small update turns its vectors, so read an arm's share beside other arms'.

All is computed on the CPU in float64, one layer at a time, and the base's side once for all adapters.
Singular vectors come from the Gram matrix of the weight's shorter side, whose update is of low rank: with
dW = B A it is W W' + C B' + B C' + B (A A') B', C = W A', so that no matrix of a weight's size is made for an
adapter. A layer of 1280 x 1280 takes one thread 0.6 s once and 0.15 s for each adapter of rank 16, one of
10240 x 1280 1.2 s and 0.3 s (AMD EPYC); it grows with the cube of the shorter side. So the 192 layers of
attention and feed-forward in Stable Diffusion v1.5 should take about a minute, and 15 s for each adapter.
Memory: the weight in float64, up to 240 MB of a wide convolution, and some squares of the shorter side.

LoHa, LoKr and full differences are measured by their whole update, in about the time that the base takes.

Whether a lower rank would do as well: `adapters.lowrank.resize` cuts an adapter, which is then drawn with.

Dimensions: n rows and m columns of a weight as a matrix [out, in * kh * kw], p the smaller of the two, r
rank, k leading directions.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import scipy.linalg
import torch
from torch import nn

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.lowrank import effective_rank, singular_values
from lorascope.adapters.modules import FullModule, LoraModule, Module
from lorascope.console import Tally
from lorascope.diagnosis.layers import LayerFigures
from lorascope.errors import AdapterError

# The defaults of PEFT's `reduce_intruder_dimension`, which follows the paper.
TOP_DIRECTIONS = 10
COSINE_THRESHOLD = 0.5
INTRUDER_FACTOR = 0.75  # what is kept of an intruder's singular value
# Of the largest singular value: below it the Gram matrix in float64 no longer tells a value from zero.
_LEAST_VALUE = 1e-6


@dataclass(frozen=True)
class BaseLayer:
    """The singular vectors and values of a base's weight, by its shorter side."""

    short: torch.Tensor  # the weight with its shorter side first, float64 [p, max(n, m)]
    is_tall: bool  # whether `short` is the transpose
    gram: torch.Tensor  # short @ short.T, float64 [p, p]
    vectors: torch.Tensor  # its left singular vectors as columns, float64 [p, q]; those of zeros left out
    values: torch.Tensor  # its singular values, float64 [q], falling; q <= p

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return math.sqrt(float(self.gram.trace()))

    @property
    def spectral_norm(self) -> float:
        """The largest singular value."""
        return float(self.values[0]) if len(self.values) else 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        rows, columns = self.short.shape
        return (columns, rows) if self.is_tall else (rows, columns)

    def cosines(self, left: torch.Tensor) -> torch.Tensor:
        """Absolute cosines of unit vectors [n, j] with the left singular vectors of the weight: [j, q]."""
        if not self.is_tall:
            return (left.T @ self.vectors).abs()
        # u_i = W v_i / s_i, which would be a matrix of the weight's size
        return ((self.short @ left).T @ self.vectors / self.values).abs()


def decompose(weight: torch.Tensor) -> BaseLayer:
    """The singular vectors of a weight [out, in] or [out, in, kh, kw], whatever its dtype and device."""
    matrix = weight.detach().to("cpu", torch.float64).flatten(1)
    is_tall = matrix.shape[0] > matrix.shape[1]
    short = matrix.T if is_tall else matrix
    gram = short @ short.T
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.flip(0).clamp(min=0).sqrt()
    kept = int((values > values[0] * _LEAST_VALUE).sum())
    return BaseLayer(short, is_tall, gram, vectors.flip(1)[:, :kept], values[:kept])


@dataclass(frozen=True)
class Directions:
    """The leading singular triplets of W + dW, and how near each is to one of W's."""

    values: torch.Tensor  # float64 [k], falling
    left: torch.Tensor  # unit columns, float64 [n, k]
    right: torch.Tensor  # unit columns, float64 [m, k]
    cosines: torch.Tensor  # the largest absolute cosine with any left singular vector of W, float64 [k]

    def intruders(self, threshold: float = COSINE_THRESHOLD) -> torch.Tensor:
        """Which of them are intruders: bool [k]."""
        return self.cosines < threshold


def leading_directions(base: BaseLayer, module: Module, count: int = TOP_DIRECTIONS) -> Directions:
    """The `count` leading singular triplets of the base's weight with an adapter's update added.

    There are fewer where W + dW has fewer singular values above zero. Raises `AdapterError` as
    `measure_layer` does.
    """
    up, down = _factors(base, module)
    # dW, or its transpose where the weight is tall, is first @ second.T
    first, second = (down.T, up) if base.is_tall else (up, down.T)
    crossed = base.short @ second @ first.T
    gram = base.gram + crossed + crossed.T + first @ (second.T @ second) @ first.T
    size = len(gram)
    squares, vectors = scipy.linalg.eigh(
        gram.numpy(), subset_by_index=[max(0, size - count), size - 1], overwrite_a=True, check_finite=False
    )
    values = torch.from_numpy(squares.copy()).flip(0).clamp(min=0).sqrt()
    near = torch.from_numpy(vectors.copy()).flip(1)[:, values > values[0] * _LEAST_VALUE]
    far = base.short.T @ near + second @ (first.T @ near)
    values = torch.linalg.vector_norm(far, dim=0)
    far = far / values
    left, right = (far, near) if base.is_tall else (near, far)
    cosines = base.cosines(left)
    nearest = cosines.amax(dim=1) if cosines.shape[1] else torch.zeros(len(cosines), dtype=cosines.dtype)
    return Directions(values, left, right, nearest)


def _factors(base: BaseLayer, module: Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The update's factors, the scale in the first: float64 [n, r] and [r, m], on the CPU. Of other kinds
    than LoRA one of them is the update, by its shorter side, and the other the identity.
    """
    if module.dora_scale is not None:
        raise AdapterError(
            "its module is DoRA, whose update is no product of two factors: only plain LoRA can be measured"
        )
    parts = {name: part.detach().to("cpu", torch.float64) for name, part in module.tensors().items()}
    if bad := [name for name, part in parts.items() if not part.isfinite().all()]:
        raise AdapterError(f"{bad[0]} has values that are NaN or infinite: take an earlier epoch's adapter")
    if module.matrix_shape != base.shape:
        raise AdapterError(
            f"the adapter is for a weight of {module.matrix_shape[0]} x {module.matrix_shape[1]}, the base's "
            f"is {base.shape[0]} x {base.shape[1]}: another base model"
        )
    exact = module.with_tensors(parts)
    if isinstance(exact, LoraModule):
        return exact.up.flatten(1) * exact.scale, exact.full_down().flatten(1)
    update = exact.update().double().reshape(base.shape)
    identity = torch.eye(min(base.shape), dtype=torch.float64)
    return (update, identity) if base.is_tall else (identity, update)


def measure_layer(layer: str, base: BaseLayer, module: Module, count: int = TOP_DIRECTIONS) -> LayerFigures:
    """The figures of one layer.

    Raises `AdapterError` for DoRA, for weights that are not finite and for a module of another shape.
    """
    directions = leading_directions(base, module, count)
    values = singular_values(module)
    norm, spectral = float(torch.linalg.vector_norm(values)), float(values[0])
    return LayerFigures(
        layer=layer,
        rank=module.rank,
        norm_ratio=norm / base.norm if base.norm else None,
        spectral_ratio=spectral / base.spectral_norm if base.spectral_norm else None,
        stable_rank=(norm / spectral) ** 2 if spectral else 0.0,
        rank_95=effective_rank(values),
        num_directions=len(directions.values),
        num_intruders=int(directions.intruders().sum()),
    )


def measure_adapters(
    components: Mapping[str, nn.Module],
    adapters: Mapping[str, Adapter],
    count: int = TOP_DIRECTIONS,
    tally: Tally | None = None,
) -> dict[str, list[LayerFigures]]:
    """The figures of every layer of each adapter, in the adapter's own order, by the adapter's name. Norms,
    whose weights are no matrices, are left out.

    `components` are the base's `unet` and `text_encoder` without a bank in place. `tally` counts layers, each
    once for all adapters. Raises `AdapterError` with
    the layer's path as `measure_layer` does, and for a layer that the base lacks.
    """
    found: dict[tuple[str, str], LayerFigures] = {}
    for path, base, own in _layers(components, adapters, tally):
        for name, module in own.items():
            with _named(path):
                found[name, path] = measure_layer(path, base, module, count)
    return {
        name: [found[name, path] for path in adapter.modules if (name, path) in found]
        for name, adapter in adapters.items()
    }


def _layers(
    components: Mapping[str, nn.Module], adapters: Mapping[str, Adapter], tally: Tally | None
) -> Iterator[tuple[str, BaseLayer, dict[str, Module]]]:
    """Every layer but norms that some adapter adapts, decomposed, with those adapters' modules by adapter."""
    paths = dict.fromkeys(
        path
        for adapter in adapters.values()
        for path, module in adapter.modules.items()
        if not (isinstance(module, FullModule) and module.is_norm)
    )
    weights = {path: _weight(components, path) for path in paths}  # all are there before the long work
    for path, weight in weights.items():
        own = {name: adapter.modules[path] for name, adapter in adapters.items() if path in adapter.modules}
        yield path, decompose(weight), own
        if tally is not None:
            tally.advance()


def _weight(components: Mapping[str, nn.Module], path: str) -> torch.Tensor:
    """The weight of an adapted layer, whose path has the `text_model.` that transformers 5 dropped."""
    component, _, name = path.partition(".")
    modules = dict(components[component].named_modules()) if component in components else {}
    layer = modules.get(name) or modules.get(name.removeprefix("text_model."))
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise AdapterError(
            f"{path}: the base has no Linear or convolution of this name: give the base that the adapter "
            "was trained on"
        )
    return layer.weight


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Within, errors name the layer."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error


def scale_intruders(
    components: Mapping[str, nn.Module],
    adapters: Mapping[str, Adapter],
    factor: float = INTRUDER_FACTOR,
    count: int = TOP_DIRECTIONS,
    tally: Tally | None = None,
) -> dict[str, Adapter]:
    """The same adapters with the intruders of W + dW scaled by `factor` in [0, 1]; 1 changes nothing.

    Every update becomes dW - (1 - factor) * sum of s_i u_i v_i' over its intruders, exactly and not cut back
    to rank r, as PEFT's function does it. So each module has rank r + `count` and keeps its scale, alpha
    growing with the rank; where a layer has fewer intruders, columns and rows of zeros fill it up, so that
    an arm of one rank stays one and goes into an `AdapterBank`. Factors are in the module's own dtype, at
    least float32. Raises `AdapterError` as `measure_adapters` does, and for other kinds than LoRA.
    """
    if not 0 <= factor <= 1:
        raise ValueError(f"factor = {factor}: must be in [0, 1]")
    found: dict[tuple[str, str], LoraModule] = {}
    plain = {name: adapter.lora_modules("only LoRA can be edited") for name, adapter in adapters.items()}
    for path, base, own in _layers(components, adapters, tally):
        for name in own:
            with _named(path):
                found[name, path] = _with_scaled_intruders(base, plain[name][path], factor, count)
    return {
        name: replace(adapter, modules={path: found[name, path] for path in adapter.modules})
        for name, adapter in adapters.items()
    }


def _with_scaled_intruders(base: BaseLayer, module: LoraModule, factor: float, count: int) -> LoraModule:
    directions = leading_directions(base, module, count)
    intruders = directions.intruders()
    roots = directions.values[intruders].sqrt()
    up, down = _factors(base, module)
    rank = module.rank + count
    # Without a scale nothing was added, so there is no intruder to divide by it for.
    share = (1 - factor) / module.scale if module.scale else 0.0
    new_up, new_down = up.new_zeros(len(up), rank), down.new_zeros(rank, down.shape[1])
    num_filled = module.rank + len(roots)
    new_up[:, : module.rank] = module.up.flatten(1)
    new_up[:, module.rank : num_filled] = directions.left[:, intruders] * roots * -share
    new_down[: module.rank] = down
    new_down[module.rank : num_filled] = (directions.right[:, intruders] * roots).T
    dtype = torch.promote_types(module.down.dtype, torch.float32)
    shape = module.weight_shape
    is_conv = len(shape) > 2
    up, down = new_up.to(dtype), new_down.to(dtype)
    return LoraModule(
        down=down.unflatten(1, shape[1:]) if is_conv else down,
        up=up[..., None, None] if is_conv else up,
        alpha=module.scale * rank,
    )
