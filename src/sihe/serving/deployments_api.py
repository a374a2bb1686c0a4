"""Deployments over HTTP, under /api: what is deployed, how requests are dealt out between versions, and what arms did.

Clients that may only ask may also say what an answer was worth (`…/feedback`). Logged requests, which may hold text of
every tenant, are under /api/logs: administrators read them.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from sihe.core.errors import Forbidden, NotFound
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.gateway.replicas.config import OpenAiBackend, ReplicaConfig
from sihe.serving.gateway.traffic.experiment import ExperimentReport
from sihe.serving.gateway.traffic.request_log import RequestRecord
from sihe.serving.gateway.traffic.rollout import Plan, Rollout
from sihe.serving.gateway.traffic.shadow import ShadowReport
from sihe.serving.gateway.traffic.types import CANARY, Sticky, TrafficPolicy
from sihe.serving.gateway.types import DeploymentStatus
from sihe.serving.tenants.http import caller_of
from sihe.serving.tenants.types import Right

_TARGET = "model@alias, model@3, or model for its newest version"
_SETTINGS = "what differs from the defaults of its kind"
MAX_LOG_ROWS = 10_000


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DeployBody(_Body):
    """POST /api/deployments."""

    name: str
    target: str = Field(description=_TARGET)
    settings: dict[str, Any] = Field(default_factory=dict, description=_SETTINGS)
    replicas: dict[str, Any] = Field(default_factory=dict, description="replica settings that differ from the defaults")


class AliasBody(_Body):
    """POST /api/models/{name}/aliases/{alias}."""

    version: int = Field(ge=1)


class ArmBody(_Body):
    """PUT /api/deployments/{name}/arms/{arm}."""

    target: str = Field(description=_TARGET)
    weight: float = Field(description="its share of requests; the rest is the stable arm's")
    settings: dict[str, Any] | None = Field(None, description=f"{_SETTINGS}; the stable arm's if left out")


class ShadowBody(_Body):
    """PUT /api/deployments/{name}/shadow."""

    target: str = Field(description=_TARGET)
    share: float = Field(1.0, description="of requests that are copied")
    only_idle: bool = Field(True, description="copies run only while no caller waits for an answer")
    max_waiting: int = Field(64, description="copies that wait; more are dropped")


class LogsBody(_Body):
    """PUT /api/deployments/{name}/logs."""

    share: float = Field(description="of requests that are logged to the lake; 0 for none")
    text: bool = Field(False, description="keep what was asked and answered, instead of lengths and hashes")
    keep_days: int | None = Field(None, description="days until records are removed; as before if left out")


class StickyBody(_Body):
    """PUT /api/deployments/{name}/sticky."""

    sticky: Sticky
    salt: str | None = Field(None, description="another one deals all senders anew")


class RolloutBody(_Body):
    """POST /api/deployments/{name}/rollout."""

    target: str = Field(description=_TARGET)
    arm: str = CANARY
    settings: dict[str, Any] | None = None
    plan: dict[str, Any] = Field(default_factory=dict, description="steps, gates, ready_s, patience_s")


class FeedbackBody(_Body):
    """POST /api/deployments/{name}/feedback."""

    request_id: str = Field(description="the answer's x-request-id header", max_length=200)
    values: dict[str, float] = Field(description="metrics of your own, more is better", min_length=1, max_length=24)


class FeedbackTaken(BaseModel):
    """Whose answer the feedback was about."""

    arm: str


class ArmsShown(BaseModel):
    """How requests are dealt out, as wanted."""

    weights: dict[str, float]
    targets: dict[str, str]
    sticky: Sticky
    salt: str
    shadow: dict[str, Any] | None
    log_share: float
    log_text: bool
    log_keep_days: int


def add_deployments(routes: APIRouter, gateway: Gateway) -> None:
    """Adds every route of /api that is about deployments."""
    _add_wishes(routes, gateway)
    _add_arms(routes, gateway)
    _add_rollouts(routes, gateway)
    _add_findings(routes, gateway)


def _add_wishes(routes: APIRouter, gateway: Gateway) -> None:
    @routes.get("/api/deployments", tags=["deployments"])
    def list_deployments() -> list[DeploymentStatus]:
        """Every deployment with its state, version and error."""
        return gateway.list()

    @routes.get("/api/deployments/{name}", tags=["deployments"])
    def get_deployment(name: str) -> DeploymentStatus:
        """One deployment."""
        return gateway.status(name)

    @routes.post("/api/deployments", status_code=201, tags=["deployments"])
    def create_deployment(body: DeployBody, request: Request) -> DeploymentStatus:
        """Deploys, or changes what a deployment follows. `backend.command` needs the right `admin`; so does
        `backend.url` where `serving.backend_hosts` lists nothing."""
        replicas = ReplicaConfig.from_mapping(body.replicas) if body.replicas else None
        backend = replicas.backend if replicas is not None else None
        if isinstance(backend, OpenAiBackend) and not caller_of(request).may(Right.ADMIN):
            if backend.command:
                raise Forbidden("backend.command starts a program on the server: a key for it needs the right 'admin'")
            if not gateway.workspace.settings.serving.backend_hosts:
                raise Forbidden(
                    "backend.url makes the server ask that address: a key for it needs the right 'admin', or the "
                    "operator lists the host in serving.backend_hosts"
                )
        return gateway.deploy(body.name, body.target, settings=body.settings, replicas=replicas)

    @routes.delete("/api/deployments/{name}", status_code=204, tags=["deployments"])
    def remove_deployment(name: str) -> None:
        """Drains and frees a deployment."""
        gateway.remove(name)

    @routes.post("/api/models/{name}/aliases/{alias}", tags=["deployments"])
    def move_alias(name: str, alias: str, body: AliasBody) -> dict[str, Any]:
        """Points an alias at a version; deployments that follow it swap."""
        version = gateway.move_alias(name, alias, body.version)
        return {"model": version.name, "alias": alias, "version": version.version}


def _add_arms(routes: APIRouter, gateway: Gateway) -> None:
    traffic = gateway.traffic

    @routes.get("/api/deployments/{name}/arms", tags=["traffic"])
    def get_arms(name: str) -> ArmsShown:
        """How requests are dealt out."""
        return _shown(traffic.policy(name))

    @routes.put("/api/deployments/{name}/arms/{arm}", tags=["traffic"])
    def set_arm(name: str, arm: str, body: ArmBody) -> ArmsShown:
        """Gives an arm, new or not, a version and its share of requests."""
        return _shown(traffic.set_arm(name, arm, body.target, body.weight, settings=body.settings))

    @routes.delete("/api/deployments/{name}/arms/{arm}", tags=["traffic"])
    def remove_arm(name: str, arm: str) -> ArmsShown:
        """Takes an arm away; its share goes back to the stable one."""
        return _shown(traffic.remove_arm(name, arm))

    @routes.put("/api/deployments/{name}/shadow", tags=["traffic"])
    def set_shadow(name: str, body: ShadowBody) -> ArmsShown:
        """Sends copies of requests to a version whose answers nobody gets."""
        return _shown(
            traffic.set_shadow(
                name, body.target, share=body.share, only_idle=body.only_idle, max_waiting=body.max_waiting
            )
        )

    @routes.put("/api/deployments/{name}/sticky", tags=["traffic"])
    def set_sticky(name: str, body: StickyBody) -> ArmsShown:
        """By what a sender is known, and stays on its arm."""
        return _shown(traffic.set_sticky(name, body.sticky, salt=body.salt))

    @routes.put("/api/deployments/{name}/logs", tags=["traffic"])
    def set_logs(name: str, body: LogsBody) -> ArmsShown:
        """Which share of requests is logged, whether with its text, and for how long."""
        return _shown(traffic.set_logs(name, body.share, text=body.text, keep_days=body.keep_days))


def _add_rollouts(routes: APIRouter, gateway: Gateway) -> None:
    rollouts = gateway.rollouts

    @routes.get("/api/deployments/{name}/rollouts", tags=["traffic"])
    def list_rollouts(name: str) -> list[Rollout]:
        """The latest rollouts, newest first."""
        return rollouts.history(name)

    @routes.post("/api/deployments/{name}/rollout", status_code=201, tags=["traffic"])
    def start_rollout(name: str, body: RolloutBody) -> Rollout:
        """Brings a version in, step by step, and back if it is worse."""
        plan = Plan.from_mapping(body.plan)
        return rollouts.start(name, body.target, plan, arm=body.arm, settings=body.settings)

    @routes.post("/api/deployments/{name}/rollout/{action}", tags=["traffic"])
    def steer_rollout(name: str, action: Literal["promote", "rollback", "pause", "resume"]) -> Rollout | None:
        """Promotes the canary, takes it away, lets it stay at its step, or go on; null of one that cannot be read."""
        if action == "promote":
            return rollouts.promote(name)
        if action == "rollback":
            rollouts.roll_back(name)
            latest = next(iter(rollouts.history(name)), None)
            return latest if latest is not None and not latest.is_active else None
        return rollouts.pause(name, paused=action == "pause")


def _add_findings(routes: APIRouter, gateway: Gateway) -> None:
    traffic = gateway.traffic

    @routes.get("/api/deployments/{name}/experiment", tags=["traffic"])
    def get_experiment(name: str) -> ExperimentReport:
        """The arms beside each other, with what can be said of their differences; of what other processes answer up to
        some seconds old."""
        return traffic.experiment(name)

    @routes.get("/api/deployments/{name}/shadow", tags=["traffic"])
    def get_shadow(name: str) -> ShadowReport:
        """What copies have shown in all processes that serve; of others than this one up to some seconds old."""
        found = traffic.shadow(name)
        if found is None:
            raise NotFound("shadow of", name, hint="set one, and let the deployment be served")
        return found

    @routes.post("/api/deployments/{name}/feedback", tags=["traffic"])
    def give_feedback(name: str, body: FeedbackBody, request: Request) -> FeedbackTaken:
        """Says what an answer was worth."""
        caller = caller_of(request)
        if not caller.may_use(name):
            raise NotFound("deployment", name, hint="GET /v1/models lists what your key may use")
        return FeedbackTaken(arm=traffic.feedback(name, body.request_id, body.values, tenant=caller.tenant.name))

    @routes.get("/api/logs/{name}", tags=["traffic"])
    def get_logs(name: str, arm: str | None = None, limit: int = 100) -> list[RequestRecord]:
        """Logged requests, newest first."""
        return traffic.logs(name, arm=arm, limit=max(1, min(limit, MAX_LOG_ROWS)))


def _shown(policy: TrafficPolicy) -> ArmsShown:
    plain = policy.to_mapping()
    return ArmsShown(
        weights=policy.weights,
        targets={arm.name: arm.target for arm in policy.arms},
        sticky=policy.sticky,
        salt=policy.salt,
        shadow=plain["shadow"],
        log_share=policy.logs.share,
        log_text=policy.logs.text,
        log_keep_days=policy.logs.keep_days,
    )
