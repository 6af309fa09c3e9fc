"""Weight files: read with suspicion, written as the same bytes every time.

Whatever comes from outside is held against the file's real size before anything is allocated, and no pickle
is executed: a `.ckpt` passes torch's weights-only loader, and only after its list of needed globals has been
read.
"""

import hashlib
import json
import math
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from lorascope.errors import WeightsError, first_line
from lorascope.store import atomic_path, open_regular, require_regular

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own
_PICKLE_LIMIT = 16_000_000  # bytes of the list of tensors in a torch file; Stable Diffusion's has 0.2 MB
_MAX_DIMENSIONS = 32
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
# Packed: an element is no whole byte, and torch has no such numbers.
_UNREADABLE = ("F4", "F6_E2M3", "F6_E3M2")
_DIGEST_KEY = "lorascope.digest"  # metadata of sealed files
_HIDDEN = "a global named as it runs"
# A pickle's instructions that look up a global: named beside them, or only as it runs.
_NEEDS = {
    **dict.fromkeys(("GLOBAL", "INST"), ""),
    **dict.fromkeys(("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"), _HIDDEN),
}
_TENSOR_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)|torch Size"
    r"|torch (Float|Half|BFloat16|Double|Long|Int|Short|Char|Byte|Bool)Storage|torch\.storage UntypedStorage"
    r"|torch (float|bfloat|int|uint|bool)[0-9a-z_]*"
)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header of its file states it."""

    dtype: str  # safetensors' name: F32, F16, BF16, ...
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself, held against its size."""

    path: Path
    tensors: dict[str, TensorInfo]  # in the order of their data
    metadata: dict[str, str]
    header_bytes: int  # where the tensors' data begins


def read_header(path: Path) -> Header:
    """The header of a safetensors file, without any tensor data.

    Every claim is checked: the data of the tensors fills the rest of the file without overlap or gap, and
    each has the size of its shape and dtype. Raises `WeightsError` that says what the file is instead, or
    what of it is wrong.
    """
    try:
        size = require_regular(path, WeightsError).st_size
        with open_regular(path, WeightsError) as file:
            start = file.read(512)
            length = int.from_bytes(start[:8], "little")
            if what := _other_content(start):
                raise WeightsError(f"{path}: is no safetensors file but {what}")
            if size < 8 or length > size - 8:
                claim = f"its header claims {length:,} bytes" if size >= 8 else "a header needs 8"
                raise WeightsError(
                    f"{path}: truncated or no safetensors file: it has {size:,} bytes and {claim}: get "
                    "it again"
                )
            if length > _HEADER_LIMIT:
                raise WeightsError(
                    f"{path}: its header has {length:,} bytes, at most {_HEADER_LIMIT:,} are read: the "
                    "file is damaged"
                )
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot be read ({error.strerror}): check the path and its permissions"
        ) from error
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise ValueError(f"it is a {type(header).__name__}, not an object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ must map strings to strings")
        "".join((*header, *metadata, *metadata.values())).encode()  # half characters could not be printed
        return Header(path, _checked_tensors(header, size - 8 - length), metadata, 8 + length)
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path}: its safetensors header is damaged: {first_line(error)}: get the file again"
        ) from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{repeated[:200]!r} stands there more than once")
    return content


def _checked_tensors(header: dict[str, Any], data_bytes: int) -> dict[str, TensorInfo]:
    """The tensors of a parsed header in the order of their data; raise `ValueError` for the first false
    claim.
    """
    spans = []
    for name, entry in header.items():
        shown = repr(name[:200])
        try:
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"the entry {shown} lacks dtype, shape or two data_offsets") from error
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise ValueError(f"{shown} has the unknown dtype {str(dtype)[:20]!r}")
        if (
            not isinstance(shape, list)
            or len(shape) > _MAX_DIMENSIONS
            or not all(_is_count(extent) for extent in shape)
        ):
            raise ValueError(f"{shown} has no valid shape")
        if not (_is_count(start) and _is_count(stop) and start <= stop <= data_bytes):
            raise ValueError(
                f"{shown} lies outside the file (bytes {repr(start)[:20]} to {repr(stop)[:20]} of "
                f"{data_bytes})"
            )
        if 8 * (stop - start) != (bits := math.prod(shape) * _BITS[dtype]):
            raise ValueError(f"{shown} has {stop - start} bytes, but {dtype} {shape} needs {bits / 8:g}")
        spans.append((start, stop, name, TensorInfo(dtype, tuple(shape), stop - start)))
    spans.sort(key=lambda span: span[:3])
    end = 0
    for start, stop, name, _ in spans:
        if start != end:
            raise ValueError(
                f"the data of {name[:200]!r} {'overlaps other data' if start < end else 'follows a gap'}"
            )
        end = stop
    if end != data_bytes:
        raise ValueError(f"{data_bytes - end} bytes at the end of the file belong to no tensor")
    return {name: info for _, _, name, info in spans}


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _other_content(start: bytes) -> str | None:
    """What a file that begins with these bytes is, where it is well known and no safetensors file; with the
    remedy.
    """
    text = start.lstrip().lower()
    if not start:
        return "empty: get it again"
    if start[8:9] == b"{":  # a safetensors header; its length may begin like anything
        return None
    if start.startswith(b"PK\x03\x04"):
        return "a zip archive, probably a pickled checkpoint: rename it to .ckpt, or get the safetensors file"
    if start[0] == 0x80 and start[1:2] <= b"\x05":
        return "a Python pickle: it is not opened; get the safetensors file"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, such as a login or error page saved in the file's place: get it again"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: run `git lfs pull` where it was cloned, or get the file itself"
    if start.startswith(b"GGUF"):
        return "a GGUF file: get the safetensors file"
    return None


def load_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a weight file on the CPU, all or those called `names`, in the dtype they are stored in.

    `.safetensors` files and, by their suffix, torch's zip archives (`.ckpt`, `.pt`, `.pth`, `.bin`), whose
    nested `state_dict` is unwrapped and whose entries that are no tensors are left out. The tensors may be
    mapped from the file and are then read when used. Raises `WeightsError` for damage, for a name that is not
    there, and for a pickle that asks for anything but tensors; nothing of it is executed.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        state = _load_archive(path)
        wanted = list(state) if names is None else list(names)
        _require_names(wanted, state, path)
        return {name: state[name] for name in wanted}
    header = read_header(path)
    wanted = list(header.tensors) if names is None else list(names)
    _require_names(wanted, header.tensors, path)
    if packed := [name for name in wanted if header.tensors[name].dtype in _UNREADABLE]:
        raise WeightsError(
            f"{path}: {packed[0][:200]!r} is stored as {header.tensors[packed[0]].dtype}, which cannot "
            "be read: get the fp16 file"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError, AttributeError, RuntimeError) as error:
        raise WeightsError(f"{path}: cannot be read ({first_line(error)}): get the file again") from error


def _require_names(wanted: Iterable[str], found: Mapping[str, object], path: Path) -> None:
    if missing := [name for name in wanted if name not in found]:
        raise WeightsError(
            f"{path}: lacks {len(missing)} of the tensors asked for, the first is {missing[0][:200]!r}"
        )


def _load_archive(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a torch zip archive, mapped from the file."""
    size = _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler raises anything on damaged input
        raise WeightsError(
            f"{path}: cannot be read as weights ({first_line(error)}): get it again as safetensors"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    tensors = (
        {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        if isinstance(state, dict)
        else {}
    )
    if not tensors:
        inside = (
            ", ".join(str(key)[:40] for key in list(content)[:5])
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise WeightsError(
            f"{path}: holds no weights by name, but {inside or 'nothing'}: give a checkpoint or an adapter"
        )
    total = 0
    for name, tensor in tensors.items():
        total += tensor.nbytes
        held = (
            tensor.untyped_storage().nbytes()
            if tensor.layout == torch.strided and tensor.device.type == "cpu"
            else -1
        )
        if not isinstance(name, str) or tensor.nbytes > held or total > 2 * size:
            raise WeightsError(
                f"{path}: {str(name)[:200]!r} claims more data than the file holds: it is damaged or "
                "was made to do harm"
            )
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _check_archive(path: Path) -> int:
    """The size of a torch zip archive in bytes; raise `WeightsError` unless its pickle asks for tensors
    alone.

    The pickle is read as a list of instructions here, not run.
    """
    try:
        size = require_regular(path, WeightsError).st_size
        with open_regular(path, WeightsError) as file:
            start = file.read(512)
        if not start.startswith(b"PK\x03\x04"):
            what = _other_content(start) or "something unknown: get it again"
            raise WeightsError(f"{path}: is no torch archive but {what}")
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if (
                any(member.compress_type != zipfile.ZIP_STORED for member in members)
                or sum(m.file_size for m in members) > size
            ):
                raise WeightsError(
                    f"{path}: is compressed or claims more data than it holds, which torch never "
                    "writes: convert it first"
                )
            pickles = [member for member in members if member.filename.endswith("data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _PICKLE_LIMIT:
                raise WeightsError(
                    f"{path}: is a zip archive without a list of tensors that could be read: give a "
                    "file of torch.save"
                )
            instructions = archive.read(pickles[0])
        wanted = {
            _NEEDS[code.name] or str(argument)
            for code, argument, _ in pickletools.genops(instructions)
            if code.name in _NEEDS
        }
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot be read ({error.strerror}): check the path and its permissions"
        ) from error
    except (ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise WeightsError(f"{path}: damaged ({first_line(error)}): get it again") from error
    if unknown := sorted(name for name in wanted if not _TENSOR_GLOBALS.fullmatch(name)):
        named = ", ".join(name.replace(" ", ".")[:80] if name != _HIDDEN else name for name in unknown[:3])
        raise WeightsError(
            f"{path}: the pickle asks for {named}, which is more than weights and could run code; "
            "nothing was run: convert it to safetensors with a tool you trust, or get the safetensors "
            "file"
        )
    return size


def count_not_finite(tensor: torch.Tensor) -> int:
    """How many values of a tensor of any dtype are NaN or infinite."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # torch tests no 8-bit floats
    return int((~values.isfinite()).sum())


def require_finite(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise `WeightsError` that names the first tensor with NaN or infinity, and how many values are such."""
    for name, tensor in tensors.items():
        if count := count_not_finite(tensor):
            raise WeightsError(
                f"{path}: {name[:200]!r} has {count:,} of {tensor.numel():,} values that are NaN or "
                "infinite: get the file again"
            )


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; the same tensors and metadata give the same bytes.

    Tensors on any device, of any strides; tensors that share memory are written each in full. Raises
    `StorageError`.
    """
    seen: set[int] = set()
    contiguous = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        shared = flat.untyped_storage().data_ptr() in seen
        seen.add(flat.untyped_storage().data_ptr())
        contiguous[name] = flat.clone() if shared else flat
    with atomic_path(path) as partial:
        safetensors.torch.save_file(contiguous, partial, metadata=dict(metadata))
        _sort_header(partial)


def save_sealed(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """As `save_tensors`, with a digest of all it holds, against which `load_sealed` reads it."""
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(path, own, {**metadata, _DIGEST_KEY: _content_digest(own, metadata)})


def load_sealed(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors, mapped from the file, and metadata that `save_sealed` wrote, to the last bit.

    A file without a digest, as 0.1.0 wrote it, passes if it is whole. Raises `WeightsError` for damage.
    """
    metadata, tensors = read_header(path).metadata, load_tensors(path)
    sealed = metadata.pop(_DIGEST_KEY, None)
    if sealed is not None and sealed != _content_digest(tensors, metadata):
        raise WeightsError(f"{path}: its content is not what was written (another digest)")
    return tensors, metadata


def _content_digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over metadata and contiguous tensors on the CPU, whatever their order."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sort_header(path: Path) -> None:
    """Write the metadata of a safetensors file in sorted order: the library's own order changes from call to
    call.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length  # the same content in another order, then padding
        file.seek(8)
        file.write(text.ljust(length))
