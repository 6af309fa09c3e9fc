"""The home page: all runs with picture, verdict and state, the queue, and how a run is deleted."""

import os
import shutil
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response, StreamingResponse

from lorascope.console import size
from lorascope.errors import ConfigError
from lorascope.run_folder import RunDir
from lorascope.store import storage_errors
from lorascope.web.live import event_stream
from lorascope.web.pages import page, render
from lorascope.web.services import Services, services_of
from lorascope.web.thumbnails import thumbnail
from lorascope.web.workspace import MissingError, OutsideError

router = APIRouter()


@router.get("/")
def home(request: Request) -> Response:
    """All runs."""
    services = services_of(request)
    return page(request, "home.html.j2", runs=_runs(request, services), queue=_queue(request, services))


@router.get("/events")
async def home_events(request: Request) -> StreamingResponse:
    """Runs and queue as they change."""
    services = services_of(request)

    def make() -> dict[str, str]:
        return {"runs": _runs(request, services), "queue": _queue(request, services)}

    return event_stream(request, services.workspace.state_dir, make)


def _runs(request: Request, services: Services) -> str:
    return render("_runs.html.j2", cards=services.runs.cards(), csrf=request.app.state.access.csrf)


def _queue(request: Request, services: Services) -> str:
    jobs = services.queue.jobs("running", "queued")
    trouble = services.supervisor.trouble
    return render("_queue.html.j2", jobs=jobs, trouble=trouble, csrf=request.app.state.access.csrf)


@router.get("/runs/{name}/picture")
def run_picture(request: Request, name: str, path: str, side: int = 256) -> Response:
    """A picture of a run, small."""
    services = services_of(request)
    folder = services.workspace.run_dir(name)
    content = thumbnail(inside(folder, path, ".png"), side, services.workspace.state_dir / "thumbnails")
    return Response(content, media_type="image/webp", headers={"cache-control": "private, max-age=60"})


@router.get("/runs/{name}/disk")
def run_disk(request: Request, name: str) -> Response:
    """What a run takes on the disk, as text."""
    return Response(size(_disk_bytes(services_of(request).workspace.run_dir(name))), media_type="text/plain")


@router.get("/runs/{name}/delete")
def ask_delete(request: Request, name: str) -> Response:
    """What deleting the run would free, and the question."""
    folder = services_of(request).workspace.run_dir(name)
    return page(request, "delete.html.j2", name=name, folder=str(folder), freed=size(_disk_bytes(folder)))


@router.post("/runs/{name}/delete")
def delete(request: Request, name: str, sure: Annotated[str, Form()]) -> Response:
    """Delete the run folder, where its name was typed and nobody works in it."""
    if sure != name:
        raise ConfigError(f"{sure!r} is not the name of the run: type {name!r} to delete it")
    delete_run(services_of(request), name)
    return RedirectResponse("/", 303)


def delete_run(services: Services, name: str) -> int:
    """Delete a run folder and forget its jobs; the bytes that it took.

    Raises `ConfigError` where it is in the queue, and `StorageError` where a process works in it.
    """
    folder = services.workspace.run_dir(name)
    if any(job.run == name for job in services.queue.jobs("running", "queued")):
        raise ConfigError(f"{name}: is in the queue: cancel it first")
    freed = _disk_bytes(folder)
    with storage_errors(folder):
        with RunDir(folder).lock():  # whoever works in the folder holds it
            shutil.rmtree(folder, ignore_errors=os.name != "posix")  # Windows keeps what is open
        if folder.exists():
            shutil.rmtree(folder)
    services.supervisor.forget(name)
    return freed


def inside(folder: Path, path: str, suffix: str) -> Path:
    """A file below a folder; raise `OutsideError` for one elsewhere, or `MissingError`."""
    try:
        found = (folder / path).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise MissingError(f"{path[:200]}: is not there any more") from error
    if not found.is_relative_to(folder.resolve()) or found.suffix != suffix:
        raise OutsideError(f"{path[:200]}: is no {suffix} file of this folder")
    return found


def _disk_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
