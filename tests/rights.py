"""Tests of places that may not be read, which root may read all the same."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def without_rights() -> Iterator[Path]:
    """An empty folder that all can reach, in which the rights of files hold for us: root, who has all, is
    made nobody.
    """
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        if user == 0:
            os.seteuid(65534)
        try:
            (inner := Path(folder) / "inner").mkdir()
            yield inner
        finally:
            os.seteuid(user)
