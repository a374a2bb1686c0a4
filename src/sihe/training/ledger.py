"""Following a run's log: totals over its steps, and curves in tracking without a point twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sihe.training.progress import EventReader
from sihe.training.types import StepDone, TrainEvent

if TYPE_CHECKING:
    from sihe.core.clock import Clock
    from sihe.core.tracking import Tracking

_FLUSH_S = 1.0  # how far the tracked curves may lag behind


class Ledger:
    """What the log at `path` says so far. A step that was repeated after a recovery counts once, as it was last."""

    def __init__(self, path: Path) -> None:
        self._reader = EventReader(path)
        self._seconds: dict[int, tuple[int, float]] = {}  # step → tokens, seconds
        self.last: StepDone | None = None

    def read(self) -> list[TrainEvent]:
        """Takes in what is new; the new events."""
        events: list[TrainEvent] = []
        for event in self._reader.new():
            events.append(event)
            if isinstance(event, StepDone):
                self._seconds[event.step] = (event.tokens, event.seconds)
                self.last = event
        return events

    @property
    def tokens_per_s(self) -> float:
        """Target tokens a second over all steps, without start-up and checkpoints."""
        seconds = sum(spent for _, spent in self._seconds.values())
        return sum(tokens for tokens, _ in self._seconds.values()) / seconds if seconds else 0.0


class Follower:
    """Follows a run: passes new events on, and brings its curves to tracking, about once a second.

    A step is logged once, also when it was computed again after a recovery, by this supervisor or an earlier one: the
    recovery repeats the same numbers.
    """

    def __init__(
        self,
        ledger: Ledger,
        tracking: Tracking,
        clock: Clock,
        run_id: str,
        *,
        log_every: int,
        max_steps: int,
        on_event: Callable[[TrainEvent], None],
    ) -> None:
        self._ledger = ledger
        self._tracking = tracking
        self._clock = clock
        self._run_id = run_id
        self._log_every = log_every
        self._max_steps = max_steps
        self._on_event = on_event
        logged = tracking.history(run_id, "loss")
        self._logged = logged[-1].step if logged else 0
        self._pending: dict[int, dict[str, float]] = {}
        self._flushed_at_s = clock.monotonic_s()

    def replay(self) -> None:
        """Takes in what an earlier supervisor's ranks wrote, without passing it on."""
        self._note(self._ledger.read())

    def tick(self) -> None:
        """Takes in what is new; the launcher calls it some times a second."""
        events = self._ledger.read()
        self._note(events)
        for event in events:
            self._on_event(event)
        if self._pending and self._clock.monotonic_s() - self._flushed_at_s >= _FLUSH_S:
            self._flush()

    def finish(self) -> None:
        """Takes in the rest, and writes the points that wait."""
        self.tick()
        self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._tracking.log_steps(self._run_id, self._pending)
            self._logged = max(self._pending)
            self._pending = {}
        self._flushed_at_s = self._clock.monotonic_s()

    def _note(self, events: list[TrainEvent]) -> None:
        for event in events:
            if not isinstance(event, StepDone) or event.step <= self._logged:
                continue
            if event.step % self._log_every == 0 or event.step == self._max_steps:
                self._pending[event.step] = {
                    "loss": event.loss,
                    "lr": event.lr,
                    "grad_norm": event.grad_norm,
                    "tokens_per_s": event.tokens_per_s,
                }
