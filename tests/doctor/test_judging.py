"""Errors and what rounding may explain of them."""

import math

import pytest
import torch
from torch import nn

from lorascope.doctor.judging import relative_error, rounding


def test_rounding_is_of_the_layers_and_their_products() -> None:
    layers = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(8, 2))
    assert rounding(layers) == pytest.approx(2**-23 * (math.sqrt(2) + math.sqrt(4 * 9 + 8)))
    assert rounding(layers.bfloat16()) == pytest.approx(2**-7 * math.sqrt(2) + 2**-23 * math.sqrt(44))


def test_the_relative_error_of_what_is_not_finite_is_infinite() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(torch.tensor([1.0, math.nan]), torch.ones(2)) == math.inf
