"""The VAE at work: equal to the base's own, in half precision near it, and in fp32 where half precision
overflows.
"""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from lorascope.base.autoencoder import Autoencoder, to_bytes
from lorascope.base.loading import Base

PIXELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_on_a_cpu_it_is_the_bases_own_vae_to_the_bit(base: Base) -> None:
    autoencoder = Autoencoder(base)
    posterior = autoencoder.encode(PIXELS)
    assert autoencoder.precision == "float32" and posterior.shape == (2, 2, 4, 8, 8)
    assert torch.equal(posterior, torch.stack(base.encode_pixels(PIXELS.float() / 127.5 - 1), dim=1))
    latents = posterior[:, 0]
    assert torch.equal(autoencoder.decode(latents), to_bytes(base.decode_latents(latents)))


def test_half_precision_is_near_and_leaves_the_base_as_it_is(base: Base) -> None:
    base.vae.set_attn_processor(AttnProcessor())  # torch's own kernel in bf16 goes by the processor
    plain, half = Autoencoder(base), Autoencoder(base, torch.bfloat16)
    posterior, expected = half.encode(PIXELS), plain.encode(PIXELS)
    assert (
        posterior.dtype == torch.float32 and half.precision == "bfloat16" and base.vae.dtype == torch.float32
    )
    assert not torch.equal(posterior, expected)
    # bf16 rounds at 2^-9, in each of some twenty layers: sqrt(20) * 2^-9 = 0.9 %, of pixels' 255 steps 1 to 2
    assert (posterior - expected).norm() <= 0.03 * expected.norm()
    difference = half.decode(expected[:, 0]).float() - plain.decode(expected[:, 0]).float()
    assert difference.square().mean().sqrt() <= 4


def test_a_batch_that_overflows_is_done_again_in_fp32(base: Base) -> None:
    for convolution in (base.vae.encoder.conv_in, base.vae.decoder.conv_in):
        convolution.weight.data.mul_(1e7)  # beyond fp16's 65,504; the group norms take it away again
    plain, half = Autoencoder(base), Autoencoder(base, torch.float16)
    assert not half._bases[0].encode_pixels(PIXELS.float())[0].isfinite().all()
    assert torch.equal(half.encode(PIXELS), plain.encode(PIXELS))
    latents = plain.encode(PIXELS)[:, 0]
    assert torch.equal(half.decode(latents), plain.decode(latents))


def test_pictures_are_decoded_a_few_at_a_time(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    decode = Base.decode_latents
    monkeypatch.setattr(
        Base, "decode_latents", lambda self, latents: sizes.append(len(latents)) or decode(self, latents)
    )
    monkeypatch.setattr("lorascope.base.autoencoder._DECODED_PIXELS", 3 * 32 * 32)
    assert Autoencoder(base).decode(torch.zeros(7, 4, 8, 8)).shape == (7, 32, 32, 3)
    assert sizes == [3, 3, 1]


def test_pixels_are_rounded_and_clipped() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 1.5]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_bytes(values)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_the_share_of_the_limit_follows_from_counted_operations(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    autoencoder = Autoencoder(base)
    monkeypatch.setattr("lorascope.machine.speed._SIDE", {"cpu": 256})
    one, two = (autoencoder.share_of_limit((1, 3, 32, 32), count, 1.0) for count in (1, 2000))
    assert 0 < one < two
