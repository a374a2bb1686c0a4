"""Load for `serve.hot_swap`: requests that come whether or not the ones before were answered, and a watch on memory.

Users do not stop coming because a service is away, so arrivals are a Poisson stream of a given rate; who is refused is
counted and does not come again.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self

from sihe.apps.coach.errors import LabFailed
from sihe.apps.coach.labs.hot_swap_tally import Asked
from sihe.apps.coach.labs.kv_growth_ranks import resident_bytes
from sihe.core.errors import SiheError
from sihe.serving.engine.stream import GenerationStream

_PATIENCE_S = 60.0
_LOOK_S = 0.005


class Load:
    """Requests from a thread of their own while the context is open; its end waits for the answers."""

    def __init__(self, ask: Callable[[], GenerationStream], rate_per_s: float) -> None:
        self.asked: list[Asked] = []
        self._ask = ask
        self._rate_per_s = rate_per_s
        self._begun: Counter[str] = Counter()  # answers whose first token has come, by version
        self._changed = threading.Condition()
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        self._thread.join()
        if self._failure is not None and error is None:
            raise self._failure

    def wait_for_answer(self, version: str | None = None) -> None:
        """Returns just after an answer (of `version`) has begun. Raises `LabFailed` when none does."""
        with self._changed:
            before = self._count(version)
            if not self._changed.wait_for(
                lambda: self._failure is not None or self._count(version) > before, _PATIENCE_S
            ):
                raise LabFailed(f"no answer of {version or 'any version'} began within {_PATIENCE_S:g} s")
            if self._failure is not None:
                raise self._failure

    def _count(self, version: str | None) -> int:
        return self._begun.total() if version is None else self._begun[version]

    def _run(self) -> None:
        try:
            asyncio.run(self._send())
        except BaseException as error:  # noqa: BLE001 - it is raised where the load was opened
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    async def _send(self) -> None:
        draws = random.Random(5)
        next_s = time.perf_counter()
        async with asyncio.TaskGroup() as answers:
            while not self._stopping:
                next_s += draws.expovariate(self._rate_per_s)
                await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
                answers.create_task(self._read())

    async def _read(self) -> None:
        one = Asked(time.perf_counter())
        self.asked.append(one)
        try:
            stream = self._ask()
            async for event in stream:
                one.pieces.append((time.perf_counter(), len(event.token_ids)))
                one.versions.add(stream.served_by)
                one.tokens += event.token_ids
                one.is_whole = event.finish_reason is not None
                if len(one.pieces) == 1:
                    with self._changed:
                        self._begun[stream.served_by] += 1
                        self._changed.notify_all()
        except SiheError as error:
            one.error = type(error).__name__


class MemoryWatch:
    """The most resident memory of this process while the context is open."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="memory watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, resident_bytes())
            if self._stop.wait(_LOOK_S):
                return
