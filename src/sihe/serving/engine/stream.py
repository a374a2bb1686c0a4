"""The bridge from the engine's thread to whoever reads an answer, in another thread or on an event loop.

The engine never waits for a reader. Events that a slow reader has not taken pile up and are joined into one when it
comes, and the readers of one event loop are woken together, once a step, whatever their number.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from sihe.core.errors import Busy
from sihe.serving.engine.tools import whole_calls
from sihe.serving.engine.types import Generation, GenerationEvent, join_events
from sihe.serving.errors import StreamClosed

Wake = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]
Heard = GenerationEvent | BaseException | None  # what a listener is told: an event, the error at the end, or "closed"
Relay = Callable[[GenerationEvent | BaseException], Wake | None]  # takes what the engine says; gives the reader to wake


class GenerationStream:
    """The events of one request, for one reader: iterate it (`for` or `async for`), or take the whole `result()`.

    `served_by` names the model version that answers (with several replicas it is sure from the first event on); `arm`
    is the deployment's arm that it came through, where a gateway says so. `close` aborts what has not been generated
    yet; leaving the stream as a context manager closes it. An error of the request is raised to the reader, after the
    events that came before.

    With a `relay` there is no reader here: what the engine says goes to the relay, which has readers of its own.
    """

    def __init__(
        self,
        id: int,
        served_by: str,
        *,
        abort: Callable[[int], None],
        relay: Relay | None = None,
    ) -> None:
        self.id = id
        self.served_by = served_by
        self.arm = ""
        self._abort = abort
        self._relay = relay
        self._has_reader = relay is None
        self._changed = threading.Condition()
        self._events: list[GenerationEvent] = []
        self._error: BaseException | None = None
        self._ended = False  # nothing more will come
        self._waiter: Wake | None = None
        self._listeners: list[Callable[[Heard], None]] = []

    # ---- the reader's side ------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[GenerationEvent]:
        while (event := self.next_event()) is not None:
            yield event

    async def __aiter__(self) -> AsyncIterator[GenerationEvent]:
        while (event := await self.next_event_async()) is not None:
            yield event

    def next_event(self, timeout_s: float | None = None) -> GenerationEvent | None:
        """The next event, or None after the last. Raises the request's error, or `Busy` after `timeout_s`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._events or self._ended, timeout_s):
                raise Busy(f"no token came within {timeout_s} s: the engine is busy")
            return self._take()

    async def next_event_async(self) -> GenerationEvent | None:
        """The same on an event loop."""
        while True:
            with self._changed:
                if self._events or self._ended:
                    return self._take()
                loop = asyncio.get_running_loop()
                waiter = loop.create_future()
                self._waiter = (loop, waiter)
            await waiter

    def result(self, timeout_s: float | None = None) -> Generation:
        """The whole answer. `timeout_s` bounds the wait for each event."""
        events: list[GenerationEvent] = []
        while (event := self.next_event(timeout_s)) is not None:
            events.append(event)
        return _whole(events)

    async def result_async(self, before: Iterable[GenerationEvent] = ()) -> Generation:
        """The whole answer, on an event loop, with the events that were taken `before`."""
        return _whole([*before, *[event async for event in self]])

    def close(self) -> None:
        """Aborts the request unless it has ended; a reader that waits sees the end. Safe to call again."""
        with self._changed:
            if self._ended:
                return
            self._ended = True
            self._events.clear()
            self._tell(None)
            self._changed.notify_all()
            wake, self._waiter = self._waiter, None
        self._abort(self.id)
        if wake is not None:
            wake_readers([wake])

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def watch(self, listener: Callable[[Heard], None], *, instead: bool = False) -> None:
        """Tells one more `listener` what comes from here on, and first what has come and no reader has taken yet.

        It hears each event, then the error that ends the stream, or None when the reader closes it before its end, on
        the thread that does so: it must return at once, raise nothing, and leave this stream alone. One that hears
        `instead` of a reader is the last to be told what was kept: nothing is kept any more.
        """
        with self._changed:
            self._listeners.append(listener)
            for event in self._events:
                listener(event)
            if self._error is not None:
                listener(self._error)
            elif self._ended and not self._events:
                listener(None)
            if instead:
                self._has_reader = False
                self._events.clear()

    # ---- the engine's side ------------------------------------------------------------------------------------------

    def deliver(self, event: GenerationEvent) -> Wake | None:
        """Adds an event; the reader to wake, if one waits on an event loop."""
        return self._add(event, None, ended=event.finish_reason is not None)

    def fail(self, error: BaseException) -> Wake | None:
        """Ends the stream with an error; the reader to wake, as `deliver`."""
        return self._add(None, error, ended=True)

    def _add(self, event: GenerationEvent | None, error: BaseException | None, *, ended: bool) -> Wake | None:
        with self._changed:
            if self._ended:
                return None
            if self._has_reader and event is not None:
                self._events.append(event)
            self._error = error
            self._ended = ended
            self._tell(event if error is None else error)
            self._changed.notify_all()
            wake, self._waiter = self._waiter, None
        heard = event if error is None else error
        return wake if self._relay is None or heard is None else self._relay(heard)

    def _tell(self, heard: Heard) -> None:
        for listener in self._listeners:
            listener(heard)

    def _take(self) -> GenerationEvent | None:
        if self._events:
            events, self._events = self._events, []
            return join_events(events)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return None


def wake_readers(wakes: Iterable[Wake]) -> None:
    """Wakes readers on their event loops: one call into each loop."""
    by_loop: defaultdict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = defaultdict(list)
    for loop, waiter in wakes:
        by_loop[loop].append(waiter)
    for loop, waiters in by_loop.items():
        try:
            loop.call_soon_threadsafe(_set_all, waiters)
        except RuntimeError:  # the loop has been closed, and its readers with it
            continue


def _set_all(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)


def _whole(events: list[GenerationEvent]) -> Generation:
    if not events or events[-1].finish_reason is None:
        raise StreamClosed("the stream was closed before its end")
    event = join_events(events)
    assert event.finish_reason is not None
    return Generation(
        event.text,
        event.token_ids,
        event.usage,
        event.finish_reason,
        event.logprobs,
        whole_calls(event.tool_calls),
    )
