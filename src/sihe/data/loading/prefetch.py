"""Batches that are ready before they are asked for, and how long training waited for them all the same."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Condition, Thread
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from sihe.core.errors import InvalidInput

Item = TypeVar("Item")
ItemOut = TypeVar("ItemOut", covariant=True)


class SampleStream(Protocol[ItemOut]):
    """Batches in order, with the number of the sample that comes next."""

    @property
    def next_sample(self) -> int:
        """The whole state of the stream."""
        ...

    def __next__(self) -> ItemOut:
        """The next batch."""
        ...


@dataclass(frozen=True)
class LoadReport:
    """How much of the time between the first request and the last answer was spent waiting for data."""

    batches: int
    stall_s: float
    total_s: float

    @property
    def stall_share(self) -> float:
        """0 where loading is hidden; 1 where nothing but loading happens."""
        return self.stall_s / self.total_s if self.total_s > 0 else 0.0


class Prefetcher(Generic[Item]):
    """The batches of `stream`, in its order, at most `depth` of them read ahead by a thread.

    An error of the stream arrives where its batch would have, as itself, and again at every later request. With
    `depth=0` there is no thread: batches are read when asked for, and the report shows what that costs. Close it, or
    use it as a context; the stream belongs to the thread until then.
    """

    def __init__(
        self, stream: SampleStream[Item], *, depth: int = 2, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if depth < 0:
            raise InvalidInput(f"depth is not negative, got {depth!r}")
        self._stream = stream
        self._depth = depth
        self._clock = clock
        self._next_sample = stream.next_sample
        self._ready: deque[tuple[Item, int]] = deque()
        self._failure: BaseException | None = None
        self._is_closed = False
        self._changed = Condition()
        self._batches, self._stall_s = 0, 0.0
        self._first_asked: float | None = None
        self._last_given = 0.0
        self._thread = Thread(target=self._read, name="prefetch", daemon=True) if depth else None
        if self._thread is not None:
            self._thread.start()

    @property
    def next_sample(self) -> int:
        """The state after the batches that were handed out; what is only read ahead does not count."""
        return self._next_sample

    @property
    def report(self) -> LoadReport:
        """The waiting so far."""
        total = self._last_given - self._first_asked if self._first_asked is not None else 0.0
        return LoadReport(self._batches, self._stall_s, total)

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        asked = self._clock()
        if self._first_asked is None:
            self._first_asked = asked
        batch, self._next_sample = self._take()
        self._last_given = self._clock()
        self._stall_s += self._last_given - asked
        self._batches += 1
        return batch

    def close(self) -> None:
        """Drops what was read ahead and ends the thread, after the read that it is in. May be called again."""
        with self._changed:
            self._is_closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> tuple[Item, int]:
        if self._is_closed:
            raise InvalidInput("this prefetcher is closed: make another one")
        if self._thread is None:
            return next(self._stream), self._stream.next_sample
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._failure is not None or self._is_closed)
            if self._ready:
                taken = self._ready.popleft()
                self._changed.notify_all()
                return taken
            if self._failure is not None:
                raise self._failure
            raise InvalidInput("this prefetcher was closed while a batch was awaited")

    def _read(self) -> None:
        try:
            while self._waits_for_room():
                batch = next(self._stream)
                with self._changed:
                    if not self._is_closed:
                        self._ready.append((batch, self._stream.next_sample))
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to who asks for the batch
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _waits_for_room(self) -> bool:
        """Blocks until a batch may be read; False when none shall be any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self._ready) < self._depth)
            return not self._is_closed
