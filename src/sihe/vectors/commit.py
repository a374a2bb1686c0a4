"""Group commit: threads that write at the same time share one append and one sync."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from sihe.core.errors import InternalError
from sihe.vectors.operations import Operation, Upsert

_GROUP_BYTES = 64 << 20


@dataclass
class _Ticket:
    """A write that waits for the group it is committed with."""

    operation: Operation
    size_bytes: int
    result: int | None = None
    error: BaseException | None = None


class GroupCommit:
    """Hands waiting writes in the order of their arrival to `commit`, which stores all of a group or none.

    Whichever thread gets `lock` first commits for everybody who waits by then; the others find their result ready.
    """

    def __init__(self, commit: Callable[[list[Operation]], list[int]], lock: threading.RLock) -> None:
        self._commit = commit
        self._lock = lock
        self._queue: list[_Ticket] = []
        self._queue_lock = threading.Lock()

    def submit(self, operation: Operation) -> int:
        """The result of `operation` once its group is stored; raises what `commit` raised for the group."""
        ticket = _Ticket(operation, _size(operation))
        with self._queue_lock:
            self._queue.append(ticket)
        with self._lock:
            while ticket.result is None and ticket.error is None:
                self._run(self._take())
        if ticket.error is not None:
            raise ticket.error
        if ticket.result is None:
            raise InternalError("a write was left without a result")
        return ticket.result

    def _take(self) -> list[_Ticket]:
        with self._queue_lock:
            size, count = 0, 0
            for ticket in self._queue:
                size += ticket.size_bytes
                if count and size > _GROUP_BYTES:
                    break
                count += 1
            group, self._queue = self._queue[:count], self._queue[count:]
        return group

    def _run(self, group: list[_Ticket]) -> None:
        try:
            results = self._commit([ticket.operation for ticket in group])
        except BaseException as error:
            for ticket in group:
                ticket.error = error
            if not isinstance(error, Exception):
                raise  # an interrupt is for this thread at once
            return
        for ticket, result in zip(group, results, strict=True):
            ticket.result = result


def _size(operation: Operation) -> int:
    if isinstance(operation, Upsert):
        return operation.vectors.nbytes + sum(map(len, operation.payloads))
    return 16 * len(operation.ids)
