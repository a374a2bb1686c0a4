"""What every endpoint that reads its own body does first: bounded bytes, bounded time, and a name for the request."""

from __future__ import annotations

import asyncio
import re

from fastapi import Request

from sihe.core.errors import TooLarge
from sihe.core.ids import new_id
from sihe.serving.errors import SlowBody

MAX_BODY_BYTES = 16 * 2**20
BODY_TIMEOUT_S = 30.0  # 16 MiB at 4.5 Mbit/s; larger bounds have as much more
_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


async def read_body(request: Request, *, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The body, of at most `max_bytes`, whatever its headers say. Raises `TooLarge`, `SlowBody`.

    A client that sends slowly holds a connection and what it has sent, no thread; and not for longer than
    `BODY_TIMEOUT_S`.
    """
    timeout_s = BODY_TIMEOUT_S * max(1.0, max_bytes / MAX_BODY_BYTES)
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                size += len(piece)
                if size > max_bytes:
                    raise TooLarge(
                        f"a body has at most {max_bytes} bytes: send less",
                        limit=max_bytes,
                        actual=size,
                        unit="bytes",
                    )
                pieces.append(piece)
    except TimeoutError as error:
        raise SlowBody(timeout_s) from error
    return b"".join(pieces)


def request_id(request: Request) -> str:
    """What the request is called: its own `x-request-id` if it can stand in a header and a log, or a new one."""
    known = getattr(request.state, "request_id", None)
    if known is None:
        given = request.headers.get("x-request-id", "")
        known = given if _ID.fullmatch(given) else new_id("req")
        request.state.request_id = known
    return str(known)
