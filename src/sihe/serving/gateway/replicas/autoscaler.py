"""How many replicas a deployment shall have: a pure function of what was observed, and of what was decided before.

The wanted number is that at which every measure would meet its target, as in Kubernetes' horizontal pod autoscaler
(https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/#algorithm-details), with its tolerance
and its window for going down; the measures are a serving engine's own: requests in hand, the KV cache, and the time to
the first token. A replica that is still loading counts as if it served: a load that takes a minute must not be asked
for once a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sihe.serving.gateway.replicas.config import ReplicaConfig

_TTFT_GAIN = 2.0  # a wait of twice its target and more asks for at most this many times the replicas at once


@dataclass(frozen=True, slots=True)
class Observation:
    """A deployment at `now_s`. `in_hand` are the requests that run, wait in a replica, or wait for one."""

    now_s: float
    ready: int
    coming: int
    in_hand: int
    kv_used: float
    """The mean share of the caches of the READY replicas that is in use."""
    ttft_s: float | None
    """The 95th percentile of recent times to the first token; None when there were none."""
    last_request_s: float | None


@dataclass(frozen=True, slots=True)
class ScalingState:
    """What the next decision must know: how many are wanted, since when, and what would have sufficed lately."""

    wanted: int
    raised_s: float = -math.inf
    watched_s: float | None = None
    """Since when it has been observed."""
    sufficient: tuple[tuple[float, int], ...] = ()
    """(when, how many would have sufficed) within `down_after_s`, oldest first: those that nothing later exceeds."""


def decide(config: ReplicaConfig, target_in_flight: float, state: ScalingState, seen: Observation) -> ScalingState:
    """The next state; its `wanted` is the number of replicas to have."""
    sufficient = _sufficient(config, target_in_flight, state.wanted, seen)
    window_s = config.scaling.down_after_s
    history = _noted(state.sufficient, seen.now_s, sufficient, window_s)
    watched_s = seen.now_s if state.watched_s is None else state.watched_s
    state = replace(state, wanted=_within(state.wanted, config), watched_s=watched_s, sufficient=history)
    if sufficient > state.wanted:
        if state.wanted > 0 and seen.now_s - state.raised_s < config.scaling.up_cooldown_s:
            return state
        return replace(state, wanted=min(sufficient, max(1, 2 * state.wanted)), raised_s=seen.now_s)
    most = history[0][1]
    if most < state.wanted and seen.now_s - watched_s >= window_s:
        return replace(state, wanted=most)
    return state


def initial(config: ReplicaConfig) -> ScalingState:
    """Before anything was observed. One replica at least: it shows whether the version can be loaded at all."""
    return ScalingState(max(1, config.min_replicas))


def _sufficient(config: ReplicaConfig, target_in_flight: float, wanted: int, seen: Observation) -> int:
    """How many replicas would meet every target now."""
    if seen.in_hand == 0 and config.min_replicas == 0:
        idle = seen.last_request_s is None or seen.now_s - seen.last_request_s >= config.scaling.idle_s
        return 0 if idle else min(1, wanted)
    if seen.ready == 0:  # cold: nothing is known but how many wait
        return _within(max(wanted, math.ceil(seen.in_hand / target_in_flight), min(seen.in_hand, 1)), config)
    present = seen.ready + seen.coming
    ratios = [seen.in_hand / (target_in_flight * present)]
    if seen.coming == 0:  # what is on its way will share the caches' load, and the waits
        ratios.append(seen.kv_used / config.scaling.target_kv if seen.in_hand else 0.0)
        if config.scaling.target_ttft_s is not None and seen.ttft_s is not None and seen.in_hand > seen.ready:
            ratios.append(min(_TTFT_GAIN, seen.ttft_s / config.scaling.target_ttft_s))
    ratio = max(ratios)
    if abs(ratio - 1.0) <= config.scaling.tolerance:
        return _within(present, config)
    # At least one while there are requests; the small term keeps 3.0000000001 from becoming 4.
    return _within(max(1, math.ceil(ratio * present - 1e-9)), config)


def _noted(
    history: tuple[tuple[float, int], ...], now_s: float, sufficient: int, window_s: float
) -> tuple[tuple[float, int], ...]:
    """The history with the newest number: falling, so that its first number is the most of the window."""
    kept = [(at_s, number) for at_s, number in history if number > sufficient and at_s > now_s - window_s]
    return (*kept, (now_s, sufficient))


def _within(wanted: int, config: ReplicaConfig) -> int:
    return min(config.max_replicas, max(config.min_replicas, wanted))
