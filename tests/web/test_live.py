"""Streams of events end by themselves alone."""

import asyncio
from contextlib import suppress
from pathlib import Path

from lorascope.web.live import _looks


def test_a_browser_that_goes_away_ends_no_other_stream(tmp_path: Path) -> None:
    async def go_away() -> bool:
        closing = asyncio.Event()
        looks = _looks(tmp_path, closing)
        await anext(looks)
        waiting = asyncio.ensure_future(anext(looks))  # type: ignore[arg-type]
        await asyncio.sleep(0.3)
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
        return closing.is_set()

    assert not asyncio.run(go_away())


def test_streams_end_with_the_server(tmp_path: Path) -> None:
    async def close() -> int:
        closing = asyncio.Event()
        num_looks = 0
        async for _ in _looks(tmp_path, closing):
            num_looks += 1
            closing.set()
        return num_looks

    assert asyncio.run(close()) == 1
