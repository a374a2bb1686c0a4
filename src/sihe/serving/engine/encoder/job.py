"""The answer to come of one request, for a reader in another thread or on an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError

from sihe.core.errors import Busy
from sihe.serving.engine.encoder.types import Encoded
from sihe.serving.errors import StreamClosed

_CLOSED = "the request was closed before its end"


class EncodeJob:
    """Give it `result()`, or close it: what has not been computed then is not. Leaving it as a context closes it."""

    def __init__(self, id: int, abort: Callable[[int], None]) -> None:
        self.id = id
        self._abort = abort
        self._future: Future[Encoded] = Future()

    def result(self, timeout_s: float | None = None) -> Encoded:
        """The answer. Raises the request's error, `StreamClosed` once closed, or `Busy` after `timeout_s`."""
        try:
            return self._future.result(timeout_s)
        except CancelledError:
            raise StreamClosed(_CLOSED) from None
        except TimeoutError as error:
            if self._future.done():
                raise
            raise Busy(f"no answer came within {timeout_s} s: the encoder is busy") from error

    async def result_async(self) -> Encoded:
        """The same on an event loop, which may cancel it: then the request is closed."""
        try:
            return await asyncio.wrap_future(self._future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._future.cancelled() and not (task and task.cancelling()):
                raise StreamClosed(_CLOSED) from None
            self.close()
            raise

    def close(self) -> None:
        """Ends the request unless it has ended; whoever waits is told. Safe to call again."""
        if self._future.cancel():
            self._abort(self.id)

    def __enter__(self) -> EncodeJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the engine's side ------------------------------------------------------------------------------------------

    def deliver(self, encoded: Encoded) -> None:
        """Gives the answer, unless the request was closed meanwhile."""
        try:
            self._future.set_result(encoded)
        except InvalidStateError:
            return

    def fail(self, error: BaseException) -> None:
        """Ends the request with an error, unless it was closed meanwhile."""
        try:
            self._future.set_exception(error)
        except InvalidStateError:
            return
