"""Small pictures: kept, made anew with their file, and files that are no pictures."""

import errno
import io
import os
from pathlib import Path

import pytest
from PIL import Image

from lorascope.data.pictures import RefusedError
from lorascope.web.thumbnails import SIDES, thumbnail
from lorascope.web.workspace import MissingError


def draw(path: Path, width: int, height: int, colour: str = "red", **options: object) -> Path:
    Image.new("RGB", (width, height), colour).save(path, **options)  # type: ignore[arg-type]
    return path


def opened(content: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(content))
    assert picture.format == "WEBP"
    return picture


@pytest.mark.parametrize(
    ("asked", "side"), [(256, 256), (1, 96), (-5, 96), (97, 160), (1000, 1024), (10**30, 1024), (0, 96)]
)
def test_sides_are_of_a_few_sizes(tmp_path: Path, asked: int, side: int) -> None:
    path = draw(tmp_path / "a.png", 2000, 1000)
    assert opened(thumbnail(path, asked, tmp_path / "kept")).size == (side, side // 2)
    assert side in SIDES


def test_small_pictures_stay_pixel_for_pixel(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture = Image.frombytes("RGB", (128, 100), os.urandom(128 * 100 * 3))
    picture.save(path)
    assert opened(thumbnail(path, 96, tmp_path / "kept")).convert("RGB").tobytes() == picture.tobytes()


@pytest.mark.parametrize("size", [(16_384, 1), (1, 20_000), (4000, 4000)])
def test_pictures_longer_than_webp_can_hold(tmp_path: Path, size: tuple[int, int]) -> None:
    path = draw(tmp_path / "a.png", *size)
    assert max(opened(thumbnail(path, 256, tmp_path / "kept")).size) <= 256


def test_a_thumbnail_is_kept_until_its_file_changes(tmp_path: Path) -> None:
    path, kept = draw(tmp_path / "a.png", 400, 400), tmp_path / "kept"
    first = thumbnail(path, 256, kept)
    [file] = kept.rglob("*.webp")
    file.write_bytes(b"kept")
    assert thumbnail(path, 256, kept) == b"kept"
    assert thumbnail(path, 96, kept) != b"kept"
    draw(path, 400, 400, "blue")
    os.utime(path, (1, 1))
    second = thumbnail(path, 256, kept)
    assert second not in (first, b"kept")
    path.unlink()
    with pytest.raises(MissingError, match=r"a\.png: is not there any more"):
        thumbnail(path, 256, kept)


def test_nothing_but_pixels_is_sent(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "<script>alert(1)</script>"
    path = draw(tmp_path / "a.jpg", 300, 300, exif=exif.tobytes(), comment=b"<script>secret</script>")
    assert b"script" in path.read_bytes()
    assert b"script" not in thumbnail(path, 256, tmp_path / "kept")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        b"<!DOCTYPE html><script>alert(1)</script>",
        b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
        b"%PDF-1.4",
        b"\xff\xd8\xff\xe0" + b"x" * 100,
    ],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(RefusedError):
        thumbnail(path, 256, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_picture_of_too_many_pixels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (14_000, 14_000)).save(path)
    assert path.stat().st_size < 10**6
    with pytest.raises(RefusedError):
        thumbnail(path, 256, tmp_path / "kept")


def test_what_is_no_file_is_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path, Path("/dev/zero"), tmp_path / ("x" * 300)):
        with pytest.raises(MissingError):
            thumbnail(path, 256, tmp_path / "kept")


def test_a_full_disk_costs_the_kept_copy_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = draw(tmp_path / "a.png", 300, 300)
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    assert opened(thumbnail(path, 256, tmp_path / "kept")).size == (256, 256)
    assert not list(tmp_path.rglob("*.webp"))
