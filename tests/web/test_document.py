"""The page on the web app is true: options, files, routes, limits, and its example runs."""

import re
import threading
import tomllib
from pathlib import Path

import pytest
import uvicorn

from lorascope.cli.app import app
from lorascope.data.pictures import MAX_FILE_BYTES, MAX_PIXELS
from lorascope.web.access import MAX_BODY_BYTES, MAX_UPLOAD_BYTES, Access, Gate, kept_token
from lorascope.web.api import router
from lorascope.web.app import build_app
from lorascope.web.uploads import MAX_FILES, MAX_RATIO, MAX_SET_BYTES, MAX_ZIP_BYTES
from web_client import make_services

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "web.md").read_text(encoding="utf-8")
SOURCES = [path.read_text(encoding="utf-8") for path in (ROOT / "src" / "lorascope" / "web").glob("*.py")]


def rows(head: str) -> list[str]:
    """First cells of the table with this head, without what stands around the code in them."""
    table = DOCUMENT.split(f"| {head} |")[1].split("\n\n")[0]
    return re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)


def test_the_options_are_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    app(["web", "--help"], result_action="return_value")
    assert rows("option") == re.findall(r"^│ (?:FOLDER )?(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)


def test_the_folders_and_files_are_those_of_the_code() -> None:
    own = {name.rstrip("/") for name in rows("path in `.lorascope-web/`")}
    assert own == {name for text in SOURCES for name in re.findall(r'state_dir\s*/\s*"([^"]+)"', text)}
    workspace = next(text for text in SOURCES if "class Workspace" in text)
    assert {name.partition("/")[0] for name in rows("path")} == set(
        re.findall(r'return self\.folder / "([^"]+)"', workspace)
    )


def test_the_routes_are_those_of_the_api() -> None:
    assert sorted(rows("request")) == sorted(
        f"{method} {route.path_format}"  # type: ignore[attr-defined]
        for route in router.routes
        for method in route.methods  # type: ignore[attr-defined]
    )


def test_the_limits_are_those_of_the_code() -> None:
    assert "A request may have 1 MiB, an upload 8 GiB." in DOCUMENT
    assert (MAX_BODY_BYTES, MAX_UPLOAD_BYTES) == (2**20, 8 * 2**30)
    assert "512 MiB and 64 mebipixels" in DOCUMENT
    assert (MAX_FILE_BYTES, MAX_PIXELS) == (512 * 2**20, 64 * 2**20)
    assert "20,000 files and 32 GiB. A zip may have 4 GiB" in DOCUMENT and "than 100 bytes" in DOCUMENT
    assert (MAX_FILES, MAX_SET_BYTES) == (20_000, 32 * 2**30)
    assert (MAX_ZIP_BYTES, MAX_RATIO) == (4 * 2**30 - 1, 100)


def test_the_packages_of_the_extra_are_named() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for need in project["optional-dependencies"]["web"]:
        assert re.split("[>=<]", need)[0].lower() in DOCUMENT.lower()


def test_the_example_for_scripts_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a real server; only its port is another one. Nobody runs its queue."""
    monkeypatch.chdir(tmp_path)
    services = make_services(tmp_path / "my-work")
    access = Access(kept_token(services.workspace.state_dir / "token"), 0)
    server = uvicorn.Server(
        uvicorn.Config(
            Gate(build_app(services, access), access, lambda path: b""), port=0, log_level="error", ws="none"
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        [example] = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
        exec(example.replace(":7860", f":{port}"), {})
    finally:
        server.should_exit = True
        thread.join()
        services.queue.close()
    assert capsys.readouterr().out == "lorascope study runs/first/study.toml --run-dir runs/first waiting\n"
