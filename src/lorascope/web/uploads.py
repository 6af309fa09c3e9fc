"""Pictures, captions and zips from a browser, taken into a set with suspicion.

Names are made safe and never replace a file. A picture is taken once it was decoded, whatever its name says;
a zip is read only after its list of members is known to be within bounds. What is not taken is named with the
reason. Files appear whole or not at all.
"""

import re
import secrets
import shutil
import stat
import struct
import threading
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lorascope.console import size
from lorascope.data.captions import MAX_CAPTION_BYTES, caption_in, decode_text
from lorascope.data.folders import walk
from lorascope.data.names import is_unicode, shown
from lorascope.data.pictures import MAX_FILE_BYTES, SUFFIXES, RefusedError, open_picture
from lorascope.errors import DataError, StorageError
from lorascope.store import read_regular, storage_errors, write_bytes
from lorascope.web.workspace import Workspace, require_name

MAX_FILES = 20_000
"""Files of a set, and members of a zip."""
MAX_SET_BYTES = 32 * 2**30
MAX_ZIP_BYTES = 4 * 2**30 - 1
MAX_RATIO = 100
"""Bytes of a zip's members for each byte of the zip."""

_RATIO_FROM_BYTES = 16 * 2**20
_MAX_DIRECTORY_BYTES = 16 * 2**20
_SPARE_BYTES = 256 * 2**20
_MAX_DEPTH = 6
_MAX_NAME_BYTES = 120
_CAPTION_SUFFIXES = (".txt", ".caption")
_PACKED = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_WINDOWS_NAMES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\.|$)")
_END = struct.Struct("<4s4H2LH")  # the end of a zip's directory
_END_MARK, _ZIP64_MARK = b"PK\5\6", b"PK\6\7"
_MEASURED_FOR_S = 60.0
_STALE_S = 86_400.0

_decoding = threading.BoundedSemaphore(2)  # a picture in full may take some hundred megabytes
_placing = threading.Lock()  # choosing a free name and writing it are one
_measuring = threading.Lock()
_measured: dict[Path, tuple[float, int, int]] = {}


@dataclass
class Taken:
    """What became of files that were sent: names of pictures and captions in the set, and what was left out,
    with the reason.
    """

    pictures: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def set_folder(workspace: Workspace, name: str) -> Path:
    """The folder of an uploaded set, which is made; raises `MissingError` for what is no name."""
    folder = workspace.pictures_dir / require_name(name)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise DataError(f"{name}: is no folder in {workspace.pictures_dir}: choose another name")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def arriving(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Where a file that is being sent is kept until it was looked at; gone at the end.

    Raises `StorageError` where so much more would fill the disk.
    """
    check_disk(folder, num_bytes)
    path = folder / f".arriving-{secrets.token_hex(8)}"
    try:
        with storage_errors(path):
            yield path
    finally:
        path.unlink(missing_ok=True)


def check_disk(folder: Path, num_bytes: int) -> None:
    """Raise `StorageError` where so many bytes more would fill the disk."""
    free = shutil.disk_usage(folder).free
    if num_bytes + _SPARE_BYTES > free:
        raise StorageError(
            f"the disk is full: {size(num_bytes)} are to be written and {size(free)} are free, of which "
            f"{size(_SPARE_BYTES)} are left alone: free space, then send again"
        )


class Batch:
    """Files that are taken into a set together: a caption goes with the picture of its name, whatever that is
    called in the set.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken = Taken()
        self._stems: dict[str, str] = {}  # of pictures as they were sent, to those in the set

    def take(self, name: str, path: Path) -> None:
        """Take a file that was sent under this name."""
        suffix = PurePosixPath(name.lower()).suffix
        if suffix == ".zip":
            self._take_zip(name, path)
            return
        if reason := _unwanted(name):
            self.taken.left_out.append((shown(name), reason))
            return
        limit = MAX_FILE_BYTES if suffix in SUFFIXES else MAX_CAPTION_BYTES
        if path.stat().st_size > limit:
            self.taken.left_out.append((shown(name), f"more than {limit:,} bytes"))
            return
        self._take_content(name, read_regular(path, DataError))

    def beside(self, name: str, picture: str) -> None:
        """Say what the picture of a caption's name is called in the set, where it was sent on its own."""
        stem = PurePosixPath(safe_path(picture))
        self._stems[_stem(name)] = str(stem.with_suffix(""))

    def _take_content(self, name: str, content: bytes) -> None:
        try:
            if PurePosixPath(name.lower()).suffix in SUFFIXES:
                self._take_picture(name, content)
            else:
                self._take_caption(name, content)
        except RefusedError as error:
            self.taken.left_out.append((shown(name), str(error)))

    def _take_picture(self, name: str, content: bytes) -> None:
        _refuse_markup(content)
        with _decoding:
            open_picture(content)
        self._check_bounds(len(content))
        wanted = PurePosixPath(safe_path(name))
        with _placing:
            free = self._free_name(wanted, content)
            if not (self.folder / free).exists():
                self._write(PurePosixPath(free), content)
                self.taken.pictures.append(free)
            else:
                self.taken.left_out.append((shown(name), f"is there already, as {free}"))
        self._stems.setdefault(_stem(name), str(PurePosixPath(free).with_suffix("")))

    def _free_name(self, wanted: PurePosixPath, content: bytes) -> str:
        """A name that no other picture has, whatever its ending, since one name is one caption; or the name
        under which this very picture is there.
        """
        wanted = wanted.with_suffix(wanted.suffix.lower())
        for number in range(1, MAX_FILES):
            free = wanted if number == 1 else wanted.with_stem(f"{wanted.stem}-{number}")
            others = [
                path for suffix in SUFFIXES if (path := self.folder / free.with_suffix(suffix)).exists()
            ]
            if not others or (others == [self.folder / free] and _has(others[0], content)):
                return str(free)
        raise RefusedError("too many pictures of this name")

    def _take_caption(self, name: str, content: bytes) -> None:
        caption_in(content)  # refuses what is no text
        wanted = PurePosixPath(safe_path(name))
        if (stem := self._stems.get(_stem(name))) is not None:
            wanted = PurePosixPath(stem + wanted.suffix)
        self._check_bounds(len(content))
        # As UTF-8, whichever program wrote it.
        content = decode_text(content).encode()
        with _placing:
            if not (self.folder / wanted).exists():
                self._write(wanted, content)
                self.taken.captions.append(str(wanted))
            elif not _has(self.folder / wanted, content):
                raise RefusedError(f"{wanted} is there already with another text: change it on its page")

    def _write(self, name: PurePosixPath, content: bytes) -> None:
        path = self.folder / name
        if not path.parent.resolve().is_relative_to(self.folder.resolve()):
            raise RefusedError("its folder is a link that leads out of the set")
        if any(above.exists() and not above.is_dir() for above in path.parents):
            raise RefusedError("a file stands where its folder should be")
        write_bytes(path, content)
        _count(self.folder, len(content))

    def _check_bounds(self, num_bytes: int) -> None:
        num_files, in_all = _measure(self.folder)
        if num_files >= MAX_FILES:
            raise DataError(
                f"{self.folder.name}: has {num_files:,} files, all that a set takes: make another set"
            )
        if in_all + num_bytes > MAX_SET_BYTES:
            raise DataError(
                f"{self.folder.name}: would have more than {size(MAX_SET_BYTES)}: make another set, or name "
                "the folder on this machine instead"
            )
        check_disk(self.folder, num_bytes)

    # -- zips ------------------------------------------------------------------------------------------------

    def _take_zip(self, name: str, path: Path) -> None:
        try:
            _check_directory(path)
            with zipfile.ZipFile(path) as archive:
                members = _bounded_members(archive, path.stat().st_size)
                check_disk(self.folder, sum(member.file_size for member in members))
                # Pictures first: a caption is called after its picture.
                for member in sorted(members, key=lambda found: _is_caption(found.filename)):
                    self._take_member(archive, member)
        except RefusedError as error:
            self.taken.left_out.append((shown(name), str(error)))
        except (zipfile.BadZipFile, struct.error, ValueError, OverflowError) as error:
            self.taken.left_out.append((shown(name), f"not a whole zip ({error}): pack it again"))

    def _take_member(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
        name = member.filename
        reason = _unsafe(member) or _unwanted(name)
        if not reason:
            try:
                with archive.open(member) as file:
                    content = file.read(member.file_size + 1)
            except (
                zipfile.BadZipFile,
                zlib.error,
                NotImplementedError,
                EOFError,
                RuntimeError,
                ValueError,
            ) as error:
                reason = f"cannot be unpacked ({error})"
        if reason:
            self.taken.left_out.append((shown(name)[:200], reason))
        else:
            self._take_content(name, content)


def _check_directory(path: Path) -> None:
    """Refuse a zip whose directory is larger than that of any set, before it is read into memory."""
    num_bytes = path.stat().st_size
    if num_bytes > MAX_ZIP_BYTES:
        raise RefusedError(f"more than {size(MAX_ZIP_BYTES)}: send it in parts, or name the folder instead")
    with path.open("rb") as file:
        start = max(0, num_bytes - _END.size - 2**16)
        file.seek(start)
        tail = file.read()
    place = tail.rfind(_END_MARK)
    if place < 0 or place + _END.size > len(tail):
        raise RefusedError("not a zip")
    _, _, _, _, count, directory_bytes, _, _ = _END.unpack_from(tail, place)
    if tail[max(0, place - 20) : place].startswith(_ZIP64_MARK) or count == 0xFFFF:
        raise RefusedError(f"a zip for more than 65,000 members or 4 GiB: at most {MAX_FILES:,} are taken")
    if count > MAX_FILES or directory_bytes > _MAX_DIRECTORY_BYTES:
        raise RefusedError(f"{count:,} members: at most {MAX_FILES:,} are taken")


def _bounded_members(archive: zipfile.ZipFile, zip_bytes: int) -> list[zipfile.ZipInfo]:
    """The files of a zip; refused where there are too many or they are far larger than the zip itself."""
    members = [member for member in archive.infolist() if not member.is_dir()]
    if len(members) > MAX_FILES:
        raise RefusedError(f"{len(members):,} members: at most {MAX_FILES:,} are taken")
    unpacked = sum(member.file_size for member in members)
    if unpacked > MAX_SET_BYTES:
        raise RefusedError(f"would unpack to {size(unpacked)}: at most {size(MAX_SET_BYTES)} are taken")
    if unpacked > _RATIO_FROM_BYTES and unpacked > MAX_RATIO * zip_bytes:
        raise RefusedError(
            f"would unpack to {size(unpacked)}, more than {MAX_RATIO} times its own size: pictures do not "
            "pack like that"
        )
    return members


def _unsafe(member: zipfile.ZipInfo) -> str:
    """Why a member is not even looked at."""
    # The name as it stands in the zip: what reads it makes it milder.
    name = member.orig_filename.replace("\\", "/")
    if name.startswith("/") or ".." in name.split("/") or re.match(r"[A-Za-z]:", name) or "\0" in name:
        return "its name leads out of the folder"
    mode = member.external_attr >> 16
    if mode and not (stat.S_ISREG(mode) or stat.S_IFMT(mode) == 0):
        return "is a link or a device, not a file"
    if member.flag_bits & 1:
        return "is encrypted"
    suffix = PurePosixPath(name.lower()).suffix
    limit = MAX_FILE_BYTES if suffix in SUFFIXES else MAX_CAPTION_BYTES
    if suffix in (*SUFFIXES, *_CAPTION_SUFFIXES) and member.file_size > limit:
        return f"more than {limit:,} bytes"
    return "folders within folders too deep" if name.count("/") > _MAX_DEPTH else ""


def _unwanted(name: str) -> str:
    """Why a file of this name is not taken; empty where it is a picture or a caption."""
    parts = name.replace("\\", "/").split("/")
    suffix = PurePosixPath(parts[-1].lower()).suffix
    if any(part.startswith(".") for part in parts) or "__MACOSX" in parts:
        return "is hidden"
    if not is_unicode(name):
        return "its name is not UTF-8"
    if suffix in _PACKED:
        return "is packed itself: unpack it, or send it on its own"
    if suffix not in SUFFIXES and suffix not in _CAPTION_SUFFIXES:
        return f"neither a picture ({', '.join(sorted(SUFFIXES))}) nor a caption (.txt, .caption)"
    return ""


def _is_caption(name: str) -> bool:
    return name.lower().endswith(_CAPTION_SUFFIXES)


def _refuse_markup(content: bytes) -> None:
    """Say of markup by name what it is; that it is no picture the decoder would find as well."""
    start = content[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<svg", b"<?xml", b"<!doctype svg")) and b"svg" in start:
        raise RefusedError("is an SVG drawing, whatever its name says: export it as PNG")
    if start.startswith((b"<!doctype", b"<html", b"<script", b"<?xml", b"<body", b"<head")):
        raise RefusedError("is a web page, whatever its name says: send the picture itself")


def safe_path(name: str) -> str:
    """A relative path that any system takes as it is meant, from a name that a browser or a zip gave."""
    parts = [_safe_part(part) for part in name.replace("\\", "/").split("/") if part.strip(" .")]
    return "/".join(parts[-_MAX_DEPTH - 1 :]) or "file"


def _safe_part(part: str) -> str:
    part = unicodedata.normalize("NFC", part).strip()
    part = "".join(
        "_"
        if letter in '<>:"|?*%' or unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
        else letter
        for letter in part
    ).strip(" .")
    if _WINDOWS_NAMES.match(part):
        part = f"_{part}"
    stem, dot, suffix = part.rpartition(".")
    if not dot:
        stem, suffix = part, ""
    while len(stem.encode()) > _MAX_NAME_BYTES:
        stem = stem[:-1]
    return (stem.rstrip(" .") or "file") + dot + suffix[:16]


def _stem(name: str) -> str:
    return str(PurePosixPath(name.replace("\\", "/")).with_suffix(""))


def _has(path: Path, content: bytes) -> bool:
    """Whether a file holds these bytes, but for line ends at its end."""
    try:
        if not path.is_file() or path.stat().st_size > len(content) + 2:
            return False
        return path.read_bytes().rstrip(b"\r\n") == content.rstrip(b"\r\n")
    except OSError:
        return False


def _measure(folder: Path) -> tuple[int, int]:
    """Files and bytes of a set, counted on the disk once a minute at most while files come in."""
    with _measuring:
        when, num_files, num_bytes = _measured.get(folder, (0.0, 0, 0))
        if time.monotonic() - when > _MEASURED_FOR_S or not when:
            _remove_stale(folder)
            stamps = [stamp for _, stamp in walk(folder, skip_unreadable=True) if isinstance(stamp, tuple)]
            num_files, num_bytes = len(stamps), sum(stamp[0] for stamp in stamps)
            _measured.clear()
            _measured[folder] = (time.monotonic(), num_files, num_bytes)
        return num_files, num_bytes


def _remove_stale(folder: Path) -> None:
    """Remove what a server that was killed had begun to take in."""
    for path in folder.glob(".arriving-*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink()


def _count(folder: Path, num_bytes: int) -> None:
    with _measuring:
        if found := _measured.get(folder):
            _measured[folder] = (found[0], found[1] + 1, found[2] + num_bytes)
