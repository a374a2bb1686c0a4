"""The answers to one request: several streams read as one.

An answer as a whole comes from one version of the model: where streams were begun while the version changed, that shows
in their first events, before anything of them was given out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import Generation, GenerationEvent
from sihe.serving.errors import StreamClosed


class Choices:
    """`streams`, in the order of their indices. For one reader."""

    def __init__(self, streams: Sequence[GenerationStream]) -> None:
        self.streams = tuple(streams)
        self._first: list[GenerationEvent] = []

    @property
    def served_by(self) -> frozenset[str]:
        """The versions that answer; sure once `begin` has returned."""
        return frozenset(stream.served_by for stream in self.streams)

    async def begin(self) -> None:
        """Waits for the first event of each. Raises the first error, and `StreamClosed`."""
        for stream in self.streams:
            event = await stream.next_event_async()
            if event is None:
                raise StreamClosed("the client is gone")
            self._first.append(event)

    async def events(self) -> AsyncIterator[tuple[int, GenerationEvent]]:
        """The events of all, each with its index, as they come. Raises the first error. Call `begin` before."""
        for index, event in enumerate(self._first):
            yield index, event
        if len(self.streams) == 1:  # by far the most usual: no task beside the reader's
            async for event in self.streams[0]:
                yield 0, event
            return
        merged = _Merged(self.streams)
        try:
            async for item in merged:
                yield item
        finally:
            merged.close()

    async def whole(self) -> list[Generation]:
        """All answers, when the last of them has ended. Call `begin` before."""
        return [
            await stream.result_async(before=(first,)) for stream, first in zip(self.streams, self._first, strict=True)
        ]

    def close(self) -> None:
        """Aborts what has not ended. Safe to call again."""
        for stream in self.streams:
            stream.close()


class _Merged:
    """One task a stream; each holds at most one event that the reader has not taken, the others join in the stream."""

    def __init__(self, streams: Sequence[GenerationStream]) -> None:
        self._queue: asyncio.Queue[tuple[int, GenerationEvent | Exception | None]] = asyncio.Queue(1)
        self._tasks = [asyncio.create_task(self._read(index, stream)) for index, stream in enumerate(streams)]

    async def __aiter__(self) -> AsyncIterator[tuple[int, GenerationEvent]]:
        open_streams = len(self._tasks)
        while open_streams:
            index, item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                open_streams -= 1
            else:
                yield index, item

    async def _read(self, index: int, stream: GenerationStream) -> None:
        try:
            async for event in stream:
                await self._queue.put((index, event))
        except Exception as error:  # noqa: BLE001 - it is the reader's to know
            await self._queue.put((index, error))
        else:
            await self._queue.put((index, None))

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
