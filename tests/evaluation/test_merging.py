"""Merged and unmerged adapters draw the same; one merged wrongly does not pass."""

from pathlib import Path

import pytest
import torch

from lorascope.adapters.bank import AdapterBank
from lorascope.adapters.files import save_adapter
from lorascope.adapters.targets import resolve_targets
from lorascope.arms import Arm
from lorascope.base.loading import Base
from lorascope.evaluation.merging import MERGE_TOLERANCE, compare_merged
from lorascope.evaluation.prompts import Prompt
from lorascope.evaluation.sampling import Job, latent_shape_of
from lorascope.sections import REFERENCE_TARGETS, SampleSection

ARMS = [Arm(name=f"r{rank}", rank=rank, alpha=8, lr=1e-3, seed=rank) for rank in (2, 4)]
JOB = Job(Prompt("normal", 0, "a rocket"), 0)


@pytest.fixture
def bank(base: Base) -> AdapterBank:
    bank = AdapterBank(base.components, resolve_targets(base.unet, REFERENCE_TARGETS), ARMS)
    for layer in bank.layers.values():
        layer.up.detach().normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    return bank


def test_each_arm_is_compared_with_its_own_file(base: Base, bank: AdapterBank, tmp_path: Path) -> None:
    folders = {arm.name: tmp_path / arm.name for arm in ARMS}
    for index, folder in enumerate(folders.values()):
        save_adapter(bank.adapter(index), folder, "peft", "fp32")
    before = {name: weight.clone() for name, weight in base.unet.state_dict().items()}
    shape, section = latent_shape_of(base, 32), SampleSection(steps=2)
    results = compare_merged(base, bank, folders, JOB, shape, section)
    assert list(results) == ["r2", "r4"]
    for result in results.values():
        assert result["ok"]
        # fp32: 1.2e-7 * sqrt(300) products, through 12 layers, times guidance 7.5, 5e-5 at most
        assert result["relative_error"] < 1e-4 < MERGE_TOLERANCE == result["tolerance"]
        assert result["mean_pixel_difference"] < 1
    assert all(torch.equal(before[name], weight) for name, weight in base.unet.state_dict().items())
    swapped = dict(zip(folders, reversed(folders.values()), strict=True))
    assert not any(r["ok"] for r in compare_merged(base, bank, swapped, JOB, shape, section).values())


def test_an_arm_whose_pictures_change_with_its_last_bits_is_no_fault_of_its_file(
    base: Base, tmp_path: Path
) -> None:
    """Far from the base a rounding of 1e-7 grows from step to step: merged weights draw another picture."""
    bank = AdapterBank(base.components, resolve_targets(base.unet, REFERENCE_TARGETS), ARMS)
    for layer in bank.layers.values():
        layer.up.detach().normal_(std=1, generator=torch.Generator().manual_seed(0))
    folders = {arm.name: tmp_path / arm.name for arm in ARMS}
    for index, folder in enumerate(folders.values()):
        save_adapter(bank.adapter(index), folder, "peft", "fp32")
    shape, section = latent_shape_of(base, 32), SampleSection(steps=6)
    for result in compare_merged(base, bank, folders, JOB, shape, section).values():
        assert result["ok"] and MERGE_TOLERANCE < result["relative_error"] <= result["tolerance"] <= 0.5
    swapped = dict(zip(folders, reversed(folders.values()), strict=True))
    assert not any(r["ok"] for r in compare_merged(base, bank, swapped, JOB, shape, section).values())
