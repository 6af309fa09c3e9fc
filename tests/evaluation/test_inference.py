"""Shortcuts for drawing: the same outputs, and the network as it was afterwards."""

import threading

import pytest
import torch

from lorascope.adapters.bank import AdapterBank, Slice
from lorascope.adapters.targets import resolve_targets
from lorascope.arms import Arm
from lorascope.base.loading import Base
from lorascope.evaluation.inference import folded, text_projected_once
from lorascope.sections import REFERENCE_TARGETS

ARMS = [Arm(name=f"r{rank}", rank=rank, alpha=8, lr=1e-3, seed=0) for rank in (4, 8)]
SLICES = [Slice(0, 0.0), Slice(0), Slice(1), Slice(1, 0.5)]


@pytest.fixture
def bank(base: Base) -> AdapterBank:
    bank = AdapterBank(base.components, resolve_targets(base.unet, [*REFERENCE_TARGETS, "conv1"]), ARMS)
    for layer in bank.layers.values():
        layer.up.detach().normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    bank.attach().select(SLICES)
    return bank


def predict(base: Base, text: torch.Tensor, timestep: int = 500) -> torch.Tensor:
    noisy = torch.randn(len(text), 4, 8, 8, generator=torch.Generator().manual_seed(timestep))
    with torch.inference_mode():
        return base.unet(noisy, torch.tensor(timestep), text).sample


def text_of(base: Base, seed: int = 0) -> torch.Tensor:
    return torch.randn(2 * len(SLICES), 77, 32, generator=torch.Generator().manual_seed(seed))


def test_folded_weights_give_what_the_adapters_beside_them_give(base: Base, bank: AdapterBank) -> None:
    text = text_of(base)
    modules, expected = dict(base.unet.named_modules()), predict(base, text)
    with folded(bank, SLICES):
        inside = dict(base.unet.named_modules())
        found = predict(base, text)
    # folding is for fp32: 1.2e-7 * sqrt(300) products summed in another order, through 12 layers, 7e-6
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found[2:4], found[:2])
    path = next(target.path for target in bank.targets if target.path.endswith("attn1.to_q"))
    assert inside[path] is not modules[path]
    assert dict(base.unet.named_modules()) == modules and torch.equal(predict(base, text), expected)


def test_dora_is_folded_too_and_t_lora_is_not(base: Base) -> None:
    dora = [arm.model_copy(update={"kind": "dora"}) for arm in ARMS]
    tlora = [arm.model_copy(update={"kind": "tlora", "min_rank": 2}) for arm in ARMS]
    for arms in ([ARMS[0], dora[1]], [tlora[0], ARMS[1]]):
        bank = AdapterBank(base.components, resolve_targets(base.unet, [*REFERENCE_TARGETS, "conv1"]), arms)
        for layer in bank.layers.values():
            layer.up.detach().normal_(std=0.2, generator=torch.Generator().manual_seed(0))
            if layer.magnitudes is not None:
                layer.magnitudes_of(1).mul_(1.2)
        bank.attach().select(SLICES)
        modules, expected = dict(base.unet.named_modules()), predict(base, text_of(base))
        with folded(bank, SLICES):
            is_folded = dict(base.unet.named_modules()) != modules
            found = predict(base, text_of(base))
        assert is_folded is not bank.is_masked
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)  # as above
        bank.detach()


def test_a_slice_of_strength_zero_keeps_the_bases_own_weights(base: Base, bank: AdapterBank) -> None:
    path = next(target.path for target in bank.targets if target.path.endswith("attn1.to_q"))
    weight = bank.layers[f"unet.{path}"].layer.weight
    with folded(bank, SLICES):
        weights = base.unet.get_submodule(path).weights  # type: ignore[union-attr]
    assert torch.equal(weights[0].mT, weight) and not torch.allclose(weights[1].mT, weight)


def test_weights_too_large_for_the_memory_or_not_in_fp32_are_not_folded(
    base: Base, bank: AdapterBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = dict(base.unet.named_modules())
    with monkeypatch.context() as patch:
        patch.setattr("lorascope.evaluation.inference.free_bytes", lambda device: 1000)
        with folded(bank, SLICES):
            assert dict(base.unet.named_modules()) == modules
    base.unet.to(torch.bfloat16)
    with folded(bank, SLICES):
        assert dict(base.unet.named_modules()) == modules


def test_keys_and_values_of_a_text_are_computed_once_and_the_bits_stay(base: Base, bank: AdapterBank) -> None:
    path = next(name for name, _ in base.unet.named_modules() if name.endswith("attn2.to_k"))
    calls: list[int] = []
    bank.layers[f"unet.{path}"].register_forward_hook(lambda *_: calls.append(1))
    texts = [text_of(base, seed) for seed in (0, 1)]
    expected = [predict(base, text, timestep) for text in texts for timestep in (900, 100)]
    assert len(calls) == 4
    with text_projected_once(bank):
        found = [predict(base, text, timestep) for text in texts for timestep in (900, 100)]
        assert len(calls) == 4 + 2
        other: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: other.append(predict(base, texts[0], 900)))
        thread.start()
        thread.join()
        assert torch.equal(other[0], expected[0]) and torch.equal(predict(base, texts[1], 100), expected[3])
        assert len(calls) == 4 + 3  # the other thread has its own
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert torch.equal(predict(base, texts[0], 900), expected[0]) and len(calls) == 4 + 4
