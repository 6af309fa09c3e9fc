"""Tuning: the fastest is kept by a margin, remembered, and obeyed by a run folder; tiny models are left
alone.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from conftest import make_study
from lorascope.base.attention import Kernel, Shape
from lorascope.base.configs import read_configs
from lorascope.base.loading import Base
from lorascope.machine.facts import cpu_has_bf16, device_name
from lorascope.machine.fast_paths import ALL_PATHS, FastPaths
from lorascope.sections import BaseSection
from lorascope.training import tuning
from lorascope.training.timing import Workload, build_workload
from lorascope.training.tuning import Tuning, tune, tuning_path

CPU = torch.device("cpu")
POCKET = read_configs(BaseSection())
FOUND = Tuning(
    device_name(CPU),
    "bf16",
    channels_last=True,
    kernels={Shape(64, 64, 4, 32, True): Kernel("plain"), Shape(64, 77, 4, 32, False): Kernel("cudnn", 64)},
    notes=("attention: plain",),
)


def test_tiny_models_are_not_timed(base: Base) -> None:
    """Their differences are noise, so that every test and run of them is in fp32 with torch's attention."""
    found = tune(base.configs["unet"], build_workload(base.configs, 32, 8, 18), CPU)
    assert found.precision == "fp32" and not found.channels_last and not found.kernels
    assert "nothing timed" in found.notes[0]
    assert (
        tune(base.configs["unet"], build_workload(base.configs, 32, 8, 18), CPU, "bf16").precision == "bf16"
    )


def test_the_pocket_base_is_timed_once_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = build_workload(POCKET, 64, 8, 8)
    assert workload == Workload((4, 16, 16), 77, 8, 8)
    found = tune(POCKET["unet"], workload, CPU)
    assert found.precision in (("fp32", "bf16") if cpu_has_bf16() else ("fp32",)) and not found.channels_last
    assert {(shape.queries, shape.keys) for shape in found.kernels} == {
        (n, keys) for n in (256, 64, 16) for keys in (n, 77)
    }
    assert {kernel.name for kernel in found.kernels.values()} <= {"sdpa", "plain"}
    monkeypatch.setattr(tuning, "_measure", None)  # anything that times again fails
    assert tune(POCKET["unet"], workload, CPU) == found
    with pytest.raises(TypeError):
        tune(POCKET["unet"], dataclasses.replace(workload, train_batch=4), CPU)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"\xff", b"[" * 100_000, b'{"KEY": 3}', b'{"KEY": {"attention": [{}]}}']
)
def test_a_damaged_memory_is_timed_anew(base: Base, content: bytes) -> None:
    workload = build_workload(base.configs, 32, 8, 18)
    found = tune(base.configs["unet"], workload, CPU)
    (key,) = json.loads(tuning_path().read_text())
    tuning_path().write_bytes(content.replace(b"KEY", key.encode()))
    assert tune(base.configs["unet"], workload, CPU) == found
    assert key in json.loads(tuning_path().read_text())


def test_a_memory_that_cannot_be_written_stops_nothing(base: Base) -> None:
    tuning_path().parent.parent.mkdir(parents=True, exist_ok=True)
    tuning_path().parent.write_text("a file where the folder should be")
    assert tune(base.configs["unet"], build_workload(base.configs, 32, 8, 18), CPU).precision == "fp32"


def test_the_memory_does_not_grow_without_end(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_MAX_REMEMBERED", 2)
    for batch in (1, 2, 3):
        tune(base.configs["unet"], build_workload(base.configs, 32, batch, 1), CPU)
    assert [entry["key"]["workload"][-2] for entry in json.loads(tuning_path().read_text()).values()] == [
        2,
        3,
    ]


def test_tunings_travel_as_json() -> None:
    assert Tuning.from_json(json.loads(json.dumps(FOUND.to_json()))) == FOUND
    for broken in (
        None,
        [],
        {},
        {**FOUND.to_json(), "precision": "fp8"},
        {**FOUND.to_json(), "attention": [{"queries": "many"}]},
    ):
        with pytest.raises(ValueError, match="no tuning"):
            Tuning.from_json(broken)
    odd = FOUND.to_json()
    odd["attention"][0]["kernel"] = "unknown"
    with pytest.raises(ValueError, match="no tuning"):
        Tuning.from_json(odd)


def test_a_run_folder_keeps_its_choice(base: Base) -> None:
    """All of it on the same device; on another of the kind its precision, so that all arms are trained in
    one.
    """
    workload = build_workload(base.configs, 32, 8, 18)
    assert tune(base.configs["unet"], workload, CPU, kept=FOUND.to_json()) == FOUND
    moved = tune(
        base.configs["unet"], workload, CPU, kept=dataclasses.replace(FOUND, device="another").to_json()
    )
    assert moved.precision == "bf16" and moved.device == FOUND.device and not moved.kernels
    assert (
        tune(base.configs["unet"], workload, CPU, kept={"precision": "bf16"}).precision == "fp32"
    )  # damaged


def test_what_may_not_be_used_is_left_out_of_what_was_found(base: Base) -> None:
    """Of the run folder's choice, and of what an earlier run found on this machine."""
    workload, name = build_workload(base.configs, 32, 8, 18), FOUND.kernels[next(iter(FOUND.kernels))].name
    allowed = FastPaths(barred_kernels=frozenset({name}), channels_last=False)
    found = tune(base.configs["unet"], workload, CPU, kept=FOUND.to_json(), fast_paths=allowed)
    assert name not in {kernel.name for kernel in found.kernels.values()}
    assert (found.precision, found.channels_last, found.barred_kernels) == ("bf16", False, {name})
    assert FOUND.within(ALL_PATHS) == FOUND
    found.apply(base.unet)
    assert {processor.barred for processor in base.unet.attn_processors.values()} == {frozenset({name})}


def test_what_may_not_be_used_is_not_timed(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    workload, timed = build_workload(base.configs, 32, 2, 2), []
    monkeypatch.setattr(tuning, "_LEAST_FLOPS", 0.0)
    monkeypatch.setattr(tuning, "race", lambda runs, device: timed.extend(runs) or dict.fromkeys(runs, 1.0))
    free = tune(base.configs["unet"], workload, CPU, "fp32")
    assert {kernel.name for kernel in free.kernels.values()} == {"sdpa"} and set(timed) == {
        Kernel(),
        Kernel("plain"),
    }
    timed.clear()
    allowed = FastPaths(barred_kernels=frozenset({"sdpa"}))
    plain = tune(base.configs["unet"], workload, CPU, "fp32", fast_paths=allowed)
    assert {kernel.name for kernel in plain.kernels.values()} == {"plain"} and Kernel() not in timed
    assert tune(base.configs["unet"], workload, CPU, "fp32") == free  # each is remembered for itself


def test_another_kernel_must_win_by_a_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 10 % and 0.2 ms in a pass over the U-Net."""
    candidates, shape = [Kernel(), Kernel("plain")], Shape(16, 16, 2, 8, False)

    def chosen(default_s: float, other_s: float) -> tuple[Kernel, float]:
        monkeypatch.setattr(
            tuning, "race", lambda runs, device: dict(zip(runs, (default_s, other_s), strict=True))
        )
        return tuning._fastest_kernel(candidates, shape, 1, 1, torch.float32, CPU)

    assert chosen(0.010, 0.005) == (Kernel("plain"), 2.0)
    assert chosen(0.010, 0.0095)[0] == Kernel()
    assert chosen(0.0002, 0.0001)[0] == Kernel()
    assert chosen(0.005, 0.010) == (Kernel(), 1.0)


def test_what_a_gpu_tries_and_what_is_too_large_for_a_cpu() -> None:
    tried = list(tuning._candidates(Shape(4096, 4096, 8, 40, True), 8, torch.bfloat16, torch.device("cuda")))
    assert tried[0] == Kernel() and {str(kernel) for kernel in tried} == {
        "sdpa", "flash", "flash padded to 64", "efficient", ("efficient padded to "
        "64"), "cudnn", "cudnn padded to 64"
    }  # fmt: skip
    assert list(tuning._candidates(Shape(4096, 4096, 8, 40, True), 8, torch.bfloat16, CPU)) == [Kernel()]
    assert list(tuning._candidates(Shape(64, 64, 8, 40, True), 8, torch.bfloat16, CPU)) == [
        Kernel("plain"),
        Kernel(),
    ]
    assert list(tuning._candidates(Shape(64, 64, 8, 40, False), 8, torch.bfloat16, CPU)) == [
        Kernel(),
        Kernel("plain"),
    ]


def test_a_pass_that_memory_does_not_hold_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tuning, "pass_run", build)
    monkeypatch.setattr(tuning, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(tuning, "_tune_attention", lambda *arguments: ({}, "attention: torch's choice"))
    found = tune(POCKET["unet"], build_workload(POCKET, 64, 8, 8), CPU)
    assert found.precision == "fp32" and found.notes[0] == "bf16: could not be timed"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_timed() -> None:
    found = tune(POCKET["unet"], build_workload(POCKET, 64, 8, 8), torch.device("cuda"))
    assert found.precision in ("bf16", "fp16") and "channels_last" in found.notes[0]
    assert {(shape.queries, shape.keys) for shape in found.kernels} == {
        (n, keys) for n in (256, 64, 16) for keys in (n, 77)
    }


def test_applied_to_a_unet(exact_base: Base) -> None:
    """Memory format and kernels change nothing but rounding."""
    base, generator = exact_base, torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 32, generator=generator)
    x, text = x.double(), text.double()
    with torch.no_grad():
        before = base.unet(x, 500, text).sample
        dataclasses.replace(FOUND, kernels={Shape(64, 64, 2, 8, False): Kernel("plain")}).apply(base.unet)
        assert base.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        after = base.unet(x, 500, text).sample
    assert (after - before).norm() <= 1e-12 * before.norm()  # float64, 2.2e-16 times some for its sums


def test_a_study_resumes_with_the_choice_it_began_with(study_file: Path, tmp_path: Path) -> None:
    study = make_study(study_file, tmp_path / "run")
    assert study.base.unet.dtype == torch.float32
    manifest = study.run_dir.manifest()
    assert Tuning.from_json(manifest["tuning"]) == study.tuning
    study.run_dir.describe(tuning=FOUND.to_json())
    tuning_path().unlink()
    again = make_study(study_file, tmp_path / "run")
    assert again.tuning == FOUND and again.base.unet.dtype == torch.bfloat16
    assert not tuning_path().exists()  # nothing was timed
