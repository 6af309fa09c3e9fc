"""The page of a result: the verdict and why, the file to take along, the next study."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from lorascope.errors import LorascopeError
from lorascope.run_folder import RunDir
from lorascope.web.adapter_files import size_of
from lorascope.web.commands import Made, how_made, keep_made, make_file
from lorascope.web.pages import page, render
from lorascope.web.queue import Job
from lorascope.web.results import FORMAT_WORDS, MERGED, Export, Result, read_result
from lorascope.web.services import Services, services_of

router = APIRouter()

_KIND = "export"
_NUM_JOBS = 100  # of the queue that are looked through
_OUT = "--out="


@dataclass(frozen=True)
class Download:
    """A file that was made: `use` says what to do with it."""

    path: str
    name: str
    num_bytes: int
    is_folder: bool
    use: tuple[str, str]
    made: Made | None


@dataclass(frozen=True)
class MergedModel:
    """A whole model that the queue makes, or made."""

    job: Job
    name: str
    path: str
    command: str
    num_bytes: int
    is_folder: bool
    notes: tuple[str, ...]


@router.get("/runs/{name}/result")
def result(
    request: Request,
    name: str,
    arm: str = "",
    layout: str = "kohya",
    checkpoint: str = "last",
    strength: float = 1.0,
    bake: bool = False,
    as_lora: bool = False,
) -> Response:
    """What the run comes to; with `arm` and so on the file that was made of it."""
    services = services_of(request)
    card = services.runs.card(name)
    try:
        found = _result_of(services, name)
    except LorascopeError as error:
        return page(request, "result_missing.html.j2", card=card, reason=str(error))
    keep = found.keep or (found.arms[0].name if found.arms else "")
    chosen = Export(keep, "kohya", found.epoch, found.strength, found.strength != 1, False)
    download = None
    if arm:
        chosen = Export.of(found, arm, layout, checkpoint, strength, bake, as_lora)
        download = _download(services, name, found, chosen)
    return page(
        request,
        "result.html.j2",
        card=card,
        r=found,
        has_report=RunDir(services.workspace.run_dir(name)).report_html.is_file(),
        formats=FORMAT_WORDS,
        chosen=chosen,
        made=None if download is None else _shown(name, download),
        exports=_exports(request, services, name),
    )


@router.post("/runs/{name}/export")
def export(
    request: Request,
    name: str,
    arm: Annotated[str, Form()],
    layout: Annotated[str, Form()] = "kohya",
    checkpoint: Annotated[str, Form()] = "last",
    strength: Annotated[float, Form()] = 1.0,
    bake: Annotated[bool, Form()] = False,
    as_lora: Annotated[bool, Form()] = False,
) -> Response:
    """Make a file of an arm: at once, or in the queue where a whole model is written."""
    services, workspace = services_of(request), services_of(request).workspace
    found = _result_of(services, name)
    wish = Export.of(found, arm, layout, checkpoint, strength, bake, as_lora)
    out = wish.out(workspace, name, found.study)
    arguments = wish.arguments(workspace, name, out)
    is_asked_in_page = bool(request.headers.get("hx-request"))
    if wish.layout in MERGED:
        services.supervisor.enqueue(_KIND, f"{out.name} of {name}", arguments, run=name)
        if is_asked_in_page:
            return HTMLResponse(_exports(request, services, name), headers={"hx-retarget": "#exports"})
        return RedirectResponse(f"/runs/{name}/result#exports", 303)
    make_file(workspace, arguments, out)
    if is_asked_in_page:
        download = _download(services, name, found, wish)
        return HTMLResponse("" if download is None else _shown(name, download))
    asked = {"arm": arm, "layout": layout, "checkpoint": checkpoint, "strength": f"{strength:g}"}
    marks = {key: "true" for key, value in (("bake", bake), ("as_lora", as_lora)) if value}
    return RedirectResponse(f"/runs/{name}/result?{urlencode({**asked, **marks})}#made", 303)


@router.get("/runs/{name}/exports")
def exports(request: Request, name: str) -> Response:
    """The models that are made in the queue, as they are now."""
    return HTMLResponse(_exports(request, services_of(request), name))


def _result_of(services: Services, name: str) -> Result:
    run = RunDir(services.workspace.run_dir(name))
    found: Result = services.runs.kept("result", run.manifest_json, lambda: read_result(run.path))
    return found


def _download(services: Services, run: str, found: Result, wish: Export) -> Download | None:
    """The file that an export made, if it is there."""
    out = wish.out(services.workspace, run, found.study)
    if not out.exists():
        return None
    return Download(
        services.workspace.shown_path(out),
        out.name,
        size_of(out),
        out.is_dir(),
        _use(out, wish),
        how_made(services.workspace, out),
    )


def _use(out: Path, wish: Export) -> tuple[str, str]:
    """What to do with a file: in words, and as what is typed."""
    weight = 1.0 if wish.is_baked else wish.strength
    match wish.layout:
        case "kohya":
            words = "Put it into models/Lora (WebUI, Forge) or models/loras (ComfyUI). In a prompt:"
            return words, f"<lora:{out.stem}:{weight:g}>"
        case "diffusers":
            at = "" if weight == 1 else f', and draw with cross_attention_kwargs={{"scale": {weight:g}}}'
            return f"In Python{at}:", f'pipeline.load_lora_weights("{out.name}")'
        case "peft":
            at = "" if weight == 1 else f" It was trained for weight 1; the verdict uses {weight:g}."
            return f"Unpack it. In Python:{at}", f'PeftModel.from_pretrained(pipeline.unet, "{out.name}")'
        case "merged-ldm":
            words = "Put it into models/Stable-diffusion (WebUI, Forge) or models/checkpoints (ComfyUI):"
            return words, out.name
        case _:
            return "Unpack it. In Python:", f'StableDiffusionPipeline.from_pretrained("{out.name}")'


def _shown(run: str, download: Download) -> str:
    return render("_made.html.j2", made=download, run=run)


def _exports(request: Request, services: Services, name: str) -> str:
    """Models of this run that the queue makes or made."""
    rows: list[MergedModel] = []
    for job in services.queue.recent(_KIND, _NUM_JOBS):
        out = _out_of(services, job)
        if job.run != name or out is None or (job.state == "done" and not out.exists()):
            continue
        if job.state == "done" and how_made(services.workspace, out) is None:
            said = services.supervisor.log_tail(job.id)
            keep_made(services.workspace, out, job.arguments, said, job.ended or 0.0)
        is_done = job.state == "done"
        made = how_made(services.workspace, out) if is_done else None
        rows.append(
            MergedModel(
                job,
                out.name,
                services.workspace.shown_path(out),
                job.command,
                size_of(out) if is_done else 0,
                out.is_dir(),
                made.notes if made else (),
            )
        )
    csrf = request.app.state.access.csrf
    waits = any(row.job.state in ("queued", "running") for row in rows)
    return render("_exports.html.j2", name=name, rows=rows, waits=waits, csrf=csrf)


def _out_of(services: Services, job: Job) -> Path | None:
    text = next((part.removeprefix(_OUT) for part in job.arguments if part.startswith(_OUT)), None)
    return None if text is None else services.workspace.folder / text
