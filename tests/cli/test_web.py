"""`lorascope web`: its options, and what it says where it cannot start."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorascope.cli.app import main
from lorascope.errors import EXIT_DONE, EXIT_INPUT
from lorascope.web.app import Options
from lorascope.web.workspace import Workspace


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be served, instead of serving it."""
    served: list[Any] = []
    monkeypatch.setattr("lorascope.web.app.serve", lambda *arguments: served.extend(arguments))
    return served


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "watchfiles"])
def test_without_the_extra_it_says_how_to_install_it(missing: str, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    code = f"""
import sys
sys.modules[{missing!r}] = None
from lorascope.cli.app import main
sys.exit(main(["web", {str(folder)!r}]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    line = f"lorascope: lorascope web needs {missing}, which is not installed: pip install 'lorascope[web]'\n"
    assert (result.returncode, result.stdout, result.stderr) == (EXIT_INPUT, "", line)
    assert not folder.exists()


def test_only_this_machine_unless_asked(tmp_path: Path, served: list[Any]) -> None:
    assert main(["web", str(tmp_path)]) == EXIT_DONE
    assert served == [Workspace.open(tmp_path, [Path.home()]), Options("127.0.0.1", 7860)]


def test_options(tmp_path: Path, served: list[Any]) -> None:
    (tmp_path / "allowed").mkdir()
    options = [
        "--listen",
        "0.0.0.0",
        "--port",
        "0",
        "--host-name",
        "a.lan",
        "--host-name",
        "b.lan",
        "--browser",
    ]
    assert main(["web", str(tmp_path), *options, "--allow", str(tmp_path / "allowed")]) == EXIT_DONE
    assert served == [  # the home folder is not shown to a network
        Workspace.open(tmp_path, [tmp_path / "allowed"]),
        Options("0.0.0.0", 0, ("a.lan", "b.lan"), opens_browser=True),
    ]


def test_a_home_folder_that_is_not_there_is_no_reason_not_to_start(
    tmp_path: Path, served: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    assert main(["web", str(tmp_path)]) == EXIT_DONE
    assert served[0].roots == (tmp_path,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "65536"], "65535"),
        (["--port", "-1"], "0"),
        (["--allow", "/no/such/folder"], "--allow /no/such/folder: no such folder"),
    ],
)
def test_wrong_options_are_one_line(
    tmp_path: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["web", str(tmp_path), *options]) == EXIT_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error
