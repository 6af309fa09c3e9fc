"""Who may talk to the server: every request through the real gate, also those that no browser would send."""

import asyncio
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from lorascope.errors import StorageError
from lorascope.web.access import MAX_BODY_BYTES, MAX_UPLOAD_BYTES, Access, Gate, kept_token
from lorascope.web.app import build_app
from web_client import ADDRESS, PORT, TOKEN, make_services, web_client

ACCESS = Access(TOKEN, PORT)
HOST = f"127.0.0.1:{PORT}"
COOKIE = f"{ACCESS.cookie_name}={ACCESS.cookie}"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A client that is not signed in."""
    with web_client(make_services(tmp_path_factory.mktemp("work")), signed_in=False) as client:
        yield client


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    """The app to be asked by hand, with headers that clients refuse to send."""
    services = make_services(tmp_path_factory.mktemp("work"))
    return Gate(build_app(services, ACCESS), ACCESS, lambda path: path.encode())


def ask(
    gate: Gate,
    method: str = "GET",
    path: str = "/",
    query: bytes = b"",
    headers: list[tuple[bytes, bytes]] | None = None,
    body: tuple[bytes, ...] = (b"",),
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to a request as it comes off the wire, its body in pieces."""
    pieces = list(body)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not pieces:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(errors="surrogateescape"),
        "root_path": "",
        "query_string": query,
        "headers": headers if headers is not None else [(b"host", HOST.encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", PORT),
    }
    asyncio.run(gate(scope, receive, send))
    found = {name.decode("latin-1"): value.decode("latin-1") for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:])


def signed(*more: tuple[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers of a signed-in browser, and more."""
    pairs = [("host", HOST), ("cookie", COOKIE), ("accept", "text/html"), *more]
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]


# -- the token -----------------------------------------------------------------------------------------------


def test_without_a_token_a_browser_is_asked_for_it_and_a_program_is_told(client: TestClient) -> None:
    page = client.get("/")
    assert (page.status_code, page.text) == (401, "sign in")
    for path, accept in (("/", "*/*"), ("/api/runs", "text/html"), ("/runs/a/picture", "image/webp")):
        answer = client.get(path, headers={"accept": accept})
        assert answer.status_code == 401
        assert "Authorization: Bearer TOKEN" in answer.text
    assert client.get("/", headers={"authorization": "Bearer no"}).status_code == 401
    assert client.get("/", headers={"authorization": TOKEN}).status_code == 401


def test_the_token_in_the_address_becomes_a_cookie_and_leaves_the_address(client: TestClient) -> None:
    answer = client.get("/plan", params={"a": "1", "token": TOKEN, "b": "ü &", "empty": ""})
    assert answer.status_code == 303
    assert answer.headers["location"] == "/plan?a=1&b=%C3%BC+%26&empty="
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(COOKIE)
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert TOKEN not in str(answer.headers)
    client.cookies.clear()


def test_a_wrong_token_in_the_address_lets_nobody_in(client: TestClient) -> None:
    for token in ("", "no", TOKEN[:-1], TOKEN + "x", "ü", "\udcff"):
        answer = client.get("/", params={"token": token.encode(errors="surrogateescape")})
        assert (answer.status_code, "set-cookie" in answer.headers) == (401, False)
    assert client.post("/jobs/1/pause", params={"token": TOKEN}).status_code == 401


@pytest.mark.parametrize(
    "path", ["//evil.com", "///evil.com", "/\\evil.com", "\\\\evil.com", "/\t/evil.com", "/\n/evil.com"]
)
def test_a_redirect_never_leads_to_another_host(gate: Gate, path: str) -> None:
    query = f"token={TOKEN.replace(' ', '+')}".encode()
    status, headers, _ = ask(gate, path=path, query=query)
    assert status == 303
    # Browsers take backslashes for slashes and leave out tabs and line feeds.
    place = headers["location"].replace("\\", "/").replace("\t", "").replace("\n", "")
    assert place.startswith("/") and not place.startswith("//")
    form = f"token={TOKEN.replace(' ', '+')}&to={path}".encode()
    kind = [(b"host", HOST.encode()), (b"content-type", b"application/x-www-form-urlencoded")]
    status, headers, _ = ask(gate, "POST", "/enter", headers=kind, body=(form,))
    place = headers["location"].replace("\\", "/").replace("\t", "").replace("\n", "")
    assert (status, place.startswith("/"), place.startswith("//")) == (303, True, False)


def test_signing_in_by_the_form(client: TestClient) -> None:
    wrong = client.post("/enter", data={"token": "no", "to": "/plan"})
    assert wrong.status_code == 401
    assert "not the token" in wrong.text and 'value="/plan"' in wrong.text
    right = client.post("/enter", data={"token": f" {TOKEN} ", "to": "/plan?x=1"})
    assert (right.status_code, right.headers["location"]) == (303, "/plan?x=1")
    assert {"HttpOnly", "SameSite=strict"} <= set(right.headers["set-cookie"].split("; "))
    assert client.get("/").status_code == 200
    client.cookies.clear()
    assert client.get("/enterprise").status_code == 401


def test_programs_send_the_token_and_need_no_form_token(gate: Gate) -> None:
    bearer = [(b"host", HOST.encode()), (b"authorization", f"Bearer {TOKEN}".encode())]
    assert ask(gate, headers=bearer)[0] == 200
    assert ask(gate, "POST", "/jobs/1/pause", headers=bearer)[0] == 404  # there is no such job
    assert ask(gate, "POST", "/jobs/1/pause", headers=signed())[0] == 403


def test_the_token_of_a_folder_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "token"
    token = kept_token(path)
    assert len(token) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert kept_token(path) == token


@pytest.mark.parametrize("content", ["", "short\n", "with a blank in it, but long enough\n"])
def test_a_token_that_protects_nothing_is_made_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(0o644)
    assert kept_token(path) != content.strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_damaged_token_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xff" * 40)
    with pytest.raises(StorageError, match="delete the file"):
        kept_token(tmp_path / "token")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="is a folder"):
        kept_token(tmp_path / "folder")
    (tmp_path / "long").write_bytes(b"x" * 2000)
    with pytest.raises(StorageError, match="at most"):
        kept_token(tmp_path / "long")


# -- which host, which site ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:7860", "LOCALHOST:7860", "[::1]:7860", "localhost:8000", "[::1]"]
)
def test_names_of_this_machine_are_answered_at_any_port(gate: Gate, host: str) -> None:
    assert ask(gate, headers=[(b"host", host.encode())])[0] == 401


@pytest.mark.parametrize(
    "host",
    [
        *("evil.com", "evil.com:7860", "127.0.0.1.evil.com", "localhost.evil.com:7860", "a@127.0.0.1:7860"),
        *("192.168.1.5:7860", "127.0.0.2", "0.0.0.0:7860", "[::]:7860", "2130706433", "", ":7860"),
        *("127.0.0.1:x", "127.0.0.1/evil", "127.0.0.1\\evil", "[::1", "[[::1]]", "localhost:1:2"),
        *("localhost, evil.com", "xn--localhost", "localhost\t"),
    ],
)
def test_another_name_is_not_answered_whatever_it_carries(gate: Gate, host: str) -> None:
    """DNS rebinding: another site's name that leads here."""
    carried = [(b"host", host.encode()), (b"cookie", COOKIE.encode()), (b"accept", b"text/html")]
    for path in ("/", "/static/web.css", "/enter", "/api/openapi.json"):
        assert ask(gate, path=path, headers=carried)[0] == 421
    assert ask(gate, headers=[])[0] == 421


def test_ip_addresses_are_answered_where_it_listens_to_the_network() -> None:
    access = Access(TOKEN, PORT, is_open=True)
    assert all(map(access.knows_host, ("192.168.1.5:7860", "[fe80::1]:7860", "10.0.0.1", "localhost")))
    assert not any(map(access.knows_host, ("evil.com", "192.168.1.5.evil.com", "a.192.168.1.5")))


def test_own_names_are_answered_in_any_case() -> None:
    access = Access(TOKEN, PORT, names=("MyBox.lan",))
    assert all(map(access.knows_host, ("mybox.lan", "MYBOX.LAN:7860", "mybox.lan:443", "127.0.0.1:7860")))
    assert not any(map(access.knows_host, ("box.lan", "mybox.lan.evil.com", "192.168.1.5")))


@pytest.mark.parametrize(
    "site",
    [
        {"origin": "http://evil.com"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "http://127.0.0.1"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://["},
        {"origin": f"ftp://{HOST}"},
        {"origin": f"http://evil@{HOST}"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_a_post_of_another_site_is_refused_even_with_cookie_and_form_token(
    gate: Gate, site: dict[str, str]
) -> None:
    headers = signed(("x-csrf-token", ACCESS.csrf), *site.items())
    assert ask(gate, "POST", "/jobs/1/pause", headers=headers)[0] == 403
    assert ask(gate, "POST", "/enter", headers=headers)[0] == 403


@pytest.mark.parametrize(
    "site", [{"origin": ADDRESS}, {"origin": f"https://{HOST}"}, {"sec-fetch-site": "none"}]
)
def test_a_post_of_an_own_page_passes(gate: Gate, site: dict[str, str]) -> None:
    headers = signed(("x-csrf-token", ACCESS.csrf), *site.items())
    assert ask(gate, "POST", "/jobs/1/pause", headers=headers)[0] == 404


def test_a_form_carries_its_token_as_header_field_or_in_the_address(gate: Gate) -> None:
    form = ("content-type", "application/x-www-form-urlencoded")

    def post(query: str = "", body: str = "", *more: tuple[str, str]) -> int:
        return ask(gate, "POST", "/jobs/1/pause", query.encode(), signed(*more), (body.encode(),))[0]

    right, wrong = ACCESS.csrf, "0" * 64
    assert post("", "", ("x-csrf-token", right)) == post(f"csrf={right}") == 404
    assert post("", f"csrf={right}", form) == 404
    assert post() == post("", "", ("x-csrf-token", wrong)) == post("csrf=%C3%BC") == 403
    assert post("", f"csrf={wrong}", form) == post("", "csrf=%ff", form) == post("", "", form) == 403
    assert post("", f"csrf={right}") == 403  # a text, not a form
    assert post(f"csrf={right}", "", ("x-csrf-token", wrong)) == 403


# -- how much ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length", ["x", "-1", "1.5", "²", "1e3", "", " 5", "9" * 5000, str(MAX_BODY_BYTES + 1)]
)
def test_a_length_that_is_none_or_too_much_is_refused(gate: Gate, length: str) -> None:
    headers = signed(("content-length", length), ("x-csrf-token", ACCESS.csrf))
    assert ask(gate, "POST", "/jobs/1/pause", headers=headers)[0] == 413


def test_uploads_may_be_larger(gate: Gate) -> None:
    headers = signed(("content-length", str(MAX_BODY_BYTES + 1)))
    assert ask(gate, "POST", "/pictures/upload", headers=headers)[0] != 413
    headers = signed(("content-length", str(MAX_UPLOAD_BYTES + 1)))
    assert ask(gate, "POST", "/pictures/upload", headers=headers)[0] == 413


def test_a_body_without_a_length_is_cut_off(gate: Gate) -> None:
    """As in chunks: what was said of it does not count, what comes does."""
    form = ("content-type", "application/x-www-form-urlencoded")
    pieces = (b"x" * 2**19,) * 4
    for more in ([form], [form, ("x-csrf-token", ACCESS.csrf)], [form, ("content-length", "5")]):
        status, _, text = ask(gate, "POST", "/runs/a/delete", headers=signed(*more), body=pieces)
        assert (status, b"send less at once" in text) == (413, True)
    assert ask(gate, "POST", "/enter", headers=signed(form), body=pieces)[0] == 413


def test_a_chunked_body_over_a_real_client(client: TestClient) -> None:
    def pieces() -> Iterator[bytes]:
        yield from (b"a" * 2**19,) * 4

    kind = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/enter", content=pieces(), headers=kind).status_code == 413


# -- headers of every answer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(("GET", "/", 200), ("GET", "/nothing", 404), ("GET", "/static/web.css", 200)),
        *(("GET", "/static/none.js", 404), ("GET", "/runs/none", 404), ("DELETE", "/", 405)),
        *(("GET", "/jobs/1/pause", 405), ("GET", "/jobs/x/pause", 405), ("GET", "/runs/a/disk/", 307)),
        ("GET", "/api/openapi.json", 200),
    ],
)
def test_every_answer_has_the_policy(gate: Gate, method: str, path: str, status: int) -> None:
    found, headers, _ = ask(gate, method, path, headers=signed())
    assert found == status
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "http" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "server" not in headers and "access-control-allow-origin" not in headers
    kept = path == "/static/web.css"
    assert ("immutable" in headers["cache-control"], headers["cache-control"] == "no-store") == (
        kept,
        not kept,
    )


def test_answers_of_the_gate_have_the_policy_too(gate: Gate) -> None:
    token = f"token={TOKEN.replace(' ', '+')}".encode()
    answers = [
        ask(gate),
        ask(gate, query=token),
        ask(gate, headers=[(b"host", b"evil.com")]),
        ask(gate, "POST", headers=signed(("origin", "null"))),
        ask(gate, "POST", headers=signed(("content-length", "x"))),
    ]
    assert [status for status, _, _ in answers] == [401, 303, 421, 403, 413]
    assert all("default-src 'none'" in headers["content-security-policy"] for _, headers, _ in answers)
    assert all(headers["cache-control"] == "no-store" for _, headers, _ in answers)


def test_an_address_of_other_letters_is_refused(gate: Gate) -> None:
    status, headers, _ = ask(gate, query="csrf=ü".encode(), headers=signed())
    assert (status, "content-security-policy" in headers) == (400, True)


def test_there_are_no_web_sockets_and_no_pages_with_scripts_of_others(client: TestClient) -> None:
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/events"):
        pass
    bearer = {"authorization": f"Bearer {TOKEN}"}
    assert [client.get(path, headers=bearer).status_code for path in ("/docs", "/redoc")] == [404, 404]


# -- whatever may come ---------------------------------------------------------------------------------------

HEADER = st.sampled_from(
    [
        *("host", "cookie", "origin", "content-length", "content-type", "authorization", "x-csrf-token"),
        *("hx-request", "accept", "sec-fetch-site", "range", "transfer-encoding"),
    ]
)
VALUE = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([HOST, COOKIE, ACCESS.csrf, ADDRESS, f"Bearer {TOKEN}"]).map(str.encode),
    st.sampled_from(
        [
            *(b"multipart/form-data; boundary=x", b"application/x-www-form-urlencoded", b"application/json"),
            *(b"text/html", b"true", b"bytes=0-", b"\xb2"),
        ]
    ),
)
PATH = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=30).map(lambda text: "/" + text),
    st.sampled_from(
        [
            *("/", "/enter", "/events/", "/static/web.css", "/runs/a", "/runs/../..", "/runs/a/delete"),
            *("/jobs/1/pause", f"/jobs/{'9' * 30}/pause", "/runs/a\0/picture", "/api/openapi.json"),
        ]
    ),
)
QUERY = st.one_of(
    st.binary(max_size=30), st.sampled_from([b"path=..%2f..%2f&side=9", b"token=%ff", b"csrf=%ff"])
)


@settings(max_examples=300, deadline=None)
@given(
    method=st.sampled_from(["GET", "POST", "HEAD", "OPTIONS", "PUT", "X"]),
    path=PATH,
    query=QUERY,
    more=st.lists(st.tuples(HEADER, VALUE), max_size=4),
    is_signed=st.booleans(),
    body=st.binary(max_size=60),
)
def test_whatever_comes_is_answered_and_never_by_a_fault(
    gate: Gate,
    method: str,
    path: str,
    query: bytes,
    more: list[tuple[str, bytes]],
    is_signed: bool,
    body: bytes,
) -> None:
    headers = [*(signed(("x-csrf-token", ACCESS.csrf)) if is_signed else [(b"host", HOST.encode())])]
    headers += [(name.encode(), value) for name, value in more]
    status, found, _ = ask(gate, method, path, query, headers, (body,))
    assert status < 500
    assert "content-security-policy" in found
