"""The measure of style on features of known distance, with tiny models, and once on the pocket world."""

import io
import json
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lorascope.base.loading import Base
from lorascope.evaluation.discriminant import fit_style_axis
from lorascope.evaluation.features import load_encoder
from lorascope.evaluation.scoring import draw_noise
from lorascope.evaluation.style import measure_style, through_vae
from lorascope.evaluation.two_samples import mmd_p, squared_mmd
from lorascope.sections import ScoreSection

CPU = torch.device("cpu")


def sample(count: int, shift: float = 0.0, seed: int = 0, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)) + shift


def test_positions_are_those_of_the_axis() -> None:
    base, real, further = sample(20), sample(16, 2.0, seed=1), sample(5, 1.0, seed=2)
    style, axis = measure_style(base, real), fit_style_axis(base, real)
    assert style.reason is None
    assert style.auc == axis.auc > 0.9
    rows = [3, 1, 4, 1, 5]
    positions, own = style.positions(further, rows), style.positions(base, range(20))
    assert positions is not None
    assert own is not None
    np.testing.assert_array_equal(positions, axis.positions(further, rows))
    np.testing.assert_allclose(own, axis.base)
    assert own.mean() == pytest.approx(0)
    assert style.base_std == pytest.approx(own.std(ddof=1))
    assert 0.2 < positions.mean() < 0.8


def test_controls_have_positions_and_discrepancies() -> None:
    base, real = sample(20), sample(16, 2.0, seed=1)
    noise = sample(4, -2.0, seed=3)
    style = measure_style(base, real, {"noise": noise, "style": sample(3, 2.0, seed=4)})
    positions = style.positions(noise)
    assert positions is not None
    assert style.controls["noise"].position == pytest.approx(positions.mean())
    assert positions.mean() < -0.5
    assert style.controls["noise"].mmd == style.mmd(noise)
    assert style.controls["style"].position == pytest.approx(1, abs=0.3)
    assert style.controls["style"].mmd is None  # of three pictures


def test_kinds_that_cannot_be_told_apart_have_no_positions() -> None:
    style = measure_style(sample(30), sample(30, seed=1), {"noise": sample(4, 9.0)})
    assert style.auc is not None
    assert style.auc < 0.8
    assert style.reason == f"not separable here: AUC {style.auc:.2f}, must be at least 0.8"
    assert style.positions(sample(3)) is None
    assert style.controls["noise"].position is None
    assert style.controls["noise"].mmd is not None
    assert style.base_std is None
    assert style.base_mmd is not None  # the second witness needs no axis
    assert style.base_mmd.p > 0.01


@pytest.mark.parametrize(
    ("num_base", "num_real", "reason"),
    [(3, 8, "3 base pictures: .* draw more prompts"), (8, 0, "one of each kind")],
)
def test_too_few_pictures_are_not_measured(num_base: int, num_real: int, reason: str) -> None:
    style = measure_style(sample(num_base), sample(num_real, 2.0))
    assert style.auc is None
    assert style.reason is not None
    assert style.reason.startswith("not measured: ")
    assert re.search(reason, style.reason)
    assert style.base_mmd is None
    assert (style.null_mmd is None) == (num_real == 0)


def test_pictures_that_are_all_alike_are_not_measured() -> None:
    style = measure_style(np.ones((8, 5)), np.zeros((8, 5)))
    assert style.reason is not None
    assert "all alike" in style.reason


def test_features_of_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="both need rows of one width"):
        measure_style(sample(8), sample(8, width=3))


def test_the_discrepancy_falls_towards_the_style_and_keeps_prompts_together() -> None:
    base, real, nearer = sample(12), sample(16, 2.0, seed=1), sample(12, 1.2, seed=2)
    prompts = [f"prompt {n // 2}" for n in range(12)]
    style = measure_style(base, real, prompts=prompts)
    measured = style.mmd(nearer, prompts)
    assert measured is not None
    assert style.base_mmd is not None
    assert style.null_mmd is not None
    assert measured.value == squared_mmd(nearer, real)
    assert measured.p == mmd_p(nearer, real, groups=(prompts, list(range(16))))
    assert style.null_mmd[0] < 0 < style.null_mmd[1] < measured.value < style.base_mmd.value
    assert style.mmd(nearer[:3]) is None


def test_facts_are_json() -> None:
    controls = {"noise": sample(5, 4.0)}
    for style in (measure_style(sample(9), sample(9, 2.0), controls), measure_style(sample(2), sample(2))):
        facts = json.loads(json.dumps(style.facts()))
        assert facts["num_real"] == style.num_real
        assert facts["auc"] == style.auc
        assert facts["base_mmd"] == (style.base_mmd and vars(style.base_mmd))
    assert facts["null_mmd"] is None


def test_pictures_pass_through_the_vae_each_by_itself(base: Base) -> None:
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, size, dtype=np.uint8) for size in ((32, 32, 3), (16, 24, 3))]
    passed = through_vae(base, pictures)
    assert [picture.shape for picture in passed] == [(32, 32, 3), (16, 24, 3)]
    assert all(picture.dtype == np.uint8 for picture in passed)
    pixels = torch.from_numpy(pictures[1]).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = base.vae.decode(base.vae.encode(pixels).latent_dist.mean).sample[0]
    expected_bytes = ((expected.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    np.testing.assert_allclose(passed[1].astype(float), expected_bytes, atol=1)
    np.testing.assert_array_equal(through_vae(base, pictures[1:])[0], passed[1])
    assert through_vae(base, []) == []


@pytest.mark.parametrize("size", [(30, 32, 3), (32, 31, 3), (32, 32), (32, 32, 4)])
def test_pictures_that_the_vae_cannot_take_are_refused(base: Base, size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="both multiples of 4"):
        through_vae(base, [np.zeros(size, np.uint8)])


def test_the_pocket_scorer_tells_cartoons_from_coarse_ones_and_from_noise_and_paper() -> None:
    folder = Path(str(resources.files("lorascope") / "pocket" / "cartoon" / "data"))
    rows = pq.read_table(folder / "test-00000-of-00001.parquet").slice(0, 64)["image"].to_pylist()
    images = [Image.open(io.BytesIO(row["bytes"])).convert("RGB").resize((64, 64)) for row in rows]
    encoder = load_encoder(ScoreSection(), CPU)
    cartoons = encoder.encode_hidden(images)
    # What stands for the base's drawings: the same pictures with less detail.
    coarse = encoder.encode_hidden([image.resize((16, 16)).resize((64, 64)) for image in images])
    controls = {
        "noise": encoder.encode_hidden(draw_noise(4, 64)),
        "white": encoder.encode_hidden([np.full((64, 64, 3), 255, np.uint8)] * 4),
    }
    style = measure_style(coarse[:24], cartoons[24:48], controls)  # the last 16 are new in both kinds
    start, end = style.positions(coarse[48:]), style.positions(cartoons[48:])
    assert start is not None
    assert end is not None
    assert start.mean() == pytest.approx(0, abs=0.35)
    assert end.mean() == pytest.approx(1, abs=0.35)
    # Noise stands beyond the style on the axis; the other witness sees that it is something else.
    assert style.base_mmd is not None
    assert all(
        control.mmd.value > 10 * style.base_mmd.value for control in style.controls.values() if control.mmd
    )
