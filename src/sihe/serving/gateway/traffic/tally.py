"""What all arms were measured by in one period, as far as one process has answered; tallies of several add up.

Whether requests get lost on an arm is seen from the senders, so these must be the same share of each arm's: where there
are too many to keep, those of all arms stop at the same request, and of a tally that does not fit any more, none is
taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sihe.serving.gateway.traffic.arm_stats import ArmStats
from sihe.serving.gateway.traffic.outcome import Outcome

MAX_SENDERS = 16_384  # told apart by one process: 88 kB in the records
MAX_SENDERS_TOGETHER = 8 * MAX_SENDERS


class Tally:
    """Statistics by arm, and the smallest p seen of each comparison: what makes it valid always. Not thread-safe."""

    def __init__(self, arms: Iterable[str] = ()) -> None:
        self.arms = {arm: ArmStats() for arm in arms}
        self.least: dict[str, float] = {}

    def arm(self, name: str) -> ArmStats:
        """What was measured of an arm; nothing where it is not known here."""
        return self.arms.get(name) or ArmStats()

    def record(self, arm: str, outcome: Outcome, cluster: int, sender: int) -> None:
        """Takes in a request that has ended; `sender` is a hash of 32 bits."""
        stats = self.arms[arm]
        stats.record(outcome, cluster)
        known = [one.senders for one in self.arms.values()]
        if sum(map(len, known)) < MAX_SENDERS and not any(sender in one for one in known):
            stats.senders.add(sender)

    def absorb(self, other: Tally) -> None:
        """Takes in what another process has measured in the same period."""
        fits = self._senders + other._senders <= MAX_SENDERS_TOGETHER
        for arm, stats in other.arms.items():
            self.arms.setdefault(arm, ArmStats()).absorb(stats, with_senders=fits)
        for name, p in other.least.items():
            self.least[name] = min(p, self.least.get(name, 1.0))

    @property
    def _senders(self) -> int:
        return sum(len(stats.senders) for stats in self.arms.values())

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, from which `from_mapping` makes the same again."""
        return {"arms": {arm: stats.to_mapping() for arm, stats in self.arms.items()}, "least": dict(self.least)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Tally:
        """The tally that `to_mapping` wrote. Raises `KeyError`, `TypeError`, `ValueError` or `AttributeError` for what
        has another form."""
        made = cls()
        made.arms = {arm: ArmStats.from_mapping(stats) for arm, stats in values["arms"].items()}
        made.least = {name: float(p) for name, p in values["least"].items()}
        return made

    @classmethod
    def sum(cls, tallies: Iterable[Tally]) -> Tally:
        """All of them together, in their order."""
        made = cls()
        for tally in tallies:
            made.absorb(tally)
        return made
