"""A pretended CUDA device for a CPU build of torch, to run the CUDA paths where no GPU is.

Its tensors say `cuda:0` and keep their values in CPU tensors. It refuses what a GPU refuses (devices mixed,
device tensors pinned or read by NumPy, what a recording forbids), notes what makes the host wait and which
line did it, rounds convolutions to TF32 where torch allows that, and records graphs and replays them on the
same buffers. It shows nothing of kernels, speed, real memory or races between streams.

`guard.load`, then `install`, before any work on tensors; a process that has it installed has it for good.
"""

import functools
import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import lorascope

_PACKAGE = Path(lorascope.__file__).parent
DEVICE = torch.device("cuda", 0)
TF32_MASK = ~0x1FFF  # of the 23 bits of a float32's mantissa TF32 keeps 10

_READ_BY_HOST = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
    "aten::masked_select",
    "aten::_unique2",
    "aten::is_nonzero",
}
_INDEXED = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"}  # which take indices of the CPU
_CONVOLUTIONS = {"aten::convolution", "aten::convolution_backward"}
# Half precision adds up in float32 on tensor cores; on this CPU it would take very long besides.
_ADDS_IN_FP32 = _CONVOLUTIONS | {
    "aten::mm",
    "aten::bmm",
    "aten::addmm",
    "aten::baddbmm",
    "aten::baddbmm_",
    "aten::native_group_norm",
    "aten::native_group_norm_backward",
}


class Event(NamedTuple):
    """Something that the host did with the device besides giving it work."""

    kind: str  # `copy to device`, `copy to host`: both wait; `async copy`; `read`: waits; `wait`: asked for
    operation: str
    place: str  # the package's line, `step.py:81 Step.begin`

    @property
    def waits(self) -> bool:
        """Whether the host stands still until the device has done all that it was given."""
        return self.kind != "async copy"


EVENTS: list[Event] = []
_PINNED: set[int] = set()  # addresses of storages
_TAPE: list[Callable[[], None]] | None = None  # of the graph that is being recorded
_RECORDING_THREAD: threading.Thread | None = None


def install(free_bytes: int = 8 * 2**30) -> None:
    """Have a GPU with so many bytes from here on; `guard.load` comes before."""
    importlib.import_module("torch._dynamo")  # looks at CUDA when first imported
    _replace_cuda(free_bytes)
    torch.inference_mode = torch.no_grad  # wrapped tensors cannot enter it
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    _Everything().__enter__()


# -- tensors -------------------------------------------------------------------------------------------------


class DeviceTensor(torch.Tensor):
    """A tensor on the device; `inner` holds its values."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "DeviceTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )
        tensor.inner = inner.detach()
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copy: Any = DeviceTensor(self.inner.clone())
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        _note("read", "tolist")
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: "DeviceTensor") -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner


class _Everything(TorchDispatchMode):
    """Sees every operation, also those without a device tensor among their arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _dispatch(func, args, kwargs)


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether torch puts this operation together of others."""
    is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return is_composite and func._schema.name not in ("aten::pin_memory", "aten::is_pinned")


# -- operations ----------------------------------------------------------------------------------------------


def _dispatch(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Do an operation as a GPU would."""
    name = func._schema.name
    tensors = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_device = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
    asked = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    match name:
        case "aten::_pin_memory" | "aten::pin_memory":
            return _pinned(args[0])
        case "aten::is_pinned":
            return not on_device and args[0].untyped_storage().data_ptr() in _PINNED
        case "aten::_fused_sdp_choice":
            return 0  # the plain formula
        case "aten::_to_copy" if on_device != (asked == "cuda") and asked is not None:
            return _moved(func, args[0], kwargs)
        case "aten::copy_":
            return _copied(func, args, kwargs)
    if not on_device and asked != "cuda":
        return _on_host(func, args, kwargs)
    _check_devices(func, tensors, args)
    return _on_device(func, args, kwargs)


def _on_host(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    pins = kwargs.get("pin_memory")
    result = func(*args, **({**kwargs, "pin_memory": False} if pins else kwargs))
    if pins:
        _PINNED.add(result.untyped_storage().data_ptr())
    return result


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, DeviceTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    copy = tensor.clone()
    _PINNED.add(copy.untyped_storage().data_ptr())
    return copy


def _moved(func: Any, source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """A copy on the other device."""
    kept = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    if isinstance(source, DeviceTensor):
        _note("async copy" if kwargs.get("non_blocking") else "copy to host", func)
        return func(source.inner, **kept)
    _note_upload(func, source, bool(kwargs.get("non_blocking")))
    return DeviceTensor(func(source, **kept))


def _copied(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """`copy_` within a device or from one to the other."""
    target, source = args[:2]
    non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    if isinstance(target, DeviceTensor) and not isinstance(source, DeviceTensor):
        _note_upload(func, source, non_blocking)
    elif isinstance(source, DeviceTensor) and not isinstance(target, DeviceTensor):
        _note("async copy" if non_blocking else "copy to host", func)
    inner_target, inner_source = _inner(target), _inner(source)
    inner_target.copy_(inner_source)
    if _TAPE is not None:
        _TAPE.append(lambda: inner_target.copy_(inner_source))
    return target


def _note_upload(func: Any, source: torch.Tensor, non_blocking: bool) -> None:
    """A copy from pageable memory waits, whatever it was asked."""
    is_pinned = source.untyped_storage().data_ptr() in _PINNED
    _note("async copy" if non_blocking and is_pinned else "copy to device", func)


def _check_devices(func: Any, tensors: Sequence[torch.Tensor], args: Sequence[Any]) -> None:
    """Raise where tensors of both devices meet, and note what is read by the host."""
    name = func._schema.name
    strangers = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.dim() > 0]
    if name.endswith("_like"):  # takes only the shape of its argument
        return
    if strangers and name not in _INDEXED:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({func})"
        )
    if strangers:
        _note("copy to device", func)  # of the indices
    indices = _leaves(args[1]) if name in _INDEXED else []
    by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
    if name in _READ_BY_HOST or by_mask:
        _note("read", func)


def _on_device(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Compute on the inner tensors, and write it on the tape of a recording."""
    inner_args, inner_kwargs = _mapped(_inner, list(args)), _mapped(_inner, dict(kwargs))
    inner_kwargs |= {"device": torch.device("cpu")} if inner_kwargs.get("device") is not None else {}
    result = _computed(func, inner_args, inner_kwargs)
    is_view, is_written = _aliases(func)
    if _TAPE is not None and not is_view:
        _TAPE.append(lambda: _compute_into(func, inner_args, inner_kwargs, result))
    if not is_written:
        return _mapped(_outer, result)
    leaves = zip(_leaves((args, kwargs)), _leaves((inner_args, inner_kwargs)), strict=True)
    written = {id(inner): outer for outer, inner in leaves if isinstance(outer, DeviceTensor)}
    return _mapped(lambda value: written.get(id(value), value), result)


@functools.cache
def _aliases(func: Any) -> tuple[bool, bool]:
    """Whether an operation returns views of its arguments, and whether it returns what it wrote to."""
    writes = [item.alias_info.is_write for item in func._schema.returns if item.alias_info is not None]
    return not all(writes), any(writes)


def _compute_into(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
    """Compute again, to where the recording's result lies."""
    again = _computed(func, args, kwargs)
    for old, new in zip(_leaves(result), _leaves(again), strict=True):
        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)


def _computed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The operation with the device's rounding."""
    name = func._schema.name
    if name not in _ADDS_IN_FP32:
        return func(*args, **kwargs)
    dtype = next(leaf.dtype for leaf in _leaves(args) if isinstance(leaf, torch.Tensor))
    if name in _CONVOLUTIONS and dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        args = _mapped(_to_tf32, list(args))
    if dtype not in (torch.float16, torch.bfloat16):
        return func(*args, **kwargs)
    wide = _mapped(lambda leaf: leaf.float() if _is(leaf, dtype) else leaf, list(args))
    result = func(*wide, **kwargs)
    if name.endswith("_"):
        return args[0].copy_(result)
    return _mapped(lambda leaf: leaf.to(dtype) if _is(leaf, torch.float32) else leaf, result)


def _is(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == dtype


def _to_tf32(value: Any) -> Any:
    return (
        (value.contiguous().view(torch.int32) & TF32_MASK).view(torch.float32)
        if _is(value, torch.float32)
        else value
    )


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The same nest of lists, tuples and dicts with `function` of what lies in it; torch's own takes as long
    as the whole study.
    """
    if isinstance(value, list | tuple):
        return type(value)(
            [_mapped(function, item) if isinstance(item, _NESTS) else function(item) for item in value]
        )
    if isinstance(value, dict):
        return {key: _mapped(function, item) for key, item in value.items()}
    return function(value)


_NESTS = (list, tuple, dict)


def _leaves(value: Any) -> list[Any]:
    """What lies in a nest of lists, tuples and dicts."""
    if not isinstance(value, _NESTS):
        return [value]
    leaves: list[Any] = []
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, _NESTS):
            leaves += _leaves(item)
        else:
            leaves.append(item)
    return leaves


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, DeviceTensor) else value


def _outer(value: Any) -> Any:
    return DeviceTensor(value) if isinstance(value, torch.Tensor) else value


def _note(kind: str, operation: Any) -> None:
    """Note an event, and refuse it while a graph is recorded by this thread."""
    event = Event(kind, str(operation), _place())
    EVENTS.append(event)
    if _TAPE is not None and threading.current_thread() is _RECORDING_THREAD and event.waits:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({event})")


def _place() -> str:
    """The innermost line of the package under way."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            return f"{path.name}:{frame.f_lineno} {frame.f_code.co_qualname.partition('.<locals>')[0]}"
        frame = frame.f_back
    return "elsewhere"


# -- torch.cuda ----------------------------------------------------------------------------------------------


class _Stream:
    device = DEVICE

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def wait_stream(self, other: "_Stream") -> None: ...

    def synchronize(self) -> None:
        _note("wait", "Stream.synchronize")


class _CudaEvent:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None:
        _note("wait", "Event.synchronize")

    def elapsed_time(self, other: "_CudaEvent") -> float:
        return 1.0


class Graph:
    """Takes the place of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.tape: list[Callable[[], None]] = []

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def reset(self) -> None:
        self.tape = []

    def replay(self) -> None:
        """Do again what was recorded, reading and writing where it lay then."""
        with _disable_current_modes(), torch.no_grad():
            for operation in self.tape:
                operation()


class _Recording:
    """Takes the place of `torch.cuda.graph`."""

    def __init__(self, graph: Graph, **_: Any) -> None:
        self.graph = graph

    def __enter__(self) -> None:
        global _TAPE, _RECORDING_THREAD
        _TAPE, _RECORDING_THREAD = self.graph.tape, threading.current_thread()

    def __exit__(self, *_: Any) -> None:
        global _TAPE
        _TAPE = None


class _HostGenerator(torch.Generator):
    """Draws on the CPU for either device."""

    def __new__(cls, device: Any = "cpu") -> "_HostGenerator":
        return super().__new__(cls, "cpu")

    def __init__(self, *_: Any, **__: Any) -> None: ...


def _replace_cuda(free_bytes: int) -> None:
    properties = {"name": "Pretended GPU", "total_memory": free_bytes, "major": 9, "minor": 0}
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "_lazy_init": None,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "Pretended GPU",
        "get_device_properties": type("Properties", (), {**properties, "multi_processor_count": 132})(),
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "mem_get_info": (free_bytes, free_bytes),
        **dict.fromkeys(("memory_allocated", "memory_reserved"), 2**28),
        **dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), 2**28),
        "reset_peak_memory_stats": None,
        "empty_cache": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    current = _Stream()
    torch.cuda.synchronize = lambda *_: _note("wait", "synchronize")
    torch.cuda.is_current_stream_capturing = lambda: _TAPE is not None
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *_: current
    torch.cuda.stream = lambda stream: stream
    torch.cuda.Stream, torch.cuda.Event = _Stream, _CudaEvent  # type: ignore[misc]
    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, _Recording  # type: ignore[misc]
    torch.Generator = _HostGenerator  # type: ignore[misc]
