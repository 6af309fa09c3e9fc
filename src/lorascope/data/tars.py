"""Samples of WebDataset tar files: where their files stand, from the headers alone. Nothing is unpacked or
followed.
"""

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from lorascope.errors import first_line

_MAX_HEADER_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar file: its ending, where its bytes stand, and why they cannot be used."""

    ending: str
    offset: int
    size: int  # bytes
    problem: str | None


def read_samples(file: io.BufferedReader, num_bytes: int) -> Iterator[tuple[str, list[Member]]]:
    """Key and members of each sample, as WebDataset's `base_plus_ext` and `group_by_keys` make them.

    The key is the name up to the first dot of its last part, and the ending, in lower case, what follows.
    Names without a dot and hidden ones belong to no sample. `num_bytes` is the tar file's size. Where a
    damaged header hides the rest, the last sample is `archive` with a member `damaged`. Raises
    `tarfile.ReadError` if `file` does not begin as a tar file does.
    """
    key, members = "", list[Member]()
    for name, offset, size, problem in _read_headers(file, num_bytes):
        found = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", name, re.DOTALL)
        if found is None or re.match(r"__[^/]*__(/|$)", name):
            continue
        if found[1] != key and members:
            yield key, members
            members = []
        key = found[1]
        members.append(Member(found[2].lower(), offset, size, problem))
    if members:
        yield key, members


class _HeaderFile:
    """A tar file of which only headers are read: a header that claims to be larger than any is refused before
    allocating.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self.seek, self.tell = file.seek, file.tell
        self._file = file

    def read(self, size: int) -> bytes:
        if size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return self._file.read(size)


def _read_headers(file: io.BufferedReader, num_bytes: int) -> Iterator[tuple[str, int, int, str | None]]:
    """Name, offset, size in bytes and problem of everything in a tar file but folders; reads no contents.

    Where a damaged header hides the rest, the last entry has the name `archive.damaged` and says so:
    `tarfile` would end there in silence.
    """
    try:
        archive = tarfile.TarFile(fileobj=_HeaderFile(file), errorlevel=2)  # type: ignore[arg-type]
    except (OSError, tarfile.TarError):
        raise
    except Exception as error:  # damaged headers make it raise errors of any type
        raise tarfile.ReadError(first_line(error)) from error
    with archive:
        last = 0
        while last <= num_bytes:  # of a file that the archive is too short for, its own entry says so
            try:
                member = archive.next()
            except OSError:
                raise
            except Exception:
                break
            if member is None or archive.offset <= last:  # back: for a size below 0, and so for ever
                break
            last = archive.offset
            archive.members = []  # type: ignore[attr-defined]  # it would keep them all
            problem = None
            if not member.isreg():
                problem = (
                    "a link, which is not followed"
                    if member.issym() or member.islnk()
                    else "a device, not a file"
                )
            elif member.sparse is not None:
                problem = "a sparse file: pack it again without --sparse"
            elif member.size < 0 or member.offset_data + member.size > num_bytes:
                problem = "the archive ends before this file does"
            if not member.isdir():
                yield member.name, member.offset_data, member.size, problem
        if last < num_bytes and file.seek(last) == last and any(file.read(tarfile.BLOCKSIZE)):
            yield (
                "archive.damaged",
                0,
                0,
                f"damaged at byte {last}: what follows cannot be read, download it again",
            )
