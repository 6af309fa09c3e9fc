"""Memory told wrong and workers that see the wrong GPUs are found."""

from collections.abc import Callable, Mapping

import pytest
import torch

from lorascope.doctor import resources
from lorascope.doctor.resources import check_memory, check_workers
from lorascope.machine.memory import free_bytes, used_bytes

CPU = torch.device("cpu")


@pytest.mark.figures
def test_free_memory_is_told_right_here() -> None:
    assert check_memory(CPU).status == "ok"


@pytest.mark.parametrize(
    ("free", "used"),
    [
        (lambda device: 2**34, used_bytes),  # does not move
        (lambda device: 10 * free_bytes(device), used_bytes),
        (free_bytes, lambda device: 2**30),
    ],
)
def test_memory_told_wrong_is_found(
    free: Callable[[torch.device], int], used: Callable[[torch.device], int]
) -> None:
    assert check_memory(CPU, free, used).status == "wrong"


def test_memory_that_cannot_be_allocated_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_ALLOCATED_ON_CPU", 2**60)
    monkeypatch.setattr(resources, "_MEMORY_BLOCK", 2**60)
    finding = check_memory(CPU)
    assert finding.status == "wrong" and "cannot be allocated" in finding.told


def seen(*by_worker: list[str]) -> Callable[[Mapping[str, str]], list[str]]:
    return lambda environment: by_worker[int(environment["CUDA_VISIBLE_DEVICES"])]


@pytest.mark.parametrize(
    ("by_worker", "status"),
    [
        ([["A"], ["B"]], "ok"),
        ([["A"], ["A"]], "wrong"),
        ([["A", "B"], ["A", "B"]], "wrong"),
        ([["A"], []], "wrong"),
    ],
)
def test_workers_see_a_gpu_each(
    monkeypatch: pytest.MonkeyPatch, by_worker: list[list[str]], status: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert check_workers(2, seen(*by_worker)).status == status


def test_a_process_without_gpus_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resources.gpus_seen({"CUDA_VISIBLE_DEVICES": "-1"}) == []
    assert check_workers(1).status == check_workers(0).status == "not checked"
