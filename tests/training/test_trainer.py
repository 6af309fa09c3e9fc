"""Training: stacked equals alone, AdamW equals torch's, resume is bit-exact, failures stay with their arm."""

import dataclasses
from pathlib import Path

import pytest
import torch

from lorascope.adapters.bank import AdapterBank, Slice
from lorascope.adapters.targets import resolve_section, resolve_targets
from lorascope.arms import Arm
from lorascope.base.loading import Base, load_base
from lorascope.data.encoding import Encoded
from lorascope.errors import StorageError
from lorascope.sections import (
    REFERENCE_TARGETS,
    AdapterSection,
    BaseSection,
    DataSection,
    TargetGroup,
    TrainSection,
)
from lorascope.seeding import seeded
from lorascope.training.probe import probe_losses
from lorascope.training.trainer import (
    CheckpointPart,
    StepRecord,
    Trainer,
    count_steps,
    read_checkpoint_facts,
    split_checkpoint,
)

R4 = Arm(name="r4", rank=4, alpha=8, lr=1e-3, seed=0)
R8 = Arm(name="r8", rank=8, alpha=16, lr=2e-3, seed=0)
OTHER_SEED = Arm(name="r4-s1", rank=4, alpha=8, lr=1e-3, seed=1)
SECTION = TrainSection(epochs=2, batch_size=2, caption_dropout=0.2, max_grad_norm=1.0)


def make_trainer(base: Base, pictures: Encoded, *arms: Arm, section: TrainSection = SECTION) -> Trainer:
    bank = AdapterBank(base.components, resolve_targets(base.unet, REFERENCE_TARGETS), arms)
    return Trainer(base, bank, pictures, section)


def run(trainer: Trainer, steps: int | None = None) -> list[StepRecord]:
    """Train `steps` steps, or to the end, with the bank attached only meanwhile."""
    trainer.bank.attach()
    try:
        records = []
        for record in trainer.run():
            records.append(record)
            if len(records) == steps:
                break
        return records
    finally:
        trainer.bank.detach()


# Through a base in float64, two ways of computing give losses and gradients whose fp32 is the same but for
# a last bit now and then, 1.2e-7; AdamW, which divides a gradient by its own size, makes no more of it.
SAME = 1e-6


def assert_close(bank: AdapterBank, other: AdapterBank) -> None:
    """The first adapters of two banks agree within `SAME` of the norm of each matrix."""
    theirs = other.adapter(0).modules
    for name, module in bank.adapter(0).modules.items():
        for ours, reference in ((module.down, theirs[name].down), (module.up, theirs[name].up)):
            assert (ours - reference).norm() <= SAME * reference.norm()


def test_an_adapter_in_a_stack_trains_as_it_does_alone(exact_base: Base, pictures: Encoded) -> None:
    """Rank 4 alone and beside rank 8: same losses and weights over 10 steps of AdamW."""
    alone = make_trainer(exact_base, pictures, R4)
    stacked = make_trainer(exact_base, pictures, R4, R8)
    for one, two in zip(run(alone), run(stacked), strict=True):
        assert one.losses[0] == pytest.approx(two.losses[0], rel=SAME)
    assert_close(alone.bank, stacked.bank)


def test_padding_stays_exactly_zero(base: Base, pictures: Encoded) -> None:
    trainer = make_trainer(base, pictures, R4, R8)
    run(trainer)
    for layer in trainer.bank.layers.values():
        assert not layer.down.detach()[0, 4:].any() and not layer.up.detach()[0, :, 4:].any()
        assert layer.up.detach()[0].any() and layer.up.detach()[1].any()


def test_arms_of_one_seed_see_the_same_batches_and_others_do_not(base: Base, pictures: Encoded) -> None:
    trainer = make_trainer(base, pictures, R4, R8, OTHER_SEED)
    batch = trainer.feed.load(3)
    for part in batch:
        first, second, _ = part.unflatten(0, (3, -1))
        assert torch.equal(first, second)
    noise = batch[1].unflatten(0, (3, -1))
    assert not torch.equal(noise[0], noise[2])


def test_training_leaves_every_base_weight_unchanged(base: Base, pictures: Encoded) -> None:
    before = {name: tensor.clone() for name, tensor in base.unet.state_dict().items()}
    run(make_trainer(base, pictures, R4, R8))
    assert all(torch.equal(before[name], tensor) for name, tensor in base.unet.state_dict().items())


def test_training_lowers_the_loss_at_fixed_noise(exact_base: Base, pictures: Encoded) -> None:
    base = exact_base
    trainer = make_trainer(base, pictures, R8, section=SECTION.model_copy(update={"epochs": 8}))
    trainer.bank.attach()
    before = probe_losses(base, trainer.bank, [Slice(0, 0.0)], pictures, [True])[0]
    run(trainer)
    trainer.bank.attach()
    after = probe_losses(base, trainer.bank, [Slice(0, 0.0), Slice(0)], pictures, [True])[0]
    trainer.bank.detach()
    torch.testing.assert_close(before[0], after[0], rtol=SAME, atol=0)
    assert after[1].mean() < 0.97 * before[0].mean()


def test_clipping_limits_each_arm_by_its_own_norm(base: Base, pictures: Encoded) -> None:
    free = run(
        make_trainer(base, pictures, R4, R8, section=SECTION.model_copy(update={"max_grad_norm": 0.0})), 1
    )[0]
    limit = min(free.grad_norms) * 0.5
    trainer = make_trainer(
        base, pictures, R4, R8, section=SECTION.model_copy(update={"max_grad_norm": limit})
    )
    record = run(trainer, 1)[0]
    assert record.grad_norms == pytest.approx(free.grad_norms)
    # the 1e-6 that clipping adds to a norm, of 0.1 here, lest it divide by 0: rel 1e-5
    assert trainer.bank.gradient_norms().tolist() == pytest.approx([limit, limit], rel=1e-4)


@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    base: Base, pictures: Encoded, tmp_path: Path, stop_after: int
) -> None:
    whole = make_trainer(base, pictures, R4, R8)
    run(whole)
    first = make_trainer(base, pictures, R4, R8)
    run(first, stop_after)
    first.save_checkpoint(tmp_path / "c.safetensors", "inputs", {"note": 1})
    second = make_trainer(base, pictures, R4, R8)
    assert second.load_checkpoint(tmp_path / "c.safetensors", "inputs") == {"note": 1}
    records = run(second)
    assert records[0].step == stop_after + 1
    assert torch.equal(whole.bank.parameters, second.bank.parameters)


def test_checkpoints_of_other_inputs_or_damaged_are_refused(
    base: Base, pictures: Encoded, tmp_path: Path
) -> None:
    trainer, path = make_trainer(base, pictures, R4), tmp_path / "c.safetensors"
    trainer.save_checkpoint(path, "inputs", {})
    with pytest.raises(StorageError, match="of another configuration"):
        trainer.load_checkpoint(path, "others")
    whole = path.read_bytes()
    header_bytes = int.from_bytes(whole[:8], "little")
    for place in (9, header_bytes // 2, header_bytes + 20, len(whole) - 1):  # names, facts and numbers
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(
            StorageError, match=r"damaged checkpoint \(.*: delete it and run the same command"
        ):
            trainer.load_checkpoint(path, "inputs")
    path.write_bytes(whole[:100])
    with pytest.raises(StorageError, match="damaged checkpoint"):
        trainer.load_checkpoint(path, "inputs")


def test_a_checkpoint_splits_into_groups_that_go_on_as_the_whole_would(
    exact_base: Base, pictures: Encoded, tmp_path: Path
) -> None:
    """After a group ran out of memory: each half has the state of the whole one's step, whatever the padding
    beside it was.
    """
    whole = make_trainer(exact_base, pictures, R4, R8, OTHER_SEED)
    run(whole, 4)
    whole.save_checkpoint(tmp_path / "whole", "inputs", {"count": 3})
    parts = [
        CheckpointPart(tmp_path / "a", ["r4", "r4-s1"], "a", {"count": 2}),
        CheckpointPart(tmp_path / "b", ["r8"], "b", {"count": 1}),
    ]
    split_checkpoint(tmp_path / "whole", parts)
    assert read_checkpoint_facts(tmp_path / "a") == {"count": 2}
    half, other = make_trainer(exact_base, pictures, R4, OTHER_SEED), make_trainer(exact_base, pictures, R8)
    assert half.load_checkpoint(tmp_path / "a", "a") == {"count": 2} and other.load_checkpoint(
        tmp_path / "b", "b"
    ) == {"count": 1}
    assert half.step == other.step == 4
    for ours, arms in ((half, ((0, 0), (1, 2))), (other, ((0, 1),))):
        for index, place in arms:
            assert all(
                torch.equal(a, b)
                for a, b in zip(_matrices(ours.bank, index), _matrices(whole.bank, place), strict=True)
            )
    run(whole)
    run(half)
    assert_close(half.bank, whole.bank)


def _matrices(bank: AdapterBank, index: int) -> list[torch.Tensor]:
    return [matrix for module in bank.adapter(index).modules.values() for matrix in (module.down, module.up)]


def test_a_pause_is_asked_for_after_each_step_and_leaves_no_record_behind(
    base: Base, pictures: Encoded
) -> None:
    trainer = make_trainer(base, pictures, R4)
    asked: list[int] = []

    def pause(step: int) -> bool:
        asked.append(step)
        return step % 2 == 0

    trainer.bank.attach()
    steps = [(record.step, trainer.step) for record in trainer.run(pause)]
    trainer.bank.detach()
    assert [step for step, _ in steps] == list(range(1, trainer.num_steps + 1))
    assert all(step == done for step, done in steps if step % 2 == 0) and steps[-1][1] == trainer.num_steps
    assert asked == list(range(1, trainer.num_steps))  # the last step is a pause whatever is said


def test_an_arm_that_diverges_stops_and_leaves_the_others_alone(exact_base: Base, pictures: Encoded) -> None:
    wild = Arm(name="wild", rank=4, alpha=1e20, lr=1e20, seed=0)
    trainer = make_trainer(exact_base, pictures, R4, wild)
    alone = make_trainer(exact_base, pictures, R4)
    records = run(trainer)
    run(alone)
    assert records[-1].failed == (False, True)
    assert trainer.bank.parameters.isfinite().all()
    assert_close(trainer.bank, alone.bank)


def test_steps_cover_every_picture_of_every_epoch() -> None:
    assert count_steps(TrainSection(epochs=10, batch_size=4), 1500) == 3750
    assert count_steps(TrainSection(epochs=3, batch_size=4), 10) == 8
    assert count_steps(TrainSection(epochs=3, batch_size=4), 10, epochs=1) == 3


def test_an_epoch_never_counts_beyond_the_last(base: Base, pictures: Encoded) -> None:
    trainer = make_trainer(base, pictures, R4, section=TrainSection(epochs=1, batch_size=4))
    assert trainer.train.num_entries % 4
    epochs = [record.epoch for record in run(trainer)]
    assert epochs == [*sorted(set(epochs))] and epochs[0] == 4 / trainer.train.num_entries and epochs[-1] == 1


def test_a_bf16_base_trains_float32_adapters_to_nearly_the_same_losses(
    pipeline_folder: Path, base: Base, pictures: Encoded
) -> None:
    half = load_base(BaseSection(model=str(pipeline_folder)), torch.device("cpu"), "bf16")
    assert half.unet.dtype == torch.bfloat16
    trainer, reference = make_trainer(half, pictures, R4, R8), make_trainer(base, pictures, R4, R8)
    assert trainer.bank.parameters.dtype == torch.float32
    for ours, theirs in zip(run(trainer), run(reference), strict=True):
        # bf16 rounds at 2^-9, in some forty layers: sqrt(40) * 2^-9 = 1.2 % of a prediction, less of its loss
        assert ours.losses == pytest.approx(theirs.losses, rel=0.02)


# Choices ----------------------------------------------------------------------------------------------------

TEXT_AND_CONV = AdapterSection(
    targets=("to_q", "to_v"),
    groups=(
        TargetGroup(
            targets=("proj_in", "proj_out", "*.resnets.*.conv1", "*.downsamplers.*.conv"), rank=2, lr=5e-4
        ),
        TargetGroup(component="text_encoder", targets=("q_proj", "v_proj", "fc1"), rank=3, alpha=6),
    ),
)


def make_wide_trainer(base: Base, pictures: Encoded, *arms: Arm, section: TrainSection = SECTION) -> Trainer:
    """Attention, convolutions and the text encoder, with ranks and rates of their own."""
    bank = AdapterBank(base.components, resolve_section(base.components, TEXT_AND_CONV), arms)
    return Trainer(base, bank, dataclasses.replace(pictures, text_states=None), section)


def test_convolutions_and_text_encoder_train_in_a_stack_as_alone(exact_base: Base, pictures: Encoded) -> None:
    base = exact_base
    alone, stacked = make_wide_trainer(base, pictures, R4), make_wide_trainer(base, pictures, R4, R8)
    before = {
        name: tensor.clone()
        for part in base.components.values()
        for name, tensor in part.state_dict().items()
    }
    run(alone)
    run(stacked)
    assert_close(alone.bank, stacked.bank)
    modules = alone.bank.adapter(0).modules
    assert any(name.startswith("text_encoder.text_model.") for name in modules) and any(
        m.down.dim() == 4 for m in modules.values()
    )
    assert all(module.up.any() for module in modules.values())
    assert all(
        torch.equal(before[name], tensor)
        for part in base.components.values()
        for name, tensor in part.state_dict().items()
    )


def test_text_states_made_at_each_step_equal_kept_ones(exact_base: Base, pictures: Encoded) -> None:
    kept, made = (
        make_trainer(exact_base, pictures, R4),
        make_trainer(exact_base, dataclasses.replace(pictures, text_states=None), R4),
    )
    assert [record.losses[0] for record in run(kept)] == pytest.approx(
        [record.losses[0] for record in run(made)], rel=SAME
    )


def test_shuffled_tags_are_the_same_for_every_arm_of_a_seed_and_change_from_draw_to_draw(
    base: Base, pictures: Encoded
) -> None:
    tags = tuple(f"{index}, red, green, blue, yellow" for index in range(10))
    pictures = dataclasses.replace(pictures, captions=tags, text_states=None)
    bank = AdapterBank(base.components, resolve_targets(base.unet, ["to_q"]), [R4, R8, OTHER_SEED])
    trainer = Trainer(
        base, bank, pictures, TrainSection(batch_size=2), DataSection(shuffle_tags=True, keep_tags=1)
    )
    first, second, other = trainer.feed.load(0)[3].unflatten(0, (3, -1))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(trainer.feed.load(0)[3], trainer.feed.load(0)[3])
    assert not torch.equal(trainer.feed.load(0)[3], trainer.feed.load(1)[3])


def test_accumulated_batches_equal_one_large_batch(exact_base: Base, pictures: Encoded) -> None:
    """Two batches of two are the pictures, noise and timesteps of one batch of four: same losses and
    gradients.
    """
    whole = make_trainer(exact_base, pictures, R4, section=TrainSection(epochs=1, batch_size=4))
    parts = make_trainer(
        exact_base, pictures, R4, section=TrainSection(epochs=1, batch_size=2, accumulation_steps=2)
    )
    assert whole.num_steps == parts.num_steps == 3
    for one, two in zip(run(whole), run(parts), strict=True):
        assert one.losses == pytest.approx(two.losses, rel=SAME)
        assert one.grad_norms == pytest.approx(two.grad_norms, rel=SAME)


def test_gradient_checkpointing_changes_nothing_but_memory(
    pipeline_folder: Path, base: Base, pictures: Encoded
) -> None:
    plain = make_trainer(base, pictures, R4, R8)
    run(plain)
    saving = make_trainer(
        load_base(BaseSection(model=str(pipeline_folder)), base.device), pictures, R4, R8,
        section=SECTION.model_copy(update={"gradient_checkpointing": True}),
    )  # fmt: skip
    assert saving.base.unet.is_gradient_checkpointing
    run(saving)
    assert torch.equal(saving.bank.parameters, plain.bank.parameters)
    make_trainer(saving.base, pictures, R4)
    assert not saving.base.unet.is_gradient_checkpointing, "the next group decides for itself"


def test_batches_hold_one_shape_and_every_epoch_every_picture_its_number_of_times(
    base: Base, pictures: Encoded
) -> None:
    wide = tuple(torch.randn(1, 2, 4, 4, 16, generator=seeded("wide", index)) for index in range(5))
    mixed = dataclasses.replace(pictures, latents=(*pictures.latents[:5], *wide), repeats=(1, 2) * 5)
    trainer = make_trainer(base, mixed, R4, OTHER_SEED, section=TrainSection(epochs=4, batch_size=5))
    assert (
        mixed.num_entries == 15
        and trainer.num_steps == 12
        and [len(bucket) for bucket in trainer.feed.buckets] == [8, 7]
    )
    shapes = [tuple(trainer.feed.load(number)[0].shape) for number in range(12)]
    assert set(shapes) == {(10, 4, 4, 16), (10, 4, 8, 8)}
    assert len(run(trainer)) == 12
    probe = probe_losses(base, trainer.bank.attach(), [Slice(0)], mixed, [True])[0]
    trainer.bank.detach()
    assert probe.shape == (1, 10, 4) and probe.isfinite().all()


def test_mirrored_views_are_drawn_for_half_of_the_positions(base: Base, pictures: Encoded) -> None:
    """Pictures whose mirrored view is all ones and whose own is all zeros, without posterior noise: the batch
    tells which was taken.
    """
    views = torch.stack([torch.zeros(4, 8, 8), torch.ones(4, 8, 8)])[:, None].repeat(1, 2, 1, 1, 1)
    views[:, 1] = 0
    trainer = make_trainer(
        base,
        dataclasses.replace(pictures, latents=(views,) * 10),
        R4,
        R8,
        section=TrainSection(epochs=40, batch_size=2),
    )
    taken = torch.stack([trainer.feed.load(number)[0].mean(dim=(1, 2, 3)) for number in range(200)])
    assert set(taken.unique().tolist()) == {0.0, 1.0} and 0.4 < taken.mean() < 0.6
    assert torch.equal(taken[:, :2], taken[:, 2:])
