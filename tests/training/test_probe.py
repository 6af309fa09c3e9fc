"""Losses at fixed noise: the same whatever stands beside them, and their records."""

import pytest
import torch
from scipy import stats

from lorascope.adapters.bank import AdapterBank, Slice
from lorascope.adapters.targets import resolve_targets
from lorascope.arms import Arm
from lorascope.base.loading import Base
from lorascope.data.encoding import Encoded
from lorascope.sections import REFERENCE_TARGETS
from lorascope.seeding import seeded
from lorascope.training.objective import sample_losses
from lorascope.training.probe import NUM_BANDS, Probe, probe, probe_losses, probe_records

R4 = Arm(name="r4", rank=4, alpha=8, lr=1e-3, seed=0)
SAME = 1e-6  # float64 leaves far less than the losses' float32 rounds


def make_bank(base: Base) -> AdapterBank:
    return AdapterBank(base.components, resolve_targets(base.unet, REFERENCE_TARGETS), [R4]).attach()


def test_probes_are_the_same_each_time_whatever_else_is_in_the_batch(
    exact_base: Base, pictures: Encoded
) -> None:
    bank = make_bank(exact_base)
    alone = probe_losses(exact_base, bank, [Slice(0, 0.0)], pictures, [False])
    beside = probe_losses(
        exact_base, bank, [Slice(0), Slice(0, 0.0)] * 5, pictures.subset([2, 0]), [True, False]
    )
    bank.detach()
    assert alone.shape == (1, 1, 10, 4) and beside.shape == (2, 10, 2, 4)
    torch.testing.assert_close(
        beside[1, 1::2], alone[0, 0, [2, 0]].expand(5, -1, -1), rtol=SAME, atol=0
    )  # ten slices go in two parts
    assert not torch.equal(beside[0], beside[1])


def test_probes_come_with_their_places_and_conditions_meet_the_same_noise(
    base: Base, pictures: Encoded
) -> None:
    bank = make_bank(base)
    done: list[Probe] = []
    losses = probe_losses(base, bank, [Slice(0, 0.0)] * 9, pictures, [True, False], done.append)
    again = list(probe(base, bank, [Slice(0, 0.0)] * 9, pictures, [False, False]))
    bank.detach()
    assert [part.num_slices for part in done] == [8] * 8 + [1] * 8  # two batches, of 8 and 2 pictures
    assert sum(part.num_slices * len(part.pictures) for part in done) == 9 * 10 * NUM_BANDS
    for part, other in zip(done, again, strict=True):
        assert torch.equal(part.predictions[1], other.predictions[0])
        assert torch.equal(other.predictions[0], other.predictions[1])
        assert torch.equal(part.target, other.target)
        rows = losses[0, part.first_slice : part.first_slice + part.num_slices, part.pictures, part.band]
        assert torch.equal(rows[0], sample_losses(part.predictions[0][0], part.target))


def test_probe_records_are_paired_means_with_students_interval() -> None:
    generator = seeded("records")
    reference, losses = torch.rand(2, 12, 4, generator=generator)
    records = {record["band"]: record for record in probe_records(losses, reference, 1000)}
    assert list(records) == ["0-250", "250-500", "500-750", "750-1000", "all"]
    difference = (losses - reference).mean(dim=1).double().numpy()
    low, high = stats.t.interval(0.95, 11, loc=difference.mean(), scale=stats.sem(difference))
    assert records["all"]["difference"] == pytest.approx(difference.mean(), rel=1e-5)
    assert (records["all"]["difference_low"], records["all"]["difference_high"]) == pytest.approx(
        (low, high), rel=1e-5
    )
    assert (
        records["0-250"]["loss"] == pytest.approx(losses[:, 0].mean().item())
        and records["all"]["count"] == 12
    )
