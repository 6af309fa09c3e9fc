"""The page of a run under way: stages, time left, curves, previews, log; pause, go on, cancel."""

import re
from collections.abc import Mapping
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, RedirectResponse, Response, StreamingResponse

from lorascope.errors import StorageError
from lorascope.run_folder import RunDir
from lorascope.store import open_regular
from lorascope.web.live import event_stream
from lorascope.web.metrics import Curves, draw_chart
from lorascope.web.pages import page, render
from lorascope.web.queue import Job
from lorascope.web.runs import RunCard
from lorascope.web.services import Services, services_of
from lorascope.web.workspace import MissingError

router = APIRouter()

_LOG_LINES = 40
_LOG_BYTES = 16_000
# A report is a page of its own with its own policy; in a sandbox it has no cookie and no origin of ours.
_REPORT_POLICY = (
    "sandbox allow-scripts allow-downloads allow-popups; default-src 'none'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self'"
)


@router.get("/runs/{name}")
def run(request: Request, name: str) -> Response:
    """A run as it is now, and as it goes on."""
    services = services_of(request)
    card = services.runs.card(name)
    return page(request, "run.html.j2", card=card, parts=_parts(request, services, name))


@router.get("/runs/{name}/events")
async def run_events(request: Request, name: str) -> StreamingResponse:
    """The parts of the page as they change."""
    services = services_of(request)
    folder = services.workspace.run_dir(name)
    return event_stream(request, folder, lambda: _parts(request, services, name))


@router.get("/runs/{name}/report")
def report(request: Request, name: str) -> Response:
    """The report, as it stands in the run folder."""
    path = _own_file(RunDir(services_of(request).workspace.run_dir(name)).report_html, "report")
    headers = {"content-security-policy": _REPORT_POLICY}
    return FileResponse(path, media_type="text/html; charset=utf-8", headers=headers)


@router.get("/runs/{name}/log")
def whole_log(request: Request, name: str) -> Response:
    """The whole log of the run, as text."""
    path = _own_file(RunDir(services_of(request).workspace.run_dir(name)).log_path, "log")
    return FileResponse(path, media_type="text/plain; charset=utf-8")


def _own_file(path: Path, what: str) -> Path:
    """A file of a run folder, which may come from others: no link leads out of it."""
    if not path.is_file() or path.is_symlink():
        raise MissingError(f"{path.parent.name}: has no {what} yet: it is written as the run goes on")
    return path


@router.post("/jobs/{number}/{action}")
def act_on_job(request: Request, number: int, action: str) -> Response:
    """Pause, resume, cancel or move a job."""
    services = services_of(request)
    match action:
        case "pause":
            services.supervisor.pause(number)
        case "resume":
            services.supervisor.resume(number)
        case "cancel":
            services.supervisor.cancel(number)
        case "earlier" | "later":
            services.queue.move(number, earlier=action == "earlier")
        case _:
            raise MissingError(f"{action[:40]}: nothing that can be asked of a job")
    job = services.queue.job(number)
    if request.headers.get("hx-request"):
        return Response(status_code=204)  # what changed is sent as an event
    return RedirectResponse(f"/runs/{job.run}" if job.run else "/", 303)


def _parts(request: Request, services: Services, name: str) -> dict[str, str]:
    """The live parts of the page: status, curves, previews, log."""
    card = services.runs.card(name)
    run = RunDir(services.workspace.run_dir(name))
    waits_for = _waits_for(services, card)
    csrf = request.app.state.access.csrf
    curves = services.reader(name).update()
    charts = [
        draw_chart("Training loss", "step", {arm: found.loss for arm, found in curves.items()}, card.arms),
        draw_chart(
            "Held-out loss minus the base's",
            "epoch",
            {arm: found.heldout for arm, found in curves.items()},
            card.arms,
        ),
    ]
    rows = [(arm, curves[arm]) for arm in card.arms if arm in curves]
    return {
        "status": render("_status.html.j2", card=card, waits_for=waits_for, csrf=csrf),
        "curves": render("_curves.html.j2", charts=[chart for chart in charts if chart], rows=rows),
        "previews": render("_previews.html.j2", name=name, previews=_previews(run, card, curves)),
        "log": render("_log.html.j2", name=name, lines=_log_lines(services, run, card)),
    }


def _waits_for(services: Services, card: RunCard) -> list[Job]:
    """What runs before a waiting job."""
    if card.job is None or card.job.state != "queued":
        return []
    return [job for job in services.queue.jobs("running", "queued") if _is_before(job, card.job)]


def _is_before(job: Job, other: Job) -> bool:
    return job.id != other.id and (job.state == "running" or job.place < other.place)


def _previews(
    run: RunDir, card: RunCard, curves: Mapping[str, Curves]
) -> list[tuple[str, int, int | None, list[str]]]:
    """The newest previews of each arm: arm, epoch, step, paths relative to the run folder."""
    found = []
    for arm in card.arms:
        epochs = {
            int(path.name[6:]): path
            for path in (run.previews_dir / arm).glob("epoch-*")
            if re.fullmatch("[0-9]{1,9}", path.name[6:])
        }
        if epochs:
            epoch = max(epochs)
            pictures = [path.relative_to(run.path).as_posix() for path in sorted(epochs[epoch].glob("*.png"))]
            known = curves.get(arm)
            step = round(epoch * known.step / known.epoch) if known and known.epoch else None
            found.append((arm, epoch, step, pictures))
    return found


def _log_lines(services: Services, run: RunDir, card: RunCard) -> list[str]:
    lines = _tail(run.log_path)
    if card.job is not None and card.state == "failed":
        lines += services.supervisor.log_tail(card.job.id, 5)
    return lines[-_LOG_LINES:]


def _tail(path: Path) -> list[str]:
    try:
        with open_regular(path) as file:
            start = max(0, file.seek(0, 2) - _LOG_BYTES)
            file.seek(start)
            lines = file.read(_LOG_BYTES).decode(errors="replace").splitlines()
            return lines[1:] if start else lines  # the first is cut
    except (OSError, StorageError):
        return []
