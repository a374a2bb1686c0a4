"""Who hangs and who is slow, judged from heartbeats. Pure: the caller reads the clock, the file and the processes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import median

from sihe.cluster.heartbeats import Phase, Pulse
from sihe.cluster.types import WatchPolicy

_LONGEST_LOOK_S = 2.0
"""A launcher that did not run itself for longer (a suspended machine) saw nothing, and that time counts as so much."""


@dataclass(frozen=True)
class Hang:
    """No progress for `seconds`; the others wait for `rank`, whose last step was `step`."""

    rank: int
    seconds: float
    step: int


class HangWatch:
    """Watches one attempt of `world_size` ranks."""

    def __init__(self, policy: WatchPolicy, world_size: int) -> None:
        self._policy = policy
        self._beats = [-1] * world_size
        self._quiet_s = [0.0] * world_size  # since the rank's last progress
        self._stopped_s = [0.0] * world_size  # for how long its process has been stopped
        self._looked_s: float | None = None

    def look(
        self, now_s: float, pulses: Sequence[Pulse], *, stopped: Collection[int] = (), ended: Collection[int] = ()
    ) -> Hang | None:
        """The hang, if there is one at `now_s` (monotonic, s).

        `stopped` are ranks whose process a signal has stopped, `ended` those whose process has ended well.
        """
        passed_s = min(now_s - self._looked_s, _LONGEST_LOOK_S) if self._looked_s is not None else 0.0
        self._looked_s = now_s
        for rank, pulse in enumerate(pulses):
            moved = pulse.beats != self._beats[rank]
            self._beats[rank] = pulse.beats
            self._quiet_s[rank] = 0.0 if moved else self._quiet_s[rank] + passed_s
            self._stopped_s[rank] = self._stopped_s[rank] + passed_s if rank in stopped else 0.0
        alive = [rank for rank in range(len(pulses)) if rank not in ended]
        if not alive:
            return None
        # A stopped process makes no progress in any phase: no patience with it.
        halted = max(alive, key=lambda rank: self._stopped_s[rank])
        if self._stopped_s[halted] >= self._policy.hang_timeout_s:
            return Hang(halted, self._stopped_s[halted], pulses[halted].step)
        patient = any(pulses[rank].phase is not Phase.STEPPING for rank in alive)
        limit_s = self._policy.startup_timeout_s if patient else self._policy.hang_timeout_s
        quiet_s = min(self._quiet_s)
        if quiet_s < limit_s:
            return None
        behind = min(alive, key=lambda rank: (rank not in stopped, pulses[rank].step, -self._quiet_s[rank]))
        return Hang(behind, self._quiet_s[behind], pulses[behind].step)


@dataclass(frozen=True)
class Straggler:
    """Rank `rank` takes `median_s` to compute a step, the others take `others_median_s`."""

    rank: int
    median_s: float
    others_median_s: float


class StragglerWatch:
    """Compares the ranks' compute times over windows of `policy.straggler_window` steps that do not overlap."""

    def __init__(self, policy: WatchPolicy, world_size: int) -> None:
        self._policy = policy
        self._seconds: list[list[float]] = [[] for _ in range(world_size)]
        self._last = [0] * world_size

    @property
    def window(self) -> int:
        """Steps in a window."""
        return self._policy.straggler_window

    def look(self, pulses: Sequence[Pulse]) -> list[Straggler]:
        """Takes in new compute times; the stragglers of a window that is now complete, slowest first.

        Steps that pass between two looks are not seen: then more steps make up a window.
        """
        for rank, pulse in enumerate(pulses):
            if pulse.computed_step > self._last[rank]:
                self._last[rank] = pulse.computed_step
                self._seconds[rank].append(pulse.compute_s)
        if len(pulses) < 2 or min(map(len, self._seconds)) < self._policy.straggler_window:
            return []
        medians = [median(seconds) for seconds in self._seconds]
        for seconds in self._seconds:
            seconds.clear()
        found = []
        for rank, own in enumerate(medians):
            others = median(medians[:rank] + medians[rank + 1 :])
            if own > self._policy.straggler_factor * others:
                found.append(Straggler(rank, own, others))
        return sorted(found, key=lambda straggler: -straggler.median_s)
