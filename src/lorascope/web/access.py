"""Who may talk to the server: token, Host and Origin, size of what is sent, and the headers of every answer.

A browser shows the token once, in the address that the server prints, and gets a cookie for it; a program
sends it with every request (`Authorization: Bearer TOKEN`). A request is answered only under a name that the
server is known by, so that no other site can lend its name to this one (DNS rebinding), and one that changes
anything only from a page of this server.
"""

import hashlib
import hmac
import ipaddress
import json
import os
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

from fastapi import HTTPException, Request

from lorascope.errors import StorageError
from lorascope.store import read_regular, storage_errors

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 2**20
MAX_UPLOAD_BYTES = 8 * 2**30
UPLOADS = ("/pictures/upload", "/files/upload")  # what may send more
_SAFE = ("GET", "HEAD", "OPTIONS")
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{1,5})?")
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Access:
    """What the server is known by. `names` are further host names; with `is_open` any IP address is one."""

    token: str
    port: int
    names: tuple[str, ...] = ()
    is_open: bool = False

    @property
    def cookie_name(self) -> str:
        """A cookie each port: cookies themselves are shared by all servers of a machine."""
        return f"lorascope-{self.port}"

    @property
    def cookie(self) -> str:
        """What the browser keeps in place of the token."""
        return self._sign("session")

    @property
    def csrf(self) -> str:
        """What forms carry, so that only pages of this server can send them."""
        return self._sign("form")

    def _sign(self, purpose: str) -> str:
        return hmac.new(self.token.encode(), purpose.encode(), hashlib.sha256).hexdigest()

    def knows_host(self, host: str) -> bool:
        """Whether the Host of a request is this server: an own name, or an IP address, which no other site
        can have. Any port will do, since a tunnel or a container may have the server at another one.
        """
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = (found[1] or found[2]).lower()
        if name in _LOOPBACK_NAMES or name in (own.lower() for own in self.names):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.is_open

    def knows_token(self, token: str) -> bool:
        """Whether this is the token, compared in constant time."""
        return hmac.compare_digest(token.encode(), self.token.encode())


def kept_token(path: Path) -> str:
    """The token of a workspace, made at the first start and readable by its owner alone.

    It stays the same, so that an open page goes on after the server was started again.
    """
    try:
        token = read_regular(path, limit_bytes=1000).decode("ascii").strip()
        if re.fullmatch(r"[!-~]{32,}", token):
            return token
    except FileNotFoundError:
        pass
    except UnicodeDecodeError as error:
        raise StorageError(f"{path}: the token cannot be read ({error}): delete the file") from error
    token = secrets.token_urlsafe(32)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(token + "\n")
    return token


class Gate:
    """Every request passes here first."""

    def __init__(self, app: Application, access: Access, sign_in: Callable[[str], bytes]) -> None:
        self.app, self.access, self.sign_in = app, access, sign_in

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the request through with `scope["state"]["by_token"]` set."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})  # there are no web sockets here
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        path, method = scope["path"], scope["method"]
        reply = _Reply(send, is_json=path.startswith("/api/"))
        if not scope.get("query_string", b"").isascii():
            await reply.refuse(
                400, "an address holds letters, digits and signs of ASCII alone: escape others"
            )
            return
        if not self.access.knows_host(headers.get("host", "")):
            await reply.refuse(421, "this server is not known by that name: use the address that it printed")
            return
        if method not in _SAFE and not self._is_from_here(headers):
            await reply.refuse(403, "sent from another site: open the page by the address that it printed")
            return
        limit = MAX_UPLOAD_BYTES if path.startswith(UPLOADS) else MAX_BODY_BYTES
        if not _fits(headers.get("content-length", "0"), limit):
            await reply.refuse(413, f"larger than {limit:,} bytes: send less at once")
            return
        if path.startswith("/static/") or path == "/enter":
            await self.app(scope, _bounded(receive, limit), reply.send)
            return
        given = _query(scope).get("token", [])
        bearer = headers.get("authorization", "")
        by_token = bearer.startswith("Bearer ") and self.access.knows_token(bearer.removeprefix("Bearer "))
        if given and method == "GET" and self.access.knows_token(given[0]):
            await reply.redirect(_without_token(scope), self._cookie_header())
            return
        if by_token or self._has_cookie(headers):
            scope.setdefault("state", {})["by_token"] = by_token
            await self.app(scope, _bounded(receive, limit), reply.send)
            return
        if path.startswith("/api/") or "text/html" not in headers.get("accept", ""):
            await reply.refuse(
                401, "no token: send `Authorization: Bearer TOKEN`, or open the printed address"
            )
            return
        await reply.html(401, self.sign_in(_without_token(scope)))

    def _is_from_here(self, headers: dict[str, str]) -> bool:
        """Whether a request that changes something was sent by a page of this server, or by no page."""
        origin, host = headers.get("origin"), headers.get("host", "").lower()
        if origin is not None:
            return origin.lower() in (f"http://{host}", f"https://{host}")
        return headers.get("sec-fetch-site", "none") in ("same-origin", "none")

    def _has_cookie(self, headers: dict[str, str]) -> bool:
        parts = (part.strip().partition("=") for part in headers.get("cookie", "").split(";"))
        return any(
            name == self.access.cookie_name and hmac.compare_digest(value, self.access.cookie)
            for name, _, value in parts
            if value.isascii()
        )

    def _cookie_header(self) -> str:
        access = self.access
        return f"{access.cookie_name}={access.cookie}; HttpOnly; SameSite=Strict; Path=/; Max-Age=31536000"


class _Reply:
    """Sends answers, each with the headers that all of them have."""

    def __init__(self, send: Send, is_json: bool) -> None:
        self._send, self._is_json = send, is_json

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Pass a message of the application on; what it says of a header stands."""
        if message["type"] == "http.response.start":
            own = {name.lower() for name, _ in message.get("headers", [])}
            added = [
                (name.encode(), value.encode())
                for name, value in _HEADERS.items()
                if name.encode() not in own
            ]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await self._send(message)

    async def refuse(self, status: int, text: str) -> None:
        """Say why a request is not answered, as the API says it or as text."""
        if self._is_json:
            await self._whole(status, json.dumps({"error": text}).encode(), "application/json")
        else:
            await self._whole(status, text.encode() + b"\n", "text/plain; charset=utf-8")

    async def html(self, status: int, content: bytes) -> None:
        await self._whole(status, content, "text/html; charset=utf-8")

    async def redirect(self, place: str, cookie: str) -> None:
        await self._whole(
            303, b"", "text/plain", [(b"location", place.encode()), (b"set-cookie", cookie.encode())]
        )

    async def _whole(
        self, status: int, content: bytes, kind: str, headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        own = [(b"content-type", kind.encode()), (b"content-length", str(len(content)).encode()), *headers]
        await self.send({"type": "http.response.start", "status": status, "headers": own})
        await self.send({"type": "http.response.body", "body": content})


def _bounded(receive: Receive, limit: int) -> Receive:
    """A request's body, cut off with an error where it is longer than it said."""
    received = 0

    async def bounded() -> MutableMapping[str, Any]:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise HTTPException(413, f"larger than {limit:,} bytes: send less at once")
        return message

    return bounded


def _fits(length: str, limit: int) -> bool:
    """Whether a Content-Length is a number of bytes that may be sent."""
    return re.fullmatch("[0-9]{1,15}", length) is not None and int(length) <= limit


def _query(scope: Scope) -> dict[str, list[str]]:
    return parse_qs(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)


def _without_token(scope: Scope) -> str:
    """The address asked for, without the token, so that it stays in no history."""
    rest = _query(scope)
    rest.pop("token", None)
    # Two slashes in front would name another machine, and browsers leave out tabs and line feeds.
    path = quote("/" + scope["path"].lstrip("/\\"))
    return path + (f"?{urlencode(rest, doseq=True)}" if rest else "")


async def check_csrf(request: Request) -> None:
    """Refuse a change that does not carry the token of this server's forms; programs send theirs instead."""
    if request.method in _SAFE or request.url.path == "/enter" or request.state.by_token:
        return
    access: Access = request.app.state.access
    given = request.headers.get("x-csrf-token") or request.query_params.get("csrf")
    kind = request.headers.get("content-type", "")
    if given is None and kind.startswith("application/x-www-form-urlencoded"):
        given = str((await request.form()).get("csrf", ""))
    if not hmac.compare_digest((given or "").encode(), access.csrf.encode()):
        raise HTTPException(403, "this form is not of this server: load the page again")
