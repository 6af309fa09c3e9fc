"""The server around the app: one for a folder, a port of its own, and what it says as it starts."""

import socket
from pathlib import Path

import pytest
from filelock import FileLock

from lorascope.errors import ConfigError, StorageError
from lorascope.web.app import Options, serve
from lorascope.web.workspace import Workspace


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
