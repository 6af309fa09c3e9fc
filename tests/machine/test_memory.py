"""What is free, in use and at its peak, and that it ran out."""

import sys
from pathlib import Path

import pytest
import torch

from lorascope.machine import memory
from lorascope.machine.memory import (
    _container_free,
    _machine_free,
    free_bytes,
    is_out_of_memory,
    machine_bytes,
    parked,
    peak_memory,
    reset_peak_memory,
    used_bytes,
)

CPU = torch.device("cpu")
MIB = 2**20


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_free_memory_of_a_cpu_counts_caches_as_free(tmp_path: Path) -> None:
    write(
        tmp_path,
        meminfo="MemTotal:       24684084 kB\nMemFree:         1000000 kB\nMemAvailable:   20000000 kB",
    )
    assert _machine_free(tmp_path / "meminfo") == 20_000_000 * 1024
    assert 100 * MIB < free_bytes(CPU) <= machine_bytes()


def test_a_container_limits_memory_in_version_2(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n")
    root = tmp_path / "fs"
    write(root / "job" / "step", memory__max="max", memory__current=10)
    assert min(_container_free(own, root)) > 2**60
    write(root / "job", memory__max=1000, memory__current=700, memory__stat="anon 400\ninactive_file 250")
    assert min(_container_free(own, root)) == 550
    write(root, memory__max=500, memory__current=100)
    assert min(_container_free(own, root)) == 400, "its own group, mounted at the root"


def test_a_container_limits_memory_in_version_1(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("9:name=systemd:/\n5:cpu,cpuacct:/elsewhere\n4:memory:/docker/abc\n0::/\n")
    root = tmp_path / "fs"
    write(
        root / "memory",
        memory__limit_in_bytes=800,
        memory__usage_in_bytes=300,
        memory__stat="cache 90\ntotal_inactive_file 50",
    )
    assert min(_container_free(own, root)) == 550
    write(root / "memory" / "docker" / "abc", memory__limit_in_bytes=400, memory__usage_in_bytes=200)
    assert min(_container_free(own, root)) == 200
    assert min(_container_free(tmp_path / "missing", root)) > 2**60


@pytest.mark.figures
def test_the_peak_of_a_stage_is_its_own() -> None:
    size = 300 * MIB
    torch.ones(size // 4)
    peak, kind = peak_memory(CPU)
    assert kind == "rss" and peak > size
    reset_peak_memory(CPU)
    before = used_bytes(CPU)
    assert peak_memory(CPU)[0] < before + size // 2, "of what came before nothing is left"
    torch.ones(size // 4)
    assert before + size * 0.9 < peak_memory(CPU)[0] < before + size * 1.1


def test_on_a_cpu_nothing_is_parked() -> None:
    layer = torch.nn.Linear(2, 2)
    place = layer.weight.data_ptr()
    with parked(CPU, layer):
        assert layer.weight.data_ptr() == place


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_parked_modules_leave_the_gpu_and_come_back_unchanged() -> None:
    device = torch.device("cuda")
    layer = torch.nn.Linear(2, 2).to(device)
    weight = layer.weight.detach().clone()
    with pytest.raises(KeyError), parked(device, layer):
        assert layer.weight.device == CPU
        raise KeyError
    assert torch.equal(layer.weight, weight)


def test_an_allocation_that_failed_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("size mismatch"))


@pytest.mark.figures
def test_memory_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows and macOS: the same figures, from psutil."""
    used, free = used_bytes(CPU), free_bytes(CPU)
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    assert used_bytes(CPU) == pytest.approx(used, rel=0.2)
    assert free / 2 < free_bytes(CPU) <= machine_bytes()
    assert machine_bytes() >= peak_memory(CPU)[0] >= used_bytes(CPU) * 0.8 and peak_memory(CPU)[1] == "rss"
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows has none
    assert peak_memory(CPU)[0] == pytest.approx(used_bytes(CPU), rel=0.2)
    reset_peak_memory(CPU)


@pytest.mark.figures
def test_an_apple_gpu_shares_the_machines_memory() -> None:
    assert free_bytes(torch.device("mps")) == pytest.approx(free_bytes(CPU), rel=0.3)
    assert used_bytes(torch.device("mps")) > 100 * MIB
