"""Tar files: their rows, the samples that WebDataset finds, and archives that are damaged or mean harm."""

import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_iterator

from lorascope.data import tars
from lorascope.data.dataset import load_dataset
from lorascope.data.examples import Example
from lorascope.data.sources import open_source
from lorascope.data.tars import Member, read_samples
from lorascope.errors import DataError
from samples import (
    add_member,
    captions,
    encode,
    pixels,
    prepare,
    section,
    shard_of,
    write_shard,
)


def test_a_tar_file(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", shard_of(0, 6, json={"caption": "not this", "seed": 1}))
    dataset = prepare(path)
    examples = (*dataset.train, *dataset.heldout)
    assert captions(examples) == {f"picture {seed}" for seed in range(6)}
    for example in examples:
        assert re.fullmatch(r"a.tar/0000\d.png@\d+\+\d+", example.id)
        np.testing.assert_array_equal(dataset.load_pixels(example), pixels(int(example.caption.split()[1])))
    assert [example.caption for example in dataset.in_storage_order(examples)] == [
        f"picture {seed}" for seed in range(6)
    ]


def test_pixels_of_a_tar_file_are_found_without_reading_its_headers_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shard(tmp_path / "a.tar", shard_of(0))
    dataset = prepare(path)
    monkeypatch.setattr(tars, "read_samples", None)
    again = load_dataset(section(path), dataset.summary)
    for example in again.train:
        np.testing.assert_array_equal(again.load_pixels(example), dataset.load_pixels(example))
    assert again.in_storage_order(again.train) == dataset.in_storage_order(dataset.train)


def test_a_folder_of_tar_files_with_splits(tmp_path: Path) -> None:
    write_shard(tmp_path / "data/train-000.tar", shard_of(0))
    write_shard(tmp_path / "data/train-001.tar", shard_of(10))
    write_shard(tmp_path / "data/test-000.tar", shard_of(20, 2))
    dataset = prepare(tmp_path)
    assert (len(dataset.train), captions(dataset.heldout)) == (8, {"picture 20", "picture 21"})


def test_captions_in_json(tmp_path: Path) -> None:
    samples = [
        {"__key__": f"{seed}", "jpg": encode(pixels(seed), "JPEG"), "json": {"caption": f"picture {seed}"}}
        for seed in range(4)
    ]
    samples += [
        {"__key__": "8", "jpg": b"a", "json": b"{oops"},
        {"__key__": "9", "jpg": b"a", "json": {"url": "x"}},
    ]
    dataset = prepare(write_shard(tmp_path / "a.tar", samples))
    assert captions((*dataset.train, *dataset.heldout)) == {f"picture {seed}" for seed in range(4)}
    assert [entry["reason"] for entry in dataset.summary["refused"]] == [
        "its .json file is not JSON",
        "no caption",
    ]


def test_endings_that_are_set_and_endings_that_may_each_be_meant(tmp_path: Path) -> None:
    samples = [
        {
            "__key__": f"{seed}",
            "left.png": encode(pixels(seed)),
            "right.png": encode(pixels(seed + 9)),
            "txt": "a",
            "prompt": f"{seed}",
        }
        for seed in range(4)
    ]
    path = write_shard(
        tmp_path / "a.tar", [{**sample, "prompt": str(sample["prompt"]).encode()} for sample in samples]
    )
    with pytest.raises(
        DataError, match=r"a.tar: 0: left.png, right.png may each be meant: set data.image_column"
    ):
        prepare(path)
    with pytest.raises(DataError, match=r"a.tar: 0: prompt, txt may each be meant: set data.caption_column"):
        prepare(path, image_column="right.png")
    dataset = prepare(path, image_column="right.png", caption_column="prompt")
    [example] = dataset.heldout
    np.testing.assert_array_equal(dataset.load_pixels(example), pixels(int(example.caption) + 9))


def test_incomplete_samples_are_refused(tmp_path: Path) -> None:
    samples = [
        *shard_of(0),
        {"__key__": "a", "txt": "no picture"},
        {"__key__": "b", "png": encode(pixels(50))},
    ]
    samples += [{"__key__": "c", "png": encode(pixels(51)), "txt": b"caf\xe9"}]
    path = write_shard(tmp_path / "a.tar", samples)
    assert [
        (entry["id"].partition("@")[0], entry["reason"]) for entry in prepare(path).summary["refused"]
    ] == [
        ("a.tar/a", "no picture: txt"),
        ("a.tar/b.png", "no caption"),
        ("a.tar/c.png", "its .txt file: not UTF-8 (unexpected end of data at byte 3): save it as UTF-8"),
    ]


def test_members_that_no_archive_of_pictures_should_hold(tmp_path: Path) -> None:
    picture = encode(pixels(60))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for seed in range(4):
            add_member(archive, f"{seed}.png", encode(pixels(seed)))
            add_member(archive, f"{seed}.txt", b"fine")
        add_member(archive, "folder.d", type=tarfile.DIRTYPE)
        add_member(archive, "no-ending", picture)
        add_member(archive, "__meta__/a.png", picture)
        for number, name in enumerate(
            ("../../up.png", "/etc/absolute.png", "a/../../b.png", "caf\udce9.png")
        ):
            add_member(archive, name, picture + bytes(number))
        add_member(archive, "symbolic.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add_member(archive, "hard.png", type=tarfile.LNKTYPE, linkname="0.png")
        for number, kind in enumerate((tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)):
            add_member(archive, f"device{number}.png", type=kind)
        add_member(archive, "twice.png", picture)
        add_member(archive, "twice.PNG", picture)
    refused = prepare(tmp_path / "a.tar").summary["refused"]
    assert [(entry["id"], entry["reason"]) for entry in refused] == [
        ("a.tar/../../up", "its name leads out of the archive"),
        ("a.tar//etc/absolute", "its name leads out of the archive"),
        ("a.tar/a/../../b", "its name leads out of the archive"),
        ("a.tar/caf\\xe9", "the file name is not UTF-8"),
        ("a.tar/symbolic.png", "a link, which is not followed"),
        ("a.tar/hard.png", "a link, which is not followed"),
        *((f"a.tar/device{number}.png", "a device, not a file") for number in range(3)),
        ("a.tar/twice", "two files of one name"),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "cache"}


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write_shard(
        tmp_path / "a.tar", [*shard_of(0), {"__key__": "00001", "png": encode(pixels(9)), "txt": "9"}]
    )
    [entry] = prepare(path).summary["refused"]
    assert entry["id"].startswith("a.tar/00001.png@")
    assert entry["reason"] == "00001 was there before: the files of a sample must stand together, once"


def test_a_member_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_shard(
        tmp_path / "a.tar", [*shard_of(0), {"__key__": "large", "png": b"a" * 3000, "txt": "large"}]
    )
    monkeypatch.setattr(tars, "MAX_FILE_BYTES", 2000)
    reason = "the image file has 3000 bytes, more than the limit of 2000"
    assert prepare(path).summary["refused"] == [{"id": "a.tar/large.png", "reason": reason}]


def test_a_tar_file_that_is_none(tmp_path: Path) -> None:
    for content in (b"", b"not a tar file" * 100):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(
            DataError,
            match=(
                r"a.tar: cannot be read as an uncompressed tar file \(.*\): unpack it, or download it "
                r"again"
            ),
        ):
            prepare(tmp_path / "a.tar")


def test_pictures_of_a_tar_file_that_went_away(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", shard_of(0))
    dataset = prepare(path)
    os.truncate(path, 100)
    with pytest.raises(DataError, match=r"a.tar ends before this picture does: put it back"):
        dataset.load_pixels(dataset.train[0])
    path.unlink()
    with pytest.raises(DataError, match=r"a.tar cannot be read \(No such file or directory\)"):
        dataset.load_pixels(dataset.train[0])
    with pytest.raises(DataError, match=r"no such row in .*a.tar'"):
        dataset.load_pixels(Example("elsewhere.tar/1.png@0+5", "a", "b", 1, 8, 8))


def test_a_tar_file_that_goes_away_after_it_was_listed(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", shard_of(0))
    source = open_source(section(path))
    assert source.num_rows == 4
    path.unlink()
    with pytest.raises(
        DataError, match=r"a.tar: cannot be read any more \(No such file or directory\): put it back$"
    ):
        list(source.rows())


# Headers ----------------------------------------------------------------------------------------------------


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
