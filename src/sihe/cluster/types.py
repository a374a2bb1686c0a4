"""The values of the cluster room: a job of processes, its restart policy, and what a launcher reports."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sihe.core.errors import InvalidInput

MAX_RESTARTS = 1000
"""More than any job needs; the file that counts them has room for so many."""


@dataclass(frozen=True)
class WatchPolicy:
    """When ranks that do not die count as hung, and when one of them counts as slow.

    The job hangs when no rank at all made progress: while one works, the others may wait for it.
    """

    hang_timeout_s: float = 90.0
    """Without progress of any rank. Longer than the slowest micro-batch."""
    startup_timeout_s: float = 600.0
    """The same while a rank is in a slow phase: imports, compilation, loading and saving checkpoints, export."""
    straggler_factor: float = 1.5
    """A rank is a straggler when its median compute time is more than this many times that of the others."""
    straggler_window: int = 20
    """Steps over which the medians are taken; a straggler is reported at most once in each window."""

    def __post_init__(self) -> None:
        if not 0 < self.hang_timeout_s <= self.startup_timeout_s:
            raise InvalidInput(
                "hang_timeout_s must be positive and at most startup_timeout_s, "
                f"got {self.hang_timeout_s!r} and {self.startup_timeout_s!r}"
            )
        if self.straggler_factor <= 1 or self.straggler_window < 3:
            raise InvalidInput(
                "straggler_factor must be above 1 and straggler_window at least 3 steps, "
                f"got {self.straggler_factor!r} and {self.straggler_window!r}"
            )


@dataclass(frozen=True)
class ProcessJob:
    """`world_size` ranks of `python -m module args…` that live and die together."""

    name: str
    module: str
    world_size: int
    log_dir: Path
    """Each attempt writes `attempt-<n>/rank-<r>/{stdout,stderr}.log` here; `restarts` keeps the budget that is used."""
    args: tuple[str, ...] = ()
    threads_per_rank: int = 1
    gpus_per_rank: int = 0
    """Accelerators that a launcher over several machines reserves for each rank; a local one reserves nothing."""
    env: Mapping[str, str] = field(default_factory=dict)
    world_sizes: tuple[int, ...] = ()
    """Every number of ranks with which the job can run (elastic); only `world_size` when empty."""
    capacity_file: Path | None = None
    """While this file exists, the whole number in it is how many ranks may run now."""
    watch: WatchPolicy | None = None
    """For ranks that write heartbeats; those of other jobs are not watched for hanging."""

    def __post_init__(self) -> None:
        for name in ("world_size", "threads_per_rank"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} of job {self.name!r} must be at least 1, got {getattr(self, name)!r}")
        if self.gpus_per_rank < 0:
            raise InvalidInput(f"gpus_per_rank of job {self.name!r} must not be negative, got {self.gpus_per_rank!r}")
        if any(size < 1 for size in self.world_sizes):
            raise InvalidInput(f"world_sizes of job {self.name!r} must be at least 1, got {self.world_sizes!r}")

    def largest_size(self, slots: int | None) -> int | None:
        """The most ranks that the job can run with on `slots` slots (`None`: no limit); `None` when none fits."""
        return max(
            (size for size in self.world_sizes or (self.world_size,) if slots is None or size <= slots), default=None
        )


@dataclass(frozen=True)
class RestartPolicy:
    """How often a job is started again after a failure, and how long to wait before.

    The budget belongs to the job and is kept beside its logs: neither progress nor another launcher refills it, so
    that a job which always fails always ends. With `window_s` it is a budget for each such stretch of time instead,
    for jobs that run for months on machines that fail now and then; such a job can fail for ever, at that rate.
    """

    max_restarts: int = 3
    first_delay_s: float = 0.25
    factor: float = 2.0
    max_delay_s: float = 30.0
    jitter: float = 0.25
    """The share of a delay that is left to chance, so that jobs which failed together do not come back together."""
    seed: int = 0
    window_s: float | None = None
    capacity_timeout_s: float = 600.0
    """How long to wait when fewer slots are free than the job needs at least."""

    def __post_init__(self) -> None:
        if self.max_restarts < 0 or self.first_delay_s < 0 or self.factor < 1 or self.max_delay_s < 0:
            raise InvalidInput(f"a restart policy has no negative number and a factor of at least 1, got {self!r}")
        if self.max_restarts > MAX_RESTARTS:
            raise InvalidInput(f"max_restarts must be at most {MAX_RESTARTS}, got {self.max_restarts!r}")
        if not 0 <= self.jitter <= 1 or self.capacity_timeout_s < 0:
            raise InvalidInput(f"jitter lies in [0, 1] and capacity_timeout_s is not negative, got {self!r}")
        if self.window_s is not None and self.window_s <= 0:
            raise InvalidInput(f"window_s must be positive, or None for the whole life of a job, got {self.window_s!r}")

    def delay_s(self, restart: int) -> float:
        """Seconds to wait before restart number `restart` (from 1); the same for the same seed."""
        # The exponent is bounded: a float overflows long before anybody waits that long.
        full = min(self.max_delay_s, self.first_delay_s * self.factor ** min(restart - 1, 64))
        return full * (1 - self.jitter * random.Random(f"{self.seed}:{restart}").random())


@dataclass(frozen=True)
class RanksStarted:
    """Attempt number `attempt` runs; `pids[rank]` are its processes, on the machines `hosts[rank]`."""

    attempt: int
    pids: tuple[int, ...]
    log_dir: Path
    hosts: tuple[str, ...] = ()
    """Addresses; empty when all ranks run on this machine."""


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
class RankHung:
    """No rank made progress for `seconds`; `rank` is the one that the others wait for. All were killed."""

    attempt: int
    rank: int
    pid: int
    seconds: float
    step: int
    """The last step that it began; 0 when it never came so far."""
    state: str
    """What the system says about its process, such as "T (stopped)"."""
    stacks: Path
    """Where each of its threads was; the files of the other ranks lie in the folders beside it."""
    log: Path

    @property
    def reason(self) -> str:
        """The failure in words."""
        return f"hung for {self.seconds:.0f} s at step {self.step}, its process {self.state} (stacks: {self.stacks})"


@dataclass(frozen=True)
class StragglerSeen:
    """Over a window of `steps` steps that ended at `step`, rank `rank` computed much longer than the others."""

    attempt: int
    rank: int
    step: int
    steps: int
    median_s: float
    """Compute time of a step, without waiting for other ranks."""
    others_median_s: float


@dataclass(frozen=True)
class WorkersChanged:
    """From attempt `attempt` on, `after` ranks run instead of `before`."""

    attempt: int
    before: int
    after: int
    slots: int | None
    """How many may run now; `None` for no limit."""


@dataclass(frozen=True)
class Restarting:
    """All ranks start again after `delay_s`; it is restart number `restart` of at most `max_restarts`."""

    restart: int
    max_restarts: int
    delay_s: float


JobEvent = RanksStarted | RankFailed | RankHung | StragglerSeen | WorkersChanged | Restarting
