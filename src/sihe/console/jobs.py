"""Work that outlives a request, one piece at a time: labs measure the machine and must not disturb each other."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from sihe.core.clock import Clock
from sihe.core.errors import NotFound, SiheError
from sihe.core.ids import new_id
from sihe.core.telemetry import logger

_KEPT = 50
_log = logger("console")
Result = TypeVar("Result")
Report = Callable[[int, int], None]
"""Says how much is done, and of how much."""
State = Literal["waiting", "running", "done", "failed"]


@dataclass
class Job(Generic[Result]):
    """One piece of work. `result` is set when it is done, `error` when it failed."""

    id: str
    what: str
    state: State = "waiting"
    began_s: float = 0.0
    done: int = 0
    total: int = 0
    result: Result | None = None
    error: str | None = None
    finished: threading.Event = field(default_factory=threading.Event)


class Jobs(Generic[Result]):
    """Runs jobs in the background, in order, and remembers the last few."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._jobs: OrderedDict[str, Job[Result]] = OrderedDict()
        self._guard = threading.Lock()
        self._one_at_a_time = threading.Lock()

    def start(self, what: str, work: Callable[[Report], Result]) -> Job[Result]:
        """Begins `work` as soon as the jobs before it have ended."""
        job: Job[Result] = Job(new_id("job"), what)
        with self._guard:
            self._jobs[job.id] = job
            while len(self._jobs) > _KEPT:
                self._jobs.popitem(last=False)
        # A daemon: a server that stops does not wait for a measurement that nobody will read.
        threading.Thread(target=self._run, args=(job, work), name=job.id, daemon=True).start()
        return job

    def get(self, job_id: str) -> Job[Result]:
        """The job. Raises `NotFound`: jobs are forgotten when the server stops."""
        with self._guard:
            if job_id not in self._jobs:
                raise NotFound("job", job_id, hint="jobs end with the server that ran them: start it again")
            return self._jobs[job_id]

    def elapsed_s(self, job: Job[Result]) -> float:
        """Seconds since the job's work began."""
        return self._clock.monotonic_s() - job.began_s if job.state != "waiting" else 0.0

    def _run(self, job: Job[Result], work: Callable[[Report], Result]) -> None:
        def report(done: int, total: int) -> None:
            job.done, job.total = done, total

        with self._one_at_a_time:
            job.began_s, job.state = self._clock.monotonic_s(), "running"
            try:
                job.result = work(report)
                job.state = "done"
            except SiheError as error:
                job.error, job.state = str(error), "failed"
            except Exception as error:  # noqa: BLE001 - nobody above could answer: it is logged and shown
                _log.error("job_failed", what=job.what, exc_info=error)
                job.error, job.state = type(error).__name__, "failed"
            finally:
                job.finished.set()
