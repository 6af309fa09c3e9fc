"""Speed of a device: the rate of a matrix product is one, and calls are timed one by one."""

import time

import pytest
import torch

from lorascope.machine.speed import matmul_flops, timed

CPU = torch.device("cpu")


def test_the_rate_is_that_of_a_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorascope.machine.speed._SIDE", {"cpu": 256})
    assert 1e8 < matmul_flops(CPU, torch.float32) < 1e14


def test_each_call_is_timed() -> None:
    pauses = iter([0.01, 0.03])
    short, long = timed(lambda: time.sleep(next(pauses)), 2, CPU)
    assert 0.01 <= short < long
