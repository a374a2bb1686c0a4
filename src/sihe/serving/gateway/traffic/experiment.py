"""One period in which the arms, their versions and their weights stayed as they are, and what it says about them.

When any of the three changes a new period begins: to add up requests from before and after a change of weights would
mix the hours of the day into the difference between arms (Kohavi, Tang and Xu, "Trustworthy Online Controlled
Experiments", Cambridge 2020, chapter 3, on Simpson's paradox in ramp-ups). An arm whose first version becomes known
begins one only where others were measured without it: what it has answered until then came from that version.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sihe.core.errors import AlreadyExists, NotFound
from sihe.serving.gateway.traffic import significance
from sihe.serving.gateway.traffic.arm_stats import ERROR, LATENCY, LOWER_IS_BETTER, TOKENS, TTFT, ArmStats
from sihe.serving.gateway.traffic.assignment import draw
from sihe.serving.gateway.traffic.moments import CLUSTERS
from sihe.serving.gateway.traffic.outcome import Outcome
from sihe.serving.gateway.traffic.types import STABLE

ALPHA = 0.05
MISMATCH_ALPHA = 0.001  # for the split itself: an alarm there puts everything else in doubt
MAX_RECENT = 50_000  # requests that feedback may still come for
_MAX_UNITS = 100_000  # senders that are told apart; beyond it the split is checked on those so far

Verdict = Literal["better", "worse", "differs", "undecided", "few"]


@dataclass(frozen=True, slots=True)
class Split:
    """What a period is about: the weight and the version of every arm. A version is None before its first load."""

    weights: Mapping[str, float]
    versions: Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class MetricReport:
    """A metric of an arm. `low` to `high` holds its difference from `stable` at any time with 95 %; None for `stable`
    and where there are too few values. `p_once` is right for one look at a time fixed before, `p_always` for any."""

    metric: str
    count: int
    mean: float
    difference: float | None
    low: float | None
    high: float | None
    p_once: float | None
    p_always: float | None
    verdict: Verdict | None


@dataclass(frozen=True, slots=True)
class ArmReport:
    """An arm in this period. Times are seconds."""

    arm: str
    version: int | None
    weight: float
    requests: int
    errors: int
    left: int
    latency_p50_s: float | None
    latency_p95_s: float | None
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    metrics: tuple[MetricReport, ...]


@dataclass(frozen=True, slots=True)
class ExperimentReport:
    """A period's arms beside each other. When the split is `mismatched` no difference between them is to be believed:
    requests of one arm get lost, or never came."""

    deployment: str
    period: int
    started_at: datetime
    mismatch_p_once: float
    mismatch_p_always: float
    mismatched: bool
    arms: tuple[ArmReport, ...]


@dataclass(slots=True)
class _Ended:
    """A request that feedback may come for."""

    arm: str
    cluster: int
    given: tuple[str, ...] = ()


class Experiment:
    """Thread-safe: engines' threads record while pages and the rollout read."""

    def __init__(self, deployment: str, period: int, split: Split, started_at: datetime) -> None:
        self.deployment = deployment
        self.period = period
        self.split = split
        self.started_at = started_at
        self._lock = threading.Lock()
        self._arms = {arm: ArmStats() for arm in split.weights}
        self._units: set[int] = set()
        self._recent: OrderedDict[str, _Ended] = OrderedDict()
        self._least: dict[str, float] = {}  # the smallest p seen of each comparison: what makes it valid always
        self.changes = 0  # grows with every record: whoever stores the statistics sees whether there is news

    def followed_by(self, split: Split, now: datetime) -> Experiment:
        """The period that `split` belongs to from `now` on: this one where it changes nothing but that versions become
        known and no other arm was measured yet, else the next one.

        Whose arm's version becomes known with the next one may still give feedback on what that arm has answered.
        """
        with self._lock:
            former = self.split
            new = {arm for arm in split.weights if former.versions.get(arm) is None}
            known = {arm: version for arm, version in split.versions.items() if arm not in new}
            is_same = split.weights == former.weights and all(former.versions[arm] == known[arm] for arm in known)
            if is_same and not any(self._arms[arm].is_measured for arm in known):
                self.split, self.started_at = split, now
                self.changes += 1
                return self
            following = Experiment(self.deployment, self.period + 1, split, now)
            kept = new if is_same else set()
            following._recent.update((id, ended) for id, ended in self._recent.items() if ended.arm in kept)
            return following

    def begin(self, request_id: str, arm: str, key: str) -> int:
        """Notes that a request goes to its arm, so that feedback may come for it; the cluster that its values go by."""
        place = draw(key, salt=self.deployment, name="cluster")
        cluster = int(place * CLUSTERS)
        with self._lock:
            self._recent[request_id] = _Ended(arm, cluster)
            if len(self._recent) > MAX_RECENT:
                self._recent.popitem(last=False)
        return cluster

    def record(self, arm: str, outcome: Outcome, cluster: int, key: str) -> None:
        """Takes in a request that has ended."""
        with self._lock:
            stats = self._arms[arm]
            stats.record(outcome, cluster)
            unit = hash(key)
            if len(self._units) < _MAX_UNITS and unit not in self._units:
                self._units.add(unit)
                stats.units += 1
            self.changes += 1

    def feedback(self, request_id: str, values: Mapping[str, float]) -> str:
        """Takes in what a client says of an answer; the arm that it is about.

        Raises `NotFound` for a request of another period or too long ago, `AlreadyExists`, `InvalidInput`.
        """
        with self._lock:
            ended = self._recent.get(request_id)
            if ended is None:
                raise NotFound(
                    "request",
                    request_id.rpartition("/")[2],
                    hint=f"feedback is taken for the last {MAX_RECENT} requests since arms or weights last changed",
                )
            for metric in values:
                if metric in ended.given:
                    raise AlreadyExists(
                        "feedback", f"{request_id.rpartition('/')[2]} {metric}", hint="each answer is judged once"
                    )
            arm = self._arms[ended.arm]
            arm.check(values)  # first: of what comes together all is taken, or nothing
            for metric, value in values.items():
                arm.add(metric, value, ended.cluster)
            ended.given = (*ended.given, *values)
            self.changes += 1
            return ended.arm

    def stats(self, arm: str) -> ArmStats:
        """A copy of an arm's statistics."""
        with self._lock:
            return ArmStats.from_mapping(self._arms[arm].to_mapping())

    def report(self) -> ExperimentReport:
        """The arms beside each other, as of now."""
        with self._lock:
            weighted = [arm for arm, weight in self.split.weights.items() if weight > 0]
            counts = [self._arms[arm].units for arm in weighted]
            shares = [self.split.weights[arm] for arm in weighted]
            once = significance.ratio_mismatch(counts, shares).p_value
            always = self._note("split", significance.ratio_mismatch_always(counts, shares))
            return ExperimentReport(
                self.deployment,
                self.period,
                self.started_at,
                once,
                always,
                always < MISMATCH_ALPHA,
                tuple(self._arm(arm, stats) for arm, stats in self._arms.items()),
            )

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for the records; `restore` takes them back."""
        with self._lock:
            return {"arms": {arm: stats.to_mapping() for arm, stats in self._arms.items()}, "least": dict(self._least)}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Goes on where another process stopped. Senders are not remembered: those who come again count again."""
        with self._lock:
            self._arms |= {arm: ArmStats.from_mapping(stats) for arm, stats in values["arms"].items()}
            self._least = dict(values["least"])

    def _arm(self, arm: str, stats: ArmStats) -> ArmReport:
        latency, ttft = stats.times[LATENCY], stats.times[TTFT]
        return ArmReport(
            arm=arm,
            version=self.split.versions.get(arm),
            weight=self.split.weights[arm],
            requests=stats.requests,
            errors=stats.errors,
            left=stats.left,
            latency_p50_s=latency.quantile(0.5),
            latency_p95_s=latency.quantile(0.95),
            ttft_p50_s=ttft.quantile(0.5),
            ttft_p95_s=ttft.quantile(0.95),
            metrics=tuple(self._metric(arm, name) for name, moments in stats.metrics.items() if moments.count),
        )

    def _metric(self, arm: str, name: str) -> MetricReport:
        own, stable = self._arms[arm].metric(name), self._arms[STABLE].metric(name)
        if arm == STABLE:
            return MetricReport(name, own.count, own.mean, None, None, None, None, None, None)
        compare = significance.difference_of_rates if name == ERROR else significance.difference
        found = compare(stable, own, alpha=ALPHA)
        if found is None:
            return MetricReport(name, own.count, own.mean, None, None, None, None, None, "few")
        always = self._note(f"{arm}/{name}", found.p_always)
        return MetricReport(
            name,
            own.count,
            own.mean,
            found.value,
            found.value - found.radius if math.isfinite(found.radius) else None,
            found.value + found.radius if math.isfinite(found.radius) else None,
            found.p_once,
            always,
            _verdict(name, found.value, always),
        )

    def _note(self, name: str, p: float) -> float:
        self._least[name] = min(p, self._least.get(name, 1.0))
        return self._least[name]


def _verdict(metric: str, difference: float, p: float) -> Verdict:
    if p >= ALPHA or difference == 0:
        return "undecided"
    if metric == TOKENS:
        return "differs"  # longer is neither
    return "better" if (difference < 0) == (metric in LOWER_IS_BETTER) else "worse"
