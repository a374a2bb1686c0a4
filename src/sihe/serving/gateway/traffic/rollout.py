"""A canary's way from its first requests to all of them, or back: a pure state machine.

A canary climbs the steps of its plan. At each poll it is judged by what the current step has shown:

* *fast*, on evidence that may be looked at after every request, that something is worse than allowed: it is rolled back
  at once;
* at the end of a step (enough requests, enough time), also by the plain numbers: where they are not good enough the
  canary waits for more, and is rolled back when its patience ends.

A canary that is not ready gets no traffic (the gateway sees to that) and gets no further here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from sihe.core.errors import InvalidInput
from sihe.serving.gateway.settings import ModelSettings
from sihe.serving.gateway.traffic import significance
from sihe.serving.gateway.traffic.arm_stats import ERROR, LATENCY, TTFT, ArmStats
from sihe.serving.gateway.traffic.types import check_share

MAX_STEPS = 20
_FAILED_S = 30.0  # a version that could not be loaded is tried a few times in it, in case memory becomes free
_TAIL = 0.05  # latencies are compared at their 95th percentile


class RolloutState(StrEnum):
    """Where a rollout is. The last two are final."""

    RUNNING = "RUNNING"
    PAUSED = "PAUSED"  # stays at its step, whatever is seen, until somebody resumes it
    PROMOTING = "PROMOTING"  # decided; the canary becomes the stable version
    PROMOTED = "PROMOTED"
    ROLLED_BACK = "ROLLED_BACK"


@dataclass(frozen=True, slots=True)
class Step:
    """The canary's share of requests, and what it must have shown before it gets more."""

    weight: float
    min_requests: int = 50
    min_s: float = 60.0

    def __post_init__(self) -> None:
        check_share("weight", self.weight)
        if self.weight == 1:
            raise InvalidInput("a step's weight is below 1: without stable requests there is nothing to compare with")
        is_whole = isinstance(self.min_requests, int) and not isinstance(self.min_requests, bool)
        if not (is_whole and self.min_requests >= 1 and 0 <= self.min_s < math.inf):
            raise InvalidInput(
                f"a step needs at least 1 request and 0 seconds, got {self.min_requests!r} and {self.min_s!r}"
            )


@dataclass(frozen=True, slots=True)
class Gates:
    """What a canary must keep to, beside the stable version in the same step.

    Its rate of errors: at most `max_error_rate`, or the stable version's own where that is higher. The 95th percentiles
    of latency and of the time to the first token: at most that many times the stable version's. `metric`, a name of
    feedback where more is better: at most `max_drop` below. None does not look. `alpha` is the probability that a
    canary as good as allowed is rolled back by one of the gates.
    """

    max_error_rate: float = 0.02
    max_latency_ratio: float | None = 1.5
    max_ttft_ratio: float | None = 1.5
    metric: str | None = None
    max_drop: float = 0.0
    alpha: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.max_error_rate < 1:
            raise InvalidInput(f"max_error_rate must be between 0 and 1, got {self.max_error_rate!r}")
        for name in ("max_latency_ratio", "max_ttft_ratio"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 1000:
                raise InvalidInput(f"{name} must be 1 to 1000, got {value!r}")
        if not (math.isfinite(self.max_drop) and self.max_drop >= 0):
            raise InvalidInput(f"max_drop must be 0 or more, got {self.max_drop!r}")
        if not 0 < self.alpha < 1:
            raise InvalidInput(f"alpha must be between 0 and 1, got {self.alpha!r}")


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of a rollout, in order of their weights, and its gates.

    `ready_s` is how long the canary may be unable to serve, and `patience_s` how long it may stay at a step that has
    seen enough without passing it.
    """

    steps: tuple[Step, ...] = (Step(0.05), Step(0.25), Step(0.5))
    gates: Gates = field(default_factory=Gates)
    ready_s: float = 300.0
    patience_s: float = 1800.0

    def __post_init__(self) -> None:
        if not 1 <= len(self.steps) <= MAX_STEPS:
            raise InvalidInput(f"a rollout has 1 to {MAX_STEPS} steps, got {len(self.steps)}")
        weights = [step.weight for step in self.steps]
        if sorted(set(weights)) != weights:
            raise InvalidInput(f"a rollout's weights must grow, got {', '.join(f'{weight:g}' for weight in weights)}")
        if not (0 <= self.ready_s < math.inf and 0 <= self.patience_s < math.inf):
            raise InvalidInput(f"ready_s and patience_s must be 0 or more, got {self.ready_s!r}, {self.patience_s!r}")

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, as the records hold them."""
        return asdict(self) | {"steps": [asdict(step) for step in self.steps]}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Plan:
        """The plan that stored or posted `values` describe; what they leave out is the default's. `InvalidInput`."""
        try:
            given = dict(values)
            if "steps" in given:
                given["steps"] = tuple(Step(**step) for step in given["steps"])
            if "gates" in given:
                given["gates"] = Gates(**given["gates"])
            return cls(**given)
        except TypeError as error:
            raise InvalidInput(f"a rollout's plan has an unknown or wrong part: {error}") from error


@dataclass(frozen=True, slots=True)
class Rollout:
    """A rollout as the records hold it. The version is pinned: what is judged is what is promoted."""

    id: str
    deployment: str
    arm: str
    model: str
    version: int
    settings: ModelSettings | None
    plan: Plan
    state: RolloutState
    step: int
    reason: str
    started_at: datetime
    changed_at: datetime
    """When it entered its step, or its final state."""

    @property
    def is_active(self) -> bool:
        """Whether it is on its way."""
        return self.state in (RolloutState.RUNNING, RolloutState.PAUSED, RolloutState.PROMOTING)

    @property
    def weight(self) -> float:
        """The canary's share at its step."""
        return self.plan.steps[self.step].weight

    def at_step(self, step: int, now: datetime) -> Rollout:
        """The same at another step."""
        return replace(self, step=step, changed_at=now, reason="")


@dataclass(frozen=True, slots=True)
class Sight:
    """What is known of a canary at one poll.

    `unready_s` is for how long it has been unable to serve, `fault` why, and `has_failed` whether it was tried in vain;
    `step_s` for how long it has had the step's weight while able to serve. The statistics are the step's.
    """

    is_ready: bool
    unready_s: float
    has_failed: bool
    fault: str | None
    step_s: float
    stable: ArmStats
    canary: ArmStats


class Move(StrEnum):
    """What to do now."""

    HOLD = "hold"
    ADVANCE = "advance"
    PROMOTE = "promote"
    ROLL_BACK = "roll back"


@dataclass(frozen=True, slots=True)
class Decision:
    """A move and why."""

    move: Move
    reason: str


def decide(rollout: Rollout, sight: Sight) -> Decision:
    """What a running rollout does next. The reasons are what a page shows."""
    plan, step = rollout.plan, rollout.plan.steps[rollout.step]
    if rollout.state is not RolloutState.RUNNING:
        return Decision(Move.HOLD, f"the rollout is {rollout.state.value}")
    if harm := _harm(plan.gates, sight.stable, sight.canary):
        return Decision(Move.ROLL_BACK, harm)
    if not sight.is_ready:
        why = sight.fault or "its model is loading"
        if sight.unready_s > (min(plan.ready_s, _FAILED_S) if sight.has_failed else plan.ready_s):
            return Decision(Move.ROLL_BACK, f"the canary could not serve for {sight.unready_s:.0f} s: {why}")
        return Decision(Move.HOLD, f"the canary cannot serve yet: {why}")
    if missing := _missing(step, sight):
        return Decision(Move.HOLD, missing)
    if doubt := _doubt(plan.gates, step, sight.stable, sight.canary):
        if sight.step_s > step.min_s + plan.patience_s:
            return Decision(Move.ROLL_BACK, f"no proof within {plan.patience_s:.0f} s that it is good: {doubt}")
        return Decision(Move.HOLD, doubt)
    if rollout.step + 1 < len(plan.steps):
        return Decision(Move.ADVANCE, f"it passed {step.weight:.0%} with {sight.canary.requests} requests")
    return Decision(Move.PROMOTE, f"it passed its last step with {sight.canary.requests} requests")


def _missing(step: Step, sight: Sight) -> str | None:
    """What the step must still see."""
    if sight.canary.requests < step.min_requests:
        return f"it has answered {sight.canary.requests} of {step.min_requests} requests"
    if sight.step_s < step.min_s:
        return f"it has served {sight.step_s:.0f} of {step.min_s:.0f} s at this step"
    return None


def _harm(gates: Gates, stable: ArmStats, canary: ArmStats) -> str | None:
    """What is worse than allowed, on evidence that holds however often it is looked at."""
    needed = math.log(len(_gates(gates)) / gates.alpha)  # shared among the gates (Bonferroni)
    ceiling = _error_ceiling(gates, stable)
    if significance.evidence_above(canary.errors, canary.requests, ceiling) >= needed:
        return f"{canary.errors} of {canary.requests} requests failed, and {ceiling:.1%} may"
    for name, ratio in _time_gates(gates):
        bound = _time_bound(stable, name, ratio)
        if bound is None:
            continue
        slow, number = canary.times[name].above(bound), canary.times[name].count
        if significance.evidence_above(slow, number, _TAIL) >= needed:
            return (
                f"{slow} of {number} requests had a {name} above {bound:.3g}, {ratio:g} times the stable version's p95"
            )
    if gates.metric is not None:
        own, other = canary.metric(gates.metric), stable.metric(gates.metric)
        found = significance.difference(other, own, alpha=math.exp(-needed))
        if found is not None and found.value + found.radius < -gates.max_drop:
            return f"{gates.metric} is {own.mean:.4g}, and the stable version's {other.mean:.4g}"
    return None


def _doubt(gates: Gates, step: Step, stable: ArmStats, canary: ArmStats) -> str | None:
    """Which plain number is not good enough yet."""
    least = min(step.min_requests, significance.LEAST_VALUES)
    if stable.requests < least:
        return f"the stable version has answered {stable.requests} of {least} requests to compare with"
    rate, ceiling = canary.errors / canary.requests, _error_ceiling(gates, stable)
    if rate > ceiling:
        return f"{rate:.1%} of its requests failed, and {ceiling:.1%} may"
    for name, ratio in _time_gates(gates):
        own, other = canary.times[name].quantile(1 - _TAIL), stable.times[name].quantile(1 - _TAIL)
        if own is not None and other is not None and own > ratio * other:
            return f"the p95 of its {name} is {own:.3g}, and the stable version's {other:.3g}"
    if gates.metric is not None:
        own_values, other_values = canary.metric(gates.metric), stable.metric(gates.metric)
        if min(own_values.count, other_values.count) < least:
            return f"{gates.metric} has {min(own_values.count, other_values.count)} of {least} values for each"
        if own_values.mean < other_values.mean - gates.max_drop:
            return f"its {gates.metric} is {own_values.mean:.4g}, and the stable version's {other_values.mean:.4g}"
    return None


def _error_ceiling(gates: Gates, stable: ArmStats) -> float:
    own = stable.errors / stable.requests if stable.requests >= significance.LEAST_VALUES else 0.0
    return min(0.999, max(gates.max_error_rate, own))


def _time_bound(stable: ArmStats, name: str, ratio: float) -> float | None:
    if stable.times[name].count < significance.LEAST_VALUES:
        return None
    p95 = stable.times[name].quantile(1 - _TAIL)
    return None if p95 is None else ratio * p95


def _time_gates(gates: Gates) -> list[tuple[str, float]]:
    pairs = ((LATENCY, gates.max_latency_ratio), (TTFT, gates.max_ttft_ratio))
    return [(name, ratio) for name, ratio in pairs if ratio is not None]


def _gates(gates: Gates) -> list[str]:
    names = [ERROR, *(name for name, _ in _time_gates(gates))]
    return names if gates.metric is None else [*names, gates.metric]
