"""The objective: randomness by (seed, position), and diffusers' own schedule as reference."""

import pytest
import torch
from diffusers import DDPMScheduler

from lorascope.objective import add_noise, draw, epoch_order, prediction_target, sample_losses, seeded

SHAPE = (4, 8, 8)


def equal(a: object, b: object) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_draws_depend_on_seed_and_position_alone() -> None:
    whole = draw(3, range(12), 10, SHAPE, 1000, 0.5)
    for size in (1, 4):
        parts = [draw(3, range(start, start + size), 10, SHAPE, 1000, 0.5) for start in range(0, 12, size)]
        for name, tensor in vars(whole).items():
            assert torch.equal(tensor, torch.cat([getattr(part, name) for part in parts]))
    assert not equal(whole, draw(4, range(12), 10, SHAPE, 1000, 0.5))


def test_draws_ignore_the_global_generator() -> None:
    torch.manual_seed(1)
    first = draw(0, range(4), 10, SHAPE, 1000, 0.1)
    torch.manual_seed(2)
    assert equal(first, draw(0, range(4), 10, SHAPE, 1000, 0.1))


def test_every_epoch_shows_each_picture_once_in_another_order() -> None:
    seen = draw(0, range(30), 10, SHAPE, 1000, 0.0).indices.view(3, 10)
    assert all(sorted(row.tolist()) == list(range(10)) for row in seen)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], epoch_order(0, 1, 10))


def test_draws_have_the_distributions_they_claim() -> None:
    draws = draw(0, range(4000), 10, (1, 2, 2), 1000, 0.25)
    assert draws.timesteps.min() < 5 and draws.timesteps.max() > 994
    assert abs(draws.timesteps.float().mean() - 499.5) < 20
    assert abs(draws.dropped.float().mean() - 0.25) < 0.03
    for noise in (draws.noise, draws.posterior_noise):
        assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert abs((draws.noise * draws.posterior_noise).mean()) < 0.03


def test_no_caption_is_dropped_at_share_zero_and_every_one_at_share_one() -> None:
    assert not draw(0, range(100), 10, SHAPE, 1000, 0.0).dropped.any()
    assert draw(0, range(100), 10, SHAPE, 1000, 1.0).dropped.all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_targets_equal_diffusers(prediction_type: str) -> None:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    generator = seeded("test")
    latents, noise = torch.randn((2, 6, *SHAPE), generator=generator)
    timesteps = torch.tensor([0, 1, 250, 500, 998, 999])
    alphas = scheduler.alphas_cumprod
    torch.testing.assert_close(add_noise(latents, noise, timesteps, alphas), scheduler.add_noise(latents, noise, timesteps))
    expected = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(prediction_target(latents, noise, timesteps, alphas, prediction_type), expected)


def test_losses_are_mean_squares_per_sample_in_float32() -> None:
    prediction, target = torch.zeros(2, 4, 2, 2, dtype=torch.bfloat16), torch.ones(2, 4, 2, 2)
    target[1] *= 3
    losses = sample_losses(prediction, target)
    assert losses.dtype == torch.float32 and losses.tolist() == [1.0, 9.0]
