"""Server-sent events: one stream a page, which ends when the reader leaves or the server stops."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from fastapi.responses import StreamingResponse


class Event(NamedTuple):
    """A named event with plain data."""

    name: str
    data: Any


def event_stream(events: AsyncIterator[Event]) -> StreamingResponse:
    """The events as `text/event-stream` (WHATWG HTML, section 9.2)."""

    async def encoded() -> AsyncIterator[str]:
        async for event in events:
            yield f"event: {event.name}\ndata: {json.dumps(event.data, ensure_ascii=False, allow_nan=False)}\n\n"

    # Proxies must not hold events back.
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(encoded(), media_type="text/event-stream", headers=headers)


async def pause(stopping: asyncio.Event, seconds: float) -> bool:
    """Waits; True when the server began to stop meanwhile."""
    try:
        await asyncio.wait_for(stopping.wait(), seconds)
    except TimeoutError:
        return False
    return True
