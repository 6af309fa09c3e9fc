"""Server-sent events: parts of a page, sent when the files that they are made of change."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from watchfiles import Change, awatch

_LOOK_EVERY_MS = 1000  # also without a change: what the queue knows is in no file that is watched
_FASTEST_S = 0.4
_WATCHED = ("progress.json", "manifest.json", "groups.json", "study.toml", "lorascope.log", ".jsonl")
_BEAT_S = 15.0

Parts = Mapping[str, str]


def event_stream(request: Request, folder: Path, make: Callable[[], Parts]) -> StreamingResponse:
    """Events named as the parts that `make` gives, each whenever its text is another one than before.

    `make` is called in a thread, after a change below `folder` and about once a second.
    """
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_events(request, folder, make), media_type="text/event-stream", headers=headers)


async def _events(request: Request, folder: Path, make: Callable[[], Parts]) -> AsyncIterator[str]:
    sent: dict[str, str] = {}
    loop = asyncio.get_running_loop()
    last = loop.time()
    yield "retry: 2000\n\n"
    async for _ in _looks(folder, request.app.state.closing):
        if await request.is_disconnected():
            return
        parts = await run_in_threadpool(make)
        for name, text in parts.items():
            if sent.get(name) != text:
                sent[name], last = text, loop.time()
                yield _event(name, text)
        if loop.time() - last > _BEAT_S:
            last = loop.time()
            yield ": still here\n\n"


async def _looks(folder: Path, closing: asyncio.Event) -> AsyncIterator[None]:
    """When to look: now, after each change, and about once a second."""
    yield None
    while not closing.is_set():
        if not folder.is_dir():
            await asyncio.sleep(_LOOK_EVERY_MS / 1000)
            yield None
            continue
        changes = awatch(
            folder,
            watch_filter=_is_watched,
            step=100,
            rust_timeout=_LOOK_EVERY_MS,
            yield_on_timeout=True,
            # Its own: where a browser goes away, the wait is cancelled, which sets the event it was given.
            stop_event=asyncio.Event(),
            recursive=True,
            ignore_permission_denied=True,
        )
        async for _ in changes:
            if closing.is_set():
                return
            yield None
            await asyncio.sleep(_FASTEST_S)


def _is_watched(change: Change, path: str) -> bool:
    return path.endswith(_WATCHED)


def _event(name: str, text: str) -> str:
    lines = "".join(f"data: {line}\n" for line in text.splitlines() or [""])
    return f"event: {name}\n{lines}\n"
