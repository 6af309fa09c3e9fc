"""Files appear whole or not at all, are read with suspicion, and digests are canonical."""

import errno
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostile import JSON, failing, make_device, make_folder, make_pipe, make_socket
from lorascope.errors import EXIT_RUN_FAILED, ConfigError, StorageError
from lorascope.store import (
    atomic_path,
    digest_bytes,
    digest_file,
    digest_folder,
    digest_json,
    kept_digest,
    open_regular,
    read_json,
    read_regular,
    require_regular,
    storage_errors,
    write_bytes,
    write_json,
    write_text,
)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- atomic writes -------------------------------------------------------------------------------------------
def test_a_write_makes_folders_and_replaces_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    write_text(path, "old")
    write_text(path, "new ✓")
    assert path.read_text(encoding="utf-8") == "new ✓"
    assert files_in(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_writer_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")

    def write_half() -> None:
        with atomic_path(path) as partial:
            partial.write_bytes(b"ne")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_bytes() == b"old"
    assert files_in(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("place", ["pathlib.Path.write_bytes", "os.fsync", "pathlib.Path.replace"])
@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "the disk is full: free space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_disk_that_fails_at_any_point_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: int, remedy: str
) -> None:
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(place, failing(number))
        with pytest.raises(StorageError, match=remedy) as error:
            write_bytes(path, b"new")
    assert str(error.value).startswith(f"{path}: cannot be written: ")
    assert path.read_bytes() == b"old"
    assert files_in(tmp_path) == ["file.bin"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Any:
    """A file system of 64 KiB, where mounting one is permitted."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_leaves_the_old_content(tiny_disk: Path) -> None:
    path = tiny_disk / "file.bin"
    write_bytes(path, b"old")
    with pytest.raises(StorageError, match=r"file\.bin: cannot be written: the disk is full"):
        write_bytes(path, bytes(1 << 20))
    assert path.read_bytes() == b"old"
    assert files_in(tiny_disk) == ["file.bin"]


def test_a_full_disk_is_told_from_the_errors_of_writers_in_rust(tiny_disk: Path) -> None:
    numpy = pytest.importorskip("numpy")
    safetensors = pytest.importorskip("safetensors.numpy")
    with (
        pytest.raises(StorageError, match="the disk is full"),
        atomic_path(tiny_disk / "w.safetensors") as partial,
    ):
        safetensors.save_file({"weight": numpy.zeros(1 << 18)}, partial)
    assert files_in(tiny_disk) == []


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EACCES, "permission denied"), (errno.EROFS, "read-only")]
)
def test_a_folder_that_may_not_be_written_is_named_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    monkeypatch.setattr("pathlib.Path.touch", failing(number))
    with pytest.raises(StorageError, match=f"{remedy}.*choose another folder .--run-dir for a run") as error:
        write_text(tmp_path / "file.txt", "text")
    assert error.value.exit_code == EXIT_RUN_FAILED


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        write_text(tmp_path / "file" / "x.txt", "text")
    with pytest.raises(StorageError, match="a part of this path is a file"):
        write_text(tmp_path / "file" / "folder" / "x.txt", "text")


def test_a_folder_in_the_files_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").mkdir()
    with pytest.raises(StorageError, match="a folder stands where a file is needed"):
        write_text(tmp_path / "x.txt", "text")
    assert files_in(tmp_path) == ["x.txt"]


def test_errors_that_are_not_the_disks_pass() -> None:
    with pytest.raises(ZeroDivisionError), storage_errors(Path("x")):
        raise ZeroDivisionError
    with pytest.raises(StorageError, match="x: cannot be written: unknown format"), storage_errors(Path("x")):
        raise OSError("unknown format")
    with pytest.raises(StorageError, match=r"^inner$"), storage_errors(Path("x")):
        raise StorageError("inner")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_users_usual_permissions(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        write_text(tmp_path / "file.txt", "text")
        with atomic_path(
            tmp_path / "private.txt"
        ) as partial:  # as safetensors does, which renames a file of its own
            private = partial.with_suffix(".own")
            private.touch(mode=0o600)
            private.replace(partial)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_a_partial_file_keeps_the_suffix_and_is_hidden(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "figure.svg") as partial:
        assert (partial.suffix, partial.parent, partial.name[0]) == (".svg", tmp_path, ".")
        partial.write_bytes(b"")


def test_threads_writing_one_file_leave_one_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    contents = [bytes([number]) * 100_000 for number in range(4)]
    seen: set[bytes] = set()

    def work(content: bytes) -> None:
        for _ in range(25):
            write_bytes(path, content)
            seen.add(path.read_bytes())

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen <= set(contents)
    assert files_in(tmp_path) == ["file.bin"]


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def only_files(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "not for folders")
        sync(descriptor)

    monkeypatch.setattr("os.fsync", only_files)
    write_text(tmp_path / "file.txt", "text")
    assert files_in(tmp_path) == ["file.txt"]


# -- JSON ----------------------------------------------------------------------------------------------------
@given(value=JSON)
def test_json_comes_back(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}, {"a": object()}])
def test_what_json_cannot_hold_is_refused_before_the_file_is_touched(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "value.json"
    write_json(path, 1)
    with pytest.raises((ValueError, TypeError)):
        write_json(path, value)
    assert read_json(path) == 1
    assert files_in(tmp_path) == ["value.json"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff\xfe"])
def test_damaged_json_is_named_with_a_remedy(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(
        StorageError, match=r"value\.json: damaged .*: delete it and run the same command again"
    ):
        read_json(path)


def test_json_that_is_not_there_or_not_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not there: run the stage that writes it first"):
        read_json(tmp_path / "value.json")
    with pytest.raises(StorageError, match="is a folder"):
        read_json(tmp_path)


# -- digests -------------------------------------------------------------------------------------------------
READERS = {
    "json": read_json,
    "digest": digest_file,
    "kept digest": kept_digest,
    "bytes": read_regular,
    "open": open_regular,
}


@pytest.mark.skipif(os.name != "posix", reason="needs named pipes and sockets with names")
@pytest.mark.parametrize("make", [make_pipe, make_socket, make_folder, make_device])
@pytest.mark.parametrize("read", READERS)
def test_what_is_no_file_is_never_opened(make: Callable[[Path], str], read: str, tmp_path: Path) -> None:
    path = tmp_path / "here"
    kind = make(path)
    with pytest.raises(StorageError, match=rf"here: is a {kind}, where a file is needed: name a file"):
        READERS[read](path)


def test_the_error_is_the_callers_and_a_link_to_a_file_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        require_regular(tmp_path, ConfigError)
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", limit_bytes=5) == b"12345"
    with pytest.raises(ConfigError, match="has 5 bytes, at most 4 are read: name the right file"):
        read_regular(tmp_path / "link", ConfigError, limit_bytes=4)
    with pytest.raises(FileNotFoundError):
        require_regular(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("a" * 5000, "File name too long"), ("a\0b", "embedded null byte"), ("file/x", "Not a directory")],
)
def test_a_path_that_cannot_be_is_one_line(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=rf"cannot be read \({reason}\): check the path") as caught:
        read_json(tmp_path / name)
    assert len(str(caught.value)) < 500


def test_digests_are_stable() -> None:
    assert digest_bytes() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert digest_json({"b": [1, 2.5, None], "a": "ä"}) == digest_bytes(b'{"a":"\\u00e4","b":[1,2.5,null]}')


def test_parts_do_not_run_into_each_other() -> None:
    assert (
        len(
            {
                digest_bytes(b"ab", b"c"),
                digest_bytes(b"a", b"bc"),
                digest_bytes(b"abc"),
                digest_bytes(b"abc", b""),
            }
        )
        == 4
    )


@given(
    values=st.dictionaries(
        st.text(max_size=4),
        st.integers() | st.dictionaries(st.text(max_size=4), st.integers(), max_size=4),
        max_size=5,
    )
)
def test_the_order_of_keys_is_of_no_account(values: dict[str, Any]) -> None:
    assert digest_json(values) == digest_json(dict(reversed(values.items())))


def test_json_digests_tell_values_apart() -> None:
    values = [1, 1.0, "1", True, None, [], {}, [1], [[1]], [1, 2], [2, 1], {"a": 1}, {"a": [1]}]
    assert len({digest_json(value) for value in values}) == len(values)
    assert digest_json((1, 2)) == digest_json([1, 2])
    assert digest_json("\ud800") != digest_json("\ud801")  # file names that are not UTF-8


def test_a_folders_digest_covers_names_and_contents(tmp_path: Path) -> None:
    def build(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            write_text(tmp_path / name / file, text)
        return digest_folder(tmp_path / name)

    files = {"config.json": "{}", "unet/model.safetensors": "w"}
    same = build("a", files)
    assert build("b", dict(reversed(files.items()))) == same
    assert build("c", {**files, "README.md": "text"}) == same
    assert build("d", {**files, "vocab.txt": ""}) != same
    assert build("e", {"config.json": "{}", "vae/model.safetensors": "w"}) != same
    assert build("f", {**files, "config.json": "[]"}) != same
    assert (
        digest_file(tmp_path / "a" / "config.json")
        == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    )


def test_where_files_in_use_cannot_be_replaced_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, where another process that reads the file is in the way."""
    monkeypatch.setattr("lorascope.store._IS_POSIX", False)
    refusals = iter([PermissionError(errno.EACCES, "in use")] * 2)
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        for refusal in refusals:
            raise refusal
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and files_in(tmp_path) == ["a"]
    monkeypatch.setattr("lorascope.store._REPLACE_WAIT_S", 0.1)
    monkeypatch.setattr(Path, "replace", failing(errno.EACCES))
    with pytest.raises(StorageError, match="a: cannot be written: permission denied"):
        write_text(tmp_path / "a", "newer")
    assert (tmp_path / "a").read_text() == "new"


def test_the_digest_of_a_large_file_is_kept_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorascope.store._KEPT_FROM_BYTES", 10)
    read: list[Path] = []
    monkeypatch.setattr("lorascope.store.digest_file", lambda path: read.append(path) or digest_file(path))
    path, small = tmp_path / "model.safetensors", tmp_path / "config.json"
    path.write_bytes(b"weights of a model")
    small.write_bytes(b"{}")
    assert (
        kept_digest(path) == kept_digest(path) == digest_file(path) and len(read) == 2
    )  # it changed just now
    monkeypatch.setattr("lorascope.store._SETTLED_NS", -1)
    assert [kept_digest(path) for _ in range(3)] == [digest_file(path)] * 3 and len(read) == 3
    assert [kept_digest(small) for _ in range(2)] == [digest_file(small)] * 2 and len(read) == 5
    time = path.stat().st_mtime_ns
    path.write_bytes(b"weights of another")
    os.utime(path, ns=(time, time))  # same size, same time: the inode's own time tells
    assert kept_digest(path) == digest_file(path) and len(read) == 6
    entry = next((tmp_path / "cache" / "lorascope" / "digests").iterdir())
    entry.write_text("[]")
    assert kept_digest(path) == digest_file(path) and len(read) == 7
    monkeypatch.setenv("XDG_CACHE_HOME", str(small))
    assert (
        kept_digest(path) == digest_file(path) and len(read) == 8
    )  # a cache that cannot be written is of no account


def test_a_folders_digest_is_the_same_from_kept_digests(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    assert digest_folder(tmp_path, digest=kept_digest) == digest_folder(tmp_path)
