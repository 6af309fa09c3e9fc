"""Adapters edited after training: of one rank, ready for a bank, with groups' ranks kept by a cut."""

import pytest
import torch

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.bank import AdapterBank
from lorascope.adapters.lowrank import Target as CutTarget
from lorascope.adapters.lowrank import resize
from lorascope.adapters.modules import Module
from lorascope.adapters.targets import Target, resolve_section
from lorascope.arms import Arm
from lorascope.base.loading import Base
from lorascope.diagnosis.edits import arm_of, edit_adapters
from lorascope.diagnosis.weights import scale_intruders
from lorascope.errors import AdapterError
from lorascope.evaluation.sweep_rows import SCALED_INTRUDERS, cut_to
from lorascope.sections import AdapterSection
from random_adapters import random_full

ARM = Arm(name="r6", rank=6, alpha=12.0, lr=1e-3, seed=0)


@pytest.fixture
def targets(base: Base) -> list[Target]:
    """Linear layers and a convolution of the U-Net, and the text encoder's with a rank and alpha of its
    own.
    """
    text = {"component": "text_encoder", "targets": ["q_proj"], "rank": 4, "alpha": 2.0}
    section = AdapterSection.model_validate({"targets": ["to_q", "conv1"], "groups": [text]})
    return resolve_section(base.components, section)


@pytest.fixture
def adapter(base: Base, targets: list[Target]) -> Adapter:
    bank = AdapterBank(base.components, targets, [ARM])
    for layer in bank.layers.values():
        layer.up.detach().normal_(std=0.4, generator=torch.Generator().manual_seed(0))
    return bank.adapter(0)


def assert_same_updates(adapter: Adapter, expected: Adapter) -> None:
    assert set(adapter.modules) == set(expected.modules)
    for path, module in adapter.modules.items():
        torch.testing.assert_close(module.update(), expected.modules[path].update(), rtol=1e-4, atol=1e-6)


def test_scaled_intruders_go_into_a_bank_with_one_rank_and_scale(
    base: Base, targets: list[Target], adapter: Adapter
) -> None:
    edited = edit_adapters(base.components, targets, {"r6": adapter}, SCALED_INTRUDERS)["r6"]
    assert {(module.rank, module.scale) for module in edited.modules.values()} == {(16, 1.0)}
    scaled = scale_intruders(base.components, {"r6": adapter})["r6"]
    assert_same_updates(edited, scaled)
    assert any(
        not torch.equal(edited.modules[path].update(), adapter.modules[path].update())
        for path in adapter.modules
    )
    plain = [Target(item.component, item.path, item.down_shape, item.out_features) for item in targets]
    bank = AdapterBank(base.components, plain, [arm_of("r6", edited)])
    bank.load(0, edited)
    assert_same_updates(bank.adapter(0), edited)


def test_a_cut_leaves_layers_whose_group_sets_the_rank(
    base: Base, targets: list[Target], adapter: Adapter
) -> None:
    edited = edit_adapters(base.components, targets, {"r6": adapter}, cut_to(2))["r6"]
    assert {module.rank for module in edited.modules.values()} == {4}  # filled up to the group's
    of_unet = {path: item for path, item in adapter.modules.items() if path.startswith("unet.")}
    cut = resize(Adapter(of_unet, "bank", {}), CutTarget(rank=2)).adapter
    assert_same_updates(edited, Adapter(adapter.modules | cut.modules, "bank", {}))
    assert all(torch.linalg.matrix_rank(edited.modules[path].update().flatten(1)) == 2 for path in of_unet)


def test_other_kinds_are_cut_to_lora(base: Base, targets: list[Target], adapter: Adapter) -> None:
    """Norms, whose weights have no rank, are left out; intruders of LoRA alone are scaled."""
    generator = torch.Generator().manual_seed(0)
    part = [item for item in targets if item.component == "unet"]
    shapes = {item.name_in_files: (item.out_features, *item.down_shape) for item in part}
    modules: dict[str, Module] = {path: random_full(shape, generator) for path, shape in shapes.items()}
    norm = {"unet.down_blocks.0.resnets.0.norm1": random_full((16,), generator)}
    full = Adapter({**norm, **modules}, "bank", {})
    edited = edit_adapters(base.components, part, {"full": full}, cut_to(3))["full"]
    assert {(module.kind, module.rank, module.scale) for module in edited.modules.values()} == {
        ("lora", 3, 1.0)
    }
    assert_same_updates(edited, resize(Adapter(modules, "bank", {}), CutTarget(rank=3)).adapter)
    with pytest.raises(
        AdapterError, match="is a full difference, not a product of two factors: only LoRA can"
    ):
        edit_adapters(base.components, part, {"full": full}, SCALED_INTRUDERS)
    with pytest.raises(
        AdapterError, match="is a full difference, not a product of two factors: only LoRA can"
    ):
        edit_adapters(
            base.components, [], {"full": Adapter({**adapter.modules, **modules}, "", {})}, cut_to(3)
        )


def test_weights_that_are_no_edit_are_refused(base: Base, targets: list[Target], adapter: Adapter) -> None:
    with pytest.raises(ValueError, match="weights = 'trained': must be 'scaled intruders' or cut to a rank"):
        edit_adapters(base.components, targets, {"r6": adapter}, "trained")
