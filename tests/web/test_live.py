"""Event streams of a real server: what changes is sent once, to many browsers, and nothing is left of one
that goes.
"""

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import uvicorn

from lorascope.config import load_study
from lorascope.inputs import freeze
from lorascope.run_folder import RunDir
from lorascope.web.access import Access, Gate
from lorascope.web.app import build_app
from lorascope.web.live import Feeds
from lorascope.web.services import Services
from web_client import TOKEN, make_services


class Server:
    """The real app on a free port, in a thread."""

    def __init__(self, services: Services) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        access = Access(TOKEN, self.port)
        app = build_app(services, access)
        self.feeds: Feeds = app.state.feeds
        config = uvicorn.Config(Gate(app, access, lambda _: b""), log_level="error", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    @contextmanager
    def stream(self, path: str) -> Iterator["Stream"]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            headers = f"Host: 127.0.0.1:{self.port}\r\nAuthorization: Bearer {TOKEN}"
            connection.sendall(f"GET {path} HTTP/1.1\r\n{headers}\r\n\r\n".encode())
            yield Stream(connection)

    def wait_for(self, num_feeds: int) -> None:
        give_up = time.monotonic() + 10
        while len(self.feeds._feeds) != num_feeds:
            assert time.monotonic() < give_up
            time.sleep(0.02)


class Stream:
    """What one browser reads: `text` is what it has not looked at yet."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self.text, self._end = connection, "", ""

    def _receive(self) -> None:
        content = self._connection.recv(65_536).decode()
        assert content, f"ended after {self._end}"
        self.text += content
        self._end = (self._end + content)[-300:]

    def read_until(self, *words: str) -> str:
        """What came since the last time, up to where all words stand in it."""
        while not all(word in self.text for word in words):
            self._receive()
        text, self.text = self.text, ""
        return text

    def read_for(self, seconds: float) -> str:
        """All that comes within a time."""
        self._connection.settimeout(seconds)
        with suppress(TimeoutError):
            while True:
                self._receive()
        text, self.text = self.text, ""
        return text

    def read_to_the_end(self) -> None:
        while not self._end.endswith("0\r\n\r\n"):
            self._receive()


@pytest.fixture
def services(tmp_path: Path, study_file: Path) -> Services:
    services = make_services(tmp_path / "work")
    config = load_study(study_file, environment={}).model_copy(update={"name": "tiny"})
    freeze(RunDir(services.workspace.runs_dir / "tiny"), config)
    return services


@pytest.fixture
def server(services: Services) -> Iterator[Server]:
    server = Server(services)
    yield server
    server.stop()
    services.queue.close()


def train(services: Services, step: int, loss: float) -> None:
    record = {"kind": "train", "step": step, "epoch": 1, "arm": "r4", "loss": loss}
    with RunDir(services.workspace.runs_dir / "tiny").metrics_jsonl.open("a") as file:
        file.write(json.dumps(record) + "\n")


def test_what_changes_is_sent_and_nothing_twice(services: Services, server: Server) -> None:
    with server.stream("/runs/tiny/events") as stream:
        first = stream.read_until("event: status", "event: curves", "event: previews", "event: log")
        assert "text/event-stream" in first and "content-security-policy" in first
        assert stream.read_for(2.5) == ""
        for step in (1, 2):
            train(services, step, step / 8)
            text = stream.read_until("event: curves", f"0.{125 * step}0")
            assert "event: status" not in text and "event: log" not in text
        assert stream.read_for(2.5) == ""


def test_many_browsers_cost_one_look_and_leave_nothing_behind(services: Services, server: Server) -> None:
    """Also once half of them went: a browser that goes must not end the streams of the others."""
    streams = [server.stream("/runs/tiny/events") for _ in range(60)]
    opened = [stream.__enter__() for stream in streams]
    for stream in opened:
        stream.read_until("event: log")
    assert len(server.feeds._feeds) == 1
    for context in streams[:30]:
        context.__exit__(None, None, None)
    time.sleep(0.3)
    for step in (1, 2):  # a look goes on after the next one too
        train(services, step, 0.125)
        for stream in opened[30:]:
            stream.read_until("event: curves")
    for context in streams[30:]:
        context.__exit__(None, None, None)
    server.wait_for(num_feeds=0)
    with server.stream("/runs/tiny/events") as stream:
        stream.read_until("event: log")
        train(services, 3, 0.375)
        stream.read_until("0.3750")


def test_pages_answer_while_many_streams_are_open(services: Services, server: Server) -> None:
    streams = [server.stream(f"/runs/tiny/events?tab={number}") for number in range(50)]
    for stream in [context.__enter__() for context in streams]:
        stream.read_until("event: log")
    assert len(server.feeds._feeds) == 50
    started = time.monotonic()
    with server.stream("/runs/tiny/log") as page:  # answered by a thread of those that streams use too
        page.read_until("no log yet")
    assert time.monotonic() - started < 3
    for context in streams:
        context.__exit__(None, None, None)
    server.wait_for(num_feeds=0)


def test_a_run_that_appears_and_goes_is_seen_on_the_home_page(services: Services, server: Server) -> None:
    folder = services.workspace.runs_dir / "tiny"
    with server.stream("/events") as stream:
        assert "tiny" in stream.read_until("event: runs", "event: queue")
        shutil.copytree(folder, services.workspace.runs_dir / "later")
        stream.read_until("event: runs", "later")
        shutil.rmtree(folder)
        stream.read_until("event: runs")


def test_the_stream_of_a_run_that_is_deleted_ends(services: Services, server: Server) -> None:
    with server.stream("/runs/tiny/events") as stream:
        stream.read_until("event: log")
        shutil.rmtree(services.workspace.runs_dir / "tiny")
        stream.read_to_the_end()
    with server.stream("/runs/tiny/events") as stream:
        stream.read_until("404")


def test_streams_end_when_the_server_does(services: Services, server: Server) -> None:
    with server.stream("/runs/tiny/events") as run, server.stream("/events") as home:
        run.read_until("event: log")
        home.read_until("event: runs")
        server.feeds.close()
        run.read_to_the_end()
        home.read_to_the_end()
    with server.stream("/events") as late:
        late.read_until("retry: 2000")
        late.read_to_the_end()


def test_lines_of_a_part_stay_lines(services: Services, server: Server) -> None:
    log = RunDir(services.workspace.runs_dir / "tiny").log_path
    log.write_text("one\r\n\ndata: two\r\nevent: forged\n")
    with server.stream("/runs/tiny/events") as stream:
        text = stream.read_until("event: log", "forged", "The whole log")
        assert [line for line in text.splitlines() if line.startswith("event: ")] == [
            f"event: {name}" for name in ("status", "curves", "previews", "log")
        ]
