"""How fast a device is: seconds of calls, and the rate of a large matrix product to hold them against."""

import time
from collections.abc import Callable

import torch

_SIDE = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # of the matrices
_FIRST_SIDE = 256
_LONG_S = 0.05  # of a product, which takes eight times as long at twice the side


def timed(step: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Seconds of each of `count` calls on a CPU; on a GPU, which lags behind the calls, their mean by its own
    clock.
    """
    if device.type == "cuda":
        started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        started.record()
        for _ in range(count):
            step()
        ended.record()
        torch.cuda.synchronize(device)
        return [started.elapsed_time(ended) / 1e3 / count]
    seconds = []
    for _ in range(count):
        begun = time.perf_counter()
        step()
        if device.type == "mps":
            torch.mps.synchronize()
        seconds.append(time.perf_counter() - begun)
    return seconds


def matmul_flops(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> float:
    """FLOP/s of a large square matrix product, the fastest of `repeats`: what this device can do with its
    present threads.

    On a CPU that lacks instructions for `dtype` the matrices are smaller: a large product would take seconds
    there, and a dozen are timed.
    """

    def seconds(side: int, times: int) -> float:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return min(timed(lambda: left @ right, 1, device)[0] for _ in range(times))

    side = _SIDE[device.type]
    if device.type == "cpu":
        side = _FIRST_SIDE
        while side < _SIDE["cpu"] and seconds(side, 2) < _LONG_S:
            side *= 2
    return float(2 * side**3 / seconds(side, repeats + 2))
