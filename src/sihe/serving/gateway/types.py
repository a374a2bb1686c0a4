"""Deployments as they are wanted and as they are. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from sihe.serving.gateway.replicas.config import ReplicaConfig
from sihe.serving.gateway.replicas.types import ReplicaState as ReplicaState
from sihe.serving.gateway.replicas.types import ReplicaStatus as ReplicaStatus
from sihe.serving.gateway.settings import ModelSettings
from sihe.serving.gateway.traffic.types import ArmStatus, TrafficPolicy


class DeploymentState(StrEnum):
    """What a deployment can do for a request now."""

    PENDING = "PENDING"  # a version is on its way and none serves yet
    READY = "READY"
    FAILED = "FAILED"  # no version serves and the last one could not be loaded
    UNSERVED = "UNSERVED"  # no running process has reported about it lately


@dataclass(frozen=True, slots=True)
class Deployment:
    """What is wanted: `name` answers with the version of `model` that `selector` points at.

    The selector is an alias, a version number, or empty for the newest version.
    """

    name: str
    model: str
    selector: str
    settings: ModelSettings
    created_at: datetime
    updated_at: datetime
    replicas: ReplicaConfig = field(default_factory=ReplicaConfig)
    traffic: TrafficPolicy = field(default_factory=TrafficPolicy)
    adapters: tuple[tuple[str, str], ...] = ()
    """LoRA adapters that were loaded while it served, by name: where their files are in the object store."""

    @property
    def target(self) -> str:
        """The followed reference, such as `gpt@production`."""
        return target_of(self.model, self.selector)


def target_of(model: str, selector: str) -> str:
    """A reference to the version of `model` that `selector` points at; empty: its newest."""
    return f"{model}@{selector}" if selector else model


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """What is: which version answers (None: none yet), which one is wanted, and why they differ if they do. Where
    several processes serve it, it is that of all together (`reports`)."""

    name: str
    target: str
    state: DeploymentState
    version: int | None
    wanted: int | None
    error: str | None
    replicas: tuple[ReplicaStatus, ...]
    updated_at: datetime
    reported_at: datetime | None
    arms: tuple[ArmStatus, ...] = ()
    """Every arm, the shadow's among them, where there are others than the stable one."""
    rollout_note: str = ""
    """What the rollout that is on its way waits for."""
    processes: int = 1
    """How many processes serve it, each with replicas of its own."""
