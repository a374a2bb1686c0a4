"""What the processes that serve a deployment say of it, read from the records and put together. Pure.

Several processes may serve one deployment, each with replicas of its own, and callers reach any of them. What is shown
is what callers get:

* the state of the process that can do most: READY where any is, else PENDING where one is on its way, else FAILED;
* the version that those answer with; while they answer with several (one has swapped, another has not), the lowest that
  is not the wanted one, so that a deployment is seen at its wanted version when all its callers are;
* what is wanted, and what a rollout waits for, as it was said last;
* all replicas, arms by their names with the requests of all, and every error, with how many processes have it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from sihe.serving.gateway.traffic.shadow import ShadowReport
from sihe.serving.gateway.traffic.types import STABLE, ArmStatus
from sihe.serving.gateway.types import DeploymentState, DeploymentStatus, ReplicaState, ReplicaStatus

_REPORTED = ("state", "version", "wanted", "error", "replicas", "arms", "rollout_note")
_STATES = (DeploymentState.READY, DeploymentState.PENDING, DeploymentState.FAILED, DeploymentState.UNSERVED)
_REPLICAS = (ReplicaState.READY, ReplicaState.WARMING, ReplicaState.LOADING)


def to_mapping(status: DeploymentStatus, shadow: ShadowReport | None) -> dict[str, Any]:
    """What one process says, as plain values for the records."""
    said = asdict(status)
    return {key: said[key] for key in _REPORTED} | {"shadow": None if shadow is None else asdict(shadow)}


def from_mapping(unserved: DeploymentStatus, said: Mapping[str, Any], reported_at: datetime) -> DeploymentStatus:
    """What one process said of a deployment that is `unserved` without it. Raises `KeyError`, `TypeError` or
    `ValueError` where a newer version of the house said it in another form."""
    return replace(
        unserved,
        state=DeploymentState(said["state"]),
        version=said["version"],
        wanted=said["wanted"],
        error=said["error"],
        replicas=tuple(
            ReplicaStatus(item["version"], ReplicaState(item["state"]), item["in_flight"]) for item in said["replicas"]
        ),
        arms=tuple(ArmStatus(**item) for item in said.get("arms", ())),
        rollout_note=said.get("rollout_note", ""),
        reported_at=reported_at,
        processes=1,
    )


def shadow_from_mapping(said: Mapping[str, Any]) -> ShadowReport | None:
    """What one process said of its shadow; None where that is nothing, or nothing that can be read."""
    found = said.get("shadow")
    try:
        return None if found is None else ShadowReport(**found)
    except TypeError:  # a newer version wrote it
        return None


def merged(unserved: DeploymentStatus, said: Sequence[DeploymentStatus]) -> DeploymentStatus:
    """What all processes together say of a deployment that is `unserved` where none says anything.

    One without `reported_at` speaks now: it is the process that asks.
    """
    if len(said) < 2:
        return said[0] if said else unserved
    latest = max(said, key=lambda one: one.reported_at or datetime.max.replace(tzinfo=UTC))
    state = min((one.state for one in said), key=_STATES.index)
    able = [one for one in said if one.state is state]
    order = {state: place for place, state in enumerate(_REPLICAS)}
    replicas = [replica for one in said for replica in one.replicas]
    return replace(
        latest,
        state=state,
        version=_version([one.version for one in able], latest.wanted),
        error=_errors([one.error for one in said]),
        replicas=tuple(sorted(replicas, key=lambda one: order.get(one.state, len(order)))),
        arms=_arms(latest, said),
        rollout_note=latest.rollout_note or next((one.rollout_note for one in said if one.rollout_note), ""),
        reported_at=max((one.reported_at for one in said if one.reported_at is not None), default=None),
        processes=sum(one.processes for one in said),
    )


def _arms(latest: DeploymentStatus, said: Sequence[DeploymentStatus]) -> tuple[ArmStatus, ...]:
    """The arms that any process has: of one that is new, or gone, not all have heard yet."""
    found: dict[str, list[ArmStatus]] = {arm.name: [] for arm in latest.arms}
    for one in said:
        for arm in one.arms:
            found.setdefault(arm.name, []).append(arm)
    known = {arm.name: arm for arm in latest.arms}
    return tuple(
        _arm(known.get(name) or arms[0], arms)
        for name, arms in sorted(found.items(), key=lambda item: (item[0] != STABLE, item[0]))
    )


def _arm(latest: ArmStatus, arms: Sequence[ArmStatus]) -> ArmStatus:
    rank = {state.value: place for place, state in enumerate(_STATES)}
    state = min((arm.state for arm in arms), key=lambda one: rank.get(one, len(rank)))
    return replace(
        latest,
        state=state,
        version=_version([arm.version for arm in arms if arm.state == state], None),
        in_flight=sum(arm.in_flight for arm in arms),
        error=_errors([arm.error for arm in arms]),
    )


def _version(versions: Sequence[int | None], wanted: int | None) -> int | None:
    known = {version for version in versions if version is not None}
    return min(known - {wanted}, default=wanted if wanted in known else None)


def _errors(errors: Sequence[str | None]) -> str | None:
    counts = Counter(error for error in errors if error)
    whole = len(errors)
    said = [
        error if count == whole else f"{error} (in {count} of {whole} processes)" for error, count in counts.items()
    ]
    return "; ".join(said) or None


def merged_shadow(said: Sequence[ShadowReport]) -> ShadowReport | None:
    """What the copies of all processes have shown together, of one target; None where nothing was said."""
    if len(said) < 2:
        return said[0] if said else None
    compared = sum(one.compared for one in said)

    def mean(name: str) -> float | None:
        pairs = [(getattr(one, name), one.compared) for one in said if getattr(one, name) is not None]
        return sum(value * number for value, number in pairs) / compared if pairs and compared else None

    return ShadowReport(
        copies=sum(one.copies for one in said),
        compared=compared,
        failed=sum(one.failed for one in said),
        yielded=sum(one.yielded for one in said),
        dropped=sum(one.dropped for one in said),
        same=sum(one.same for one in said),
        mean_agreement=mean("mean_agreement"),
        mean_latency_ratio=mean("mean_latency_ratio"),
        measure=next((one.measure for one in said if one.measure is not None), None),
        mean_latency_s=mean("mean_latency_s"),
        target=said[0].target,
    )
