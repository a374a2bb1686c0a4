"""What an arm's answers were like: counts and sums that grow with each request, of bounded size, and that add up.

What several processes have measured is absorbed into one, and that is what one process would hold that had answered all
requests. So senders are kept as numbers, not only counted: one whose requests went to two processes is still one.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from typing import Any

from sihe.core.errors import InvalidInput
from sihe.core.ids import check_name
from sihe.serving.gateway.traffic.moments import Histogram, Moments
from sihe.serving.gateway.traffic.outcome import Outcome

ERROR, LATENCY, TTFT, TPOT, TOKENS = "error", "latency_s", "ttft_s", "tpot_s", "completion_tokens"
BUILT_IN = (ERROR, LATENCY, TTFT, TPOT, TOKENS)
LOWER_IS_BETTER = frozenset({ERROR, LATENCY, TTFT, TPOT})
MAX_METRICS = 24  # of feedback; a client names them, and each costs memory
MAX_VALUE = 1e9  # of feedback: the squares of a million of them are still far from what a float holds
_TIMES = (LATENCY, TTFT, TPOT)


class ArmStats:
    """One arm in one period. Not thread-safe."""

    def __init__(self) -> None:
        self.requests = 0  # that ended by themselves, with an answer or an error
        self.left = 0  # whose reader left: neither good nor bad
        self.senders: set[int] = set()  # hashes of 32 bits, of those that are told apart
        self.units_before = 0  # senders that an earlier version of the house counted and did not keep
        self.metrics: dict[str, Moments] = {name: Moments() for name in BUILT_IN}
        self.times: dict[str, Histogram] = {name: Histogram() for name in _TIMES}

    @property
    def units(self) -> int:
        """Senders, as far as they are told apart."""
        return self.units_before + len(self.senders)

    @property
    def is_measured(self) -> bool:
        """Whether a request of it has ended."""
        return self.requests > 0 or self.left > 0

    @property
    def errors(self) -> int:
        """Requests that the arm failed to answer."""
        return round(self.metrics[ERROR].total)

    def record(self, outcome: Outcome, cluster: int) -> None:
        """Takes in a request that has ended."""
        if outcome.ending == "left":
            self.left += 1
            return
        self.requests += 1
        failed = outcome.ending == "failed"
        self.metrics[ERROR].add(float(failed), cluster)
        if failed:
            return
        self.metrics[TOKENS].add(float(outcome.completion_tokens), cluster)
        for name, value in ((LATENCY, outcome.latency_s), (TTFT, outcome.ttft_s), (TPOT, outcome.tpot_s)):
            if value is not None:
                self.metrics[name].add(value, cluster)
                self.times[name].add(value)

    def check(self, values: Mapping[str, float]) -> None:
        """Raises `InvalidInput` for feedback that `add` could not take in."""
        for metric, value in values.items():
            check_name("metric", metric)
            if metric in BUILT_IN:
                raise InvalidInput(f"{metric!r} is measured here and cannot come as feedback: choose another name")
            if not abs(value) <= MAX_VALUE:  # NaN neither
                raise InvalidInput(
                    f"the value of {metric!r} must be a finite number of at most {MAX_VALUE:g}, got {value!r}"
                )
        new = [metric for metric in values if metric not in self.metrics]
        if len(self.metrics) + len(new) > len(BUILT_IN) + MAX_METRICS:
            raise InvalidInput(f"a deployment has at most {MAX_METRICS} metrics of feedback, and {new[0]!r} is new")

    def add(self, metric: str, value: float, cluster: int) -> None:
        """Takes in a value of feedback that was checked."""
        self.metrics.setdefault(metric, Moments()).add(value, cluster)

    def metric(self, name: str) -> Moments:
        """The moments of a metric; empty where it has no values."""
        return self.metrics.get(name) or Moments()

    def absorb(self, other: ArmStats, *, with_senders: bool = True) -> None:
        """Takes in what `other` has measured of the same arm. Names of feedback beyond the limit are left out."""
        self.requests += other.requests
        self.left += other.left
        if with_senders:
            self.senders |= other.senders
            self.units_before += other.units_before
        for name, moments in sorted(other.metrics.items()):
            if name in self.metrics or len(self.metrics) < len(BUILT_IN) + MAX_METRICS:
                self.metrics.setdefault(name, Moments()).absorb(moments)
        for name, histogram in other.times.items():
            self.times.setdefault(name, Histogram()).absorb(histogram)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, from which `from_mapping` makes the same again."""
        return {
            "requests": self.requests,
            "left": self.left,
            "units": self.units_before,
            "senders": _packed(self.senders),
            "metrics": {name: moments.to_mapping() for name, moments in self.metrics.items()},
            "times": {name: histogram.to_mapping() for name, histogram in self.times.items()},
        }

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ArmStats:
        """The statistics that `to_mapping` wrote."""
        made = cls()
        made.requests, made.left, made.units_before = values["requests"], values["left"], values["units"]
        made.senders = _unpacked(values.get("senders", ""))
        made.metrics |= {name: Moments.from_mapping(moments) for name, moments in values["metrics"].items()}
        made.times |= {name: Histogram.from_mapping(counts) for name, counts in values["times"].items()}
        return made


def _packed(numbers: set[int]) -> str:
    """Base64 of four bytes each: half of what a list of them takes in JSON."""
    return base64.b64encode(struct.pack(f"<{len(numbers)}I", *sorted(numbers))).decode("ascii")


def _unpacked(text: str) -> set[int]:
    """The numbers again. Raises `ValueError` for anything else."""
    packed = base64.b64decode(text, validate=True)
    if len(packed) % 4:
        raise ValueError(f"senders are numbers of 4 bytes, got {len(packed)} bytes")
    return set(struct.unpack(f"<{len(packed) // 4}I", packed))
