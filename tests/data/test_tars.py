"""Tar files: the samples that WebDataset finds, and archives that are damaged or mean harm."""

import os
import tarfile
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_iterator

from lorascope.data.tars import Member, read_samples
from samples import add_member, encode, pixels, shard_of, write_shard


def samples_of(path: Path) -> dict[str, list[Member]]:
    with path.open("rb") as file:
        return dict(read_samples(file, path.stat().st_size))


def problems_of(path: Path) -> dict[str, str]:
    """The files that cannot be used, with the reason."""
    return {
        f"{key}.{member.ending}": member.problem
        for key, members in samples_of(path).items()
        for member in members
        if member.problem
    }


def test_samples_are_those_that_webdataset_reads(tmp_path: Path) -> None:
    samples = [
        *(
            {"__key__": f"folder/0.{name}", "png": encode(pixels(seed)), "txt": name}
            for seed, name in enumerate("ab")
        ),
        {"__key__": "deep/er/c", "PNG": encode(pixels(2)), "Txt": "c"},
        {"__key__": "d", "seg.png": encode(pixels(3)), "txt": "d"},
    ]
    path = write_shard(tmp_path / "a.tar", samples)
    with path.open("rb") as file:
        grouped = group_by_keys(dict(record, __url__="") for record in tar_file_iterator(file))
        read = {sample["__key__"]: sorted(name for name in sample if name[0] != "_") for sample in grouped}
    assert {
        key: sorted(member.ending for member in members) for key, members in samples_of(path).items()
    } == read


def test_members_say_where_their_bytes_stand(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", shard_of(0))
    content = path.read_bytes()
    for number, members in enumerate(samples_of(path).values()):
        found = {member.ending: content[member.offset : member.offset + member.size] for member in members}
        assert found == {"png": encode(pixels(number)), "txt": f"picture {number}".encode()}


def test_a_tar_file_that_is_cut_short(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", shard_of(0, 6))
    with tarfile.open(path) as archive:
        last = archive.getmember("00005.png")
    os.truncate(path, last.offset_data + 20)
    assert problems_of(path) == {"00005.png": "the archive ends before this file does"}


def test_a_tar_file_that_is_damaged_inside(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", shard_of(0, 6))
    with tarfile.open(path) as archive:
        offset = archive.getmember("00004.png").offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 512] = b"\xff" * 512
    path.write_bytes(content)
    assert problems_of(path) == {
        "archive.damaged": f"damaged at byte {offset}: what follows cannot be read, download it again"
    }
    assert [*samples_of(path)] == ["00000", "00001", "00002", "00003", "archive"]


def test_a_member_that_claims_more_than_there_is(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add_member(archive, "0.png", b"fine")
        offset = archive.offset
        add_member(archive, "huge.png")
    content = bytearray((tmp_path / "a.tar").read_bytes())
    header = tarfile.TarInfo("huge.png")
    header.size = 2**40
    content[offset : offset + 512] = header.tobuf()
    (tmp_path / "a.tar").write_bytes(content)
    assert problems_of(tmp_path / "a.tar") == {"huge.png": "the archive ends before this file does"}


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add_member(archive, "0.png", b"fine")
        add_member(
            archive,
            "sparse.png",
            b"1\n0\n3\n" + bytes(506) + b"abc",
            pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
        )
    assert problems_of(tmp_path / "a.tar") == {"sparse.png": "a sparse file: pack it again without --sparse"}


def test_a_header_that_claims_gigabytes_is_not_read(tmp_path: Path) -> None:
    header = tarfile.TarInfo("long")
    header.type, header.size = tarfile.XHDTYPE, 2**32
    (tmp_path / "a.tar").write_bytes(header.tobuf() + bytes(2048))
    with pytest.raises(tarfile.ReadError, match=r"^a header claims \d+ bytes$"):
        samples_of(tmp_path / "a.tar")


def with_pax(**headers: str) -> bytes:
    """An archive of a good file and one with these extended headers, then another good one."""
    content = b""
    for name, more in (("0.png", {}), ("1.png", headers), ("2.png", {})):
        member = tarfile.TarInfo(name)
        member.size, member.pax_headers = 4, more
        content += member.tobuf(tarfile.PAX_FORMAT) + b"fine" + bytes(508)
    return content + bytes(1024)


@pytest.mark.parametrize("size", ["1" * 20, "1" * 400, "9223372036854775807", "-512", "-1", "-2048", "x"])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_size_that_cannot_be(tmp_path: Path, size: str, is_first: bool) -> None:
    content = with_pax(size=size)
    (tmp_path / "a.tar").write_bytes(content[1024:] if is_first else content)
    try:
        found = problems_of(tmp_path / "a.tar")
    except tarfile.ReadError:
        assert is_first
    else:
        assert found
