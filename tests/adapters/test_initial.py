"""What adapters start from."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from lorascope.adapters.initial import initial_factors
from lorascope.arms import Init


@pytest.mark.parametrize(
    ("init", "in_peft"), [("kaiming", True), ("gaussian", "gaussian"), ("orthogonal", "orthogonal")]
)
@pytest.mark.parametrize("init_rank", [4, 16])
def test_an_adapter_starts_as_in_peft(init: Init, in_peft: bool | str, init_rank: int) -> None:
    """The product is zero, and A and B are of PEFT's size and share of directions."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(600, 500))
    config = LoraConfig(r=init_rank, target_modules=["0"], init_lora_weights=in_peft)  # type: ignore[arg-type]
    theirs: Any = get_peft_model(layer, config).base_model.model[0]  # type: ignore[arg-type]
    expected = theirs.lora_A["default"].weight.detach(), theirs.lora_B["default"].weight.detach()
    start = initial_factors(init, init_rank, (600,), 500, torch.Generator().manual_seed(0))
    down, up = start.down, start.up
    # fp32: 1.2e-7 x 16 products of at most 0.5 x 0.5
    torch.testing.assert_close(up @ down, torch.zeros(500, 600), rtol=0, atol=1e-6)
    for ours, other in zip((down, up), expected, strict=True):
        assert ours.shape == other.shape and ours.dtype == torch.float32
        assert torch.linalg.matrix_rank(ours) == torch.linalg.matrix_rank(other)
        # Of 2,000 numbers and more the standard deviation is known to 1.6 %, of two to 2.3 %: four of these.
        torch.testing.assert_close(ours.std(), other.std(), rtol=0.09, atol=0)


def test_an_orthogonal_start_takes_an_odd_rank_too() -> None:
    start = initial_factors("orthogonal", 3, (5, 3, 3), 7, torch.Generator().manual_seed(0))
    down, up = start.down, start.up
    assert down.shape == (3, 5, 3, 3) and up.shape == (7, 3) and down.any() and up.any()
    torch.testing.assert_close(up @ down.flatten(1), torch.zeros(7, 45), rtol=0, atol=1e-6)


def test_pissa_starts_from_pefts_leading_triplets() -> None:
    """PEFT subtracts their product from the base's weight, which stays here: what is left is the same."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(60, 50)
    weight = layer.weight.detach().clone()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights="pissa")
    theirs: Any = get_peft_model(torch.nn.Sequential(layer), config).base_model.model[0]  # type: ignore[arg-type]
    start = initial_factors("pissa", 4, (60,), 50, torch.Generator(), weight, scale=2.0)
    ours = start.up @ start.down
    other = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    # fp32 products of singular vectors: 1e-6 of values up to 1.2
    torch.testing.assert_close(ours, other.detach(), rtol=0, atol=5e-6)
    torch.testing.assert_close(weight - 2.0 * ours, theirs.base_layer.weight.detach(), rtol=0, atol=1e-5)
    lengths = torch.linalg.vector_norm(start.down, dim=1), torch.linalg.vector_norm(start.up, dim=0)
    torch.testing.assert_close(lengths[0], lengths[1], rtol=1e-4, atol=0)
    convolution = initial_factors("pissa", 3, (5, 3, 3), 7, torch.Generator(), torch.randn(7, 5, 3, 3))
    assert convolution.down.shape == (3, 5, 3, 3) and convolution.up.shape == (7, 3)


def published(rank: int, inputs: int, outputs: int, seed: int) -> tuple[Any, Any, Any]:
    """A, B and S of the paper's code for its "last" start, in NumPy: rows of U and columns of V' of a random
    matrix's SVD, and its least values.
    """
    matrix = np.random.default_rng(seed).normal(0, 1 / rank, (inputs, outputs))
    u, s, vh = np.linalg.svd(matrix)
    return u[-rank:], vh[:, -rank:], s[-rank:]


@pytest.mark.parametrize(("inputs", "outputs"), [(320, 320), (96, 320)])
def test_t_lora_starts_with_the_law_of_the_published_one(inputs: int, outputs: int) -> None:
    rank = 64
    start = initial_factors("random-svd", rank, (inputs,), outputs, torch.Generator().manual_seed(0))
    assert start.values is not None
    down, up, values = published(rank, inputs, outputs, 0)
    for ours, other in ((start.down, down), (start.up.T, up.T)):
        assert ours.shape == other.shape and ours.dtype == torch.float32
        for factor in (ours.double().numpy(), other):  # orthonormal rows
            np.testing.assert_allclose(factor @ factor.T, np.eye(rank), atol=1e-5)
        # Entries of an orthogonal matrix: of 6,000 and more the standard deviation is known to 1 %.
        assert float(ours.std()) == pytest.approx(float(other.std()), rel=0.04)
    # Singular values of a random matrix hardly vary: their mean to 2 %.
    assert float(start.values.mean()) == pytest.approx(float(values.mean()), rel=0.1)
    assert (start.values.diff() <= 0).all()


@pytest.mark.parametrize(("inputs", "outputs", "mean"), [(320, 320, 0.044), (320, 2560, 0.59)])
def test_the_values_grow_with_how_far_from_square_a_layer_is(inputs: int, outputs: int, mean: float) -> None:
    """The means are those of the published start; of a square matrix they are those of the shorter side."""
    drawn = {
        init: initial_factors(init, 64, (inputs,), outputs, torch.Generator().manual_seed(0)).values
        for init in ("random-svd", "random-svd-square")
    }
    own, square = drawn["random-svd"], drawn["random-svd-square"]
    assert own is not None and square is not None
    assert float(own.mean()) == pytest.approx(mean, rel=0.05)
    assert float(square.mean()) == pytest.approx(0.044, rel=0.05)
