"""The web app: all pages behind one gate, and the server around them."""

import ipaddress
import os
import socket
import threading
import webbrowser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse, Response
from filelock import FileLock, Timeout
from starlette.exceptions import HTTPException

from lorascope import __version__
from lorascope.console import log, say
from lorascope.data.pictures import RefusedError
from lorascope.errors import ConfigError, LorascopeError, StorageError
from lorascope.store import storage_errors
from lorascope.web import api, compare_page, files_page, home, pictures, plan_page, result_page, run_page
from lorascope.web.access import Access, Gate, check_csrf, kept_token
from lorascope.web.live import Feeds
from lorascope.web.pages import page, problem, render, static_file
from lorascope.web.queue import Queue
from lorascope.web.runs import Runs
from lorascope.web.services import Services
from lorascope.web.starting import TakenError
from lorascope.web.supervisor import Supervisor
from lorascope.web.workspace import MissingError, OutsideError, Workspace

_ROUTERS = (
    home.router,
    run_page.router,
    compare_page.router,
    result_page.router,
    files_page.router,
    pictures.router,
    plan_page.router,
)
_CLOSING_S = 1


def build_app(services: Services, access: Access) -> FastAPI:
    """The application, without its gate; `Gate(build_app(...))` is what is served."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        app.state.feeds.close()

    app = FastAPI(
        title="lorascope",
        version=__version__,
        lifespan=lifespan,
        dependencies=[Depends(check_csrf)],
        docs_url=None,  # these pages would load scripts from another host
        redoc_url=None,
        openapi_url="/api/openapi.json",
    )
    app.state.services, app.state.access, app.state.feeds = services, access, Feeds()
    app.add_exception_handler(LorascopeError, _on_user_error)
    app.add_exception_handler(RefusedError, _on_user_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_bad_request)
    app.add_exception_handler(Exception, _on_fault)
    for router in _ROUTERS:
        app.include_router(router, include_in_schema=False)
    app.include_router(api.router)
    app.add_api_route("/static/{name}", _static, include_in_schema=False)
    app.add_api_route("/enter", _enter, methods=["POST"], include_in_schema=False)
    return app


def _static(name: str) -> Response:
    found = static_file(name)
    if found is None:
        raise HTTPException(404, f"{name[:80]}: no such file")
    content, kind = found
    return Response(
        content, media_type=kind, headers={"cache-control": "public, max-age=31536000, immutable"}
    )


def _enter(
    request: Request, token: Annotated[str, Form()] = "", to: Annotated[str, Form()] = "/"
) -> Response:
    """Sign in with the token."""
    access: Access = request.app.state.access
    if not access.knows_token(token.strip()):
        return page(request, "enter.html.j2", status=401, to=to, wrong=True)
    reply = RedirectResponse("/" + to.lstrip("/\\"), 303)
    reply.set_cookie(
        access.cookie_name, access.cookie, max_age=365 * 86400, httponly=True, samesite="strict", path="/"
    )
    return reply


async def _on_user_error(request: Request, error: Exception) -> Response:
    statuses: dict[type[Exception], int] = {MissingError: 404, OutsideError: 403, TakenError: 409}
    return problem(request, statuses.get(type(error), 400), str(error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: "There is nothing at this address.", 405: "This address cannot be used that way."}
    text = (
        known.get(error.status_code) if error.detail in ("Not Found", "Method Not Allowed") else error.detail
    )
    return problem(request, error.status_code, str(text))


async def _on_bad_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    if first["loc"] == ("body",) or first["type"] == "json_invalid":
        where, first["msg"] = "body", "is no JSON object: send one, with `Content-Type: application/json`"
    return problem(request, 422, f"{where}: {first['msg']}")


async def _on_fault(request: Request, error: Exception) -> Response:
    return problem(request, 500, "a fault of lorascope: the terminal of the server says more")


@dataclass(frozen=True)
class Options:
    """How the server is reached."""

    host: str = "127.0.0.1"
    port: int = 7860
    names: tuple[str, ...] = ()
    opens_browser: bool = False


def serve(workspace: Workspace, options: Options) -> None:
    """Serve a workspace until Ctrl-C.

    Raises `ConfigError` where the port is taken, and `StorageError` where another server works in the
    workspace.
    """
    lock = FileLock(workspace.state_dir / "lock")
    with storage_errors(workspace.state_dir):
        workspace.state_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise StorageError(
                f"{workspace.folder}: another server works in this folder: open its address, or name "
                "another folder"
            ) from error
    with lock, _listen(options) as listener:
        host, port = listener.getsockname()[:2]
        is_open = not ipaddress.ip_address(host).is_loopback
        names = (*options.names, options.host)
        access = Access(kept_token(workspace.state_dir / "token"), port, names, is_open)
        queue = Queue(workspace.state_dir / "queue.sqlite")
        supervisor = Supervisor(workspace, queue)
        runs = Runs(workspace, queue)
        app = build_app(Services(workspace, queue, supervisor, runs), access)
        config = uvicorn.Config(
            Gate(app, access, _sign_in),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_CLOSING_S,
            server_header=False,
            ws="none",
        )
        shown = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
        address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/?token={access.token}"
        say(f"lorascope works in {workspace.folder}", f"Open {address}")
        if is_open:
            log.warning("web      open to the network without encryption: better a tunnel, see docs/web.md")
        if options.opens_browser:
            webbrowser.open(address)
        supervisor.start()
        threading.Thread(target=runs.cards, daemon=True).start()  # hundreds of runs take seconds to read
        try:
            _Server(config, app.state.feeds).run(sockets=[listener])
        finally:
            supervisor.stop()
            queue.close()


class _Server(uvicorn.Server):
    """Has streams of events, which never end by themselves, end before it waits for all connections to."""

    def __init__(self, config: uvicorn.Config, feeds: Feeds) -> None:
        super().__init__(config)
        self._feeds = feeds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._feeds.close()
        await super().shutdown(sockets)


def _sign_in(path: str) -> bytes:
    return render("enter.html.j2", to=path, wrong=False, csrf="", here="/enter").encode()


def _listen(options: Options) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    if os.name == "posix":  # elsewhere it would let two servers have one port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((options.host, options.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--port {options.port} on {options.host}: cannot be used ({error.strerror}): name another "
            "with --port"
        ) from error
    listener.listen(128)
    return listener
