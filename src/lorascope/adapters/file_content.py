"""What a weight file holds: shapes, dtypes and metadata of its header, and a way to its tensors."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorascope.adapters.file_modules import num_elements
from lorascope.base.layers import Shape
from lorascope.base.weights import PICKLE_SUFFIXES, load_tensors, read_header
from lorascope.errors import WeightsError
from lorascope.store import open_regular

_DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}


@dataclass(frozen=True)
class Content:
    """A file's tensors by header, and a way to its weights."""

    path: Path
    shapes: dict[str, Shape]
    dtypes: dict[str, int]
    num_parameters: int
    metadata: dict[str, str]
    data_start: int  # where a safetensors file's data begin; 0 for a pickle
    config: dict[str, Any] | None = None
    archive: dict[str, torch.Tensor] | None = None

    def tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """These tensors by name; raises `WeightsError` where they cannot be read."""
        if self.archive is not None:
            return {name: self.archive[name] for name in names}
        return load_tensors(self.path, names)


def open_content(path: Path, config: dict[str, Any] | None = None) -> Content:
    """A weight file's content; raises `WeightsError` for what is none."""
    if path.suffix.lower() in PICKLE_SUFFIXES and _is_zip(path):
        archive = load_tensors(path)
        dtypes = Counter(
            str(tensor.dtype).removeprefix("torch.") for tensor in archive.values() if tensor.ndim
        )
        shapes = {name: tuple(tensor.shape) for name, tensor in archive.items()}
        return Content(
            path, shapes, dict(dtypes), sum(t.numel() for t in archive.values()), {}, 0, config, archive
        )
    header = read_header(path)
    dtypes = Counter(_DTYPES.get(info.dtype, info.dtype) for info in header.tensors.values() if info.shape)
    shapes = {name: info.shape for name, info in header.tensors.items()}
    parameters = sum(num_elements(shape) for shape in shapes.values())
    return Content(path, shapes, dict(dtypes), parameters, header.metadata, header.header_bytes, config)


def _is_zip(path: Path) -> bool:
    with open_regular(path, WeightsError) as file:
        return file.read(4) == b"PK\x03\x04"
