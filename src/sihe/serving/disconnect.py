"""Waiting for an answer as long as there is a client to give it to, and time."""

from __future__ import annotations

import asyncio
import time
from typing import TypeVar

from starlette.types import Receive

from sihe.serving.deadlines import Deadline
from sihe.serving.errors import StreamClosed

CLIENT_GONE = 499  # nginx's status for it; nobody reads the answer
T = TypeVar("T")


async def unless_gone(receive: Receive, answer: asyncio.Future[T]) -> T:
    """The answer. Raises what it raises, and `StreamClosed` when the client has gone first: then it is cancelled."""
    gone = asyncio.ensure_future(_until_gone(receive))
    waiting: set[asyncio.Future[object]] = {answer, gone}  # type: ignore[arg-type]  # of any result
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise StreamClosed("the client has gone")
        return await answer
    finally:
        gone.cancel()
        answer.cancel()


async def in_time(receive: Receive, answer: asyncio.Future[T], deadline: Deadline | None) -> T:
    """The same, until `deadline`: then the answer is cancelled, too, and this raises `DeadlineExceeded`."""
    limit = asyncio.timeout(None if deadline is None else max(0.0, deadline.at_s - time.monotonic()))
    try:
        async with limit:
            return await unless_gone(receive, answer)
    except TimeoutError:
        if deadline is not None and limit.expired():
            raise deadline.exceeded(is_whole=True) from None
        raise


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
