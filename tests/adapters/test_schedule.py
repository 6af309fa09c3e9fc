"""T-LoRA: how many components act at a timestep, on what samples, and what its files are refused for."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.bank import AdapterBank, Slice
from lorascope.adapters.files import Layout, load_adapter, save_adapter
from lorascope.adapters.lowrank import Target as CutTarget
from lorascope.adapters.lowrank import resize
from lorascope.adapters.merge import merge_weights
from lorascope.adapters.schedule import SCHEDULE_KEY, RankSchedule, read_schedule
from lorascope.adapters.targets import resolve_section, resolve_targets
from lorascope.arms import Arm
from lorascope.base.loading import Base
from lorascope.errors import AdapterError
from lorascope.sections import REFERENCE_TARGETS, AdapterSection, TargetGroup
from random_adapters import randomize

LORA = Arm(name="lora", rank=4, alpha=8, lr=1e-3, seed=0)
TLORA = Arm(name="tlora", rank=6, alpha=6, lr=1e-3, seed=1, kind="tlora", min_rank=2)
IN_TRAINING = TLORA.model_copy(update={"name": "masked", "mask_when": "training"})
# Of a sum of a few hundred products, through a dozen layers, float64 leaves 1e-13.
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def transcribed(rank: int, least: int, exponent: float, timestep: int) -> int:
    """As the official code has it (ControlGenAI/T-LoRA, trainer_sdxl.py)."""
    return int(np.power((1000 - timestep) / 1000, exponent) * (rank - least)) + least


@pytest.mark.parametrize(
    ("rank", "least", "exponent"), [(64, 32, 1.0), (16, 1, 2.0), (5, 5, 0.5), (7, 3, 1.5)]
)
def test_the_schedule_is_the_papers(rank: int, least: int, exponent: float) -> None:
    table = RankSchedule(rank, least, exponent).table(rank)
    assert table == [transcribed(rank, least, exponent, timestep) for timestep in range(1000)]


def test_the_papers_own_numbers() -> None:
    table = RankSchedule(64, 32).table(64)
    assert [table[timestep] for timestep in (0, 500, 968, 999)] == [64, 48, 33, 32]


def test_a_layer_of_another_rank_has_the_same_share() -> None:
    table = RankSchedule(16, 4).table(8)
    assert (table[0], table[999], RankSchedule(16, 4).table(1)[999]) == (8, 2, 1)


def make_bank(base: Base, arms: list[Arm]) -> AdapterBank:
    section = AdapterSection(targets=REFERENCE_TARGETS, groups=(TargetGroup(targets=("*.conv1",), rank=3),))
    bank = AdapterBank(base.components, resolve_section(base.components, section), arms)
    randomize(bank)
    return bank


def inputs_of(timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    noisy, text = (
        torch.randn(len(timesteps), *shape, dtype=torch.float64, generator=generator)
        for shape in ((4, 8, 8), (77, 32))
    )
    return noisy, timesteps, text


def cut_at(bank: AdapterBank, index: int, timestep: int) -> AdapterBank:
    """A bank of one LoRA that has the components of an arm which act at a timestep, the others zero."""
    arm = bank.arms[index].model_copy(update={"kind": "lora", "min_rank": None})
    alone = AdapterBank(bank.components, bank.targets, [arm])
    for target in bank.targets:
        rank = target.rank(arm)
        least = 2 if rank == 6 else 1  # a third of the rank, as 2 is of 6
        acting = transcribed(rank, least, 1.0, timestep)
        for own, theirs in (("down", (slice(acting),)), ("up", (slice(None), slice(acting)))):
            part = getattr(bank.layers[target.name], own).detach()[index][theirs]
            getattr(alone.layers[target.name], own).detach()[0][theirs] = part
        alone.layers[target.name].down.detach()[0, acting:] = 0
    return alone


TIMES = torch.tensor([0, 999, 480, 250, 999, 3])  # of two samples under each of three arms


def test_each_sample_has_the_components_of_its_timestep(exact_base: Base) -> None:
    bank = make_bank(exact_base, [LORA, TLORA, IN_TRAINING])
    noisy, timesteps, text = inputs_of(TIMES)
    bank.attach()
    bank.at(timesteps, training=True)
    together = exact_base.unet(noisy, timesteps, text).sample
    bank.detach()
    for sample, timestep in enumerate(TIMES.tolist()):
        index = sample // 2
        alone = cut_at(bank, index, timestep) if index else cut_at(bank, 0, 0)
        alone.attach()
        part = slice(sample, sample + 1)
        expected = exact_base.unet(noisy[part], timesteps[part], text[part]).sample
        alone.detach()
        torch.testing.assert_close(together[part], expected, **EXACT)


def test_components_that_do_not_act_have_no_gradient(exact_base: Base) -> None:
    """And the others have that of LoRA with these components alone."""
    bank = make_bank(exact_base, [TLORA])
    timesteps = torch.tensor([999, 999])
    noisy, _, text = inputs_of(timesteps)
    bank.attach()
    bank.at(timesteps, training=True)
    exact_base.unet(noisy, timesteps, text).sample.square().sum().backward()
    bank.detach()
    alone = cut_at(bank, 0, 999)
    alone.attach()
    exact_base.unet(noisy, timesteps, text).sample.square().sum().backward()
    alone.detach()
    for target in bank.targets:
        acting = transcribed(target.rank(TLORA), 2 if target.rank(TLORA) == 6 else 1, 1.0, 999)
        ours, theirs = bank.layers[target.name], alone.layers[target.name]
        assert not ours.down.grad[0, acting:].any() and not ours.up.grad[0, :, acting:].any()
        assert ours.up.grad[0, :, :acting].any()
        # fp32 gradients of float64 products
        torch.testing.assert_close(
            ours.down.grad[0, :acting], theirs.down.grad[0, :acting], rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            ours.up.grad[0, :, :acting], theirs.up.grad[0, :, :acting], rtol=1e-5, atol=1e-6
        )


def test_masked_in_training_alone_draws_with_all_components(exact_base: Base) -> None:
    noisy, timesteps, text = inputs_of(torch.tensor([999, 700]))

    def drawn(arm: Arm) -> torch.Tensor:
        bank = make_bank(exact_base, [arm]).attach()
        bank.select([Slice(0, 0.5)])
        bank.at(timesteps, training=True)
        bank.at(timesteps)
        result: torch.Tensor = exact_base.unet(noisy, timesteps, text).sample.detach()
        bank.detach()
        return result

    plain = TLORA.model_copy(update={"kind": "lora", "min_rank": None})
    assert torch.equal(drawn(IN_TRAINING), drawn(plain))
    assert not torch.allclose(drawn(TLORA), drawn(plain), rtol=1e-3)


@pytest.fixture
def scheduled(base: Base) -> Adapter:
    return make_bank(base, [TLORA]).adapter(0)


def test_the_schedule_is_in_the_file_and_comes_back(base: Base, scheduled: Adapter, tmp_path: Path) -> None:
    written = save_adapter(scheduled, tmp_path / "peft", "peft", "fp32")
    assert "T-LoRA: PEFT reads it as LoRA of the full rank" in written.notes[0]
    with safe_open(tmp_path / "peft" / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()[SCHEDULE_KEY]) == {
            "rank": 6,
            "min_rank": 2,
            "exponent": 1.0,
            "num_timesteps": 1000,
        }
    adapter = load_adapter(tmp_path / "peft")
    assert adapter.schedule == RankSchedule(6, 2)
    make_bank(base, [TLORA]).load(0, adapter)
    for arm in (IN_TRAINING, TLORA.model_copy(update={"min_rank": 3})):
        with pytest.raises(AdapterError, match=r"has the T-LoRA schedule .*, the arm .*: it belongs to"):
            make_bank(base, [arm]).load(0, adapter)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_other_programs_get_it_as_lora_and_only_when_asked(
    scheduled: Adapter, layout: Layout, tmp_path: Path
) -> None:
    with pytest.raises(
        AdapterError,
        match=(
            r"^T-LoRA: 2 to 6 components act by timestep, so no single weight holds it: .*write peft, or "
            r"with --as-lora"
        ),
    ):
        save_adapter(scheduled, tmp_path / "a.safetensors", layout)
    written = save_adapter(scheduled.as_lora(), tmp_path / "a.safetensors", layout)
    assert any(note.startswith("T-LoRA written as LoRA: all components act") for note in written.notes)
    assert load_adapter(tmp_path / "a.safetensors").schedule is None


def test_it_is_not_merged_or_cut(scheduled: Adapter, base: Base) -> None:
    with pytest.raises(
        AdapterError, match="no single weight holds it: draw with the adapter beside the base"
    ):
        merge_weights(base.unet.state_dict(prefix="unet."), scheduled)
    with pytest.raises(AdapterError, match="no single weight holds it: keep it"):
        resize(scheduled, CutTarget(rank=1))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"rank": 4}',
        '{"rank": 4, "min_rank": 5}',
        '{"rank": 4, "min_rank": 0}',
        '{"rank": 4.5, "min_rank": 1}',
        '{"rank": 4, "min_rank": 1, "exponent": 0}',
        '{"rank": 4, "min_rank": 1, "exponent": "1"}',
        '{"rank": 4, "min_rank": 1, "num_timesteps": 1000000000}',
        '{"rank": 4, "min_rank": 1, "other": 1}',
    ],
)
def test_a_schedule_that_is_none_is_refused_by_name(text: str) -> None:
    with pytest.raises(AdapterError, match="^lorascope_tlora = .*: is no schedule of T-LoRA: must have rank"):
        read_schedule({SCHEDULE_KEY: text})


def test_a_bank_without_such_arms_masks_nothing(base: Base) -> None:
    bank = AdapterBank(base.components, resolve_targets(base.unet, ["to_q"]), [LORA])
    bank.at(torch.tensor([5]), training=True)
    layers: list[Any] = list(bank.layers.values())
    assert not bank.is_masked and all(layer.mask is None for layer in layers)


def test_components_are_dropped_by_sample_and_layer_in_training_alone(base: Base) -> None:
    """As kohya's `rank_dropout`: the others are scaled up, and T-LoRA's mask holds too."""
    rate = 0.25
    dropping = LORA.model_copy(update={"rank": 64, "alpha": 64.0, "rank_dropout": rate})
    masked = TLORA.model_copy(update={"rank": 64, "min_rank": 32, "rank_dropout": rate})
    arms = [dropping, LORA, masked]
    bank = AdapterBank(base.components, resolve_targets(base.unet, REFERENCE_TARGETS), arms)
    noise = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([10, 500] * 3)
    bank.at(times, training=True, noise=noise)
    masks = torch.stack([layer.mask for layer in bank.layers.values()])  # (layers, arms, samples, rank)
    assert masks[:, 1, :, :4].eq(1).all()
    found = masks[:, 0]
    assert {round(float(value), 4) for value in found.unique()} == {0.0, round(1 / (1 - rate), 4)}
    # Of 5,000 chances the share is known to 0.6 %, their mean factor to 0.8 %: four of these.
    assert float(found.eq(0).float().mean()) == pytest.approx(rate, abs=0.025)
    assert float(found.mean()) == pytest.approx(1.0, abs=0.033)
    assert masks[:, 2, 1, 48:].eq(0).all() and masks[:, 2, 1, :48].any()
    drawn = found.flatten(0, 1)
    assert len({tuple(row) for row in drawn.tolist()}) == len(drawn), "each sample and layer has its own"
    pairs = torch.corrcoef(drawn)[~torch.eye(len(drawn), dtype=torch.bool)]
    # Of 64 pairs of independent chances a correlation has the standard deviation 1 / 8.
    assert float(pairs.square().mean().sqrt()) == pytest.approx(0.125, rel=0.1)
    bank.at(times, training=True, noise=noise)
    again = torch.stack([layer.mask for layer in bank.layers.values()])
    assert torch.equal(again, masks), "a function of the noise"
    bank.select_all()
    bank.at(times)
    assert bank.layers[bank.targets[0].name].mask[0].eq(1).all(), "nothing is dropped in drawing"


def test_an_arm_that_drops_trains_in_company_as_alone(exact_base: Base) -> None:
    arms = [LORA, LORA.model_copy(update={"name": "dropping", "seed": 3, "rank_dropout": 0.5})]
    together = make_bank(exact_base, arms)
    noisy, timesteps, text = inputs_of(torch.tensor([5, 900, 300, 40]))
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    together.attach()
    together.at(timesteps, training=True, noise=noise)
    exact_base.unet(noisy, timesteps, text).sample.square().sum().backward()
    together.detach()
    for index, arm in enumerate(arms):
        part = slice(2 * index, 2 * index + 2)
        alone = AdapterBank(exact_base.components, together.targets, [arm])
        alone.load(0, together.adapter(index))
        alone.attach()
        alone.at(timesteps[part], training=True, noise=noise[part])
        exact_base.unet(noisy[part], timesteps[part], text[part]).sample.square().sum().backward()
        alone.detach()
        own = together.unpadded(together.gradients, index)
        assert own.any()
        torch.testing.assert_close(own, alone.gradients[0], rtol=1e-5, atol=1e-6 * float(own.abs().max()))


def test_each_thread_that_draws_has_its_own_mask(base: Base) -> None:
    bank = AdapterBank(base.components, resolve_targets(base.unet, REFERENCE_TARGETS), [TLORA])
    layer = bank.layers[bank.targets[0].name]
    bank.at(torch.tensor([999]), training=True)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: layer.mask).result().sum() == 2, "training masks for all"
        bank.at(torch.tensor([0]))
        other.submit(bank.at, torch.tensor([500])).result()
        assert other.submit(lambda: layer.mask).result().sum() == 4 and layer.mask.sum() == 6
        bank.at(torch.tensor([999]), training=True)
        assert layer.mask.sum() == 2
