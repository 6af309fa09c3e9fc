"""A hub on this machine: the parts of its protocol that huggingface_hub uses to fetch a snapshot, with faults
on demand.

Served are `/api/models/ID/revision/REV` and the tree listing in pages (and the same below `/api/datasets`),
and files below `/ID/resolve/REV/PATH`. Binary files stand in large-file storage, so a request for one is sent
on to another host name, as the hub sends it on to its content network; `Range` is honoured there.
"""

import hashlib
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 3
TOKEN = "hf_good"


def git_digest(content: bytes) -> str:
    """What the hub gives as ETag of a small file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """A repository: its commits, and the branches and tags that name them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    disabled: bool = False
    xet: bool = False

    def commit(self, files: dict[str, bytes], *refs: str) -> str:
        """Add a commit of `files`, named by `refs`; returns its hash."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit] = files
        self.refs |= dict.fromkeys(refs, commit)
        return commit


@dataclass
class Fault:
    """What goes wrong, `times` times, with requests whose path contains `part`.

    With a `status` the hub answers that; otherwise the connection is closed after `sent` bytes of the file,
    or reset (`reset`), or the file is said to end there (`short`).
    """

    part: str
    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    sent: int = 0
    short: bool = False
    reset: bool = False
    method: str = "GET"


class HubServer:
    """The hub; `requests` lists method and path of all it was asked, and `tokens` what it was told by
    whom.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.tokens: set[tuple[str, str | None]] = set()
        self.connections: set[socket.socket] = set()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage_url = f"http://localhost:{self._server.server_port}"

    def add_folder(self, name: str, folder: Path, *refs: str) -> str:
        """A repository with the files of a folder; `name` is `models/owner/name` or `datasets/owner/name`."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return self.repos.setdefault(name, Repo()).commit(files, *(refs or ("main",)))

    def fetched(self) -> list[str]:
        """The paths of the files whose content was asked for."""
        return [path for method, path in self.requests if method == "GET" and not path.startswith("/api/")]

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault to meet this request with, if any is left."""
        for fault in self.faults:
            if fault.times and fault.part in path and fault.method in (method, "*"):
                fault.times -= 1
                return fault
        return None

    @contextmanager
    def running(self) -> Iterator["HubServer"]:
        """Serve until the block ends."""
        thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        thread.start()
        try:
            yield self
        finally:
            self.stop()
            thread.join()

    def stop(self) -> None:
        """Answer no more: connections are refused from here on."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def setup(self) -> None:
        super().setup()
        self.server_hub.connections.add(self.connection)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.server_hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        hub.tokens.add((self.headers["Host"].partition(":")[0], token))
        fault = hub.fault(self.command, path)
        if fault and fault.status:
            self._send(fault.status, fault.body, fault.headers)
        elif token not in (None, TOKEN) and not path.startswith("/storage/"):
            self._refuse(401, None, "Invalid credentials in Authorization header")
        elif path.startswith("/api/"):
            self._answer_api(path, token)
        elif path.startswith("/storage/"):
            contents = {
                hashlib.sha256(c).hexdigest(): c
                for r in hub.repos.values()
                for files in r.commits.values()
                for c in files.values()
            }
            self._send_file(contents[path.removeprefix("/storage/")], {}, fault)
        else:
            self._answer_file(path, token, fault)

    def _find(self, name: str, revision: str, token: str | None) -> tuple[Repo, str] | None:
        """Repository and commit, or None once the reason is sent."""
        repo = self.server_hub.repos.get(name)
        if repo is None:
            # Without a token the hub does not tell a private repository from none.
            self._refuse(404 if token else 401, "RepoNotFound" if token else None, "Repository not found")
        elif repo.disabled:
            self._refuse(403, None, "Access to this resource is disabled.")
        elif (commit := repo.refs.get(revision, revision)) not in repo.commits:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repo, commit
        return None

    def _answer_api(self, path: str, token: str | None) -> None:
        kind, owner, name, *rest = path.removeprefix("/api/").split("/")
        action, revision = (rest[0], rest[1]) if rest else ("revision", "main")
        found = self._find(f"{kind}/{owner}/{name}", revision, token)
        if found is None:
            return
        repo, commit = found
        if action == "revision":
            self._send_json(
                {"id": f"{owner}/{name}", "sha": commit, "siblings": [], "gated": repo.gated, "tags": []}
            )
            return
        entries = [self._entry(repo, name, content) for name, content in repo.commits[commit].items()]
        first = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        headers = {}
        if first + PAGE < len(entries):
            headers["Link"] = (
                f'<{self.server_hub.url}{path}?recursive=True&cursor={first + PAGE}>; rel="next"'
            )
        self._send_json(entries[first : first + PAGE], headers)

    def _entry(self, repo: Repo, name: str, content: bytes) -> dict[str, object]:
        entry: dict[str, object] = {
            "type": "file",
            "path": name,
            "size": len(content),
            "oid": git_digest(content),
        }
        if _is_large(name):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            if repo.xet:
                entry["xetHash"] = digest
        return entry

    def _answer_file(self, path: str, token: str | None, fault: Fault | None) -> None:
        parts = path.strip("/").split("/")
        kind, parts = (parts[0], parts[1:]) if parts[0] == "datasets" else ("models", parts)
        name, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        found = self._find(f"{kind}/{name}", revision, token)
        if found is None:
            return
        repo, commit = found
        if repo.gated and token != TOKEN:
            self._refuse(403 if token else 401, "GatedRepo", f"Access to {kind} {name} is restricted.")
            return
        if file not in repo.commits[commit]:
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        content = repo.commits[commit][file]
        if not _is_large(file):
            self._send_file(content, {"X-Repo-Commit": commit, "ETag": f'"{git_digest(content)}"'}, fault)
            return
        digest = hashlib.sha256(content).hexdigest()
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.server_hub.storage_url}/storage/{digest}",
        }
        if repo.xet:
            headers |= {"X-Xet-Hash": digest, "X-Xet-Refresh-Route": f"{self.server_hub.url}/api/xet"}
        self._send(302, b"", headers)

    def _send_file(self, content: bytes, headers: dict[str, str], fault: Fault | None) -> None:
        total, status = len(content), 200
        if asked := self.headers.get("Range"):
            self.server_hub.ranges.append(asked)
            first = int(asked.removeprefix("bytes=").partition("-")[0])
            headers = {**headers, "Content-Range": f"bytes {first}-{total - 1}/{total}"}
            content, status = content[first:], 206
        if fault is None:
            self._send(status, content, headers)
        elif fault.short:
            self._send(status, content[: fault.sent], headers)
        else:
            self._send(status, content[: fault.sent], headers, length=len(content))
            self.close_connection = True
            if fault.reset:  # no orderly end: what is not yet read is lost too
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())

    def _refuse(
        self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None
    ) -> None:
        marks = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self._send(
            status, json.dumps({"error": message}).encode(), {**marks, "Content-Type": "application/json"}
        )

    def _send_json(self, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {**(headers or {}), "Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {
            **headers,
            "Content-Length": str(len(body) if length is None else length),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".parquet", ".bin"))
