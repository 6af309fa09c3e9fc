"""Worker processes: what they are told and say, how they end, and what becomes of them when the parent
ends.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import worker_tasks
from lorascope.errors import ConfigError, StorageError
from lorascope.machine.workers import (
    Answer,
    deferred_signals,
    num_cores,
    threads_per_worker,
    worker_environments,
)
from lorascope.run_folder import RunDir
from worker_tasks import TWO, Counted

ONE = [{"OMP_NUM_THREADS": "1"}]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up, f"no {what}"
        time.sleep(0.01)


def test_tasks_are_done_by_as_many_workers_as_there_are_environments() -> None:
    tally = Counted()
    tasks = [["echo", n] for n in range(4)] + [["count", 300]]
    answers = worker_tasks.run(tasks, tally, TWO, [])
    assert sorted(task for task, _ in answers if task[0] == "echo") == tasks[:4]
    assert all(answer.value[:2] == ["w", task[1]] for task, answer in answers if task[0] == "echo")
    assert {answer.value[2] for task, answer in answers if task[0] == "echo"} <= {"1", "2"}
    assert (tally.done, tally.skipped) == (300, 2)


def test_log_lines_warnings_and_words_on_stderr_come_with_the_label(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lorascope"):
        worker_tasks.run([["say", "this"]], Counted(), ONE, [])
    assert "[say] train    this" in caplog.messages and "[say] a word of a library" in caplog.messages
    assert "[say] no answer" in caplog.messages  # what a library prints is no answer
    warned = [record for record in caplog.records if "beware of this" in record.message]
    assert len(warned) == 1 and warned[0].levelno == logging.WARNING


def test_an_error_of_a_worker_is_raised_here_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "other"
    with pytest.raises(StorageError, match="^the disk is full$"):
        worker_tasks.run([["write", str(path)], ["refuse"]], Counted(), TWO, [])
    assert (
        not path.exists() or path.read_text() == "stopped"
    )  # the other one was told to stop, and left its task in order
    with pytest.raises(ConfigError, match="^this setup is broken$"):
        worker_tasks.run([["echo", 1]], Counted(), ONE, [], broken=True)
    with pytest.raises(RuntimeError, match="^ZeroDivisionError: by zero$"):
        worker_tasks.run([["fault"]], Counted(), ONE, [])


def test_a_worker_that_dies_is_told_of_and_replaced(tmp_path: Path) -> None:
    answers = worker_tasks.run([["die", str(tmp_path / "once")], ["echo", 1], ["leave"]], Counted(), ONE, [])
    assert [answer for _, answer in answers] == [
        Answer(death="was ended by SIGKILL"),
        Answer(["w", 1, "1"]),
        Answer(death="ended with exit code 7"),
    ]


_PARENT = """
import os, sys
import worker_tasks
from worker_tasks import TWO, Counted
from pathlib import Path
from lorascope.run_folder import RunDir
from worker_tasks import TWO, Counted
folder = Path(sys.argv[1])
run = RunDir(folder)
with run.lock():
    try:
        tasks = [["write", str(folder / name)] for name in ("a", "b")]
        worker_tasks.run(tasks, Counted(), TWO, [run.lock_descriptor])
    except KeyboardInterrupt:
        sys.exit(130)
"""


def start_parent(folder: Path) -> subprocess.Popen[bytes]:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    wait_for(lambda: (folder / "a").exists() and (folder / "b").exists(), "work")
    return parent


def test_workers_end_when_their_parent_is_killed_and_hold_the_folder_until_then(tmp_path: Path) -> None:
    parent = start_parent(tmp_path)
    parent.kill()
    parent.wait()
    with RunDir(tmp_path).lock():  # waits for them
        at_end = [(tmp_path / name).read_text() for name in "ab"]
        time.sleep(0.2)
        assert [(tmp_path / name).read_text() for name in "ab"] == at_end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_parent_lets_every_worker_leave_its_task_in_order(
    tmp_path: Path, number: signal.Signals
) -> None:
    parent = start_parent(tmp_path)
    parent.send_signal(number)
    assert parent.wait(timeout=30) == 130
    assert [(tmp_path / name).read_text() for name in "ab"] == ["stopped", "stopped"]


def test_a_second_signal_acts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), deferred_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received()
        os.kill(os.getpid(), signal.SIGTERM)


def test_cores_are_shared_among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorascope.machine.workers.num_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads_per_worker(number) for number in (1, 2, 3, 16)] == [8, 4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert (
        threads_per_worker(2) == 1
        and worker_environments("cpu", 2) == [{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}] * 2
    )


def test_each_worker_sees_one_gpu_of_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert worker_environments("cuda", 2) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    assert worker_environments("cuda", 2)[1] == {"CUDA_VISIBLE_DEVICES": "GPU-5"}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity masks")
def test_an_affinity_mask_is_respected() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert num_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
