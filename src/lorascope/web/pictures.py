"""The Pictures step: a folder is chosen or sent, captions are written, checked and changed all at once."""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Form, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from lorascope.data.captions import has_words
from lorascope.data.pictures import RefusedError
from lorascope.errors import ConfigError, StorageError
from lorascope.store import storage_errors
from lorascope.web import uploads
from lorascope.web.chooser import list_folder
from lorascope.web.crops import RESOLUTIONS, Crop, buckets_of, crop_of
from lorascope.web.live import event_stream
from lorascope.web.pages import page, render
from lorascope.web.picture_check import Check, command, last_check, run_check
from lorascope.web.picture_set import Caption, Change, Conflict, PictureSet, note_recent, recent_sets
from lorascope.web.queue import Job, in_shell
from lorascope.web.services import Services, services_of
from lorascope.web.thumbnails import thumbnail

router = APIRouter()

_PER_PAGE = 60
_SHOWN_CHANGES = 20
_RESOLUTION = 512
_WRITE_BYTES = 2**20
_SHOWS = {
    "all": "all pictures",
    "uncaptioned": "without a caption",
    "refused": "refused",
    "duplicate": "duplicates",
    "treated": "with remarks",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class View:
    """What of a set a page shows, as its address says."""

    folder: str
    page: int = 1
    show: str = "all"
    resolution: int = _RESOLUTION
    buckets: bool = False

    def query(self, **changes: Any) -> str:
        """The address's query, with some of it changed; what is as usual is left out."""
        values = {**self.__dict__, **changes}
        usual = View("").__dict__
        kept = {name: int(value) if isinstance(value, bool) else value for name, value in values.items()}
        return urlencode({name: value for name, value in kept.items() if value != usual[name]})


@dataclass(frozen=True)
class Shown:
    """A picture on a page. `crop` is what training would take of it, None where that is not drawn; `refused`
    says why it is no picture, `problem` why its caption alone cannot be changed.
    """

    name: str
    stamp: str
    caption: Caption
    crop: Crop | None
    refused: str
    notes: Sequence[tuple[str, str]]
    problem: str

    @property
    def has_more_lines(self) -> bool:
        """Whether there are words that are not read in training."""
        return sum(map(has_words, self.caption.text.split("\n"))) > 1


# -- choose or upload ----------------------------------------------------------------------------------------


@router.get("/pictures")
def choose(request: Request, at: str = "") -> Response:
    """The file chooser, recent sets, and a form for a new set."""
    workspace = services_of(request).workspace
    recent = [(path.name, workspace.shown_path(path)) for path in recent_sets(workspace)]
    roots = [(workspace.shown_path(root), str(root)) for root in workspace.roots]
    listing = list_folder(workspace, at or ".")
    return page(
        request, "pictures.html.j2", listing=listing, roots=roots, recent=recent, at=at, limits=uploads
    )


@router.post("/pictures/upload")
async def upload_form(request: Request) -> Response:
    """A set from a form with files, for browsers without JavaScript."""
    workspace = services_of(request).workspace
    # What is sent lies in the system's folder for temporary files first, which may be full as well.
    with storage_errors(workspace.pictures_dir):
        async with request.form(max_files=uploads.MAX_FILES, max_fields=10) as form:
            folder = uploads.set_folder(workspace, str(form.get("name", "")).strip())
            files = [file for file in form.getlist("files") if isinstance(file, UploadFile) and file.filename]
            if not files:
                raise ConfigError("no files were sent: choose pictures, captions or a zip")
            batch = await run_in_threadpool(_take_all, folder, files)
    address = f"/pictures/set?{View(workspace.shown_path(folder)).query()}"
    if not batch.taken.left_out:
        return RedirectResponse(address, 303)
    return page(request, "uploaded.html.j2", taken=batch.taken, address=address, name=folder.name)


def _take_all(folder: Path, files: Sequence[UploadFile]) -> uploads.Batch:
    batch = uploads.Batch(folder)
    # Pictures first: a caption is called after its picture.
    for file in sorted(files, key=lambda sent: (sent.filename or "").lower().endswith((".txt", ".caption"))):
        with uploads.arriving(folder, file.size or 0) as path:
            with path.open("wb") as out:
                while piece := file.file.read(_WRITE_BYTES):
                    out.write(piece)
            batch.take(file.filename or "", path)
    return batch


@router.post("/pictures/upload/{name}")
async def upload_one(request: Request, name: str, file: str, beside: str = "") -> Response:
    """One file of a set, as the body of the request; says what became of it."""
    workspace = services_of(request).workspace
    folder = await run_in_threadpool(uploads.set_folder, workspace, name)
    batch = uploads.Batch(folder)
    if beside:
        batch.beside(file, beside)
    with uploads.arriving(folder, int(request.headers.get("content-length", "0"))) as path:
        with path.open("wb") as out:
            gathered = bytearray()
            async for piece in request.stream():
                gathered += piece
                if len(gathered) >= _WRITE_BYTES:
                    await run_in_threadpool(out.write, bytes(gathered))
                    gathered.clear()
            await run_in_threadpool(out.write, bytes(gathered))
        await run_in_threadpool(batch.take, file, path)
    taken = batch.taken
    content = {"pictures": taken.pictures, "captions": taken.captions, "left_out": taken.left_out}
    return JSONResponse({**content, "folder": workspace.shown_path(folder)})


# -- a set ---------------------------------------------------------------------------------------------------


@router.get("/pictures/set")
def show_set(
    request: Request,
    folder: str,
    page: int = 1,
    show: str = "all",
    resolution: int = _RESOLUTION,
    buckets: bool = False,
) -> Response:
    """The pictures of a folder with their captions."""
    services = services_of(request)
    found = PictureSet.open(services.workspace, folder)
    if found.pictures or found.rows_elsewhere:
        with suppress(StorageError):  # on a full disk, what is there can still be looked at
            note_recent(services.workspace, found.folder)
    view = View(found.address, page, show if show in _SHOWS else "all", resolution, buckets)
    return _set_page(request, services, found, view)


def _set_page(request: Request, services: Services, found: PictureSet, view: View) -> HTMLResponse:
    check = last_check(services.workspace, found.folder)
    names = _chosen(found, view.show, check)
    num_pages = max(1, -(-len(names) // _PER_PAGE))
    number = min(max(1, view.page), num_pages)
    view = View(view.folder, number, view.show, view.resolution, view.buckets)
    sizes = buckets_of(view.resolution, view.buckets) if view.resolution else []
    here = names[(number - 1) * _PER_PAGE : number * _PER_PAGE]
    num_captioned = sum(map(found.is_captioned, found.pictures))
    csrf = request.app.state.access.csrf
    return page(
        request,
        "set.html.j2",
        found=found,
        name=found.folder.name or found.address,
        view=view,
        num_captioned=num_captioned,
        num_chosen=len(names),
        num_pages=num_pages,
        pictures=[_shown(found, name, sizes, check) for name in here],
        first=(number - 1) * _PER_PAGE,
        shows=_SHOWS,
        resolutions=sorted({*RESOLUTIONS, view.resolution} - {0}),
        last_change=found.last_change(),
        opens_check=check is not None and (view.show in check.KINDS or not check.found["would_start"]),
        has_duplicates=check is not None and check.found["duplicates"] is not None,
        check=_check_part(found, check, view, csrf),
        blip=_blip_part(services, found, view, csrf),
        is_checked=check is not None,
        is_ours=found.folder.parent == services.workspace.pictures_dir,
        limits=uploads,
    )


def _chosen(found: PictureSet, show: str, check: Check | None) -> list[str]:
    if show == "all":
        return found.pictures
    if show == "uncaptioned":
        return [name for name in found.pictures if not found.is_captioned(name)]
    notes = check.notes if check else {}
    return [name for name in found.pictures if any(kind == show for kind, _ in notes.get(name, ()))]


def _shown(found: PictureSet, name: str, sizes: Sequence[tuple[int, int]], check: Check | None) -> Shown:
    crop, refused = None, ""
    try:
        width_px, height_px = found.size_of(name)
        crop = crop_of(width_px, height_px, sizes) if sizes else None
    except RefusedError as error:
        refused = str(error)
    stamp = found.stamps.get(name)
    notes = check.notes.get(name, ()) if check else ()
    caption = found.caption(name)
    problem = "" if found.read_only else caption.problem
    changed = str(stamp[1]) if isinstance(stamp, tuple) else ""
    return Shown(name, changed, caption, crop, refused, notes, problem)


@router.get("/pictures/thumb")
def picture(request: Request, folder: str, name: str, side: int = 256) -> Response:
    """A picture of a set, small."""
    workspace = services_of(request).workspace
    path = PictureSet.open(workspace, folder).path_of(name)
    content = thumbnail(path, side, workspace.state_dir / "thumbnails")
    return Response(content, media_type="image/webp", headers={"cache-control": "private, max-age=86400"})


# -- captions ------------------------------------------------------------------------------------------------


@router.get("/pictures/caption")
def show_caption(request: Request, folder: str, name: str, back: str = "", index: int = 0) -> Response:
    """A picture with its caption as it is now."""
    services = services_of(request)
    found = PictureSet.open(services.workspace, folder)
    found.path_of(name)
    view = View(found.address)
    shown = _shown(found, name, [], last_check(services.workspace, found.folder))
    return page(request, "_picture.html.j2", picture=shown, view=view, back=back, index=index)


@router.post("/pictures/caption")
def save_caption(
    request: Request,
    folder: Annotated[str, Form()],
    name: Annotated[str, Form()],
    version: Annotated[str, Form()] = "",
    text: Annotated[str, Form()] = "",
    back: Annotated[str, Form()] = "",
    index: Annotated[int, Form()] = 0,
) -> Response:
    """Save a caption, or say that another text was saved meanwhile."""
    found = _open_to_change(services_of(request), folder)
    saved = found.save(name, text, version)
    view = View(found.address)
    is_part = bool(request.headers.get("hx-request"))
    if isinstance(saved, Conflict):
        template = "_conflict.html.j2" if is_part else "conflict.html.j2"
        values = {
            "conflict": saved,
            "name": name,
            "version": version,
            "view": view,
            "back": back,
            "index": index,
        }
        return page(request, template, 200 if is_part else 409, **values)
    if is_part:
        return page(request, "_saved.html.j2", version=saved.version, words="Saved")
    return RedirectResponse(f"/pictures/set?{back or view.query()}#p{index}", 303)


@router.post("/pictures/change")
def change_all(
    request: Request,
    folder: Annotated[str, Form()],
    step: Annotated[str, Form()] = "look",
    digest: Annotated[str, Form()] = "",
    trigger: Annotated[str, Form()] = "",
    find: Annotated[str, Form()] = "",
    replacement: Annotated[str, Form()] = "",
    kind: Annotated[str, Form()] = "tag",
    same_case: Annotated[bool, Form()] = False,
) -> Response:
    """Show what a change of all captions would do, or do it."""
    found = _open_to_change(services_of(request), folder)
    change = Change(trigger.strip(), find, replacement, kind == "tag", same_case)
    if step == "do":
        found.apply(change, digest)
        return _changed(request, found)
    plan = found.plan(change)
    template = "_change.html.j2" if request.headers.get("hx-request") else "change.html.j2"
    values: dict[str, Any] = {
        "plan": plan,
        "change": change,
        "view": View(found.address),
        "limit": _SHOWN_CHANGES,
    }
    return page(request, template, **values)


@router.post("/pictures/undo")
def undo(request: Request, folder: Annotated[str, Form()]) -> Response:
    """Bring back the captions from before the last change of all of them."""
    found = _open_to_change(services_of(request), folder)
    num_back, others = found.undo()
    if not others:
        return _changed(request, found)
    values: dict[str, Any] = {"num_back": num_back, "others": others, "view": View(found.address)}
    template = "_undone.html.j2" if request.headers.get("hx-request") else "undone.html.j2"
    return page(request, template, **values)


def _open_to_change(services: Services, folder: str) -> PictureSet:
    found = PictureSet.open(services.workspace, folder)
    job = _blip_job(services, found) if found.lists else None
    if job is not None and job.state == "running":
        # That command writes the whole list anew, as it had read it.
        raise ConfigError(
            f"{found.folder.name}: captions are being written into {found.lists[0]}: wait for it"
        )
    return found


def _changed(request: Request, found: PictureSet) -> Response:
    if request.headers.get("hx-request"):
        return Response(status_code=200, headers={"hx-refresh": "true"})
    return RedirectResponse(f"/pictures/set?{View(found.address).query()}", 303)


# -- commands ------------------------------------------------------------------------------------------------


@router.post("/pictures/blip")
def caption_by_model(
    request: Request,
    folder: Annotated[str, Form()],
    model: Annotated[str, Form()] = "",
    prompt: Annotated[str, Form()] = "",
    max_tokens: Annotated[str, Form()] = "",
    overwrite: Annotated[bool, Form()] = False,
) -> Response:
    """Put `lorascope caption` into the queue."""
    services = services_of(request)
    found = PictureSet.open(services.workspace, folder)
    more = {"model": model, "prompt": prompt, "max-tokens": max_tokens}
    start_captions(services, found, {name: text.strip() for name, text in more.items()}, overwrite)
    view = View(found.address)
    if request.headers.get("hx-request"):
        return HTMLResponse(_blip_part(services, found, view, request.app.state.access.csrf))
    return RedirectResponse(f"/pictures/set?{view.query()}", 303)


def start_captions(services: Services, found: PictureSet, options: dict[str, str], overwrite: bool) -> Job:
    """Put `lorascope caption` into the queue, with those options that are not empty.

    Raises `ConfigError` where it is there already for this set.
    """
    job = _blip_job(services, found)
    if job is not None and job.state in ("queued", "running"):
        raise ConfigError(f"{found.folder.name}: is being captioned already: cancel that first")
    if options.get("model"):
        options = {**options, "model": _model(services, options["model"])}
    # In one word with its name: a text that begins with a dash is no option.
    given = [f"--{name}={text}" for name, text in options.items() if text]
    if overwrite:
        given.append("--overwrite")
    if found.lists == ["metadata.jsonl"]:
        given.append("--out=jsonl")
    title = f"Captions for {found.folder.name}"
    return services.supervisor.enqueue("caption", title, ["caption", str(found.folder), *given])


def _model(services: Services, text: str) -> str:
    """A model's folder below an allowed one, or its name on the hub."""
    if _HUB_ID.fullmatch(text) and not (services.workspace.folder / text).exists():
        return text
    return str(services.workspace.resolve(text))


@router.get("/pictures/events")
async def set_events(request: Request, folder: str) -> StreamingResponse:
    """How captioning goes on."""
    services = services_of(request)
    found = await run_in_threadpool(PictureSet.open, services.workspace, folder)
    csrf = request.app.state.access.csrf

    def make() -> dict[str, str]:
        return {"blip": _blip_state(services, found, View(found.address), csrf)}

    return event_stream(request, services.workspace.state_dir, make)


def _blip_job(services: Services, found: PictureSet) -> Job | None:
    jobs = services.queue.recent("caption", 50)
    return next((job for job in jobs if job.arguments[1:2] == (str(found.folder),)), None)


def _blip_part(services: Services, found: PictureSet, view: View, csrf: str) -> str:
    job = _blip_job(services, found)
    state = _blip_state(services, found, view, csrf)
    return render("_blip.html.j2", job=job, state=state, view=view, csrf=csrf)


def _blip_state(services: Services, found: PictureSet, view: View, csrf: str) -> str:
    job = _blip_job(services, found)
    line = services.supervisor.last_line(job.id) if job and job.state == "running" else ""
    said = services.supervisor.output(job.id).splitlines() if job and job.state in ("done", "failed") else []
    shown = job.command if job else ""
    values = {"line": line, "said": said[:30], "command": shown}
    return render("_blip_state.html.j2", job=job, view=view, csrf=csrf, **values)


@router.post("/pictures/check")
def check_set(
    request: Request,
    folder: Annotated[str, Form()],
    resolution: Annotated[int, Form()] = _RESOLUTION,
    buckets: Annotated[bool, Form()] = False,
) -> Response:
    """Run `lorascope data check` on the set and show what it found."""
    services = services_of(request)
    found = PictureSet.open(services.workspace, folder)
    buckets_of(resolution, buckets)
    check = run_check(services.workspace, found.folder, command(found.folder, resolution, buckets))
    view = View(found.address, resolution=resolution, buckets=buckets)
    if request.headers.get("hx-request"):
        return HTMLResponse(_check_part(found, check, view, request.app.state.access.csrf))
    return RedirectResponse(f"/pictures/set?{view.query()}", 303)


def _check_part(found: PictureSet, check: Check | None, view: View, csrf: str) -> str:
    counts = {
        kind: sum(any(of == kind for of, _ in notes) for notes in check.notes.values()) if check else 0
        for kind in Check.KINDS
    }
    known = set(found.pictures)
    others = [
        (name, words)
        for name, notes in (check.notes.items() if check else ())
        for kind, words in notes
        if kind == "refused" and name not in known
    ]
    values = {"counts": counts, "others": others[:50], "num_others": len(others)}
    shown = in_shell(command(Path(found.address), view.resolution or _RESOLUTION, view.buckets))
    return render("_check.html.j2", check=check, view=view, csrf=csrf, command=shown, shows=_SHOWS, **values)
