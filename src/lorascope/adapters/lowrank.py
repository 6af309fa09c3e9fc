"""The best adapter of a lower rank: from an adapter of a higher one, or from the difference of two
checkpoints.

The best approximation of rank k to a matrix in the Frobenius norm keeps its k largest singular values
(Eckart-Young); the share of the squared norm that it keeps is called its energy. An update B A of rank r
needs no SVD of its full size: with B = Qb Rb and A' = Qa Ra its singular values are those of Rb Ra', which is
r x r. All of it is computed in float64.

Dimensions: r rank, k the new rank, in and out the channels of a layer, n and m the rows and columns of a
weight as a matrix [out, in * kh * kw].
"""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional

from lorascope.adapters.adapter import Adapter, weight_shape
from lorascope.adapters.modules import KIND_NAMES, FullModule, LoraModule, Module
from lorascope.base.configs import read_configs
from lorascope.base.family import family_of_folder, family_of_tensors
from lorascope.base.ldm import PREFIXES, canonical_name, list_pairs
from lorascope.base.weights import PICKLE_SUFFIXES, load_tensors, read_header
from lorascope.errors import AdapterError
from lorascope.sections import BaseSection

_NETWORK = ("ss_network_module", "ss_network_args")  # metadata
_FOLDER_WEIGHTS = {  # a pipeline's weights; the first that is there
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
    "text_encoder": ("model.safetensors", "model.fp16.safetensors"),
}


@dataclass(frozen=True)
class Target:
    """How far to cut: to a rank, to the least rank that keeps a share of the energy, or to the smaller of the
    two.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None:
            raise AdapterError(
                "neither a rank nor a share of the energy is given: say --rank 16 or --energy 0.95"
            )
        if self.rank is not None and self.rank < 1:
            raise AdapterError(f"rank = {self.rank}: must be at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise AdapterError(f"energy = {self.energy}: must be above 0 and at most 1, such as 0.95")

    def rank_for(self, singular_values: torch.Tensor) -> int:
        """The new rank of a module with these singular values, at least 1."""
        rank = len(singular_values) if self.energy is None else effective_rank(singular_values, self.energy)
        return max(1, min(rank, len(singular_values), self.rank or rank))


@dataclass(frozen=True)
class Cut:
    """A new adapter, with what it kept."""

    adapter: Adapter
    energy: dict[str, float]  # by path: the share of the update's squared Frobenius norm, in [0, 1]
    notes: tuple[str, ...]  # what the user should know, a sentence each

    def summary(self) -> str:
        """Modules, ranks and energy kept, for people."""
        ranks = [module.rank for module in self.adapter.modules.values()]
        least = min(self.energy, key=self.energy.__getitem__)
        spread = (
            f"rank {ranks[0]}"
            if len(set(ranks)) == 1
            else f"rank {min(ranks)} to {max(ranks)}, median {statistics.median(ranks):g}"
        )
        values = list(self.energy.values())
        shares = f"least {min(values):.2%}, median {statistics.median(values):.2%}, most {max(values):.2%}"
        return f"{len(ranks)} modules, {spread}\nenergy kept: {shares}\nleast in {least}"


def singular_values(module: Module) -> torch.Tensor:
    """Those of the module's update as a matrix [out, in * kh * kw]: float64 [min(r, n, m)], of other kinds
    than LoRA [min(n, m)], falling. DoRA's magnitude is left out.
    """
    if not isinstance(module, LoraModule):
        matrix = module.update().double().reshape(module.matrix_shape)
        short = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
        return torch.linalg.eigvalsh(short @ short.T).flip(0).clamp(min=0).sqrt()
    return torch.linalg.svdvals(_core(module)[1]) * abs(module.scale)


def effective_rank(singular_values: torch.Tensor, energy: float = 0.95) -> int:
    """The least number of singular values with at least this share of the sum of squares; 0 where all are
    zero.
    """
    squares = singular_values.double().square()
    total = squares.sum()
    if total == 0:
        return 0
    return min(int((squares.cumsum(0) < total * energy).sum()) + 1, len(squares))


def _core(module: LoraModule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Qb [n, i], the small matrix Rb Ra' [i, j] and Qa [m, j] of a module without its scale."""
    left, small_left = torch.linalg.qr(module.up.double().flatten(1))
    down = replace(
        module, down=module.down.double(), mid=None if module.mid is None else module.mid.double()
    ).full_down()
    right, small_right = torch.linalg.qr(down.double().flatten(1).T)
    return left, small_left @ small_right.T, right


def _module(
    up: torch.Tensor, values: torch.Tensor, down: torch.Tensor, scale: float, kernel: torch.Size
) -> LoraModule:
    """A module from singular vectors [n, k] and [k, m] and values [k], which it shares between the factors,
    in float32.
    """
    root = values.sqrt()
    rank, is_conv = len(values), len(kernel) > 1
    down = (root[:, None] * down).float().contiguous()
    up = (up * root).float().contiguous()
    return LoraModule(
        down=down.unflatten(1, tuple(kernel)) if is_conv else down,
        up=up[..., None, None] if is_conv else up,
        alpha=scale * rank,
    )


def balanced(module: LoraModule) -> LoraModule:
    """The same update, rank and scale from factors that share its singular values, in float32.

    Factors whose product is small though they are large would lose much of it to rounding in half precision.
    """
    left, small, right = _core(module)
    u, values, v = torch.linalg.svd(small, full_matrices=False)
    missing = module.rank - len(values)  # where the layer has fewer
    up, down = functional.pad(left @ u, (0, missing)), functional.pad(v @ right.T, (0, 0, 0, missing))
    shared = functional.pad(values, (0, missing))
    new = _module(up, shared, down, module.scale, module.full_down().shape[1:])
    return replace(new, alpha=module.alpha, dora_scale=module.dora_scale)


def resize(adapter: Adapter, target: Target) -> Cut:
    """The best adapter of a lower rank, module by module.

    Every module keeps its scale, so alpha falls with the rank. A module whose rank is not above its new one
    stays as it is. LoHa, LoKr and full differences become the nearest LoRA, of scale 1; norms and biases,
    which LoRA does not have, are left out. Raises `AdapterError` for DoRA, whose magnitudes belong to the
    update as it was trained, for T-LoRA, whose components are in an order, and where only norms are there.
    """
    adapter.require_unscheduled("keep it, or write it with --as-lora before")
    modules: dict[str, Module] = {}
    energy: dict[str, float] = {}
    kept = 0
    for path, module in adapter.modules.items():
        if isinstance(module, FullModule) and module.is_norm:
            continue
        if not isinstance(module, LoraModule):
            update = module.update().double().reshape(weight_shape(path, module))
            modules[path], energy[path] = _nearest(update, target)
            continue
        if module.dora_scale is not None:
            raise AdapterError(
                f"{path}: is DoRA, whose magnitude was trained for the whole update, so a cut would "
                "change the rest too: keep it"
            )
        left, small, right = _core(module)
        u, values, v = torch.linalg.svd(small, full_matrices=False)
        rank = target.rank_for(values)
        if rank >= module.rank:
            modules[path], energy[path], kept = module, 1.0, kept + 1
            continue
        kernel = module.full_down().shape[1:]
        modules[path] = _module(left @ u[:, :rank], values[:rank], v[:rank] @ right.T, module.scale, kernel)
        energy[path] = _share(values, rank)
    notes = (
        [f"{kept} of {len(modules)} modules have no more than the new rank already and stay as they are"]
        if kept
        else []
    )
    if adapter.modules and not modules:
        raise AdapterError("it changes norms alone, of which there is no LoRA: keep it")
    if all(kind == "lora" for kind in adapter.kinds):
        return Cut(replace(adapter, modules=modules), energy, tuple(notes))
    # Of another kind of network than what comes out.
    metadata = {key: value for key, value in adapter.metadata.items() if key not in _NETWORK}
    notes += _conversion_notes(adapter)
    return Cut(replace(adapter, modules=modules, metadata=metadata), energy, tuple(notes))


def _conversion_notes(adapter: Adapter) -> list[str]:
    """What became LoRA, and what LoRA does not hold."""
    others = [module for module in adapter.modules.values() if not isinstance(module, LoraModule)]
    full = [module for module in others if isinstance(module, FullModule)]
    norms = [module for module in full if module.is_norm]
    biases = [module for module in full if module.bias is not None and not module.is_norm]
    kinds = " and ".join(KIND_NAMES[kind] for kind in adapter.kinds if kind != "lora")
    notes = [
        f"{len(others) - len(norms)} modules of {kinds} became the LoRA nearest to their updates: see how "
        "much of the energy is kept"
    ]
    if norms or biases:
        notes.append(f"{len(norms)} norms and {len(biases)} biases, which no LoRA holds, are left out")
    return notes


def _share(values: torch.Tensor, rank: int) -> float:
    squares = values.double().square()
    total = float(squares.sum())
    return float(squares[:rank].sum()) / total if total else 1.0


class Checkpoint:
    """The Linear and convolution weights of a Stable Diffusion v1 model on disk, read one at a time.

    A diffusers pipeline folder, or one file in the original LDM layout. Raises `AdapterError` for another
    kind of model, `WeightsError` for damage.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: dict[str, tuple[Path, str]] = {}  # file and name of each tensor, by path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._archive: dict[str, torch.Tensor] | None = None
        if path.is_dir():
            if family := family_of_folder(path):
                raise AdapterError(
                    f"{path}: is {family}: give a Stable Diffusion v1 pipeline folder or checkpoint file"
                )
            self._list_folder(path)
        else:
            self._list_file(path)
        self.layers = [
            name for name, shape in self.shapes.items() if name.endswith(".weight") and len(shape) in (2, 4)
        ]

    def _list_folder(self, folder: Path) -> None:
        for component, candidates in _FOLDER_WEIGHTS.items():
            file = next(
                (folder / component / name for name in candidates if (folder / component / name).is_file()),
                None,
            )
            if file is None:
                raise AdapterError(
                    f"{folder / component}: holds none of {', '.join(candidates)}: save the pipeline as "
                    "safetensors"
                )
            for name, info in read_header(file).tensors.items():
                own = name if component == "unet" or name.startswith("text_model.") else f"text_model.{name}"
                self._add(f"{component}.{own}", file, name, info.shape)

    def _list_file(self, file: Path) -> None:
        if file.suffix.lower() in PICKLE_SUFFIXES:
            self._archive = load_tensors(file)
            shapes = {name: tuple(tensor.shape) for name, tensor in self._archive.items()}
        else:
            shapes = {name: info.shape for name, info in read_header(file).tensors.items()}
        if family := family_of_tensors(shapes):
            raise AdapterError(
                f"{file}: is {family}: give a Stable Diffusion v1 pipeline folder or checkpoint file"
            )
        # Where the file carries no configuration of its own, it has the layers of SD v1.5, of whatever
        # widths.
        ours = {
            pair.ldm: pair.diffusers
            for pair in list_pairs(read_configs(BaseSection(model=str(file))))
            if pair.component == "unet"
        }
        for stored, shape in shapes.items():
            name = canonical_name(stored)
            if name.startswith(PREFIXES["unet"]):
                self._add(f"unet.{ours.get(name, name)}", file, stored, shape)
            elif name.startswith(PREFIXES["text_encoder"]):
                self._add(
                    f"text_encoder.text_model.{name.removeprefix(PREFIXES['text_encoder'])}",
                    file,
                    stored,
                    shape,
                )

    def _add(self, path: str, file: Path, name: str, shape: tuple[int, ...]) -> None:
        if "position_ids" not in name:
            self._names[path], self.shapes[path] = (file, name), shape

    def tensor(self, path: str) -> torch.Tensor:
        """One tensor, in the dtype that it is stored in."""
        file, name = self._names[path]
        return self._archive[name] if self._archive is not None else load_tensors(file, [name])[name]


def extract(base: Checkpoint, tuned: Checkpoint, target: Target) -> Cut:
    """The adapter nearest to the difference of two checkpoints, `tuned` minus `base`, one layer in memory at
    a time.

    Layers that do not differ are left out. Two checkpoints of different dtypes are compared in the coarser
    one, so that its rounding is not taken for training. Raises `AdapterError` if they are of different
    architectures, do not differ, or hold values that are not finite.
    """
    if unlike := [path for path in base.shapes if tuned.shapes.get(path) != base.shapes[path]]:
        raise AdapterError(
            f"{tuned.path}: {unlike[0]} is {_shape(tuned, unlike[0])}, in {base.path} it is "
            f"{_shape(base, unlike[0])}: the two are not the same architecture"
        )
    layers = [path for path in base.layers if not path.endswith("embedding.weight")]
    modules: dict[str, Module] = {}
    energy: dict[str, float] = {}
    for path in layers:
        difference = _difference(base, tuned, path)
        if difference.any():
            name = path.removesuffix(".weight")
            modules[name], energy[name] = _nearest(difference, target)
    if not modules:
        raise AdapterError(f"{tuned.path}: no layer differs from {base.path}: nothing to extract")
    others = [
        path for path in base.shapes if path not in set(layers) and _difference(base, tuned, path).any()
    ]
    notes = []
    if others:
        notes.append(
            f"{len(others)} tensors that no LoRA holds differ too and are left out (norms, biases, "
            f"embeddings), such as {others[0]}"
        )
    if left_out := len(layers) - len(modules):
        notes.append(f"{left_out} of {len(layers)} layers do not differ and have no module")
    return Cut(Adapter(modules, "kohya", {}), energy, tuple(notes))


def _shape(checkpoint: Checkpoint, path: str) -> str:
    return f"of shape {list(checkpoint.shapes[path])}" if path in checkpoint.shapes else "not there"


def _difference(base: Checkpoint, tuned: Checkpoint, path: str) -> torch.Tensor:
    """float64, of the weight's shape."""
    before, after = base.tensor(path), tuned.tensor(path)
    if before.dtype.itemsize > after.dtype.itemsize:
        before = before.to(after.dtype)
    elif after.dtype.itemsize > before.dtype.itemsize:
        after = after.to(before.dtype)
    difference = after.double() - before.double()
    if not difference.isfinite().all():
        raise AdapterError(
            f"{path}: has values that are NaN or infinite in {base.path} or {tuned.path}: get the file again"
        )
    return difference


def _nearest(difference: torch.Tensor, target: Target) -> tuple[LoraModule, float]:
    """The module nearest to a weight's difference, and the energy it keeps.

    By the eigenvectors of the smaller Gram matrix, many times faster than an SVD of a wide convolution;
    float64 leaves singular values down to 1e-8 of the largest, below float32's rounding of the result.
    """
    matrix = difference.flatten(1)  # (n, m)
    transposed = matrix.shape[0] > matrix.shape[1]
    short = matrix.T if transposed else matrix
    eigenvalues, vectors = torch.linalg.eigh(short @ short.T)
    values = eigenvalues.flip(0).clamp(min=0).sqrt()
    rank = target.rank_for(values)
    vectors, kept = vectors.flip(1)[:, :rank], values[:rank]
    others = (vectors.T @ short) / kept.clamp(min=torch.finfo(torch.float64).tiny)[
        :, None
    ]  # (k, the longer side)
    up, down = (others.T, vectors.T) if transposed else (vectors, others)
    return _module(up, kept, down, 1.0, difference.shape[1:]), _share(values, rank)
