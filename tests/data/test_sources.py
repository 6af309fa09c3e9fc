"""What `data.source` may name: the pocket data set, hub data sets, files and folders, and what is none."""

import os
import shutil
from pathlib import Path

import pytest

from lorascope.data import sources
from lorascope.data.dataset import load_dataset, prepare_data
from lorascope.data.sources import count_repeats
from lorascope.errors import DataError, HubError
from lorascope.sections import DataSection
from samples import (
    captions,
    count_words,
    plain,
    prepare,
    section,
    shard_of,
    with_captions,
    write,
    write_pictures,
    write_shard,
)


def test_pocket() -> None:
    dataset = prepare_data(DataSection(num_train=20, num_heldout=10), count_words)
    assert (dataset.summary["source"], len(dataset.train), len(dataset.heldout)) == ("pocket", 20, 10)
    assert dataset.load_pixels(dataset.train[0]).shape == (64, 64, 3)


def test_pocket_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_POCKET_DIR", tmp_path)
    with pytest.raises(DataError, match="missing from this installation: install lorascope again"):
        prepare("pocket")


def test_a_source_given_through_parent_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "pictures", ["1.png", "2.png"])
    (tmp_path / "pictures/metadata.csv").write_text("file_name,text\n1.png,one\n2.png,two\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(prepare("../elsewhere/../pictures").train) == 1


def make_snapshot(cache: Path, name: str, commit: str) -> Path:
    """A folder of the hub's local cache, as the client lays it out."""
    repository = cache / f"datasets--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    return repository / "snapshots" / commit


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's local cache; there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_data_set(hub_cache: Path) -> None:
    commit = "0123456789" * 4
    write(make_snapshot(hub_cache, "owner/pictures", commit) / "data" / "train-0.parquet", plain(4))
    dataset = prepare("owner/pictures")
    assert dataset.summary["source"] == f"owner/pictures@{commit}"
    assert load_dataset(section("owner/pictures"), dataset.summary) == dataset


def test_hub_data_set_at_a_revision(hub_cache: Path) -> None:
    for commit, first in (("a" * 40, 0), ("b" * 40, 10)):
        write(
            make_snapshot(hub_cache / commit, "owner/pictures", commit) / "train-0.parquet", plain(4, first)
        )
    merged = hub_cache / "datasets--owner--pictures"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(hub_cache / commit / merged.name, merged, dirs_exist_ok=True)
    dataset = prepare("owner/pictures", revision="a" * 40)
    assert captions((*dataset.train, *dataset.heldout)) == {f"picture {seed}" for seed in range(4)}
    assert dataset.summary["source"] == f"owner/pictures@{'a' * 40}"


def test_hub_data_set_of_loose_pictures(hub_cache: Path) -> None:
    write_pictures(folder := make_snapshot(hub_cache, "owner/pictures", "c" * 40), ["1.png", "2.png"])
    (folder / "metadata.csv").write_text("file_name,text\n1.png,one\n2.png,two\n")
    assert prepare("owner/pictures").summary["num_rows"] == 2


def test_hub_data_set_that_is_not_there(hub_cache: Path) -> None:
    with pytest.raises(HubError, match="data.source = 'owner/pictures'") as caught:
        prepare("owner/pictures")
    assert "\n" not in str(caught.value)


def test_missing_path() -> None:
    with pytest.raises(DataError, match="'no/such/folder': no such file or folder, and no hub data set id"):
        prepare("no/such/folder")


def test_file_that_is_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("image,text\n")
    with pytest.raises(
        DataError, match=r"rows.csv': not a Parquet file \(.parquet\), a tar file \(.tar\) or a folder"
    ):
        prepare(tmp_path / "rows.csv")


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"a.parquet': holds no rows: give a source with pictures and captions"
    ):
        prepare(write(tmp_path / "a.parquet", []))


def test_repeats_of_a_folder_are_counted_without_reading_pictures(tmp_path: Path) -> None:
    with_captions(tmp_path / "a", ["1.png", "10_cat/2.png", "10_cat/3.png", "0_none/4.png", "2024_x/5.png"])
    for path in (tmp_path / "a").rglob("*.png"):
        path.write_bytes(b"not looked at")
    counts, [remark] = count_repeats(section(tmp_path / "a", repeats=2))
    assert counts == {2: 2, 20: 2}
    assert "1 to 999: 2024_x: their pictures" in remark
    tar = write_shard(tmp_path / "a.tar", shard_of(0))
    for other in (tar, "owner/name", "pocket"):
        assert count_repeats(section(other)) == ({}, [])


@pytest.mark.parametrize("name", ["a.parquet", "a.tar"])
def test_a_pipe_as_a_source_is_not_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match=rf"{name}: is a named pipe, where a file is needed"):
            prepare(source)


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 2500, "/" + "a" * 5000 + "-{00..11}.tar"])
def test_a_path_that_is_too_long(name: str) -> None:
    with pytest.raises(DataError, match=r"a/?: cannot be read \(File name too long\)") as caught:
        prepare(name)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("ending", [".zip", ".tar.gz", ".tgz"])
def test_compressed_archives_are_not_read(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a{ending}").write_bytes(b"")
    with pytest.raises(DataError, match="compressed: unpack it and give the folder"):
        prepare(tmp_path / f"a{ending}")


def test_a_folder_of_pictures_with_a_tar_file_is_one_of_pictures(tmp_path: Path) -> None:
    with_captions(tmp_path, ["1.png", "2.png"])
    write_shard(tmp_path / "backup.tar", shard_of(0))
    write(tmp_path / "below/a.parquet", plain(2))
    summary = prepare(tmp_path).summary
    assert summary["num_rows"] == 2
    rest = "not read, since pictures are: {}: to use such, give a folder of them alone"
    assert summary["remarks"] == [
        f"1 Parquet file is {rest.format('below/a.parquet')}",
        f"1 tar file is {rest.format('backup.tar')}",
    ]


@pytest.mark.parametrize("kind", ["Parquet", "tar"])
def test_what_lies_beside_parquet_or_tar_files_is_counted(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "Parquet":
        write(tmp_path / "data/a.parquet", plain(4))
        write_shard(tmp_path / "data/odd.tar", shard_of(0))
    else:
        write_shard(tmp_path / "data/a.tar", shard_of(0))
    write_pictures(tmp_path, ["data/1.png", "below/2.JPG", "below/3.webp", "4/5/4.png", ".hidden/5.png"])
    (tmp_path / "README.md").write_text("not a row")
    (tmp_path / "data/1.txt").write_text("one")
    summary = prepare(tmp_path).summary
    assert summary["num_rows"] == 4
    rest = "to use such, give a folder of them alone"
    pictures = (
        f"4 pictures are not read, since {kind} files are: 4/5/4.png, below/2.JPG, below/3.webp and 1 more"
    )
    odd = (
        [f"1 tar file is not read, since Parquet files are: data/odd.tar: {rest}"]
        if kind == "Parquet"
        else []
    )
    assert summary["remarks"] == [f"{pictures}: {rest}", *odd]
    assert {f"data     {remark}" for remark in summary["remarks"]} <= set(caplog.messages)
    assert count_repeats(section(tmp_path)) == ({}, summary["remarks"])


def test_files_of_the_kind_that_is_read_in_other_places_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", plain(4))
    for name in ("data/b.parquet", "more/c.parquet"):
        write(tmp_path / name, plain(2, 10))
    summary = prepare(tmp_path).summary
    assert summary["num_rows"] == 4
    assert summary["remarks"] == [
        "2 Parquet files are not read, since others are: data/b.parquet, more/c.parquet: to use such, give a "
        "folder of them alone"
    ]
