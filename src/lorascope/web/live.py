"""Server-sent events: parts of a page, sent when the files that they are made of change.

All browsers at one address share one look at the files: many cost no more than one.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from pathlib import Path

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from watchfiles import Change, awatch

from lorascope.errors import LorascopeError

_LOOK_EVERY_S = 1.0  # also without a change: what the queue knows is in no file that is watched
_FASTEST_S = 0.4
_WATCHED = ("progress.json", "manifest.json", "groups.json", "study.toml", "lorascope.log", ".jsonl")
_BEAT_S = 15.0

Parts = Mapping[str, str]


class _Feed:
    """What browsers at one address are sent: `parts` as they are now; `news` is set at the next change."""

    def __init__(self, folder: Path, make: Callable[[], Parts]) -> None:
        self.parts: Parts = {}
        self.news = asyncio.Event()
        self.has_ended = False
        self.num_readers = 0
        self.task = asyncio.create_task(self._run(folder, make))

    async def _run(self, folder: Path, make: Callable[[], Parts]) -> None:
        try:
            with suppress(LorascopeError, OSError):  # a run that was deleted, say: its page tells
                async for _ in _looks(folder):
                    parts = await run_in_threadpool(make)
                    if parts != self.parts:
                        self.parts = parts
                        self._tell()
        finally:
            self.has_ended = True
            self._tell()

    def _tell(self) -> None:
        self.news.set()
        self.news = asyncio.Event()


class Feeds:
    """All event streams of a server."""

    def __init__(self) -> None:
        self._feeds: dict[str, _Feed] = {}
        self._is_closed = False

    def close(self) -> None:
        """End all streams; they never end by themselves."""
        self._is_closed = True
        for feed in self._feeds.values():
            feed.task.cancel()

    async def events(self, request: Request, folder: Path, make: Callable[[], Parts]) -> AsyncIterator[str]:
        """The events for one browser."""
        yield "retry: 2000\n\n"
        if self._is_closed:
            return
        address = f"{request.url.path}?{request.url.query}"
        feed = self._feeds.get(address)
        if feed is None or feed.has_ended:
            feed = self._feeds[address] = _Feed(folder, make)
        feed.num_readers += 1
        sent: dict[str, str] = {}
        try:
            while not feed.has_ended:
                news = feed.news
                for name, text in feed.parts.items():
                    if sent.get(name) != text:
                        sent[name] = text
                        yield _event(name, text)
                try:
                    await asyncio.wait_for(news.wait(), _BEAT_S)
                except TimeoutError:
                    if await request.is_disconnected():
                        return
                    yield ": still here\n\n"
            await asyncio.wait([feed.task])
            if not feed.task.cancelled():
                feed.task.result()  # a fault of ours is logged
        finally:
            feed.num_readers -= 1
            if not feed.num_readers:
                feed.task.cancel()
                if self._feeds.get(address) is feed:
                    del self._feeds[address]


def event_stream(request: Request, folder: Path, make: Callable[[], Parts]) -> StreamingResponse:
    """Events named as the parts that `make` gives, each whenever its text is another one than before.

    `make` is called in a thread, after a change below `folder` and about once a second, for all browsers at
    this address together.
    """
    feeds: Feeds = request.app.state.feeds
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(
        feeds.events(request, folder, make), media_type="text/event-stream", headers=headers
    )


async def _looks(folder: Path) -> AsyncIterator[None]:
    """When to look: now, after each change, and about once a second."""
    yield None
    while True:
        try:
            changes = awatch(
                folder,
                watch_filter=_is_watched,
                step=100,
                rust_timeout=round(_LOOK_EVERY_S * 1000),
                yield_on_timeout=True,
                ignore_permission_denied=True,
                # Its own: once cancelled, it sets the one that it was given.
                stop_event=asyncio.Event(),
            )
            async for _ in changes:
                yield None
                await asyncio.sleep(_FASTEST_S)
        except OSError:  # not there (yet), or the system watches no more files
            await asyncio.sleep(_LOOK_EVERY_S)
            yield None


def _is_watched(change: Change, path: str) -> bool:
    return path.endswith(_WATCHED)


def _event(name: str, text: str) -> str:
    lines = "".join(f"data: {line}\n" for line in text.splitlines() or [""])
    return f"event: {name}\n{lines}\n"
