"""From the first thread of a served model to its last: it takes requests, it closes with patience or without, or dies.

Engines, encoders and predictors compute differently; what closing promises is the same for all of them. This knows
nothing of its owner, so that no circle keeps a model's memory after its last thread has ended.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Sequence

from sihe.serving.errors import EngineClosed, EngineDead


class Lifetime:
    """The threads of `what` (`engine tiny@1`), and whether they are to end. Thread-safe.

    `changed` is the owner's condition: its threads wait on it, and look at `is_closing` (no request comes any more) and
    `is_abandoned` (those that have begun are given up, too). The last thread calls `ended`.
    """

    def __init__(self, what: str, changed: threading.Condition | None = None) -> None:
        self.changed = changed or threading.Condition()
        self.is_closing = False
        self.is_abandoned = False
        self._what = what
        self._death: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def begin(self, threads: Sequence[threading.Thread]) -> None:
        """Starts the threads. They end with the interpreter: a daemon inside a library must not outlive it."""
        atexit.register(self.close, drain=False)
        self._threads.extend(threads)
        for thread in threads:
            thread.start()

    def add(self, thread: threading.Thread) -> None:
        """Starts one more, under the condition, while it is open."""
        self._threads.append(thread)
        thread.start()

    @property
    def is_open(self) -> bool:
        """Whether requests are taken."""
        return not self.is_closing and self._death is None

    def check_open(self) -> None:
        """Raises `EngineDead` or `EngineClosed` unless requests are taken."""
        if self._death is not None:
            raise self._dead() from self._death
        if self.is_closing:
            raise EngineClosed(f"{self._what} is closing and takes no new requests")

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Takes no more requests and returns when every thread has ended. Safe to call again, and at once by several.

        With `drain` the threads finish what has begun, for at most `timeout_s` all together; then, or at once without
        `drain`, it is abandoned.
        """
        with self.changed:
            self.is_closing = True
            self.is_abandoned |= not drain
            self.changed.notify_all()
            threads = list(self._threads)
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in threads:
            thread.join(None if until_s is None else min(max(0.0, until_s - time.monotonic()), threading.TIMEOUT_MAX))
        with self.changed:
            self.is_abandoned = True
            self.changed.notify_all()
        for thread in threads:
            thread.join()

    # ---- what the threads say ---------------------------------------------------------------------------------------

    def died(self, death: BaseException) -> None:
        """A thread has met what it cannot go on after: the others end, too."""
        with self.changed:
            self._death, self.is_closing, self.is_abandoned = death, True, True
            self.changed.notify_all()

    def ending(self) -> EngineClosed | EngineDead:
        """What those are told whose requests are left at the end."""
        if self._death is None:
            return EngineClosed(f"{self._what} was closed")
        error = self._dead()
        error.__cause__ = self._death
        return error

    def ended(self) -> None:
        """The last thread has freed everything. No request is taken."""
        self.is_closing = True
        atexit.unregister(self.close)

    def _dead(self) -> EngineDead:
        return EngineDead(f"{self._what} has stopped: {self._death}")
