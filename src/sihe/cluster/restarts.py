"""The restarts that a job has used, on disk: a supervisor that dies and comes back finds what is left of the budget.

An attempt is noted before it starts and struck out when it ends well, when somebody stopped it, or when its input was
at fault. One that nobody struck out was lost together with its supervisor, and counts. The space of the file is taken
when it is made, so that a full disk, which is nobody's failure, can still be struck out.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sihe.cluster.errors import RanksLost
from sihe.cluster.types import MAX_RESTARTS, RestartPolicy
from sihe.core.errors import CorruptData
from sihe.core.files import disk_errors, write_file

if TYPE_CHECKING:
    from sihe.core.clock import Clock

_SIZE = 32_768  # bytes: a time takes twelve, and there are at most MAX_RESTARTS + 1 that matter
_MAX_REASON = 2_000  # characters


@dataclass(frozen=True)
class Failure:
    """The last failure: who, why, and where its error output is."""

    rank: int
    reason: str
    log: str


@dataclass(frozen=True)
class _Book:
    failed_at: list[int] = field(default_factory=list)  # seconds since 1970
    is_open: bool = False
    last: Failure | None = None


class RestartBudget:
    """What job `job` has used of the budget of `policy`, kept in the file at `path`. Raises `NoSpace`, `CorruptData`.

    Held by one launcher at a time.
    """

    def __init__(self, path: Path, job: str, policy: RestartPolicy, clock: Clock) -> None:
        self._path = path
        self._job = job
        self._policy = policy
        self._clock = clock
        self._book = self._read()
        if self._book.is_open:
            self.charge(Failure(0, "was lost together with its supervisor", str(path.parent)))

    @property
    def used(self) -> int:
        """Failures that count: all, or those of the last `window_s`."""
        if self._policy.window_s is None:
            return len(self._book.failed_at)
        since_s = self._now_s() - self._policy.window_s
        return sum(at_s > since_s for at_s in self._book.failed_at)

    def open(self) -> None:
        """Notes that an attempt starts. Raises `RanksLost` when the budget is spent."""
        self.check()
        self._write(replace(self._book, is_open=True))

    def excuse(self) -> None:
        """Strikes the attempt out: it ended well, was stopped, or its input was at fault."""
        self._write(replace(self._book, is_open=False))

    def charge(self, failure: Failure) -> None:
        """Counts the attempt as failed."""
        failed_at = [*self._book.failed_at, self._now_s()][-MAX_RESTARTS - 1 :]
        self._write(_Book(failed_at, False, replace(failure, reason=failure.reason[:_MAX_REASON])))

    def check(self) -> None:
        """Raises `RanksLost` when the budget is spent."""
        if self.used <= self._policy.max_restarts:
            return
        last = self._book.last
        assert last is not None, "every failure that was charged has its reason"
        raise RanksLost(self._job, last.rank, last.reason, restarts=self.used - 1, log=Path(last.log))

    def _now_s(self) -> int:
        return int(self._clock.now().timestamp())

    def _read(self) -> _Book:
        if not self._path.exists():
            write_file(self._path, _encoded(_Book()))
        try:
            values: dict[str, Any] = json.loads(self._path.read_bytes())
            last = values.pop("last")
            return _Book(**values, last=last and Failure(**last))
        except (ValueError, TypeError, KeyError) as error:
            hint = "remove it, and the job has its whole budget of restarts again"
            raise CorruptData(self._path, "it does not count restarts", hint=hint) from error

    def _write(self, book: _Book) -> None:
        # In place and in one call: a rename would need new space, and a reader of half a file does not exist.
        with disk_errors(self._path):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.pwrite(descriptor, _encoded(book), 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._book = book


def _encoded(book: _Book) -> bytes:
    return json.dumps(asdict(book)).encode().ljust(_SIZE)
