"""Speed of a device: the rate of a matrix product is one, and calls are timed one by one."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorascope.machine.speed import matmul_flops, timed

CPU = torch.device("cpu")


def test_the_rate_is_that_of_a_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorascope.machine.speed._SIDE", {"cpu": 256})
    assert 1e8 < matmul_flops(CPU, torch.float32) < 1e14


def test_a_slow_product_is_timed_on_smaller_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = []

    def slow(step: Callable[[], Any], count: int, device: torch.device) -> list[float]:
        sides.append(len(step()))
        return [1e-9 * sides[-1] ** 3]  # 17 ms at 256, 134 ms at 512

    monkeypatch.setattr("lorascope.machine.speed.timed", slow)
    assert matmul_flops(CPU, torch.float32, repeats=2) == pytest.approx(2e9)
    assert set(sides) == {256, 512}


def test_each_call_is_timed() -> None:
    pauses = iter([0.01, 0.03])
    short, long = timed(lambda: time.sleep(next(pauses)), 2, CPU)
    assert 0.01 <= short < long
