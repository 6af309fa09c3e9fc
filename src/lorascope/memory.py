"""Memory of a device: what is free, and when it has run out."""

import os

import torch

_CPU_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "could not create a primitive",  # all that torch passes on of oneDNN's failed allocation
)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: on a GPU those of its memory, on a CPU those of the machine that are available."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch has a type of its own for GPUs, and only a message for CPUs."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _CPU_MESSAGES)
