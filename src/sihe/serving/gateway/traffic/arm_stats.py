"""What an arm's answers were like: counts and sums that grow with each request, of fixed size."""

from __future__ import annotations

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
        self.units = 0  # senders, as far as they can be told apart
        self.metrics: dict[str, Moments] = {name: Moments() for name in BUILT_IN}
        self.times: dict[str, Histogram] = {name: Histogram() for name in _TIMES}

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

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, from which `from_mapping` makes the same again."""
        return {
            "requests": self.requests,
            "left": self.left,
            "units": self.units,
            "metrics": {name: moments.to_mapping() for name, moments in self.metrics.items()},
            "times": {name: histogram.to_mapping() for name, histogram in self.times.items()},
        }

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ArmStats:
        """The statistics that `to_mapping` wrote."""
        made = cls()
        made.requests, made.left, made.units = values["requests"], values["left"], values["units"]
        made.metrics |= {name: Moments.from_mapping(moments) for name, moments in values["metrics"].items()}
        made.times |= {name: Histogram.from_mapping(counts) for name, counts in values["times"].items()}
        return made
