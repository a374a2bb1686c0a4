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

from sihe.serving.gateway.replicas.config import ReplicaConfig, ScalingConfig

_SOME = 1e-6  # of a replica: there is a request
_EXACT = 1e-9  # keeps 3.0000000001 from becoming 4
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


_History = tuple[tuple[float, int], ...]


@dataclass(frozen=True, slots=True)
class ScalingState:
    """What the next decision must know: how many are wanted, since when, and what would have been right lately."""

    wanted: int
    raised_s: float = -math.inf
    watched_s: float | None = None
    """Since when it has been observed."""
    asked: _History = ()
    """(when, how many were asked for) within `up_after_s`, oldest first: those below which nothing later went."""
    sufficient: _History = ()
    """(when, how many would have sufficed) within `down_after_s`, oldest first: those that nothing later exceeds."""


def decide(config: ReplicaConfig, target_in_flight: float, state: ScalingState, seen: Observation) -> ScalingState:
    """The next state; its `wanted` is the number of replicas to have."""
    scaling, now_s = config.scaling, seen.now_s
    load = _load(config, target_in_flight, state.wanted, seen)
    asked = _noted(state.asked, now_s, _within(_up(load, scaling), config), scaling.up_after_s, least=True)
    sufficient = _noted(
        state.sufficient, now_s, _within(_down(load, scaling), config), scaling.down_after_s, least=False
    )
    watched_s = now_s if state.watched_s is None else state.watched_s
    wanted = _within(state.wanted, config)
    state = replace(state, wanted=wanted, watched_s=watched_s, asked=asked, sufficient=sufficient)
    lasting, most = asked[0][1], sufficient[0][1]
    if seen.ready == 0:  # cold: who waits, waits for nothing else
        lasting = asked[-1][1]
    elif now_s - watched_s < scaling.up_after_s:
        lasting = wanted
    if lasting > wanted:
        if wanted > 0 and now_s - state.raised_s < scaling.up_cooldown_s:
            return state
        return replace(state, wanted=min(lasting, max(1, 2 * wanted)), raised_s=now_s)
    if most < wanted and now_s - watched_s >= scaling.down_after_s:
        return replace(state, wanted=most)
    return state


def initial(config: ReplicaConfig) -> ScalingState:
    """Before anything was observed. One replica at least: it shows whether the version can be loaded at all."""
    return ScalingState(max(1, config.min_replicas))


def _load(config: ReplicaConfig, target_in_flight: float, wanted: int, seen: Observation) -> float:
    """The load in replicas: so many would each just meet the target of the measure that asks for most."""
    if seen.in_hand == 0:
        idle = seen.last_request_s is None or seen.now_s - seen.last_request_s >= config.scaling.idle_s
        return 0.0 if idle or wanted == 0 else _SOME
    by_requests = max(seen.in_hand / target_in_flight, _SOME)
    if seen.ready == 0:
        return max(by_requests, float(wanted))
    loads = [by_requests]
    if seen.coming == 0:  # what is on its way will share the caches' load, and the waits
        loads.append(seen.ready * seen.kv_used / config.scaling.target_kv)
        if config.scaling.target_ttft_s is not None and seen.ttft_s is not None and seen.in_hand > seen.ready:
            loads.append(seen.ready * min(_TTFT_GAIN, seen.ttft_s / config.scaling.target_ttft_s))
    return max(loads)


def _up(load: float, scaling: ScalingConfig) -> int:
    """How many a load asks for: what exceeds whole replicas by less than the tolerance asks for none."""
    return math.ceil(load / (1.0 + scaling.tolerance) - _EXACT) if load > _SOME else math.ceil(load)


def _down(load: float, scaling: ScalingConfig) -> int:
    """How many suffice for a load, with as much to spare: so the numbers for up and for down are never at odds."""
    return math.ceil(load / (1.0 - scaling.tolerance) - _EXACT) if load > _SOME else math.ceil(load)


def _noted(history: _History, now_s: float, number: int, window_s: float, *, least: bool) -> _History:
    """The history with the newest number: rising, so that its first number is the least of the window; or falling, so
    that it is the most. Amortised O(1) a number."""
    kept = [
        (at_s, former)
        for at_s, former in history
        if at_s > now_s - window_s and (former < number if least else former > number)
    ]
    return (*kept, (now_s, number))


def _within(wanted: int, config: ReplicaConfig) -> int:
    return min(config.max_replicas, max(config.min_replicas, wanted))
