"""New weights into a running engine: a state machine in which nothing can hang.

    IDLE ──begin──▶ PAUSING ──done──▶ TRANSFERRING ──done──▶ RESUMING ──done──▶ IDLE
                       └──────────────────┴──── too late, or refused ────┴──▶ FAILED ──reset──▶ IDLE

`Sync` is the machine: a value, and pure functions of it and of the time. Each of the three states on the way has a
deadline; `expire` is what makes it FAILED when that has passed. Commands carry a ticket, so that an answer that comes
after its deadline moves nothing. `WeightSync` drives an engine with it: it waits on the clock, never on the engine.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from sihe.core.clock import Clock, SystemClock
from sihe.core.errors import InvalidInput
from sihe.training.recipes.errors import WeightSyncFailed

if TYPE_CHECKING:
    from sihe.models.decoder import Decoder


class SyncState(Enum):
    """Where a transfer is."""

    IDLE = "idle"
    PAUSING = "pausing"
    TRANSFERRING = "transferring"
    RESUMING = "resuming"
    FAILED = "failed"


_NEXT = {
    SyncState.PAUSING: SyncState.TRANSFERRING,
    SyncState.TRANSFERRING: SyncState.RESUMING,
    SyncState.RESUMING: SyncState.IDLE,
}


@dataclass(frozen=True)
class Timeouts:
    """Seconds that the engine has for each part of a transfer."""

    pause_s: float = 30.0
    transfer_s: float = 30.0
    resume_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("pause_s", "transfer_s", "resume_s"):
            if not 0 < getattr(self, name) < float("inf"):  # no state may hang
                raise InvalidInput(f"{name} is a positive number of seconds, got {getattr(self, name)!r}")

    def of(self, state: SyncState) -> float:
        """The time for `state`."""
        return {
            SyncState.PAUSING: self.pause_s,
            SyncState.TRANSFERRING: self.transfer_s,
            SyncState.RESUMING: self.resume_s,
        }[state]


@dataclass(frozen=True)
class Sync:
    """The machine. `version` is the last one that reached the engine whole; it has that one while `is_intact`."""

    timeouts: Timeouts = Timeouts()
    state: SyncState = SyncState.IDLE
    version: int = 0
    target: int | None = None
    deadline_s: float | None = None
    ticket: int = 0
    """Number of the command that is being waited for; it grows and is never used twice."""
    is_intact: bool = True
    """Whether the engine has `version` and nothing else: not from the first byte of a transfer to its end."""
    failed_in: SyncState | None = None
    reason: str = ""
    """Why it is FAILED."""

    @property
    def is_active(self) -> bool:
        """Whether the engine is waited for."""
        return self.state in _NEXT

    def begin(self, version: int, now_s: float) -> Sync:
        """Starts to bring `version` to the engine. Raises `InvalidInput` unless idle, and for a version that is not
        newer."""
        if self.state is not SyncState.IDLE:
            raise InvalidInput(f"a transfer begins when idle, got one while {self.state.value}")
        if version <= self.version:
            raise InvalidInput(f"weights must be newer than version {self.version}, got {version!r}")
        return self._enter(SyncState.PAUSING, now_s, target=version)

    def done(self, ticket: int, now_s: float) -> Sync:
        """The engine carried out the command of `ticket`. Too late, it counts as not done."""
        late = self.expire(now_s)
        if not late.is_active or ticket != late.ticket:
            return late
        after = _NEXT[late.state]
        if after is not SyncState.IDLE:
            return late._enter(after, now_s)
        assert late.target is not None
        return replace(late, state=after, version=late.target, target=None, deadline_s=None, is_intact=True)

    def refused(self, ticket: int, reason: str) -> Sync:
        """The engine answered the command of `ticket` with an error."""
        return self._fail(reason) if self.is_active and ticket == self.ticket else self

    def expire(self, now_s: float) -> Sync:
        """FAILED if the engine has been waited for until its deadline."""
        if self.is_active and self.deadline_s is not None and now_s >= self.deadline_s:
            return self._fail(f"no answer within {self.timeouts.of(self.state):g} s")
        return self

    def reset(self) -> Sync:
        """After a failure: idle again. Where it is not intact the engine may hold half of the new weights."""
        if self.state is not SyncState.FAILED:
            raise InvalidInput(f"only a failed transfer is reset, got one that is {self.state.value}")
        return replace(self, state=SyncState.IDLE, target=None, failed_in=None, reason="")

    def _enter(self, state: SyncState, now_s: float, *, target: int | None = None) -> Sync:
        return replace(
            self,
            state=state,
            target=self.target if target is None else target,
            deadline_s=now_s + self.timeouts.of(state),
            ticket=self.ticket + 1,
            is_intact=self.is_intact and state is SyncState.PAUSING,
        )

    def _fail(self, reason: str) -> Sync:
        return replace(self, state=SyncState.FAILED, failed_in=self.state, deadline_s=None, reason=reason)


class SyncTarget(Protocol):
    """An engine that takes weights. Each call returns when it is done, and may take for ever."""

    def pause(self) -> None:
        """Takes no new requests, and returns when none runs any more."""
        ...

    def transfer(self, policy: Decoder, version: int) -> None:
        """Copies the weights of `policy`."""
        ...

    def resume(self) -> None:
        """Takes requests again."""
        ...


class WeightSync:
    """Brings weights to an engine, one transfer at a time; every call ends within the sum of the time-outs.

    Commands run in a thread of their own. One that does not come back is left behind there; its engine is asked for
    nothing more until `reset`, which starts anew beside it.
    """

    def __init__(self, target: SyncTarget, timeouts: Timeouts | None = None, *, clock: Clock | None = None) -> None:
        self._target = target
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._commands: queue.SimpleQueue[_Command | None] | None = None
        self.sync = Sync(timeouts or Timeouts())

    def send(self, policy: Decoder, version: int) -> None:
        """Makes `version` what the engine samples from. Raises `WeightSyncFailed`; `sync` is FAILED then."""
        with self._lock:
            self.sync = self.sync.begin(version, self._clock.monotonic_s())
            steps = {
                SyncState.PAUSING: self._target.pause,
                SyncState.TRANSFERRING: lambda: self._target.transfer(policy, version),
                SyncState.RESUMING: self._target.resume,
            }
            while self.sync.is_active:
                self._carry_out(steps[self.sync.state])
            if self.sync.failed_in is not None:
                raise WeightSyncFailed(self.sync.failed_in.value, version, self.sync.reason)

    def reset(self) -> None:
        """Allows transfers after a failure."""
        with self._lock:
            self.sync = self.sync.reset()
            self.close()

    def close(self) -> None:
        """Ends the thread, as soon as the engine lets it."""
        if self._commands is not None:
            self._commands.put(None)
            self._commands = None

    def _carry_out(self, action: Callable[[], None]) -> None:
        """Runs one command and moves on, or fails at its deadline."""
        command = _Command(action)
        self._worker().put(command)
        assert self.sync.deadline_s is not None
        ticket, left_s = self.sync.ticket, self.sync.deadline_s - self._clock.monotonic_s()
        answered = command.ended.wait(max(left_s, 0.0))
        now_s = self._clock.monotonic_s()
        if not answered:
            # the wait is over, whatever the clock's grain says
            self.sync = self.sync.expire(max(now_s, self.sync.deadline_s))
        elif command.error is not None:
            self.sync = self.sync.refused(ticket, repr(command.error))
        else:
            self.sync = self.sync.done(ticket, now_s)

    def _worker(self) -> queue.SimpleQueue[_Command | None]:
        if self._commands is None:
            self._commands = queue.SimpleQueue()
            threading.Thread(target=_work, args=(self._commands,), name="weight sync", daemon=True).start()
        return self._commands


class _Command:
    """One call into the engine, and how it ended."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self.ended = threading.Event()
        self.error: BaseException | None = None

    def __call__(self) -> None:
        try:
            self._action()
        except BaseException as error:  # noqa: BLE001 - it belongs to the thread that waits, whatever it is
            self.error = error
        self.ended.set()


def _work(commands: queue.SimpleQueue[_Command | None]) -> None:
    while (command := commands.get()) is not None:
        command()
