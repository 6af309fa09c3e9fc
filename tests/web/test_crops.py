"""What training would take of a picture is what training takes."""

import io

import numpy as np
import pytest
from PIL import Image

from lorascope.data.pictures import decode_picture
from lorascope.errors import ConfigError
from lorascope.web.crops import buckets_of, crop_of


@pytest.mark.parametrize("size", [(640, 480), (480, 720), (512, 512), (1200, 500), (3, 1000)])
@pytest.mark.parametrize("buckets", [False, True])
def test_the_part_that_is_drawn_is_the_part_that_is_decoded(size: tuple[int, int], buckets: bool) -> None:
    crop = crop_of(*size, buckets_of(256, buckets))
    whole = Image.linear_gradient("L").resize(size).convert("RGB")
    buffer = io.BytesIO()
    whole.save(buffer, format="PNG")
    kept = whole.crop((crop.left, crop.top, crop.right, crop.bottom))
    expected = kept.resize((crop.to_width, crop.to_height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    found = decode_picture(buffer.getvalue(), crop.to_width, crop.to_height)
    assert np.array_equal(found, np.asarray(expected))


def test_words_on_a_crop() -> None:
    crop = crop_of(640, 480, buckets_of(512, False))
    assert (crop.lost_percent, round(crop.enlarged, 2)) == (25, 1.07)
    assert crop.outline == "M0 0H640V480H0ZM80 0V480H560V0Z"
    assert (
        crop_of(1000, 500, buckets_of(512, True)).to_width
        > crop_of(500, 1000, buckets_of(512, True)).to_width
    )


@pytest.mark.parametrize(("resolution", "buckets"), [(0, False), (100, False), (8192, False), (16, True)])
def test_resolutions_that_no_study_has_are_refused(resolution: int, buckets: bool) -> None:
    with pytest.raises(ConfigError):
        buckets_of(resolution, buckets)
