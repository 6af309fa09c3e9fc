"""What tests of files put in their way: any JSON, system calls that fail, and what is no file."""

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def make_pipe(path: Path) -> str:
    os.mkfifo(path)
    return "named pipe"


def make_socket(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(path.parent):
        listener.bind(path.name)
    return "socket"


def make_folder(path: Path) -> str:
    path.mkdir()
    return "folder"


def make_device(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "device"
