"""The values of the cluster room: a job of processes, its restart policy, and what a launcher reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sihe.core.errors import InvalidInput


@dataclass(frozen=True)
class ProcessJob:
    """`world_size` ranks of `python -m module args…` that live and die together."""

    name: str
    module: str
    world_size: int
    log_dir: Path
    """Each attempt writes `attempt-<n>/rank-<r>/{stdout,stderr}.log` here."""
    args: tuple[str, ...] = ()
    threads_per_rank: int = 1
    env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("world_size", "threads_per_rank"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} of job {self.name!r} must be at least 1, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class RestartPolicy:
    """How often a job is started again after a crash, and how long to wait before.

    The budget belongs to the job and is never refilled, so that a job which always crashes always ends.
    """

    max_restarts: int = 3
    first_delay_s: float = 0.25
    factor: float = 2.0
    max_delay_s: float = 30.0

    def __post_init__(self) -> None:
        if self.max_restarts < 0 or self.first_delay_s < 0 or self.factor < 1 or self.max_delay_s < 0:
            raise InvalidInput(f"a restart policy has no negative number and a factor of at least 1, got {self!r}")

    def delay_s(self, restart: int) -> float:
        """Seconds to wait before restart number `restart` (from 1)."""
        # The exponent is bounded: a float overflows long before anybody waits that long.
        return min(self.max_delay_s, self.first_delay_s * self.factor ** min(restart - 1, 64))


@dataclass(frozen=True)
class RanksStarted:
    """Attempt number `attempt` runs; `pids[rank]` are its processes."""

    attempt: int
    pids: tuple[int, ...]
    log_dir: Path


@dataclass(frozen=True)
class RankFailed:
    """Rank `rank` was the first to die, and the others were stopped."""

    attempt: int
    rank: int
    pid: int
    exit_code: int | None
    signal: str | None
    reason: str
    log: Path


@dataclass(frozen=True)
class Restarting:
    """All ranks start again after `delay_s`; it is restart number `restart` of at most `max_restarts`."""

    restart: int
    max_restarts: int
    delay_s: float


JobEvent = RanksStarted | RankFailed | Restarting
