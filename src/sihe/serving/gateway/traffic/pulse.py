"""The last minutes of each arm, second by second, for whoever watches: kept in memory, of fixed size."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from sihe.serving.gateway.traffic.outcome import Outcome

SAMPLES = 150
_LEAST_S = 1.0  # between two samples


@dataclass(frozen=True, slots=True)
class ArmLoad:
    """What an arm holds at one moment: requests in hand, and the share of its KV cache in use."""

    in_hand: int
    kv_used: float


@dataclass(frozen=True, slots=True)
class ArmSample:
    """An arm since the sample before; means of the requests that ended, None without any."""

    requests_per_s: float
    failed_per_s: float
    ttft_s: float | None
    tpot_s: float | None
    in_hand: int
    kv_used: float


@dataclass(frozen=True, slots=True)
class Sample:
    """All arms at `at_s` of the monotonic clock."""

    at_s: float
    arms: Mapping[str, ArmSample]


@dataclass(slots=True)
class _Sums:
    requests: int = 0
    failed: int = 0
    ttft_s: float = 0.0
    ttft_count: int = 0
    tpot_s: float = 0.0
    tpot_count: int = 0


class Pulse:
    """Thread-safe: engines' threads `record`, one thread makes samples, pages read them."""

    def __init__(self, now_s: float) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, _Sums] = {}
        self._samples: deque[Sample] = deque(maxlen=SAMPLES)
        self._last_s = now_s

    def record(self, arm: str, outcome: Outcome) -> None:
        """Takes in a request that has ended."""
        with self._lock:
            sums = self._sums.setdefault(arm, _Sums())
            sums.requests += 1
            sums.failed += outcome.ending == "failed"
            if outcome.ttft_s is not None:
                sums.ttft_s += outcome.ttft_s
                sums.ttft_count += 1
            if outcome.tpot_s is not None:
                sums.tpot_s += outcome.tpot_s
                sums.tpot_count += 1

    def is_due(self, now_s: float) -> bool:
        """Whether it is time for another sample."""
        return now_s - self._last_s >= _LEAST_S

    def tick(self, now_s: float, loads: Mapping[str, ArmLoad]) -> None:
        """Makes a sample of what came since the last one. Arms that are in `loads` no more are left out."""
        with self._lock:
            elapsed_s = max(now_s - self._last_s, 1e-9)
            sums, self._sums, self._last_s = self._sums, {}, now_s
            arms = {
                arm: ArmSample(
                    requests_per_s=found.requests / elapsed_s,
                    failed_per_s=found.failed / elapsed_s,
                    ttft_s=found.ttft_s / found.ttft_count if found.ttft_count else None,
                    tpot_s=found.tpot_s / found.tpot_count if found.tpot_count else None,
                    in_hand=load.in_hand,
                    kv_used=load.kv_used,
                )
                for arm, load in loads.items()
                for found in [sums.get(arm, _Sums())]
            }
            self._samples.append(Sample(now_s, arms))

    def samples(self) -> list[Sample]:
        """The samples so far, oldest first."""
        with self._lock:
            return list(self._samples)
