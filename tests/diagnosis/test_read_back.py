"""Files for other programs against the adapter that was trained."""

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.files import load_adapter, save_adapter
from lorascope.adapters.modules import LoraModule
from lorascope.config import load_study
from lorascope.diagnosis.read_back import read_back, relative_error
from lorascope.run_folder import RunDir
from random_adapters import random_full, random_loha, random_lokr


def random_module(seed: int, kernel: int = 1) -> LoraModule:
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 12, kernel, kernel) if kernel > 1 else (4, 12)
    up = torch.randn(10, 4, generator=generator)
    down = torch.randn(shape, generator=generator)
    return LoraModule(down, up[:, :, None, None] if kernel > 1 else up, 8.0)


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_error_is_that_of_the_dense_updates(kernel: int) -> None:
    one, two = random_module(0, kernel), random_module(1, kernel)
    updates = [item.update().double() for item in (one, two)]
    expected = float((updates[0] - updates[1]).norm() / updates[0].norm())
    # `update` multiplies in fp32: 6e-8 * sqrt(4) terms
    assert relative_error(one, two) == pytest.approx(expected, rel=1e-6)
    # in float64, of parts that cancel: 1e-16 times their number
    assert relative_error(one, one) < 1e-13


def test_the_error_of_other_kinds_is_that_of_the_updates_and_biases() -> None:
    draw = torch.Generator().manual_seed(0)
    for one, two in (
        (random_loha((10, 12), 2, 1.0, draw), random_loha((10, 12), 3, 1.0, draw)),
        (random_lokr((10, 12), 1, 1.0, draw), random_lokr((10, 12), None, 1.0, draw)),
        (random_full((10, 12), draw, bias=False), random_loha((10, 12), 2, 1.0, draw)),
    ):
        updates = [item.update().double().flatten() for item in (one, two)]
        expected = float((updates[0] - updates[1]).norm() / updates[0].norm())
        assert relative_error(one, two) == pytest.approx(expected) and relative_error(one, one) == 0
    full = random_full((10, 12), draw)
    assert relative_error(full, dataclasses.replace(full, bias=None)) == math.inf
    assert relative_error(full, random_full((10, 13), draw)) == math.inf
    assert full.bias is not None
    shifted = dataclasses.replace(full, bias=full.bias + 1)
    size = float(torch.cat([full.weight.flatten(), full.bias]).norm())
    assert relative_error(full, shifted) == pytest.approx(10**0.5 / size)


def test_loha_in_half_precision_is_the_arms(study_file: Path, finished: Path, tmp_path: Path) -> None:
    """Four factors are rounded, and are still told from another strength."""
    run = RunDir(Path(shutil.copytree(finished, tmp_path / "run")))
    config = load_study(study_file, environment={})
    arm = config.expand_arms()[0]
    path = "unet.mid_block.attentions.0.proj_in"
    draw = torch.Generator().manual_seed(0)
    adapter = Adapter({path: random_loha((32, 32, 1, 1), 4, 2.0, draw)}, "bank", {})
    file = run.adapters_dir / arm.name / f"tiny-{arm.name}.safetensors"
    save_adapter(adapter, file, "kohya", "fp16")
    assert read_back(run, config, arm, adapter)[0] is True
    save_adapter(adapter.at_strength(0.9), file, "kohya", "fp16")
    assert read_back(run, config, arm, adapter)[0] is False


def test_updates_that_are_0_or_of_another_shape() -> None:
    one = random_module(0)
    zero = dataclasses.replace(one, up=torch.zeros_like(one.up))
    assert relative_error(zero, zero) == 0 and relative_error(zero, one) == math.inf
    assert relative_error(one, random_module(0, kernel=3)) == math.inf
    assert relative_error(one, dataclasses.replace(one, alpha=16.0)) == pytest.approx(1.0)


def test_a_file_that_is_not_the_arms_is_told(study_file: Path, finished: Path, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(finished, tmp_path / "run")))
    config = load_study(study_file, environment={})
    arm = config.expand_arms()[0]
    folder = run.adapters_dir / arm.name
    adapter = load_adapter(folder)
    is_right, said = read_back(run, config, arm, adapter)
    assert is_right and "updates differ by at most" in said
    path = folder / f"tiny-{arm.name}.safetensors"
    doubled = {
        name: dataclasses.replace(module, alpha=2 * module.effective_alpha)
        for name, module in adapter.modules.items()
    }
    save_adapter(dataclasses.replace(adapter, modules=doubled), path, "kohya", "fp16", {})
    assert read_back(run, config, arm, adapter)[0] is False
    few = dict(list(adapter.modules.items())[1:])
    save_adapter(dataclasses.replace(adapter, modules=few), path, "kohya", "fp16", {})
    assert read_back(run, config, arm, adapter) == (
        False,
        f"{path.name}: 1 layers differ, the first is {next(iter(adapter.modules))}",
    )
    path.write_bytes(path.read_bytes()[:100])
    assert read_back(run, config, arm, adapter)[0] is False
    path.unlink()
    assert read_back(run, config, arm, adapter) == (None, "the arm has no file for other programs")
