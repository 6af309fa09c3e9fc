"""The queue on disk: order, moving, many threads, and files that cannot be used."""

import errno
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorascope.errors import StorageError
from lorascope.web.queue import Queue
from lorascope.web.workspace import MissingError
from rights import without_rights


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "queue.sqlite"


@pytest.fixture
def queue(path: Path) -> Iterator[Queue]:
    queue = Queue(path)
    yield queue
    queue.close()


def order(queue: Queue) -> list[str]:
    return [job.title for job in queue.jobs("queued")]


def test_jobs_wait_in_order(queue: Queue) -> None:
    for title in "abc":
        queue.add("study", title, ["env", f"--{title}"], run=title)
    first = queue.add("preflight", "first", [], first=True)
    assert order(queue) == ["first", "a", "b", "c"]
    assert first.state == "queued" and first.is_open
    job = queue.job(2)
    assert (job.title, job.arguments, job.run, job.started) == ("b", ("env", "--b"), "b", None)
    assert [job.title for job in queue.jobs()] == ["first", "a", "b", "c"]


def test_moving(queue: Queue) -> None:
    a, b, c = [queue.add("study", title, []) for title in "abc"]
    queue.move(c.id, earlier=True)
    assert order(queue) == ["a", "c", "b"]
    queue.move(a.id, earlier=True)  # it is the first
    queue.move(b.id, earlier=False)  # it is the last
    queue.move(99, earlier=True)
    assert order(queue) == ["a", "c", "b"]
    queue.change(a.id, state="running")
    queue.move(a.id, earlier=False)  # what runs does not wait
    queue.move(b.id, earlier=True)
    assert order(queue) == ["b", "c"]


def test_a_job_of_no_number_is_missing(queue: Queue) -> None:
    for number in (0, -1, 99, 10**30, -(10**30)):
        with pytest.raises(MissingError, match="not in the queue"):
            queue.job(number)


def test_the_newest_of_a_run_and_of_a_kind(queue: Queue) -> None:
    for kind in ("study", "preflight", "study", "captions"):
        queue.add(kind, kind, [], run="tiny")
    found = queue.last_of("tiny")
    assert found is not None and found.id == 3
    assert queue.last_of("other") is None
    assert [job.id for job in queue.recent("study", 5)] == [3, 1]
    queue.change(3, state="running")
    queue.forget("tiny")
    assert [job.id for job in queue.jobs()] == [3]
    assert queue.add("study", "new", []).id == 5  # numbers are never given twice: their folders have files


def test_a_restart_keeps_all(path: Path, queue: Queue) -> None:
    queue.add("study", "ünïcode ' \"", ["a b", "--x=\n"], run="r")
    queue.change(1, state="paused", message="why", exit_code=130, ended=1.5)
    known = queue.jobs()
    queue.close()
    again = Queue(path)
    assert again.jobs() == known
    again.close()


def test_a_killed_writer_loses_nothing_that_was_said_to_be_kept(path: Path) -> None:
    code = f"""
import os, pathlib
from lorascope.web.queue import Queue
queue = Queue(pathlib.Path({str(path)!r}))
for number in range(20):
    queue.add("study", str(number), [])
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    queue = Queue(path)
    assert order(queue) == [str(number) for number in range(20)]
    queue.close()


def test_many_threads(queue: Queue) -> None:
    faults: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for number in range(20):
                job = queue.add("study", f"{name}{number}", [])
                queue.change(job.id, message=name)
                queue.move(job.id, earlier=True)
                queue.jobs("queued")
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    jobs = queue.jobs()
    assert faults == []
    assert len(jobs) == len({job.place for job in jobs}) == 80
    assert all(job.title.startswith(job.message) for job in jobs)


@pytest.mark.parametrize("content", [b"no database" * 1000, b"SQLite format 3\0" + b"\xff" * 4000])
def test_a_damaged_file_is_refused_with_the_remedy(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"queue.sqlite: the queue is damaged .*: move it away"):
        Queue(path)


def test_pages_overwritten_in_the_middle_are_found_at_the_start(path: Path) -> None:
    queue = Queue(path)
    for number in range(300):
        queue.add("study", "x" * 100, [str(number)])
    queue.close()
    content = bytearray(path.read_bytes())
    content[8192:12288] = b"\xab" * 4096
    path.write_bytes(content)
    with pytest.raises(StorageError, match="damaged"):
        Queue(path)


def test_a_table_of_something_else_is_refused(path: Path) -> None:
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE jobs (id INTEGER, place REAL)")
    connection.execute("INSERT INTO jobs VALUES (1, 1)")
    connection.commit()
    connection.close()
    with pytest.raises(StorageError, match="damaged"):
        Queue(path)


def test_a_folder_that_may_not_be_written() -> None:
    with without_rights() as folder:
        folder.chmod(0o500)
        try:
            with pytest.raises(StorageError, match="permission denied"):
                Queue(folder / "state" / "queue.sqlite")
            with pytest.raises(StorageError, match=r"cannot be used \(unable to open database file\)"):
                Queue(folder / "queue.sqlite")
        finally:
            folder.chmod(0o700)


def test_a_file_that_became_read_only() -> None:
    with without_rights() as folder:
        Queue(folder / "queue.sqlite").close()
        (folder / "queue.sqlite").chmod(0o400)
        folder.chmod(0o500)
        try:
            with pytest.raises(StorageError, match="cannot be used"):
                Queue(folder / "queue.sqlite")
        finally:
            folder.chmod(0o700)


def test_a_full_disk_is_told_and_nothing_is_half_kept(queue: Queue) -> None:
    """SQLite's own limit of pages gives the error that a full disk gives."""
    queue.add("study", "before", [])
    pages = queue._connection.execute("PRAGMA page_count").fetchone()[0]
    queue._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageError, match=r"disk is full\): free space"):
        queue.add("study", "x" * 100_000, [])
    assert order(queue) == ["before"]
    queue._connection.execute("PRAGMA max_page_count = 100000")
    queue.add("study", "after", [])
    assert order(queue) == ["before", "after"]


def test_a_state_folder_on_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.mkdir", full)
    with pytest.raises(StorageError, match="disk is full"):
        Queue(path)
