"""A VAE that overflows or is off in half precision is found."""

from typing import Any

import pytest
import torch

from lorascope.base.autoencoder import Autoencoder
from lorascope.base.loading import Base
from lorascope.doctor.vae import check_half_vae


def test_a_vae_that_overflows_is_found(base: Base) -> None:
    assert check_half_vae(base, 32, torch.float16).status == "ok"
    base.vae.encoder.conv_in.weight.data.mul_(1e7)  # beyond fp16's 65,504
    finding = check_half_vae(base, 32, torch.float16)
    assert finding.as_line() == (
        "half-precision VAE overflow: half precision is not used: 3 of 6 batches are beyond float16"
    )


@pytest.mark.parametrize("way", ["encode_pixels", "decode_latents"])
def test_a_vae_that_is_off_in_half_precision_is_found(
    base: Base, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    whole: Any = getattr(Base, way)

    def spoil(self: Base, given: torch.Tensor) -> Any:
        factor = 1.1 if self.vae.dtype == torch.float16 else 1.0
        result = whole(self, given)
        return tuple(part * factor for part in result) if isinstance(result, tuple) else result * factor

    monkeypatch.setattr(Base, way, spoil)
    assert check_half_vae(base, 32, torch.float16).status == "wrong"


def test_a_vae_in_float32_is_its_own_reference(base: Base) -> None:
    assert check_half_vae(base, 32).status == "not checked"
    assert Autoencoder(base).dtype == torch.float32
