"""What each arm of a deployment shall follow, and what is shown of it: pure, from values to values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from sihe.core.tracking import ModelVersion
from sihe.serving.gateway.traffic.rollout import Rollout, RolloutState
from sihe.serving.gateway.traffic.types import SHADOW, STABLE, ArmStatus
from sihe.serving.gateway.types import Deployment, DeploymentStatus

Resolve = Callable[[str], ModelVersion]


def wants_of(deployment: Deployment, rollout: Rollout | None) -> dict[str, Deployment]:
    """What each arm shall follow, as a deployment of its own. A canary that is being promoted is the stable version."""
    policy = deployment.traffic
    wants = {STABLE: deployment}
    promoted = rollout if rollout is not None and rollout.state is RolloutState.PROMOTING else None
    if promoted is not None:
        wants[STABLE] = replace(
            deployment,
            model=promoted.model,
            selector=str(promoted.version),
            settings=promoted.settings or deployment.settings,
        )
    least = replace(deployment.replicas, min_replicas=max(1, deployment.replicas.min_replicas))
    for arm in policy.arms:
        if promoted is None or arm.name != promoted.arm:
            wants[arm.name] = replace(
                deployment,
                model=arm.model,
                selector=arm.selector,
                settings=arm.settings or deployment.settings,
                replicas=least,
            )
    if policy.shadow is not None:
        wants[SHADOW] = replace(
            deployment,
            model=policy.shadow.model,
            selector=policy.shadow.selector,
            settings=policy.shadow.settings or deployment.settings,
            replicas=replace(least, min_replicas=1, max_replicas=1),
        )
    return wants


def resolved(wants: Mapping[str, Deployment], resolve: Resolve) -> tuple[dict[str, ModelVersion], dict[str, str]]:
    """The versions that are wanted, and why some could not be found out."""
    versions, faults = {}, {}
    for arm, want in wants.items():
        try:
            versions[arm] = resolve(want.target)
        except Exception as error:  # noqa: BLE001 - what serves goes on; the status shows it
            faults[arm] = str(error)
    return versions, faults


def aim_of(want: Deployment, version: ModelVersion) -> tuple[object, ...]:
    """What two routes have in common that serve the same."""
    return version.key, want.settings, want.replicas.backend


def arm_status(arm: str, status: DeploymentStatus, weight: float) -> ArmStatus:
    """An arm as the deployment's status shows it."""
    return ArmStatus(
        arm,
        status.target,
        weight,
        status.state.value,
        status.version,
        sum(replica.in_flight for replica in status.replicas),
        status.error,
    )
