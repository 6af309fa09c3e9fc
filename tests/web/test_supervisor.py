"""The queue at work: real commands with real keepers, stopped, killed and taken up again."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from lorascope.errors import EXIT_INPUT, EXIT_INTERRUPTED, StorageError
from lorascope.web.keeper import command_line
from lorascope.web.queue import Job, Queue
from lorascope.web.services import Services
from lorascope.web.supervisor import Supervisor
from web_client import make_services, web_client

QUICK = ["presets"]  # half a second
# A light command that goes on until it is asked to stop, with arguments that are hard to tell apart.
LONG = ["web", "ä folder, 'so to say\"\n", "--port", "0", "--host-name", ""]
WRONG = ["presets", "nothing takes this"]
BEGUN: list[psutil.Process] = []


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    services = make_services(tmp_path / "work")
    # No module of the workspace's is imported by a command that works in it.
    (tmp_path / "work" / "json.py").write_text("raise SystemExit(9)")
    yield services
    for process in BEGUN:  # of a test that failed
        with suppress(psutil.Error):
            process.kill()
    BEGUN.clear()
    for keeper in services.supervisor._keepers.values():  # where another server took its command up
        keeper.wait()
    services.queue.close()


def own_keepers() -> list[psutil.Process]:
    """Children of this process that are keepers or zombies; others are of other tests."""
    return [
        child
        for child in psutil.Process().children()
        if child.status() == psutil.STATUS_ZOMBIE or "lorascope.web.keeper" in child.cmdline()
    ]


def look(services: Services, until: Callable[[], bool], seconds: float = 60) -> None:
    """Look at the queue until something is so."""
    give_up = time.monotonic() + seconds
    while True:
        services.supervisor.look()
        assert len(services.queue.jobs("running")) <= 1
        if until():
            return
        assert time.monotonic() < give_up, services.queue.jobs()
        time.sleep(0.02)


def started(services: Services, number: int) -> dict[str, int] | None:
    path = services.supervisor.job_dir(number) / "started.json"
    return json.loads(path.read_text()) if path.exists() else None


def begin(services: Services, arguments: list[str]) -> tuple[Job, dict[str, int]]:
    """Put a command into the queue, and wait until it runs and listens to signals."""
    job = services.supervisor.enqueue("study", "title", arguments, run="tiny")

    def has_begun() -> bool:
        return started(services, job.id) is not None and "Open" in services.supervisor.output(job.id)

    look(services, has_begun)
    processes = started(services, job.id)
    assert processes is not None
    BEGUN.extend(map(psutil.Process, processes.values()))
    return services.queue.job(job.id), processes


def has_ended(services: Services, number: int) -> Callable[[], bool]:
    return lambda: services.queue.job(number).state not in ("queued", "running")


def lives(number: int) -> bool:
    """Whether a process runs; one that ended is taken note of by its parent, which may be this one."""
    return psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE


def test_commands_run_one_after_the_other_and_their_codes_become_states(services: Services) -> None:
    supervisor, queue = services.supervisor, services.queue
    for arguments in (QUICK, WRONG, QUICK):
        supervisor.enqueue("study", "title", arguments)
    look(services, lambda: not queue.jobs("queued", "running"))
    first, wrong, last = queue.jobs()
    assert [job.state for job in (first, wrong, last)] == ["done", "failed", "done"]
    assert [job.exit_code for job in (first, wrong, last)] == [0, EXIT_INPUT, 0]
    assert "smoke" in supervisor.output(first.id) and first.message == ""
    assert "nothing takes this" in wrong.message and "\n" not in wrong.message
    assert supervisor.log_tail(wrong.id)[-1] == f"lorascope: {wrong.message}"
    for before, after in ((first, wrong), (wrong, last)):
        assert before.ended is not None and after.started is not None and before.ended <= after.started
    assert not own_keepers()  # and no zombies


def test_what_waits_is_paused_resumed_and_cancelled(services: Services) -> None:
    supervisor, queue = services.supervisor, services.queue
    one, two = [supervisor.enqueue("study", "title", QUICK) for _ in range(2)]
    supervisor.pause(one.id)
    supervisor.pause(one.id)
    supervisor.cancel(two.id)
    assert [job.state for job in queue.jobs()] == ["paused", "cancelled"]
    supervisor.look()
    assert not queue.jobs("running")
    supervisor.resume(one.id)
    supervisor.resume(one.id)
    supervisor.pause(two.id)  # what was cancelled is not paused
    assert [job.state for job in queue.jobs()] == ["queued", "cancelled"]
    look(services, has_ended(services, one.id))
    supervisor.cancel(one.id)
    assert queue.job(one.id).state == "done"


def test_what_runs_is_paused_resumed_and_cancelled(services: Services) -> None:
    supervisor, queue = services.supervisor, services.queue
    job, first = begin(services, LONG)
    supervisor.resume(job.id)  # it runs already
    supervisor.pause(job.id)
    assert queue.job(job.id).wish == "pause"
    look(services, has_ended(services, job.id))
    paused = queue.job(job.id)
    assert (paused.state, paused.exit_code, paused.wish) == ("paused", EXIT_INTERRUPTED, "")
    assert paused.message == "interrupted; the same command goes on from here"
    supervisor.resume(job.id)
    look(services, lambda: started(services, job.id) is not None)
    supervisor.pause(job.id)
    supervisor.cancel(job.id)  # after all
    look(services, has_ended(services, job.id))
    assert queue.job(job.id).state == "cancelled"
    second = started(services, job.id)
    assert second is not None and second != first and not any(map(lives, (*first.values(), *second.values())))


def test_what_is_asked_to_stop_before_it_has_started_does(services: Services) -> None:
    supervisor = services.supervisor
    job = supervisor.enqueue("study", "title", LONG)
    supervisor.look()
    supervisor.pause(job.id)
    assert started(services, job.id) is None
    look(services, has_ended(services, job.id))
    assert services.queue.job(job.id).state == "paused"


def test_a_killed_command_is_paused_and_says_so(services: Services) -> None:
    job, processes = begin(services, LONG)
    os.kill(processes["command"], signal.SIGKILL)
    look(services, has_ended(services, job.id))
    found = services.queue.job(job.id)
    assert found.state == "paused" and "goes on from its last checkpoint" in found.message


def test_a_killed_keeper_leaves_its_command_to_be_followed_and_stopped(services: Services) -> None:
    job, processes = begin(services, LONG)
    for number in (signal.SIGTERM, signal.SIGINT):  # these pass it by
        os.kill(processes["keeper"], number)
    time.sleep(0.1)
    assert all(map(lives, processes.values()))
    waiting = services.supervisor.enqueue("study", "title", QUICK)
    os.kill(processes["keeper"], signal.SIGKILL)
    services.supervisor.look()
    time.sleep(0.1)
    services.supervisor.look()
    assert services.queue.job(job.id).state == "running"
    assert services.queue.job(waiting.id).state == "queued"  # never two at once
    services.supervisor.pause(job.id)
    look(services, has_ended(services, job.id))
    assert services.queue.job(job.id).state == "paused"
    assert not lives(processes["command"])


def test_another_server_takes_up_what_runs(services: Services) -> None:
    job, processes = begin(services, LONG)
    services.queue.change(job.id, wish="pause")  # as one that was killed before it could ask
    queue = Queue(services.workspace.state_dir / "queue.sqlite")
    later = Services(services.workspace, queue, Supervisor(services.workspace, queue), services.runs)
    later.supervisor.look()
    assert started(later, job.id) == processes
    look(later, has_ended(later, job.id))
    assert queue.job(job.id).state == "paused"
    queue.close()


@pytest.mark.parametrize(
    "number",
    [2**22 + 1, os.getpid(), 1, "x", None],
    ids=["none-of-this-number", "our-own", "the-first", "no-number", "nothing"],
)
def test_after_the_machine_went_down_it_is_paused_and_nobody_else_is_signalled(
    services: Services, number: object
) -> None:
    """Its numbers are free, or belong to others by now."""
    job = services.supervisor.enqueue("study", "title", LONG)
    services.queue.change(job.id, state="running", started=time.time(), wish="pause")
    folder = services.supervisor.job_dir(job.id)
    folder.mkdir(parents=True)
    (folder / "started.json").write_text(json.dumps({"keeper": number, "command": number}))
    services.supervisor.cancel(job.id)
    services.supervisor.look()
    found = services.queue.job(job.id)
    assert found.state == "cancelled" and "goes on from its last checkpoint" in found.message


def test_a_server_that_ended_as_it_started_a_command_leaves_it_paused(services: Services) -> None:
    job = services.supervisor.enqueue("study", "title", QUICK)
    services.queue.change(job.id, state="running", started=time.time() - 10)
    services.supervisor.look()
    assert services.queue.job(job.id).state == "running"  # its keeper may be about to say so
    services.queue.change(job.id, started=time.time() - 31)
    services.supervisor.look()
    assert services.queue.job(job.id).state == "paused"


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"exit_code": null}', '{"exit_code": "x", "ended": []}']
)
def test_files_of_a_job_that_are_damaged_do_not_stop_the_queue(services: Services, content: str) -> None:
    job = services.supervisor.enqueue("study", "title", QUICK)
    services.queue.change(job.id, state="running", started=0)
    folder = services.supervisor.job_dir(job.id)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(content)
    (folder / "started.json").write_text(content)
    services.supervisor.look()
    assert services.queue.job(job.id).state == "paused"


def test_cancelling_while_the_queue_is_looked_at_leaves_nothing_running_unknown(services: Services) -> None:
    supervisor, queue = services.supervisor, services.queue
    jobs = [supervisor.enqueue("study", "title", QUICK) for _ in range(4)]
    threads = [threading.Thread(target=supervisor.cancel, args=(job.id,)) for job in jobs]
    threads += [threading.Thread(target=supervisor.look) for _ in range(4)]
    for thread in threads[::2] + threads[1::2]:
        thread.start()
    for thread in threads:
        thread.join()
    look(services, lambda: not queue.jobs("queued", "running"))
    assert {job.state for job in queue.jobs()} <= {"cancelled", "done"}
    assert not own_keepers()


# -- a full disk ---------------------------------------------------------------------------------------------


def test_a_full_disk_holds_the_queue_up_and_is_shown(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    supervisor = services.supervisor
    with web_client(services) as client:
        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.write_bytes", full)
            supervisor.start()
            job = supervisor.enqueue("study", "title", QUICK)
            give_up = time.monotonic() + 10
            while not supervisor.trouble and time.monotonic() < give_up:
                time.sleep(0.02)
            assert "The queue does not go on" in client.get("/").text
            assert "the disk is full: free space" in client.get("/").text
        give_up = time.monotonic() + 30
        while not has_ended(services, job.id)() and time.monotonic() < give_up:
            time.sleep(0.02)
        supervisor.stop()
        assert (services.queue.job(job.id).state, supervisor.trouble) == ("done", "")


def test_what_cannot_be_queued_is_refused(services: Services) -> None:
    services.queue._connection.execute("PRAGMA max_page_count = 1")
    with pytest.raises(StorageError, match="free space"):
        services.supervisor.enqueue("study", "title", ["x" * 100_000])


def test_a_command_that_cannot_be_started_is_failed(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorascope.web.supervisor.sys.executable", "/no/python")
    job = services.supervisor.enqueue("study", "title", QUICK)
    services.supervisor.look()
    found = services.queue.job(job.id)
    assert found.state == "failed" and "could not be started" in found.message


def keep(folder: Path, arguments: list[str], code: str = "") -> subprocess.Popen[bytes]:
    """A keeper of its own, with a line of code before it."""
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps({"arguments": arguments, "cwd": str(folder)}))
    before = f"import sys, pathlib\nfrom lorascope.web import keeper\n{code}\n"
    main = before + "keeper.keep(pathlib.Path(sys.argv[1]))"
    return subprocess.Popen([sys.executable, "-c", main, str(folder)], stderr=subprocess.DEVNULL)


def test_a_command_that_nobody_could_know_of_is_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    keeper = keep(folder, LONG, "keeper.write_json = lambda *_: exec('raise keeper.StorageError')")
    assert keeper.wait() == 1
    words = command_line(LONG)
    assert not [process for process in psutil.process_iter() if _words(process) == words]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_how_a_command_ended_is_written_once_there_is_room(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    (tmp_path / "job.full").touch()
    keeper = keep(
        folder,
        QUICK,
        """
write, keeper._TRY_AGAIN_S = keeper.write_json, 0.05
def write_json(path, value):
    if path.name == "result.json" and pathlib.Path(f"{path.parent}.full").exists():
        raise keeper.StorageError("full")
    write(path, value)
keeper.write_json = write_json
""",
    )
    give_up = time.monotonic() + 30
    while not (folder / "output").exists() or b"smoke" not in (folder / "output").read_bytes():
        assert time.monotonic() < give_up
        time.sleep(0.02)
    time.sleep(0.5)
    assert keeper.poll() is None and not (folder / "result.json").exists()
    (tmp_path / "job.full").unlink()
    assert keeper.wait() == 0
    assert json.loads((folder / "result.json").read_text())["exit_code"] == 0


# -- what is left --------------------------------------------------------------------------------------------


def test_long_logs_are_read_from_their_end(services: Services) -> None:
    folder = services.supervisor.job_dir(1)
    assert services.supervisor.log_tail(1) == [] and services.supervisor.last_line(1) == ""
    assert services.supervisor.output(1) == ""
    folder.mkdir(parents=True)
    (folder / "log").write_bytes(b"\xff\n" + b"x" * 100 + b"\n" * 300_000 + b"lorascope: the end\n\n")
    (folder / "output").write_bytes(b"a" * 5_000_000)
    assert len(services.supervisor.log_tail(1, 5)) == 5
    assert services.supervisor.last_line(1) == "the end"
    assert len(services.supervisor.output(1)) == 4_000_000


def test_the_files_of_a_deleted_runs_commands_go_with_it(services: Services) -> None:
    for run in ("tiny", "tiny", "other"):
        services.supervisor.job_dir(services.queue.add("study", run, QUICK, run=run).id).mkdir(parents=True)
    services.supervisor.forget("tiny")
    assert [job.run for job in services.queue.jobs()] == ["other"]
    assert [path.name for path in (services.workspace.state_dir / "jobs").iterdir()] == ["3"]
