"""A web app to test: the real application behind its real gate, in a folder of the test's."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from starlette.testclient import TestClient

from lorascope.web.access import Access, Gate
from lorascope.web.app import build_app
from lorascope.web.queue import Queue
from lorascope.web.runs import Runs
from lorascope.web.services import Services
from lorascope.web.supervisor import Supervisor
from lorascope.web.workspace import Workspace

TOKEN = "a token for tests, long enough"
PORT = 7860
ADDRESS = f"http://127.0.0.1:{PORT}"


def make_services(folder: Path, *allowed: Path) -> Services:
    """The services of a workspace; its queue is run by whoever calls `supervisor.look`."""
    workspace = Workspace.open(folder, allowed)
    queue = Queue(workspace.state_dir / "queue.sqlite")
    return Services(workspace, queue, Supervisor(workspace, queue), Runs(workspace, queue))


@contextmanager
def web_client(services: Services, signed_in: bool = True) -> Iterator[TestClient]:
    """A client of the running app, with a browser's cookie and form token where it is signed in."""
    access = Access(TOKEN, PORT)
    app = Gate(build_app(services, access), access, lambda path: b"sign in")
    with TestClient(app, base_url=ADDRESS, follow_redirects=False) as client:
        client.headers["accept"] = "text/html"
        if signed_in:
            client.cookies.set(access.cookie_name, access.cookie)
            client.headers["x-csrf-token"] = access.csrf
        yield client
    services.queue.close()
