"""Pages from templates: one environment, what every page shows, and how errors look."""

import functools
import hashlib
import time
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from lorascope import __version__
from lorascope.console import duration, plain, size

# The report's own style is used here too, so that there is one look.
_STATIC = {
    "report.css": "report/templates",
    **dict.fromkeys(
        (
            "web.css",
            "icon.svg",
            "live.js",
            "compare.js",
            "files.js",
            "pictures.js",
            "htmx.min.js",
            "sse.min.js",
        ),
        "web/static",
    ),
}
_KINDS = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@functools.cache
def static_file(name: str) -> tuple[bytes, str] | None:
    """Content and media type of a file that pages load; None where there is none of that name."""
    folder = _STATIC.get(name)
    if folder is None:
        return None
    content = resources.files("lorascope").joinpath(*folder.split("/"), name).read_bytes()
    return content, _KINDS[Path(name).suffix]


@functools.cache
def _static_address(name: str) -> str:
    """Where a page finds a static file: the address changes with the content, so that it can be kept."""
    found = static_file(name)
    assert found is not None, name
    return f"/static/{name}?v={hashlib.sha256(found[0]).hexdigest()[:12]}"


def _ago(seconds: float | None) -> str:
    """How long ago a time was, in words."""
    return "" if seconds is None else f"{duration(max(0.0, time.time() - seconds))} ago"


def _template(name: str) -> str | None:
    for wing in ("web", "report"):  # parts of the report's page are parts of pages here
        place = resources.files("lorascope") / wing / "templates" / name
        if place.is_file():
            return place.read_text(encoding="utf-8")
    return None


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["static"] = _static_address
    environment.globals["version"] = __version__
    environment.filters["size"] = size
    environment.filters["duration"] = duration
    environment.filters["ago"] = _ago
    environment.filters["plain"] = plain
    environment.filters["part"] = lambda text: quote(str(text), safe="")
    return environment


def render(template: str, /, **values: Any) -> str:
    """A template with these values; every text in them is escaped."""
    return _environment().get_template(template).render(values)


def page(request: Request, template: str, /, status: int = 200, **values: Any) -> HTMLResponse:
    """A whole page, or for HTMX the part that it asked for."""
    common = {"csrf": request.app.state.access.csrf, "here": request.url.path}
    return HTMLResponse(render(template, **common, **values), status)


def problem(request: Request, status: int, message: str) -> Response:
    """How an error looks: JSON for programs, a notice within the page for HTMX, else a page of its own."""
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": message}, status)
    if request.headers.get("hx-request"):
        # HTMX shows what comes with 200 alone; the notice has its place on every page.
        headers = {"hx-retarget": "#notice", "hx-reswap": "innerHTML", "x-status": str(status)}
        return HTMLResponse(render("_notice.html.j2", message=message), 200, headers)
    return page(request, "problem.html.j2", status=status, message=message)
