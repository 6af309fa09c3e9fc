"""Stable Diffusion v1.5 in full size, with random weights."""

import numpy as np
import pytest
import torch

from lorascope.adapters.bank import AdapterBank, Slice
from lorascope.adapters.targets import resolve_targets
from lorascope.arms import Arm
from lorascope.base.random_base import _random_weights, build_random_base
from lorascope.data.encoding import Encoded
from lorascope.errors import BaseModelError
from lorascope.evaluation.prompts import Prompt
from lorascope.evaluation.sampling import Job, draw_pictures, latent_shape_of
from lorascope.sections import REFERENCE_TARGETS, SampleSection, TrainSection
from lorascope.training.trainer import Trainer

CPU = torch.device("cpu")


def test_only_known_configurations_can_be_built() -> None:
    with pytest.raises(BaseModelError, match="random base 'sdxl': only 'sd15'"):
        build_random_base("sdxl", CPU)


def test_random_weights_are_a_function_of_the_seed() -> None:
    generators = [np.random.Generator(np.random.SFC64([seed, 1])) for seed in (0, 0, 1)]
    first, again, other = (_random_weights("a.weight", (8, 4, 2), generator) for generator in generators)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.float32 and 0.9 * 8**-0.5 < first.abs().max() <= 8**-0.5


def test_sd15_in_full_size_trains_and_samples_one_step_at_64_px() -> None:
    """With random weights, in 5 GB."""
    base = build_random_base("sd15", CPU)
    # The dimensions of the published model.
    assert base.describe()["parameters"] == {
        "unet": 859_520_964,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
    }
    assert (base.prediction_type, base.latent_factor, base.vae.config.scaling_factor) == (
        "epsilon",
        8,
        0.18215,
    )
    assert base.alphas_cumprod[[0, -1]].tolist() == pytest.approx([0.99915, 0.0046599], rel=1e-4)
    arms = [Arm(name="r16", rank=16, alpha=32, lr=1e-4, seed=0)]
    bank = AdapterBank(base.components, resolve_targets(base.unet, REFERENCE_TARGETS), arms).attach()
    assert bank.parameters.shape == (1, 5_984_256)
    posterior = torch.stack(
        base.encode_pixels(torch.rand(1, 3, 64, 64) * 2 - 1), dim=1
    ).clone()  # (picture, mean and std, c, h, w)
    states = base.encode_text(["", "a cat"]).clone()
    encoded = Encoded((posterior,), ("a cat",), ("picture",), (1,), torch.tensor([1]), states)
    [record] = Trainer(base, bank, encoded, TrainSection(epochs=1, batch_size=1)).run()
    assert record.step == 1 and not record.failed[0] and record.grad_norms[0] > 0
    job = Job(Prompt("normal", 0, "a cat"), seed=0)
    pictures, latents = draw_pictures(
        base, bank, [Slice(0)], [job], latent_shape_of(base, 64), SampleSection(steps=1)
    )
    assert pictures.shape == (1, 1, 64, 64, 3) and latents.isfinite().all()
    bank.detach()
