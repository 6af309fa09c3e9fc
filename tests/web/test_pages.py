"""How pages and errors look: escaped, with addresses of files that change with them, for browsers, HTMX and
programs.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lorascope.web.pages import render, static_file
from web_client import make_services, web_client


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with web_client(make_services(tmp_path_factory.mktemp("work"))) as client:
        yield client


def test_static_files_are_loaded_by_addresses_that_change_with_them(client: TestClient) -> None:
    addresses = re.findall(r'(?:href|src)="(/static/[^"]+)"', client.get("/").text)
    assert len(addresses) >= 4
    for address in addresses:
        assert re.fullmatch(r"/static/[\w.]+\?v=[0-9a-f]{12}", address)
        answer = client.get(address)
        assert answer.status_code == 200 and answer.content
        assert answer.headers["content-type"].startswith(("text/css", "text/javascript", "image/svg+xml"))
    for name in ("none.js", "layout.html.j2", "web.css/", "%2e%2e%2fpages.py"):
        assert client.get(f"/static/{name}").status_code in (404, 307)
    assert static_file("../pages.py") is None


def test_pages_hold_nothing_that_the_policy_forbids(client: TestClient) -> None:
    for path in ("/", "/runs/none", "/nothing"):
        text = client.get(path).text
        assert not re.search(r"<script(?![^>]*src=)|\sstyle=|\son\w+=|hx-on|javascript:", text)
        assert not re.search(r"(?:src|href|action)=\"(?:https?:)?//", text)


def test_errors_by_who_asks(client: TestClient) -> None:
    page = client.get("/runs/none")
    assert page.status_code == 404 and "<h1>That did not work</h1>" in page.text
    part = client.get("/runs/none", headers={"hx-request": "true"})
    assert (part.status_code, part.headers["x-status"]) == (200, "404")
    assert part.headers["hx-retarget"] == "#notice" and part.text.startswith('<p class="notice">')
    program = client.get("/api/nothing")
    assert (program.status_code, list(program.json())) == (404, ["error"])
    assert "cannot be used that way" in client.get("/jobs/1/pause").text
    assert client.get("/jobs/x/pause").status_code == 405
    wrong = client.post("/jobs/x/pause")
    assert wrong.status_code == 422 and "number: " in wrong.text


def test_hostile_names_are_escaped(client: TestClient) -> None:
    for text in ("<img src=x onerror=alert(1)>", '"><script>', "{{ 7*7 }}"):
        answer = client.get("/runs/" + text.replace("/", ""), headers={"hx-request": "true"})
        assert "<img" not in answer.text and "<script" not in answer.text and "49" not in answer.text
    assert render("_notice.html.j2", message="<b>\x1b[31m\u202e") == (
        '<p class="notice">&lt;b&gt;\\x1b[31m\\u202e</p>'
    )


def test_a_fault_of_ours_is_a_page_with_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    services = make_services(tmp_path)
    monkeypatch.setattr(services.runs, "cards", lambda: 1 / 0)
    with web_client(services) as client:
        client._transport.raise_server_exceptions = False  # type: ignore[attr-defined]
        answer = client.get("/")
    assert answer.status_code == 500 and "a fault of lorascope" in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "division" not in answer.text and "Traceback" not in answer.text
