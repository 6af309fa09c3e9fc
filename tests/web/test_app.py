"""The server around the app: one for a folder, a port of its own, and what it says as it starts."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from filelock import FileLock

from conftest import digests
from lorascope.errors import EXIT_INTERRUPTED, EXIT_RUN_FAILED, ConfigError, StorageError
from lorascope.web.app import Options, serve
from lorascope.web.workspace import Workspace


class WebProcess:
    """`lorascope web` as a process of its own, and a program that talks to it."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-P", "-m", "lorascope", "web", str(folder), "--port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        said = self.process.stdout.readline() + self.process.stdout.readline()
        found = re.search(r"Open (http://127\.0\.0\.1:\d+)/\?token=(\S+)", said)
        assert found is not None, said
        self.address, self.token = found.groups()
        self.client = httpx.Client(
            base_url=self.address, headers={"authorization": f"Bearer {self.token}"}, timeout=30
        )

    def job(self) -> dict[str, Any]:
        [job] = self.client.get("/api/jobs").json()
        return dict(job)

    def wait_for(self, is_so: Callable[[dict[str, Any]], bool], seconds: float = 120) -> dict[str, Any]:
        give_up = time.monotonic() + seconds
        while not is_so(job := self.job()):
            assert time.monotonic() < give_up, job
            time.sleep(0.1)
        return job

    def end(self, number: int) -> None:
        """End it by a signal."""
        self.client.close()
        self.process.send_signal(number)
        self.process.wait(timeout=30)


@pytest.fixture
def servers() -> Iterator[list[WebProcess]]:
    servers: list[WebProcess] = []
    yield servers
    for server in servers:
        server.end(signal.SIGKILL)
        server.process.__exit__(None, None, None)  # closes its pipes


def test_a_study_outlives_its_server_and_ends_as_an_uninterrupted_one(
    tmp_path: Path, finished: Path, study_file: Path, servers: list[WebProcess]
) -> None:
    """Killed with SIGKILL while a study runs, and started again: it is found, paused, resumed and done."""
    options = ("--allow", str(study_file.parents[1]))  # where all that the study reads lies
    servers.append(WebProcess(tmp_path, *options))
    asked = {"name": "tiny", "toml": study_file.read_text()}
    answer = servers[0].client.post("/api/studies", json=asked)
    assert answer.status_code == 201, answer.text
    started = tmp_path / ".lorascope-web" / "jobs" / "1" / "started.json"
    servers[0].wait_for(lambda job: job["state"] == "running" and started.exists())
    command = json.loads(started.read_text())["command"]
    os.kill(command, signal.SIGSTOP)  # a tiny study may end before the next server is there
    servers[0].end(signal.SIGKILL)

    servers.append(WebProcess(tmp_path, *options))
    assert servers[1].token == servers[0].token  # an open page goes on
    assert servers[1].job()["state"] == "running"
    assert 'data-state="running"' in servers[1].client.get("/runs/tiny").text
    os.kill(command, signal.SIGCONT)
    servers[1].client.post("/api/jobs/1/pause")
    job = servers[1].wait_for(lambda job: job["state"] != "running")
    if job["state"] == "paused":  # and not done before it was asked
        assert 'data-state="paused"' in servers[1].client.get("/runs/tiny").text
        servers[1].client.post("/api/jobs/1/resume")
        job = servers[1].wait_for(lambda job: job["state"] not in ("queued", "running"))
    assert job["state"] == "done", job
    assert 'data-state="done"' in servers[1].client.get("/runs/tiny").text
    assert digests(tmp_path / "runs" / "tiny") == digests(finished)


def test_a_server_ends_quietly_and_at_once_with_streams_open(
    tmp_path: Path, servers: list[WebProcess]
) -> None:
    servers.append(WebProcess(tmp_path))
    with servers[0].client.stream("GET", "/events") as stream:
        events = stream.iter_text()
        while "event: queue" not in next(events):
            pass
        started = time.monotonic()
        servers[0].process.send_signal(signal.SIGINT)
        assert servers[0].process.wait(timeout=30) == EXIT_INTERRUPTED
        assert time.monotonic() - started < 3
    assert servers[0].process.stderr is not None
    assert servers[0].process.stderr.read() == "lorascope: interrupted; the same command goes on from here\n"


def test_two_servers_in_one_folder_and_what_a_browser_without_a_token_sees(
    tmp_path: Path, servers: list[WebProcess]
) -> None:
    servers.append(WebProcess(tmp_path))
    command = [sys.executable, "-P", "-m", "lorascope", "web", str(tmp_path), "--port", "0"]
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (second.returncode, second.stdout) == (EXIT_RUN_FAILED, "")
    assert second.stderr.count("\n") == 1 and "another server works in this folder" in second.stderr
    browser = httpx.Client(base_url=servers[0].address, headers={"accept": "text/html"})
    page = browser.get("/plan", params={"a": 1})
    assert (page.status_code, 'value="/plan?a=1"' in page.text) == (401, True)
    assert 'rel="stylesheet"' in page.text and browser.get("/static/web.css").status_code == 200
    browser.close()
    mode = (tmp_path / ".lorascope-web" / "token").stat().st_mode
    assert mode & 0o777 == 0o600


def test_a_second_server_in_a_folder_is_refused(tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path)
    workspace.state_dir.mkdir()
    refused = pytest.raises(StorageError, match="another server works in this folder: open its address")
    with FileLock(workspace.state_dir / "lock"), refused:
        serve(workspace, Options(port=0))


def test_a_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"--port {port} on 127.0.0.1: cannot be used .*: name another"
        ):
            serve(Workspace.open(tmp_path), Options(port=port))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "1.2.3.4", "not an address"])
def test_an_address_that_is_not_of_this_machine_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        serve(Workspace.open(tmp_path), Options(host=host, port=0))
