"""The objective: randomness by (seed, position), and diffusers' own schedule as reference."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given
from hypothesis import strategies as st

from lorascope.sections import TrainSection
from lorascope.training.objective import (
    add_noise,
    batch_indices,
    draw,
    epoch_order,
    min_snr_weights,
    plan_batches,
    prediction_target,
    sample_losses,
    seeded,
    training_losses,
)

SHAPE = (4, 8, 8)
HALF = TrainSection(caption_dropout=0.5, noise_offset=0.1)


def equal(a: object, b: object) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_draws_depend_on_seed_and_position_alone() -> None:
    whole = draw(3, range(12), SHAPE, 1000, HALF)
    for size in (1, 4):
        parts = [draw(3, range(start, start + size), SHAPE, 1000, HALF) for start in range(0, 12, size)]
        for name, tensor in vars(whole).items():
            assert torch.equal(tensor, torch.cat([getattr(part, name) for part in parts]))
    assert not equal(whole, draw(4, range(12), SHAPE, 1000, HALF))


def test_draws_ignore_the_global_generator() -> None:
    torch.manual_seed(1)
    first = draw(0, range(4), SHAPE, 1000, HALF)
    torch.manual_seed(2)
    assert equal(first, draw(0, range(4), SHAPE, 1000, HALF))


def test_every_epoch_shows_each_picture_once_in_another_order() -> None:
    entries = torch.arange(10) * 2
    seen = torch.cat([batch_indices(0, 0, entries, number, 3) for number in range(10)]).view(3, 10)
    assert all(sorted(row.tolist()) == entries.tolist() for row in seen)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], entries[epoch_order(0, 1, 10)])


def test_batches_of_one_bucket_come_in_order() -> None:
    assert plan_batches([10], 4, 7) == [(0, number) for number in range(7)]


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.integers(1, 16), st.integers(1, 200))
def test_buckets_take_turns_at_their_share_of_the_pictures(
    sizes: list[int], batch_size: int, num_batches: int
) -> None:
    """After any number of batches each bucket has had its share of them, to within two of them; none is left
    out or twice.
    """
    plan = plan_batches(sizes, batch_size, num_batches)
    assert len(plan) == num_batches
    assert plan == plan_batches(sizes, batch_size, num_batches)
    counts = [0] * len(sizes)
    for done, (bucket, number) in enumerate(plan, 1):
        assert number == counts[bucket]
        counts[bucket] += 1
        assert all(
            abs(count - done * size / sum(sizes)) < 2 + len(sizes)
            for count, size in zip(counts, sizes, strict=True)
        )


def test_draws_have_the_distributions_they_claim() -> None:
    draws = draw(0, range(4000), (1, 2, 2), 1000, TrainSection(caption_dropout=0.25))
    assert draws.timesteps.min() < 5 and draws.timesteps.max() > 994
    assert abs(draws.timesteps.float().mean() - 499.5) < 20
    assert abs(draws.dropped.float().mean() - 0.25) < 0.03
    assert abs(draws.flipped.float().mean() - 0.5) < 0.03
    for noise in (draws.noise, draws.posterior_noise):
        assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert abs((draws.noise * draws.posterior_noise).mean()) < 0.03


def test_no_caption_is_dropped_at_share_zero_and_every_one_at_share_one() -> None:
    assert not draw(0, range(100), SHAPE, 1000, TrainSection()).dropped.any()
    assert draw(0, range(100), SHAPE, 1000, TrainSection(caption_dropout=1.0)).dropped.all()


def test_the_noise_offset_shifts_whole_channels_and_nothing_else() -> None:
    plain, shifted = (
        draw(0, range(2000), (2, 4, 4), 1000, TrainSection(noise_offset=size)) for size in (0.0, 0.3)
    )
    assert torch.equal(plain.posterior_noise, shifted.posterior_noise) and torch.equal(
        plain.timesteps, shifted.timesteps
    )
    offsets = shifted.noise - plain.noise
    # fp32: noise of 4 and more with its offset rounds at 2.4e-7, and two of them are compared
    torch.testing.assert_close(offsets, offsets[:, :, :1, :1].expand_as(offsets), atol=1e-6, rtol=0)
    assert abs(offsets[:, :, 0, 0].std() - 0.3) < 0.02


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_targets_equal_diffusers(prediction_type: str) -> None:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    generator = seeded("test")
    latents, noise = torch.randn((2, 6, *SHAPE), generator=generator)
    timesteps = torch.tensor([0, 1, 250, 500, 998, 999])
    alphas = scheduler.alphas_cumprod
    torch.testing.assert_close(
        add_noise(latents, noise, timesteps, alphas), scheduler.add_noise(latents, noise, timesteps)
    )
    expected = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(
        prediction_target(latents, noise, timesteps, alphas, prediction_type), expected
    )


def test_losses_are_mean_squares_per_sample_in_float32() -> None:
    prediction, target = torch.zeros(2, 4, 2, 2, dtype=torch.bfloat16), torch.ones(2, 4, 2, 2)
    target[1] *= 3
    losses = sample_losses(prediction, target)
    assert losses.dtype == torch.float32 and losses.tolist() == [1.0, 9.0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_equal_diffusers_recipe(prediction_type: str) -> None:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    timesteps = torch.tensor([0, 10, 300, 700, 999])
    snr = compute_snr(scheduler, timesteps)
    expected = torch.stack([snr, torch.full_like(snr, 5.0)], dim=1).min(dim=1)[0] / (
        snr if prediction_type == "epsilon" else snr + 1
    )
    torch.testing.assert_close(
        min_snr_weights(timesteps, scheduler.alphas_cumprod, prediction_type, 5.0), expected
    )


def test_min_snr_weights_are_finite_where_all_or_nothing_is_noise() -> None:
    alphas = torch.tensor([1.0, 0.5, 0.0])
    assert min_snr_weights(torch.arange(3), alphas, "epsilon", 5.0).tolist() == [0, 1, 1]
    assert min_snr_weights(torch.arange(3), alphas, "v_prediction", 5.0).tolist() == [0, 0.5, 0]


def test_training_losses_are_the_mean_square_unless_told_otherwise() -> None:
    prediction, target = torch.randn((2, 3, *SHAPE), generator=seeded("losses"))
    alphas, timesteps = torch.linspace(0.99, 0.01, 1000), torch.tensor([5, 500, 990])
    squares = sample_losses(prediction, target)
    losses = [
        training_losses(prediction, target, timesteps, alphas, "epsilon", section)
        for section in (
            TrainSection(),
            TrainSection(loss="huber", huber_delta=1e3),
            TrainSection(loss="huber"),
            TrainSection(min_snr_gamma=5),
        )
    ]
    assert torch.equal(losses[0], squares)
    torch.testing.assert_close(losses[1], squares)
    distance = (prediction - target).abs()
    torch.testing.assert_close(
        losses[2], torch.where(distance < 0.1, distance**2, 0.2 * distance - 0.01).mean(dim=(1, 2, 3))
    )
    torch.testing.assert_close(losses[3], squares * min_snr_weights(timesteps, alphas, "epsilon", 5.0))
