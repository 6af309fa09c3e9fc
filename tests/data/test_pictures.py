"""Pictures: every treatment and refusal on real files, hashes, buckets."""

import hashlib
import io
import re
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorascope.data.pictures import (
    MAX_PIXELS,
    RefusedError,
    _orientation,
    choose_bucket,
    decode_picture,
    examine_picture,
    picture_size,
    plan_buckets,
)
from samples import SIDE, encode, pixels


def single(image: bytes) -> tuple[np.ndarray, list[str], str | None]:
    """Pixels, treatments and refusal of an image file."""
    try:
        facts = examine_picture(image)
    except RefusedError as error:
        with pytest.raises(RefusedError, match=re.escape(str(error))):
            decode_picture(image, SIDE, SIDE)
        return np.zeros(0), [], str(error)
    return decode_picture(image, SIDE, SIDE), list(facts.treatments), None


# Treatments -------------------------------------------------------------------------------------------------


def test_rgb_is_left_alone() -> None:
    loaded, treatments, refused = single(encode(pixels(99)))
    np.testing.assert_array_equal(loaded, pixels(99))
    assert (treatments, refused) == ([], None)


def test_opaque_alpha_is_no_treatment() -> None:
    loaded, treatments, _ = single(encode(Image.fromarray(pixels(99)).convert("RGBA")))
    np.testing.assert_array_equal(loaded, pixels(99))
    assert treatments == []


def test_cmyk_jpeg() -> None:
    loaded, treatments, _ = single(
        encode(Image.new("CMYK", (SIDE, SIDE), (10, 20, 30, 40)), "JPEG", quality=100)
    )
    expected = [round((255 - ink) * (255 - 40) / 255) for ink in (10, 20, 30)]
    assert np.abs(loaded.astype(int) - expected).max() <= 1
    assert treatments == ["CMYK converted to RGB"]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grayscale_is_scaled(kind: str) -> None:
    values = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 257
    loaded, treatments, _ = single(encode(values, kind))
    np.testing.assert_array_equal(loaded, np.repeat((values // 257).astype(np.uint8)[..., None], 3, axis=2))
    assert treatments == ["16 bits a channel scaled to 8", "grayscale converted to RGB"]


def test_16_bit_rounds_to_nearest() -> None:
    values = np.full((SIDE, SIDE), 65535, np.uint16)
    values[0, :4] = [128, 129, 65406, 65407]
    loaded, _, _ = single(encode(values))
    assert loaded[0, :5, 0].tolist() == [0, 1, 254, 255, 255]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    import zlib

    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_16_bit_rgb() -> None:
    import zlib

    wide = pixels(99).astype(">u2") * 257
    lines = b"".join(b"\0" + line.tobytes() for line in wide)
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(lines)) + png_chunk(b"IEND", b"")
    loaded, treatments, _ = single(b"\x89PNG\r\n\x1a\n" + chunks)
    np.testing.assert_array_equal(loaded, pixels(99))
    assert treatments == ["16 bits a channel scaled to 8"]


def test_16_bit_transparent_value_becomes_white() -> None:
    values = np.full((SIDE, SIDE), 100 * 257, np.uint16)
    values[:4] = 7 * 257
    image = encode(values)
    end_of_header = 8 + 25
    clear = png_chunk(b"tRNS", struct.pack(">H", 7 * 257))
    loaded, treatments, _ = single(image[:end_of_header] + clear + image[end_of_header:])
    assert (loaded[:4] == 255).all()
    assert (loaded[4:] == 100).all()
    assert "transparency composited on white" in treatments


def test_palette_with_transparency() -> None:
    image = Image.new("P", (SIDE, SIDE), 0)
    image.putpalette([200, 10, 20, 0, 100, 0])
    image.paste(1, (0, 0, SIDE, 4))
    loaded, treatments, _ = single(encode(image, transparency=1))
    assert (loaded[:4] == 255).all()
    assert (loaded[4:] == [200, 10, 20]).all()
    assert treatments == ["palette converted to RGB", "transparency composited on white"]


def test_rgba_is_composited_on_white() -> None:
    image = np.full((SIDE, SIDE, 4), (0, 0, 0, 51), np.uint8)
    loaded, treatments, _ = single(encode(image))
    assert (loaded == 204).all()
    assert treatments == ["transparency composited on white"]


def test_gray_with_alpha() -> None:
    loaded, treatments, _ = single(encode(Image.new("LA", (SIDE, SIDE), (40, 0))))
    assert (loaded == 255).all()
    assert treatments == ["grayscale converted to RGB", "transparency composited on white"]


@pytest.mark.parametrize(("mode", "value"), [("L", 77), ("1", 255)])
def test_grayscale(mode: str, value: int) -> None:
    image = Image.new(mode, (SIDE, SIDE), value)
    image.paste(0, (0, 0, 4, SIDE))
    loaded, treatments, _ = single(encode(image))
    assert (loaded[:, 4:] == value).all()
    assert (loaded[:, :4] == 0).all()
    assert treatments == ["grayscale converted to RGB"]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_animation_gives_its_first_frame(kind: str) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    first, *others = (Image.new("RGB", (SIDE, SIDE), colour) for colour in colours)
    loaded, treatments, _ = single(encode(first, kind, save_all=True, append_images=others, lossless=True))
    assert np.abs(loaded.astype(int) - colours[0]).max() <= (1 if kind == "MPO" else 0)
    assert treatments[0] == "first of 3 frames used"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, kind: str) -> None:
    upright = np.zeros((SIDE, SIDE, 3), np.uint8)
    upright[:8, :8] = (250, 0, 0)
    upright[8:, :8] = (0, 250, 0)
    to_stored: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    image = encode(np.ascontiguousarray(to_stored[orientation](upright)), kind, exif=exif, **options)
    loaded, treatments, _ = single(image)
    assert np.abs(loaded.astype(int) - upright).max() <= (6 if kind == "JPEG" else 0)
    assert treatments == ([] if orientation == 1 else [f"turned upright (EXIF orientation {orientation})"])


def test_damaged_exif_is_ignored() -> None:
    image = encode(pixels(99), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    loaded, treatments, refused = single(image)
    np.testing.assert_array_equal(loaded, pixels(99))
    assert (treatments, refused) == ([], None)


def test_exif_that_makes_pillow_raise_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (1, 1))
    monkeypatch.setattr(image, "getexif", lambda: struct.unpack("<I", b""))
    assert _orientation(image) == 1


def test_wide_and_tall_pictures_are_cropped_about_the_centre() -> None:
    wide = np.zeros((SIDE, 3 * SIDE + 1, 3), np.uint8)
    wide[:, SIDE : 2 * SIDE] = pixels(99)
    for image in (wide, wide.transpose(1, 0, 2)):
        loaded, treatments, _ = single(encode(np.ascontiguousarray(image)))
        np.testing.assert_array_equal(loaded, pixels(99) if image is wide else pixels(99).transpose(1, 0, 2))
        assert treatments == []


def test_resizing_is_lanczos() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    loaded, _, _ = single(encode(image))
    np.testing.assert_array_equal(loaded, np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)))


# Refusals ---------------------------------------------------------------------------------------------------


def float_tiff() -> bytes:
    return encode(Image.new("F", (SIDE, SIDE), 0.5), "TIFF")


def wide_tiff() -> bytes:
    return encode(Image.fromarray(np.full((SIDE, SIDE), 70_000, np.int32)), "TIFF")


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "the image file is empty"),
        (b"not a picture", "not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image in a known format"),
        (
            encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))[:2000],
            "unreadable image: ",
        ),
        (encode(pixels(1, 64), "JPEG", quality=95)[:-20], "unreadable image: image file is truncated"),
        (encode(pixels(1))[:30], ""),
        (float_tiff(), "32-bit pixels: save the picture with 8 or 16 bits"),
        (wide_tiff(), "32-bit pixels"),
    ],
    ids=["zero bytes", "text", "eps", "truncated png", "truncated jpeg", "png header", "float", "32 bits"],
)
def test_pictures_that_cannot_be_used(image: Any, reason: str) -> None:
    loaded, treatments, refused = single(image)
    assert refused is not None
    assert refused.startswith(reason)
    assert "0x" not in refused
    assert (loaded.size, treatments) == (0, [])


def flips(content: bytes, count: int) -> list[bytes]:
    """The file with each of `count` bits turned over, drawn without repetition."""
    bits = np.random.default_rng(0).permutation(8 * len(content))[:count].tolist()
    flipped = np.array([list(content)] * len(bits), np.uint8)
    for row, bit in zip(flipped, bits, strict=True):
        row[bit // 8] ^= 1 << bit % 8
    return [row.tobytes() for row in flipped]


def pillow_refuses(content: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except Exception:
        return True
    return False


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True}), ("WEBP", {"quality": 80}), ("GIF", {})],
)
def test_of_all_flips_of_a_bit_what_pillow_refuses_is_refused(kind: str, options: dict[str, Any]) -> None:
    content = encode(pixels(3), kind, **options)
    damaged = flips(content, 300)
    refused = [image for image in damaged if pillow_refuses(image)]
    assert refused
    for image in refused:
        with pytest.raises(RefusedError):
            examine_picture(image)


@pytest.mark.parametrize("side", [16, 64])
def test_no_png_with_a_flipped_bit_gives_other_pixels(side: int) -> None:
    """Its checksums tell, those of the pixels too, which Pillow does not compare as it decodes."""
    content = encode(pixels(3, side))
    num_refused = 0
    for image in flips(content, 400):
        try:
            loaded = decode_picture(image, side, side)
        except RefusedError:
            num_refused += 1
        else:
            np.testing.assert_array_equal(loaded, pixels(3, side))
    assert num_refused > 350


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True}), ("WEBP", {}), ("GIF", {})]
)
def test_pictures_cut_short_are_refused(kind: str, options: dict[str, Any]) -> None:
    content = encode(Image.fromarray(pixels(3)).resize((64, 64)), kind, **options)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(RefusedError):
            examine_picture(content[: int(share * len(content))])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_with_too_many_pixels() -> None:
    _, _, refused = single(encode(Image.new("1", (9000, 8000))))
    assert refused == f"9000 x 8000 pixels are more than the limit of {MAX_PIXELS}"
    _, _, refused = single(encode(Image.new("1", (10_000, 9_000))))  # Pillow warns from here on
    assert refused == f"10000 x 9000 pixels are more than the limit of {MAX_PIXELS}"
    _, _, refused = single(encode(Image.new("1", (20_000, 10_000))))  # and stops from here on
    assert refused == f"the picture has more pixels than the limit of {MAX_PIXELS}"


def test_a_picture_that_claims_more_pixels_than_memory_has() -> None:
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    content = (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    )
    tracemalloc.start()
    _, _, refused = single(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused == f"the picture has more pixels than the limit of {MAX_PIXELS}"
    assert peak < 2**20


def test_a_decoder_without_memory_refuses_the_picture_and_not_for_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", fail)
    with pytest.raises(RefusedError, match="unreadable image: MemoryError") as caught:
        examine_picture(encode(pixels(1)))
    assert isinstance(caught.value.__cause__, MemoryError)


# Facts ------------------------------------------------------------------------------------------------------


def test_facts() -> None:
    content = encode(np.concatenate([pixels(1), pixels(2)], axis=1))
    facts = examine_picture(content)
    assert facts.digest == hashlib.sha256(content).hexdigest()
    assert (facts.width_px, facts.height_px, facts.treatments) == (2 * SIDE, SIDE, ())
    middle = np.concatenate([pixels(1)[:, SIDE // 2 :], pixels(2)[:, : SIDE // 2]], axis=1)
    np.testing.assert_array_equal(np.frombuffer(facts.thumbnail, np.uint8).reshape(SIDE, SIDE, 3), middle)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_sizes_are_those_of_the_upright_picture(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(Image.new("RGB", (30, 20), "red"), kind, exif=exif)
    facts = examine_picture(content)
    assert (facts.width_px, facts.height_px) == ((20, 30) if orientation == 6 else (30, 20))
    assert picture_size(io.BytesIO(content)) == (facts.width_px, facts.height_px)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not a picture", "not an image in a known format"),
        (encode(pixels(1))[:20], "image"),
        (encode(Image.new("1", (9000, 8000))), "9000 x 8000 pixels are more than the limit"),
        (encode(Image.new("1", (20_000, 10_000))), "the picture has more pixels than the limit"),
    ],
    ids=["text", "cut", "large", "huge"],
)
def test_headers_of_pictures_that_cannot_be_used(content: bytes, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        picture_size(io.BytesIO(content))


def test_large_jpegs_are_looked_at_in_an_eighth_of_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(pixels(3)).resize((2100, 2060), Image.Resampling.BICUBIC)
    content = encode(image, "JPEG", quality=90)
    facts = examine_picture(content)
    assert (facts.width_px, facts.height_px) == (2100, 2060)
    exif = Image.Exif()
    exif[0x010E] = "another description"
    other = examine_picture(encode(image, "JPEG", quality=90, exif=exif))
    assert (other.pixel_digest, other.hash, other.thumbnail) == (
        facts.pixel_digest,
        facts.hash,
        facts.thumbnail,
    )
    assert other.digest != facts.digest
    exif[0x0112] = 6
    turned = examine_picture(encode(image, "JPEG", quality=90, exif=exif))
    assert (turned.width_px, turned.height_px) == (2060, 2100)
    whole = examine_picture(
        encode(Image.open(io.BytesIO(content)).copy())
    )  # the same pixels as PNG: a near duplicate
    assert (whole.hash ^ facts.hash).bit_count() <= 1
    thumbnails = (np.frombuffer(of.thumbnail, np.uint8).astype(int) for of in (whole, facts))
    assert np.abs(np.subtract(*thumbnails)).mean() < 1
    with pytest.raises(RefusedError, match="truncated"):
        examine_picture(content[:-2000])


# Buckets ----------------------------------------------------------------------------------------------------


def test_buckets_are_those_of_sd_scripts() -> None:
    """The sizes that its documentation and logs show for 512 x 512 with sides of 256 to 1,024 and steps of
    64.
    """
    tall = [(256, 1024), (256, 960), (256, 896), (256, 832), (320, 768), (320, 704), (384, 640), (448, 576)]
    expected = {*tall, (512, 512), *((height, width) for width, height in tall)}
    assert set(plan_buckets(512, 64, 4.0)) == expected


@pytest.mark.parametrize(
    ("resolution", "step", "ratio"),
    [(512, 64, 2.0), (768, 64, 3.0), (64, 8, 2.0), (500, 64, 1.5), (512, 8, 8.0)],
)
def test_buckets_fit_the_area_the_steps_and_the_ratio(resolution: int, step: int, ratio: float) -> None:
    buckets = plan_buckets(resolution, step, ratio)
    for width, height in buckets:
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        assert max(width, height) <= ratio * min(width, height)
        assert (height, width) in buckets
    shapes = [width / height for width, height in buckets]
    assert shapes == sorted(shapes)
    assert (resolution // step * step,) * 2 in buckets


def test_no_bucket_of_a_step_that_is_too_large() -> None:
    assert plan_buckets(48, 64, 2.0) == []


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1000, 1000), (512, 512)),
        ((1000, 1010), (512, 512)),
        ((3000, 2000), (640, 384)),
        ((2000, 3000), (384, 640)),
        ((5000, 100), (640, 384)),
        ((1, 5000), (384, 640)),
        ((900, 700), (576, 448)),
    ],
)
def test_the_bucket_of_the_nearest_shape(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert choose_bucket(*size, plan_buckets(512, 64, 2.0)) == bucket


def test_a_picture_covers_its_bucket_and_is_cropped_about_the_centre() -> None:
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 20:80] = 200  # 60 x 40 in the middle
    loaded = decode_picture(encode(image), 48, 32)
    assert loaded.shape == (32, 48, 3)
    assert (loaded == 200).all()
    assert decode_picture(encode(np.full((3, 900, 3), 9, np.uint8)), 16, 64).shape == (64, 16, 3)
