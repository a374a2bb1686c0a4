"""One period in which the arms, their versions and their weights stayed as they are, and what it says about them.

When any of the three changes a new period begins: to add up requests from before and after a change of weights would
mix the hours of the day into the difference between arms (Kohavi, Tang and Xu, "Trustworthy Online Controlled
Experiments", Cambridge 2020, chapter 3, on Simpson's paradox in ramp-ups). An arm whose first version becomes known
begins one only where others were measured without it: what it has answered until then came from that version.

Several processes may measure one period, each what it answers itself. What the others have stored is heard, and what is
reported is all of them together.
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
from sihe.serving.gateway.traffic.arm_stats import (
    BUILT_IN,
    ERROR,
    LATENCY,
    LOWER_IS_BETTER,
    TOKENS,
    TTFT,
    ArmStats,
)
from sihe.serving.gateway.traffic.assignment import draw
from sihe.serving.gateway.traffic.moments import CLUSTERS
from sihe.serving.gateway.traffic.outcome import Outcome
from sihe.serving.gateway.traffic.tally import Tally
from sihe.serving.gateway.traffic.types import STABLE

ALPHA = 0.05
MISMATCH_ALPHA = 0.001  # for the split itself: an alarm there puts everything else in doubt
MAX_RECENT = 50_000  # requests that feedback may still come for
_SENDERS = 2**32  # numbers that senders are told apart by

Verdict = Literal["better", "worse", "differs", "undecided", "few"]


@dataclass(frozen=True, slots=True)
class Split:
    """What a period is about: the weight and the version of every arm. A version is None before its first load."""

    weights: Mapping[str, float]
    versions: Mapping[str, int | None]

    def completes(self, former: Split) -> bool:
        """Whether it differs from `former` at most by versions that were not known there."""
        return self.weights == former.weights and all(
            self.versions.get(arm) == version for arm, version in former.versions.items() if version is not None
        )


@dataclass(frozen=True, slots=True)
class Period:
    """A period as the records hold it: its number among those of its deployment, and what it is about."""

    number: int
    split: Split
    started_at: datetime


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
    """What one process measures of a period, and what it has heard of the others' part. Thread-safe: engines' threads
    record while pages and the rollout read."""

    def __init__(self, deployment: str, period: int, split: Split, started_at: datetime) -> None:
        self.deployment = deployment
        self.period = period
        self.split = split
        self.started_at = started_at
        self._lock = threading.Lock()
        self._own = Tally(split.weights)
        self._others = Tally()  # replaced whole, never changed
        self._recent: OrderedDict[str, _Ended] = OrderedDict()
        self.changes = 0  # grows with every record: whoever stores the statistics sees whether there is news

    def hear(self, others: Tally) -> None:
        """Takes what the other processes have stored of this period, in the place of what was heard before."""
        self._others = others

    def becomes(self, split: Split) -> bool:
        """Whether this period may go on as one of `split`: nothing changes but that versions become known, and no other
        arm was measured yet, by anybody who was heard."""
        known = [arm for arm, version in self.split.versions.items() if version is not None]
        with self._lock:
            is_measured = any(tally.arm(arm).is_measured for arm in known for tally in (self._own, self._others))
        return split.completes(self.split) and not is_measured

    def place(self, period: Period) -> None:
        """Makes it that period, which the records have now; what was measured stays."""
        with self._lock:
            self.period, self.split, self.started_at = period.number, period.split, period.started_at

    def successor(self, period: Period) -> Experiment:
        """One for the period that follows, in which nothing was measured yet.

        Feedback is still taken on what arms have answered that are the same there, as far as that is known: all of them
        where the split is the same, else those whose version has only become known.
        """
        made = Experiment(self.deployment, period.number, period.split, period.started_at)
        kept = {arm for arm in period.split.weights if self.split.versions.get(arm) is None}
        if period.split == self.split:
            kept = set(period.split.weights)
        elif not period.split.completes(self.split):
            kept = set()
        with self._lock:
            made._recent.update((id, ended) for id, ended in self._recent.items() if ended.arm in kept)
        return made

    def followed_by(self, split: Split, now: datetime) -> Experiment:
        """The period that `split` belongs to from `now` on, as it is for a process alone: this one where it `becomes`
        that, else the next one."""
        if split == self.split:
            return self
        if not self.becomes(split):
            return self.successor(Period(self.period + 1, split, now))
        self.place(Period(self.period, split, now))
        return self

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
        sender = int(draw(key, salt=self.deployment, name="sender") * _SENDERS)  # the same in every process
        with self._lock:
            self._own.record(arm, outcome, cluster, sender)
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
                    hint=f"feedback is taken for the last {MAX_RECENT} requests since arms or weights last changed, by "
                    "the process that has answered",
                )
            for metric in values:
                if metric in ended.given:
                    raise AlreadyExists(
                        "feedback", f"{request_id.rpartition('/')[2]} {metric}", hint="each answer is judged once"
                    )
            arm = self._own.arms[ended.arm]
            arm.check(values)  # first: of what comes together all is taken, or nothing
            for metric, value in values.items():
                arm.add(metric, value, ended.cluster)
            ended.given = (*ended.given, *values)
            self.changes += 1
            return ended.arm

    def stats(self, arm: str) -> ArmStats:
        """What all processes have measured of an arm, without its senders."""
        found = ArmStats()
        with self._lock:
            found.absorb(self._own.arm(arm), with_senders=False)
        found.absorb(self._others.arm(arm), with_senders=False)
        return found

    def report(self) -> ExperimentReport:
        """The arms beside each other: as of now in this process, and in the others as they have stored it last, which
        is some seconds earlier."""
        split, others = self.split, self._others
        with self._lock:
            whole = Tally.sum([self._own])
        whole.absorb(others)
        weighted = [arm for arm, weight in split.weights.items() if weight > 0]
        counts = [whole.arm(arm).units for arm in weighted]
        shares = [split.weights[arm] for arm in weighted]
        once = significance.ratio_mismatch(counts, shares).p_value
        always = _noted(whole, "split", significance.ratio_mismatch_always(counts, shares))
        report = ExperimentReport(
            self.deployment,
            self.period,
            self.started_at,
            once,
            always,
            always < MISMATCH_ALPHA,
            tuple(_arm(split, whole, arm) for arm in split.weights),
        )
        self._note(whole.least)
        return report

    def to_mapping(self) -> dict[str, Any]:
        """What this process has measured itself, as plain values for the records (a `Tally`)."""
        with self._lock:
            return self._own.to_mapping()

    def _note(self, least: Mapping[str, float]) -> None:
        """Keeps the smallest p of each comparison, where nobody has seen a smaller one."""
        with self._lock:
            for name, p in least.items():
                if p < min(self._own.least.get(name, 1.0), self._others.least.get(name, 1.0)):
                    self._own.least[name] = p
                    self.changes += 1


def _arm(split: Split, whole: Tally, arm: str) -> ArmReport:
    stats = whole.arm(arm)
    latency, ttft = stats.times[LATENCY], stats.times[TTFT]
    names = [*BUILT_IN, *sorted(stats.metrics.keys() - set(BUILT_IN))]
    return ArmReport(
        arm=arm,
        version=split.versions.get(arm),
        weight=split.weights[arm],
        requests=stats.requests,
        errors=stats.errors,
        left=stats.left,
        latency_p50_s=latency.quantile(0.5),
        latency_p95_s=latency.quantile(0.95),
        ttft_p50_s=ttft.quantile(0.5),
        ttft_p95_s=ttft.quantile(0.95),
        metrics=tuple(_metric(whole, arm, name) for name in names if stats.metric(name).count),
    )


def _metric(whole: Tally, arm: str, name: str) -> MetricReport:
    own, stable = whole.arm(arm).metric(name), whole.arm(STABLE).metric(name)
    if arm == STABLE:
        return MetricReport(name, own.count, own.mean, None, None, None, None, None, None)
    compare = significance.difference_of_rates if name == ERROR else significance.difference
    found = compare(stable, own, alpha=ALPHA)
    if found is None:
        return MetricReport(name, own.count, own.mean, None, None, None, None, None, "few")
    always = _noted(whole, f"{arm}/{name}", found.p_always)
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


def _noted(whole: Tally, name: str, p: float) -> float:
    """The smallest p that was seen of a comparison, now that this one was."""
    whole.least[name] = min(p, whole.least.get(name, 1.0))
    return whole.least[name]


def _verdict(metric: str, difference: float, p: float) -> Verdict:
    if p >= ALPHA or difference == 0:
        return "undecided"
    if metric == TOKENS:
        return "differs"  # longer is neither
    return "better" if (difference < 0) == (metric in LOWER_IS_BETTER) else "worse"
