"""What comes from a browser is taken with suspicion: names, zips, pictures that are none, full disks."""

import io
import os
import stat
import struct
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path

import pytest
from PIL import Image

from lorascope.errors import DataError, StorageError
from lorascope.web import uploads
from lorascope.web.uploads import Batch, Taken, arriving, safe_path, set_folder
from lorascope.web.workspace import MissingError, Workspace


def png(red: int = 0, side: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (red, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return set_folder(Workspace.open(tmp_path / "work"), "art")


def take(folder: Path, *files: tuple[str, bytes], batch: Batch | None = None) -> Taken:
    batch = batch or Batch(folder)
    for name, content in files:
        with arriving(folder, len(content)) as path:
            path.write_bytes(content)
            batch.take(name, path)
    assert not list(folder.glob(".arriving*"))
    return batch.taken


def zipped(*members: tuple[str | zipfile.ZipInfo, bytes], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_pictures_and_captions_are_taken(folder: Path) -> None:
    taken = take(folder, ("1.PNG", png()), ("1.txt", b"\xef\xbb\xbfa b\xc3\xa4r\r\n"))
    assert (taken.pictures, taken.captions, taken.left_out) == (["1.png"], ["1.txt"], [])
    assert (folder / "1.txt").read_text(encoding="utf-8") == "a bär\n"


def test_nothing_is_replaced_and_a_caption_follows_its_picture(folder: Path) -> None:
    take(folder, ("1.png", png(1)), ("1.txt", b"first"))
    taken = take(folder, ("1.jpg", png(2)), ("1.txt", b"second"))
    assert (taken.pictures, taken.captions) == (["1-2.jpg"], ["1-2.txt"])
    assert names(folder) == ["1-2.jpg", "1-2.txt", "1.png", "1.txt"]
    # Sent one by one, the page says which picture is meant.
    batch = Batch(folder)
    batch.beside("x.txt", "1-2.jpg")
    taken = take(folder, ("x.txt", b"third"), batch=batch)
    assert "another text" in taken.left_out[0][1]
    assert (folder / "1-2.txt").read_text() == "second"
    again = take(folder, ("1.png", png(1)), ("1.txt", b"first\n"))
    assert again.left_out == [("1.png", "is there already, as 1.png")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "SVG"),
        (b'<?xml version="1.0"?>\n<svg/>', "SVG"),
        (b"<!DOCTYPE html><script>alert(1)</script>", "web page"),
        (b"\xef\xbb\xbf <html></html>", "web page"),
        (b"GIF89a", "not an image"),
        (b"%PDF-1.4", "not an image"),
        (b"", "empty"),
    ],
)
def test_what_is_no_picture_is_refused_whatever_its_name_says(
    folder: Path, content: bytes, words: str
) -> None:
    taken = take(folder, ("1.png", content))
    assert words in taken.left_out[0][1]
    assert names(folder) == []


def test_pictures_of_too_many_pixels_are_refused(folder: Path) -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )
    assert "pixels" in take(folder, ("1.png", bomb)).left_out[0][1]


def test_captions_that_are_no_text_are_refused(folder: Path) -> None:
    taken = take(folder, ("1.txt", b"\xff\xff"), ("2.txt", b"x" * 70_000))
    assert ["UTF-8" in taken.left_out[0][1], "bytes" in taken.left_out[1][1]] == [True, True]


def test_other_files_are_named_as_left_out(folder: Path) -> None:
    taken = take(folder, ("a.exe", b""), (".png", b""), ("set.7z", b""), ("\udc80.png", b""))
    assert [reason.split(":")[0].split(" (")[0] for _, reason in taken.left_out] == [
        "neither a picture",
        "is hidden",
        "is packed itself",
        "its name is not UTF-8",
    ]


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("../../etc/passwd.png", "etc/passwd.png"),
        ("/etc/a.png", "etc/a.png"),
        ("C:\\a\\b.png", "C_/a/b.png"),
        ("\\\\host\\share\\a.png", "host/share/a.png"),
        ('a<b>:"|?*.png', "a_b______.png"),
        ("con.png", "_con.png"),
        ("a\x00\u202eb.png", "a__b.png"),
        ("x" * 300 + ".png", "x" * 120 + ".png"),
        ("...", "file"),
    ],
)
def test_names_are_made_safe(name: str, safe: str) -> None:
    assert safe_path(name) == safe


def test_a_zip_is_unpacked(folder: Path) -> None:
    content = zipped(
        ("10_cat/1.txt", b"a cat"), ("10_cat/1.png", png()), ("readme.md", b""), ("__MACOSX/._1.png", b"")
    )
    taken = take(folder, ("set.ZIP", content))
    assert (taken.pictures, taken.captions) == (["10_cat/1.png"], ["10_cat/1.txt"])
    assert [name for name, _ in taken.left_out] == ["readme.md", "__MACOSX/._1.png"]
    assert names(folder) == ["10_cat/1.png", "10_cat/1.txt"]


@pytest.mark.parametrize(
    "name", ["../1.png", "a/../../1.png", "/etc/1.png", "C:/1.png", "c:1.png", "\\\\host\\1.png", "..\\1.png"]
)
def test_members_that_lead_out_are_left_out(folder: Path, name: str) -> None:
    member = zipfile.ZipInfo("x")
    member.filename = member.orig_filename = name
    taken = take(folder, ("set.zip", zipped((member, png()), ("2.png", png()))))
    assert [reason for _, reason in taken.left_out] == ["its name leads out of the folder"]
    assert names(folder) == ["2.png"]
    assert names(folder.parent) == ["art/2.png"]


def test_links_in_a_zip_are_left_out(folder: Path) -> None:
    link = zipfile.ZipInfo("1.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    taken = take(folder, ("set.zip", zipped((link, b"/etc/passwd"))))
    assert "link" in taken.left_out[0][1]
    assert names(folder) == []


def test_zips_in_zips_and_deep_folders_are_left_out(folder: Path) -> None:
    inner = zipped(("1.png", png()))
    taken = take(folder, ("set.zip", zipped(("in.zip", inner), ("a/b/c/d/e/f/g/h/1.png", png()))))
    assert [reason.split(":")[0] for _, reason in taken.left_out] == [
        "is packed itself",
        "folders within folders too deep",
    ]


def test_a_zip_that_unpacks_to_far_more_is_refused(folder: Path) -> None:
    bomb = zipped(("1.png", bytes(40 * 2**20)))
    assert len(bomb) < 100_000
    taken = take(folder, ("bomb.zip", bomb))
    assert "times its own size" in taken.left_out[0][1]


def test_a_zip_of_too_many_members_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_FILES", 3)
    many = zipped(*((f"{index}.txt", b"") for index in range(4)))
    assert "4 members" in take(folder, ("many.zip", many)).left_out[0][1]
    # Its end may lie about how many there are.
    place = many.rfind(b"PK\5\6")
    lying = many[: place + 8] + struct.pack("<HH", 1, 1) + many[place + 12 :]
    assert "4 members" in take(folder, ("lying.zip", lying)).left_out[0][1]


def test_a_zip_whose_directory_is_huge_is_not_read(folder: Path) -> None:
    small = zipped(("1.png", png()))
    place = small.rfind(b"PK\5\6")
    huge = small[: place + 12] + struct.pack("<L", 2**30) + small[place + 16 :]
    assert "members" in take(folder, ("huge.zip", huge)).left_out[0][1]
    locator = b"PK\6\7" + bytes(16)
    assert "65,000" in take(folder, ("64.zip", small[:place] + locator + small[place:])).left_out[0][1]


def test_a_member_larger_than_it_says_or_damaged_is_left_out(folder: Path) -> None:
    whole = zipped(("1.png", png(side=64)), ("2.png", png(3)), packing=zipfile.ZIP_STORED)
    damaged = whole.replace(b"IDAT", b"IDXT", 1)
    taken = take(folder, ("set.zip", damaged), ("no.zip", b"no zip"), ("cut.zip", whole[:-30]))
    assert "cannot be unpacked" in taken.left_out[0][1]
    assert taken.pictures == ["2.png"]
    assert taken.left_out[1] == ("no.zip", "not a zip")
    assert taken.left_out[2][0] == "cut.zip"


def test_encrypted_members_are_left_out(folder: Path) -> None:
    content = bytearray(zipped(("1.png", png())))
    content[content.find(b"PK\1\2") + 8] |= 1
    assert take(folder, ("set.zip", bytes(content))).left_out == [("1.png", "is encrypted")]


def test_a_full_disk_is_one_clear_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**40, 2**40, 2**28))
    with pytest.raises(StorageError, match="disk is full"):
        take(folder, ("1.png", png()))


def test_a_disk_that_fills_up_meanwhile_too(folder: Path) -> None:
    with pytest.raises(StorageError, match="disk is full"), arriving(folder, 1):
        raise OSError(28, "No space left on device")
    assert not list(folder.glob(".arriving*"))


def test_what_a_killed_server_left_is_removed(folder: Path) -> None:
    old, new = folder / ".arriving-old", folder / ".arriving-new"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    batch = Batch(folder)
    path = folder / ".arriving-this"
    path.write_bytes(png())
    batch.take("1.png", path)
    assert [old.exists(), new.exists()] == [False, True]


def test_a_set_has_bounds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take(folder, ("1.png", png()))
    monkeypatch.setattr(uploads, "MAX_SET_BYTES", 100)
    with pytest.raises(DataError, match="would have more"):
        take(folder, ("2.png", png(2)))
    monkeypatch.setattr(uploads, "MAX_FILES", 1)
    with pytest.raises(DataError, match="1 files"):
        take(folder, ("2.png", png(2)))


def test_a_set_is_a_folder_of_its_own(tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path / "work")
    for name in ("..", "a/b", "", ".hidden"):
        with pytest.raises(MissingError):
            set_folder(workspace, name)
    workspace.pictures_dir.mkdir()
    (workspace.pictures_dir / "link").symlink_to(tmp_path)
    with pytest.raises(DataError):
        set_folder(workspace, "link")


def test_folders_that_lead_out_or_are_files_are_not_written_into(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (folder / "a").symlink_to(tmp_path / "out")
    (folder / "b").write_text("a file")
    taken = take(folder, ("set.zip", zipped(("a/1.png", png()), ("b/1.png", png()))))
    assert [reason for _, reason in taken.left_out] == [
        "its folder is a link that leads out of the set",
        "a file stands where its folder should be",
    ]
    assert names(tmp_path / "out") == []
