"""Progress on a terminal and without one, figures for people, and the log file."""

import errno
import json
import logging
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorascope import console
from lorascope.console import configure_logging, duration, log, log_to_file, plain, say, size, track
from lorascope.errors import StorageError


class Clock:
    """A `time.monotonic` that the test moves on."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    moved = Clock()
    monkeypatch.setattr(
        "lorascope.console.time", type("Time", (), {"monotonic": moved.monotonic, "gmtime": time.gmtime})
    )
    return moved


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    before = (list(log.handlers), log.level, log.propagate)
    yield
    log.handlers[:], log.level, log.propagate = before


# -- without a terminal --------------------------------------------------------------------------------------


def test_plain_lines_come_every_few_seconds_and_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(logging.INFO)
    with track("train", 40, "steps", completed=10) as task:
        for _ in range(30):
            clock.now += 1
            task.advance(1, "r16 0.1200")
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [
        "train    15/40  1.0 steps/s  r16 0.1200  25 s left",
        "train    20/40  1.0 steps/s  r16 0.1200  20 s left",
        "train    25/40  1.0 steps/s  r16 0.1200  15 s left",
        "train    30/40  1.0 steps/s  r16 0.1200  10 s left",
        "train    35/40  1.0 steps/s  r16 0.1200  5 s left",
        "train    40/40  1.0 steps/s  r16 0.1200",
        "train    40/40  in 30 s",
    ]


def test_a_short_stage_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(logging.INFO)
    with track("encode", 2, "pictures") as task:
        for _ in range(2):
            clock.now += console.PLAIN_LINE_EVERY_S / 3
            task.advance()
    assert capsys.readouterr().err == ""


def test_a_failed_stage_does_not_claim_an_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(logging.INFO)

    def fail() -> None:
        with track("train", 10, "steps") as task:
            clock.now += 6
            task.advance()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert capsys.readouterr().err.splitlines() == ["train    1/10"]


def test_a_total_may_come_late_and_progress_may_stand_still(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(logging.INFO)
    with track("data", 1, "pictures") as task:
        clock.now += 6
        task.set_total(100)
        task.advance(0)
        clock.now += 6
        task.advance(12)
    assert capsys.readouterr().err.splitlines() == [
        "data     0/100",
        "data     12/100  2.0 pictures/s  44 s left",
        "data     12/100  in 12 s",
    ]


@pytest.mark.parametrize(
    ("level", "shown"),
    [(logging.WARNING, ["bad"]), (logging.INFO, ["good", "bad"]), (logging.DEBUG, ["detail", "good", "bad"])],
)
def test_the_level_chooses_what_is_shown(
    level: int, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(level)
    configure_logging(level)  # again, as in a notebook: no line twice
    log.debug("detail")
    log.info("good")
    log.warning("bad")
    assert capsys.readouterr().err.splitlines() == shown


# -- on a terminal -------------------------------------------------------------------------------------------

WORK = """
import logging, time
from lorascope.console import configure_logging, log, track
configure_logging(logging.{level})
with track("train", 20, "steps") as task:
    for step in range(20):
        time.sleep(0.02)
        task.advance(1, "[r16] 0.1200")
        if step == 10:
            log.info("a line in between")
log.info("after")
"""


TABLES = """
from rich.table import Table
from lorascope.console import cell, say_tables
table = Table("check", "details", box=None, padding=(0, 2, 0, 0))
table.add_row(cell("right", "green"), cell("many words " * 15 + "[r16] \\x1b[2J"))
say_tables(table)
"""


def bare_environment(**environment: str) -> dict[str, str]:
    """This environment without what says how a terminal looks, and with `environment`."""
    looks = ("NO_COLOR", "FORCE_COLOR", "TERM", "COLUMNS", "CI")
    return {key: value for key, value in os.environ.items() if key not in looks} | environment


def on_terminal(code: str = WORK.format(level="INFO"), stream: str = "stderr", **environment: str) -> str:
    """What a terminal receives of a stream."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=bare_environment(TERM="xterm", COLUMNS="120") | environment,
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: theirs},
    )
    os.close(theirs)
    received = b""
    while True:
        try:
            received += os.read(ours, 65536)
        except OSError:  # the other end was closed
            break
    os.close(ours)
    assert process.wait() == 0
    return received.decode()


def test_a_terminal_gets_a_bar_and_lines_stand_above_it() -> None:
    text = on_terminal()
    assert re.search(r"\x1b\[[0-9;]*3[0-9]m|\x1b\[38;5", text)  # colours
    assert "20/20" in text
    assert "steps/s  [r16] 0.1200" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    lines = [
        re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).strip() for line in text.replace("\r", "\n").split("\n")
    ]
    assert "a line in between" in lines
    assert "after" in lines


def test_no_color_is_respected() -> None:
    text = on_terminal(NO_COLOR="1")
    assert "20/20" in text
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m|\x1b\[38;5", text)


@pytest.mark.parametrize(("level", "environment"), [("WARNING", {}), ("INFO", {"TERM": "dumb"})])
def test_quiet_runs_and_dumb_terminals_get_no_bar(level: str, environment: dict[str, str]) -> None:
    text = on_terminal(WORK.format(level=level), **environment)
    assert "\x1b" not in text
    assert "20/20" not in text


def test_force_color_does_not_put_a_bar_into_a_file() -> None:
    environment = {**os.environ, "FORCE_COLOR": "1"}
    result = subprocess.run(
        [sys.executable, "-c", WORK.format(level="INFO")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == "a line in between\nafter\n"


def test_tables_are_coloured_and_as_wide_as_the_terminal() -> None:
    text = on_terminal(TABLES, "stdout")
    assert "\x1b[32mright" in text
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 120
    assert lines[-1].endswith("[r16] \\x1b[2J")  # no markup, and nothing that would clear the screen
    text = on_terminal(TABLES, "stdout", NO_COLOR="1")
    assert "right" in text and "\x1b[32m" not in text


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1", "COLUMNS": "40"}])
def test_tables_in_a_file_have_no_colours_and_whole_lines(environment: dict[str, str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", TABLES],
        env=bare_environment(**environment),
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines() == [
        "check  details",
        "right  " + "many words " * 15 + "[r16] \\x1b[2J",
    ]


# -- figures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (47.6, "48 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1 << 20, "1.0 MiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (16_745_000, "16.0 MiB"),
        (1 << 30, "1.0 GiB"),
        (1 << 42, "4096.0 GiB"),
    ],
)
def test_sizes(num_bytes: float, shown: str) -> None:
    assert size(num_bytes) == shown


# -- the log file --------------------------------------------------------------------------------------------


def test_the_log_file_has_everything_with_times_in_utc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        configure_logging(logging.WARNING)
        with log_to_file(tmp_path / "lorascope.log"):
            before = time.time()
            log.debug("detail ✓")
            log.warning("bad")
        log.warning("not in the file")
        with log_to_file(tmp_path / "lorascope.log"):
            log.info("appended")
    finally:
        monkeypatch.undo()
        time.tzset()
    lines = (tmp_path / "lorascope.log").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["DEBUG detail ✓", "WARNING bad", "INFO appended"]
    written = time.strptime(lines[0].split(" ")[0], "%Y-%m-%dT%H:%M:%SZ")
    shown = time.strftime("%Y-%m-%dT%H", time.gmtime(before))
    assert time.strftime("%Y-%m-%dT%H", written) == shown or written.tm_min == 0


HOSTILE = "a\x1b]0;title\x07b\x9b31mc\rd\u202ee\x7ff\udcff\u2028g\ttab\nline ✓ 👩\u200d🎨"
PLAIN = "a\\x1b]0;title\\x07b\\x9b31mc\\rd\\u202ee\\x7ff\\udcff\\u2028g\ttab\nline ✓ 👩\u200d🎨"


def test_nothing_that_steers_a_terminal_reaches_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plain(HOSTILE) == PLAIN
    configure_logging(logging.INFO)
    say(HOSTILE, HOSTILE, sep="|")
    say(HOSTILE, end="", file=sys.stderr)
    with log_to_file(tmp_path / "lorascope.log"):
        log.info("%s", HOSTILE)
    shown = capsys.readouterr()
    assert shown.out == f"{PLAIN}|{PLAIN}\n" and shown.err == f"{PLAIN}{PLAIN}\n"
    assert PLAIN in (tmp_path / "lorascope.log").read_text(encoding="utf-8")


@pytest.mark.skipif(os.name != "posix", reason="needs named pipes with names")
def test_a_log_file_that_is_a_named_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lorascope.log")
    with pytest.raises(StorageError, match="is a named pipe"), log_to_file(tmp_path / "lorascope.log"):
        pass


def test_a_log_file_that_cannot_be_opened_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is a folder, where a file is needed"), log_to_file(tmp_path):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_the_log_does_not_bury_the_error_that_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(logging.INFO)
    monkeypatch.setattr("lorascope.console._LogFile._open", lambda _: open("/dev/full", "a"))  # noqa: SIM115

    def fail() -> None:
        with log_to_file(tmp_path / "lorascope.log"):
            log.info("working")
            raise StorageError("adapters: the disk is full")

    with pytest.raises(StorageError, match="the disk is full"):
        fail()
    assert capsys.readouterr().err == "working\n"


def test_progress_is_in_a_file_while_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_PROGRESS_EVERY_S", 0)
    path, other = tmp_path / "progress.json", tmp_path / "other.json"
    with console.progress_to_file(path):
        assert not path.exists()
        with track("train", 10, "steps") as task, console.progress_to_file(other):
            found = json.loads(path.read_text())
            assert (found["stage"], found["done"], found["total"], found["left_s"]) == ("train", 0, 10, None)
            task.advance()
            time.sleep(0.01)
            task.advance(2, note="loss 0.1\x1b[31m")
            found = json.loads(path.read_text())
            assert found == json.loads(other.read_text())
            assert (found["done"], found["unit"], found["note"]) == (3, "steps", "loss 0.1\\x1b[31m")
            assert found["rate"] > 0 and found["left_s"] >= 0
        assert not other.exists()
    assert list(tmp_path.iterdir()) == []


def test_progress_goes_too_where_the_work_fails(tmp_path: Path) -> None:
    fails, progress = pytest.raises(ZeroDivisionError), console.progress_to_file(tmp_path / "progress.json")
    with fails, progress, track("train", 10, "steps"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_progress_is_written_once_a_second_at_most(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    with console.progress_to_file(path), track("train", 10_000, "steps") as task:
        for _ in range(500):
            task.advance()
        assert json.loads(path.read_text())["done"] == 0
        clock.now += 1.1
        task.advance()
        assert json.loads(path.read_text())["done"] == 501


def test_a_full_disk_under_the_progress_is_of_no_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(console, "_PROGRESS_EVERY_S", 0)
    monkeypatch.setattr("pathlib.Path.write_text", full)
    with console.progress_to_file(tmp_path / "progress.json"), track("train", 10, "steps") as task:
        task.advance()
    with console.progress_to_file(tmp_path / "no folder" / "progress.json"), track("train", 2, "steps"):
        pass
    assert list(tmp_path.iterdir()) == []
