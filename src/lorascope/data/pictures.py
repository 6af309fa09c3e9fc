"""Image files to pixels: what is refused, what has to be done to a picture, what tells two pictures apart,
and buckets.

Files are not trusted. Sizes are looked at before anything is decoded, and what a decoder raises becomes the
reason for which a picture is refused.
"""

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from lorascope.errors import first_line

MAX_PIXELS = 64 * 2**20
MAX_FILE_BYTES = 512 * 2**20
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"))
THUMBNAIL_SIDE = 16

Image.init()
_FORMATS = tuple(name for name in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF") if name in Image.OPEN)
_REDUCED_JPEG_SIDE = 2048
_BORDER_NOISE = 10  # of 255
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class RefusedError(Exception):
    """A picture or caption that cannot be used; the message is the reason that is reported."""


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """What a look at an image file's bytes tells, apart from where it stands and what it is called.

    `digest` is the SHA-256 of the bytes as 64 hex digits, `pixel_digest` that of the upright RGB pixels,
    `width_px` and `height_px` the upright size. `hash` has 64 bits and `thumbnail` holds uint8 [16, 16, 3],
    both of the centre square. `content` holds uint8 [16, 16, 3] too, of the whole picture without a border of
    one colour, brought to a square, and `content_width_px` and `content_height_px` are the size of that part.
    `treatments` says what was done to get RGB pixels.
    """

    digest: str
    pixel_digest: bytes
    hash: int
    thumbnail: bytes
    content: bytes
    width_px: int
    height_px: int
    content_width_px: int
    content_height_px: int
    treatments: tuple[str, ...]


def examine_picture(content: bytes) -> PictureFacts:
    """The facts of an image file, as it stands in `content`; raise `RefusedError` if it cannot be used.

    A JPEG whose shorter side has 2,048 pixels or more is decoded at an eighth of its size, which takes a
    fraction of the time and still shows whether the file is whole: its hash and thumbnail come from that, and
    its `pixel_digest` equals that of JPEGs with the same pixels, but not that of a PNG.
    """
    picture, treatments, (width, height) = _decode(content, reduced=True)
    square = _crop(picture, 1, 1)
    pixels = hashlib.sha256(f"{width}x{height}:".encode() + picture.tobytes())
    thumbnail = square.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX).tobytes()
    box = _content_box(picture)
    return PictureFacts(
        digest=hashlib.sha256(content).hexdigest(),
        pixel_digest=pixels.digest(),
        hash=_difference_hash(square),
        thumbnail=thumbnail,
        content=picture.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BILINEAR, box).tobytes(),
        width_px=width,
        height_px=height,
        content_width_px=round((box[2] - box[0]) * width / picture.width),
        content_height_px=round((box[3] - box[1]) * height / picture.height),
        treatments=tuple(treatments),
    )


def open_picture(content: bytes) -> Image.Image:
    """The whole picture of an image file, at its own size, upright, RGB on white as `decode_picture` has it.

    Raises `RefusedError` if the picture cannot be used.
    """
    return _decode(content, reduced=False)[0]


def picture_size(file: BinaryIO) -> tuple[int, int]:
    """The upright width and height of an image file, from its header alone.

    Raises `RefusedError` where the header shows that the picture cannot be used.
    """
    try:
        with Image.open(file, formats=_FORMATS) as image:
            width, height = image.size
            if isinstance(image, TiffImagePlugin.TiffImageFile):  # turned at once by some versions of Pillow
                width, height = image.tag_v2[256], image.tag_v2[257]
            # A PNG whose EXIF does not stand before its pixels would be decoded by the question.
            asked = image.format != "PNG" or "exif" in image.info
            if asked and _orientation(image) >= 5:
                width, height = height, width
    except UnidentifiedImageError as error:
        raise _unknown_format() from error
    except Image.DecompressionBombError as error:
        raise RefusedError(f"the picture has more pixels than the limit of {MAX_PIXELS}") from error
    except Exception as error:  # decoders raise errors of any type on damaged files
        raise RefusedError(f"unreadable image: {first_line(error)}") from error
    if width * height > MAX_PIXELS:
        raise RefusedError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}")
    return width, height


def _unknown_format() -> RefusedError:
    return RefusedError(f"not an image in a known format ({', '.join(_FORMATS)}): convert it to one of these")


def decode_picture(content: bytes, width_px: int, height_px: int) -> np.ndarray:
    """The picture of an image file, centre-cropped to a shape and resized: uint8 [height_px, width_px, 3],
    RGB.

    Transparency is put on white, 16-bit grey v becomes round(v / 257), EXIF orientation is applied, colour
    profiles are not. Raises `RefusedError` if the picture cannot be used.
    """
    # A reducing gap of 3 box-averages what is far larger first; the result is that of plain Lanczos to the
    # eye.
    part = _crop(open_picture(content), width_px, height_px)
    return np.array(part.resize((width_px, height_px), Image.Resampling.LANCZOS, reducing_gap=3.0))


def _decode(content: bytes, reduced: bool) -> tuple[Image.Image, list[str], tuple[int, int]]:
    """The picture as 8-bit RGB, what had to be done to it, and its full upright width and height."""
    if not content:
        raise RefusedError("the image file is empty")
    treatments = []
    try:
        with _open(content) as image:
            full = image.size
            if full[0] * full[1] > MAX_PIXELS:
                raise RefusedError(f"{full[0]} x {full[1]} pixels are more than the limit of {MAX_PIXELS}")
            if (num_frames := getattr(image, "n_frames", 1)) > 1:
                treatments.append(f"first of {num_frames} frames used")
            # A TIFF is turned as it is loaded, and then says 1. Others are loaded first: a PNG would be
            # loaded by the question itself, and what is wrong with it never heard of.
            declared = _orientation(image) if image.format == "TIFF" else 1
            if is_reduced := reduced and image.format == "JPEG" and min(full) >= _REDUCED_JPEG_SIDE:
                image.draft(None, (full[0] // 8, full[1] // 8))
            image.load()
            orientation = _orientation(image)
            declared = max(declared, orientation)
            is_deep_png = image.format == "PNG" and content[24] == 16  # bits a channel, in the header
            if image.mode.startswith("I;16") or is_deep_png:
                treatments.append("16 bits a channel scaled to 8")
            if image.mode in ("1", "L", "LA", "I") or image.mode.startswith("I;16"):
                treatments.append("grayscale converted to RGB")
            elif image.mode in ("P", "PA"):
                treatments.append("palette converted to RGB")
            elif image.mode not in ("RGB", "RGBA"):
                treatments.append(f"{image.mode} converted to RGB")
            picture, is_transparent = _to_rgb(image)
            if is_transparent:
                treatments.append("transparency composited on white")
    except RefusedError:
        raise
    except Image.DecompressionBombError as error:
        raise RefusedError(f"the picture has more pixels than the limit of {MAX_PIXELS}") from error
    except UnidentifiedImageError as error:
        raise _unknown_format() from error
    except Exception as error:  # decoders raise errors of any type on damaged files
        raise RefusedError(f"unreadable image: {first_line(error)}") from error
    if declared in _TURNS:
        treatments.append(f"turned upright (EXIF orientation {declared})")
    if orientation in _TURNS:
        picture = picture.transpose(_TURNS[orientation])
    if not is_reduced:
        return picture, treatments, picture.size
    return picture, treatments, full if orientation < 5 else (full[1], full[0])


def _open(content: bytes) -> Image.Image:
    """The image file, opened; of a PNG all checksums hold, which decoding alone does not look at."""
    image = Image.open(io.BytesIO(content), formats=_FORMATS)
    if image.format != "PNG":
        return image
    image.verify()
    return Image.open(io.BytesIO(content), formats=_FORMATS)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a picture with damaged EXIF is used as it stands
        return 1


def _to_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """A loaded image as RGB on white, and whether anything of it was transparent."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
            raise RefusedError("32-bit pixels: save the picture with 8 or 16 bits a channel")
        clear = values == image.info.get("transparency", -1)
        grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return Image.fromarray(np.where(clear, np.uint8(255), grey)).convert("RGB"), bool(clear.any())
    if not image.has_transparency_data:
        return image.convert("RGB"), False
    layers = image.convert("RGBA")
    is_transparent = layers.getchannel("A").getextrema() != (255, 255)
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert(
        "RGB"
    ), is_transparent


def _crop(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The largest centred part of the picture with the shape of `width` x `height`, to the nearest pixel."""
    return picture.crop(crop_box(picture.width, picture.height, width, height))


def crop_box(width_px: int, height_px: int, to_width: int, to_height: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part of a picture that is kept for the shape of `to_width` x
    `to_height`.
    """
    scale = max(to_width / width_px, to_height / height_px)
    part_width = min(width_px, max(1, round(to_width / scale)))
    part_height = min(height_px, max(1, round(to_height / scale)))
    left, top = (width_px - part_width) // 2, (height_px - part_height) // 2
    return left, top, left + part_width, top + part_height


def _difference_hash(square: Image.Image) -> int:
    """64 bits: whether each of 8 x 8 cells is darker than its right neighbour, by more than the noise of JPEG
    on flat areas.
    """
    cells = np.asarray(square.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(np.diff(cells, axis=1) > 2).tobytes(), "big")  # of 255


def _content_box(picture: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the picture without borders of one colour; of one colour, all of it."""
    pixels = np.asarray(picture)
    left, top, right, bottom = 0, 0, picture.width, picture.height
    for turned in (False, True) * 3:  # borders within borders of other colours, and plain ground
        part = pixels[top:bottom, left:right]
        lines = part.transpose(1, 0, 2) if turned else part
        first, last = _count_plain(lines), _count_plain(lines[::-1])
        if first + last >= len(lines):
            return 0, 0, picture.width, picture.height
        if turned:
            left, right = left + first, right - last
        else:
            top, bottom = top + first, bottom - last
    return left, top, right, bottom


def _count_plain(lines: np.ndarray) -> int:
    """How many of the first lines, uint8 [n, m, 3], have the colour of the first, up to the noise of JPEG."""
    colour = lines[0].mean(axis=0)
    return next(
        (number for number, line in enumerate(lines) if np.abs(line - colour).max() > _BORDER_NOISE),
        len(lines),
    )


# Buckets ----------------------------------------------------------------------------------------------------


def plan_buckets(resolution_px: int, step_px: int, max_ratio: float) -> list[tuple[int, int]]:
    """Widths and heights that pictures of different shapes are brought to, narrowest first; none if `step_px`
    is too large.

    Sides are multiples of `step_px`, the area is at most `resolution_px` squared, and the longer side at most
    `max_ratio` times the shorter: for each width the greatest such height, and the same turned. With a ratio
    of 4 these are the sizes of kohya's sd-scripts (`make_bucket_resolutions` in library/model_util.py).
    """
    sizes = set()
    for width in range(step_px, int(resolution_px * max_ratio) + 1, step_px):
        height = resolution_px**2 // width // step_px * step_px
        if height and max(width, height) <= max_ratio * min(width, height):
            sizes |= {(width, height), (height, width)}
    square = resolution_px // step_px * step_px
    return sorted(
        sizes | ({(square, square)} if square else set()), key=lambda size: (size[0] / size[1], size)
    )


def choose_bucket(width_px: int, height_px: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose shape is nearest a picture's, of two equally near ones the larger.

    Shapes are compared by the logarithm of width / height, so that a tall picture is treated as the same
    picture lying on its side; sd-scripts compares width / height itself (`BucketManager.select_bucket`).
    """
    shape = math.log(width_px / height_px)
    return min(
        buckets, key=lambda bucket: (abs(math.log(bucket[0] / bucket[1]) - shape), -bucket[0] * bucket[1])
    )
