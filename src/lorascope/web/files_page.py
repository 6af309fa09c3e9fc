"""The pages of adapter files of any origin: what each is, what can be made of it, downloads."""

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Form, Request, UploadFile
from fastapi.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.concurrency import run_in_threadpool

from lorascope.errors import ConfigError, LorascopeError
from lorascope.store import export_name
from lorascope.web.adapter_files import (
    delete_file,
    incoming,
    own_file,
    plain_stem,
    require_adapter,
    sendable,
    size_of,
    stem_of,
    stored_files,
    zipped,
)
from lorascope.web.commands import as_argument, forget_made, how_made, make_file
from lorascope.web.inspection_view import inspect_arguments, look_into, was_looked_into
from lorascope.web.pages import page, render
from lorascope.web.queue import in_shell
from lorascope.web.services import Services, services_of
from lorascope.web.workspace import OutsideError

router = APIRouter()

_LAYOUTS = {"kohya": "WebUI, Forge, ComfyUI", "diffusers": "diffusers", "peft": "PEFT (a folder)"}
_DTYPES = ("", "fp16", "bf16", "fp32")
_COPY_BYTES = 2**20


@router.get("/files")
def files(request: Request) -> Response:
    """All adapter files of the workspace, and where to drop another one."""
    services = services_of(request)
    return page(request, "files.html.j2", files=stored_files(services.workspace))


@router.post("/files/upload")
def upload_form(request: Request, file: UploadFile) -> Response:
    """A file chosen in a form without JavaScript."""
    services = services_of(request)
    with incoming(services.workspace, file.filename or "", file.size or 0) as upload:
        while chunk := file.file.read(_COPY_BYTES):
            upload.file.write(chunk)
    assert upload.path is not None
    return RedirectResponse(_view_address(services, upload.path), 303)


@router.post("/files/upload/{name:path}")
async def upload_raw(request: Request, name: str) -> Response:
    """A file as the body of a request, which tells a page how far it is."""
    services = services_of(request)
    with incoming(services.workspace, name, int(request.headers.get("content-length", 0))) as upload:
        async for chunk in request.stream():
            await run_in_threadpool(upload.file.write, chunk)
    assert upload.path is not None
    return JSONResponse({"view": _view_address(services, upload.path), "name": upload.path.name})


@router.get("/files/view")
def view(request: Request, path: str, now: bool = False) -> Response:
    """What a file is, and what can be made of it."""
    services = services_of(request)
    workspace = services.workspace
    found = require_adapter(workspace.resolve(path.strip()))
    shown_path = workspace.shown_path(found)
    is_known = now or was_looked_into(workspace, found)
    return page(
        request,
        "file.html.j2",
        name=found.name,
        path=shown_path,
        num_bytes=size_of(found),
        changed=found.stat().st_mtime,
        is_folder=found.is_dir(),
        is_own=found.is_relative_to(workspace.files_dir),
        is_sendable=_is_sendable(services, shown_path),
        made=how_made(workspace, found),
        command=in_shell(inspect_arguments(workspace, found)[:-1]),
        inspection=_inspection(request, services, found) if is_known else None,
    )


@router.get("/files/inspection")
def inspection(request: Request, path: str) -> Response:
    """What `lorascope inspect` says of a file, as part of its page."""
    services = services_of(request)
    return HTMLResponse(_inspection(request, services, require_adapter(services.workspace.resolve(path))))


def _inspection(request: Request, services: Services, path: Path) -> str:
    """The part of the page; a file that cannot be read is told in the command's own line."""
    try:
        found = look_into(services.workspace, path)
    except LorascopeError as error:
        return render("_notice.html.j2", message=str(error))
    return render(
        "_inspection.html.j2",
        found=found,
        path=services.workspace.shown_path(path),
        stem=stem_of(path).removesuffix("-peft"),
        layouts=_LAYOUTS,
        dtypes=_DTYPES,
        csrf=request.app.state.access.csrf,
    )


@router.post("/files/convert")
def convert(
    request: Request,
    path: Annotated[str, Form()],
    name: Annotated[str, Form()] = "",
    layout: Annotated[str, Form()] = "kohya",
    dtype: Annotated[str, Form()] = "",
    as_lora: Annotated[bool, Form()] = False,
) -> Response:
    """Write an adapter in another format."""
    more = ["--as-lora"] if as_lora else []
    return _write(request, "convert", path, name, layout, dtype, more)


@router.post("/files/resize")
def resize(
    request: Request,
    path: Annotated[str, Form()],
    name: Annotated[str, Form()] = "",
    layout: Annotated[str, Form()] = "kohya",
    dtype: Annotated[str, Form()] = "",
    rank: Annotated[str, Form()] = "",
    energy: Annotated[str, Form()] = "",
) -> Response:
    """Write the best adapter of a lower rank."""
    more = []
    for option, text, kind in (("--rank", rank, int), ("--energy", energy, float)):
        if text.strip():
            more.append(f"{option}={_number(option, text, kind)}")
    return _write(request, "resize", path, name, layout, dtype, more)


def _number(option: str, text: str, kind: Any) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(
            f"{option} {text[:40]!r}: is no number: rank is such as 8, energy such as 0.95"
        ) from error


def _write(
    request: Request, command: str, path: str, name: str, layout: str, dtype: str, more: list[str]
) -> Response:
    """Run a command that writes an adapter into `files/`, and go to the page of what it wrote."""
    services = services_of(request)
    workspace = services.workspace
    source = require_adapter(workspace.resolve(path))
    if layout not in _LAYOUTS or dtype not in _DTYPES:
        raise ConfigError(
            f"format {layout[:40]!r}, dtype {dtype[:40]!r}: choose one of those that are offered"
        )
    out = workspace.files_dir / export_name(plain_stem(name or stem_of(source)), layout)
    if out.exists():
        raise ConfigError(f"{workspace.shown_path(out)}: exists: choose another name, or delete it first")
    more = [f"--format={layout}", *([f"--dtype={dtype}"] if dtype else []), *more]
    make_file(workspace, [command, as_argument(workspace, source), as_argument(workspace, out), *more], out)
    address = _view_address(services, out)
    if request.headers.get("hx-request"):
        return Response(status_code=204, headers={"hx-redirect": address})
    return RedirectResponse(address, 303)


@router.get("/files/download")
def download(request: Request, path: str) -> Response:
    """An adapter file, or the folder that is one as a ZIP file, to be saved and never shown."""
    found = sendable(services_of(request).workspace, path)
    if found.is_dir():
        headers = {"content-disposition": f'attachment; filename="{plain_stem(found.name)}.zip"'}
        return StreamingResponse(zipped(found), media_type="application/octet-stream", headers=headers)
    return FileResponse(
        found, media_type="application/octet-stream", filename=f"{stem_of(found)}.safetensors"
    )


@router.get("/files/delete")
def ask_delete(request: Request, path: str) -> Response:
    """The question, and what it frees."""
    services = services_of(request)
    found = own_file(services.workspace, path)
    shown_path = services.workspace.shown_path(found)
    return page(request, "file_delete.html.j2", path=shown_path, name=found.name, freed=size_of(found))


@router.post("/files/delete")
def delete(request: Request, path: Annotated[str, Form()]) -> Response:
    """Delete a file of `files/`."""
    services = services_of(request)
    found = own_file(services.workspace, path)
    delete_file(found)
    forget_made(services.workspace, found)
    return RedirectResponse("/files", 303)


def _is_sendable(services: Services, path: str) -> bool:
    try:
        sendable(services.workspace, path)
    except OutsideError:
        return False
    return True


def _view_address(services: Services, path: Path) -> str:
    return f"/files/view?path={quote(services.workspace.shown_path(path), safe='')}"
