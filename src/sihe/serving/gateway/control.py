"""How requests of a deployment are dealt out, changed and looked at: arms, shadow, logs, feedback.

What is changed is written into the records, from any process; those that serve follow. What was measured is that of
all of them together: of the others as they have stored it last, within the last seconds. Feedback is taken by the
process that has answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sihe.core.errors import InvalidInput, NotFound
from sihe.core.workspace import Workspace
from sihe.serving.errors import NotReady
from sihe.serving.gateway.live import LiveDeployment, feedback_name
from sihe.serving.gateway.settings import ModelSettings, settings_for
from sihe.serving.gateway.store import DeploymentStore
from sihe.serving.gateway.traffic import request_log
from sihe.serving.gateway.traffic.experiment import ExperimentReport
from sihe.serving.gateway.traffic.experiment_store import ExperimentStore
from sihe.serving.gateway.traffic.pulse import Sample
from sihe.serving.gateway.traffic.request_log import RequestRecord
from sihe.serving.gateway.traffic.shadow import ShadowReport
from sihe.serving.gateway.traffic.store import RolloutStore
from sihe.serving.gateway.traffic.types import SHADOW, STABLE, Arm, LogPolicy, Shadow, Sticky, TrafficPolicy
from sihe.serving.predictive.config import KIND, KIND_TAG, PredictiveConfig


class TrafficControl:
    """`live` gives a deployment that this process serves, `process` its name in the records, and `notify` brings
    changes about at once."""

    def __init__(
        self,
        workspace: Workspace,
        deployments: DeploymentStore,
        *,
        live: Callable[[str], LiveDeployment | None],
        process: Callable[[], str],
        notify: Callable[[], None],
    ) -> None:
        self._workspace = workspace
        self._deployments = deployments
        self._rollouts = RolloutStore(workspace.records, workspace.clock)
        self._experiments = ExperimentStore(workspace.records, workspace.clock)
        self._live = live
        self._process = process
        self._notify = notify

    # ---- arms -------------------------------------------------------------------------------------------------------

    def policy(self, name: str) -> TrafficPolicy:
        """How requests are dealt out. Raises `NotFound`."""
        return self._deployments.get(name).traffic

    def set_arm(
        self,
        name: str,
        arm: str,
        target: str,
        weight: float,
        *,
        settings: ModelSettings | Mapping[str, Any] | None = None,
    ) -> TrafficPolicy:
        """Gives an arm, new or not, a target and its share of requests; the rest is the stable arm's.

        Raises `NotFound`, and `InvalidInput` where weights exceed 1 or the arm is a rollout's.
        """
        made = Arm(arm, *self._target(target), weight, self._settings(target, settings))
        self._refuse_canary(name, arm)
        return self._change(name, lambda policy: policy.with_arm(made))

    def remove_arm(self, name: str, arm: str) -> TrafficPolicy:
        """Takes an arm, or the `shadow`, away; what it has begun it finishes. Raises `NotFound`."""
        if arm == SHADOW:
            return self.set_shadow(name, None)
        if arm == STABLE:
            raise InvalidInput("the stable arm cannot be removed: deploy another version, or remove the deployment")
        self._refuse_canary(name, arm)
        return self._change(name, lambda policy: policy.without_arm(arm))

    def set_shadow(
        self, name: str, target: str | None, *, share: float = 1.0, only_idle: bool = True, max_waiting: int = 64
    ) -> TrafficPolicy:
        """Sends copies of a `share` of requests to `target`; None ends that. Raises `NotFound`, `InvalidInput`."""
        if target is None:
            return self._change(name, lambda policy: replace(policy, shadow=None))
        is_predictive = isinstance(self._deployments.get(name).settings, PredictiveConfig)
        version = self._workspace.tracking.resolve(target)
        if (version.tags.get(KIND_TAG) == KIND) != is_predictive:
            kind = "a predictive model" if is_predictive else "no predictive model"
            raise InvalidInput(
                f"{name!r} serves {kind}, and {target!r} is another kind: a shadow is asked what the deployment is, so "
                "give it a version of the same kind"
            )
        model, _, selector = target.partition("@")
        shadow = Shadow(model, selector, share, only_idle=only_idle, max_waiting=max_waiting)
        return self._change(name, lambda policy: replace(policy, shadow=shadow))

    def set_logs(self, name: str, share: float, *, text: bool = False, keep_days: int | None = None) -> TrafficPolicy:
        """Logs that share of requests, with their text or only lengths and hashes, and removes what was logged after so
        many days (None: as before). Raises `NotFound`, `InvalidInput`."""

        def changed(policy: TrafficPolicy) -> TrafficPolicy:
            kept = policy.logs.keep_days if keep_days is None else keep_days
            return replace(policy, logs=LogPolicy(share, text=text, keep_days=kept))

        return self._change(name, changed)

    def set_sticky(self, name: str, sticky: Sticky, *, salt: str | None = None) -> TrafficPolicy:
        """By what senders stay on their arm; another `salt` deals them anew. Raises `NotFound`, `InvalidInput`."""
        return self._change(
            name, lambda policy: replace(policy, sticky=sticky, salt=policy.salt if salt is None else salt)
        )

    # ---- what was measured ------------------------------------------------------------------------------------------

    def experiment(self, name: str) -> ExperimentReport:
        """The arms of the present period beside each other, measured by all processes that serve them.

        What this process has measured is there at once, what others have as they stored it last: they do so every
        `REPORT_INTERVAL_S`, and are read at each look at the records. Where they are in different periods, as one has
        not loaded a version yet, it is the period of this process; where this one does not serve, the newest.
        """
        live = self._live(name)
        found = live.membership if live is not None else self._experiments.latest(name)
        if found is None:
            self._deployments.get(name)
            raise NotFound("measurement of", name, hint="nothing was asked of it yet")
        return found.report()

    def feedback(self, name: str, request_id: str, values: Mapping[str, float], *, tenant: str = "") -> str:
        """Takes in what a client of `tenant` says of an answer to it; the arm that gave it.

        Raises `NotFound`, `NotReady` where another process serves, `AlreadyExists`, `InvalidInput`.
        """
        live = self._live(name)
        if live is None:
            self._deployments.get(name)
            raise NotReady(name, "this process does not serve it: send feedback to the one that does")
        return live.membership.experiment.feedback(feedback_name(request_id, tenant), values)

    def shadow(self, name: str) -> ShadowReport | None:
        """What copies have shown since the serving processes began to make them, as last stored where these are others;
        None without a shadow, or before it was heard of. Raises `NotFound`."""
        live = self._live(name)
        return self._deployments.shadow(
            name, live.shadow_report() if live is not None else None, process=self._process()
        )

    def pulse(self, name: str) -> list[Sample]:
        """The last minutes of each arm, oldest first; empty where another process serves."""
        live = self._live(name)
        return live.pulse.samples() if live is not None else []

    def logs(self, name: str, *, arm: str | None = None, limit: int | None = 100) -> list[RequestRecord]:
        """Logged requests, newest first."""
        return request_log.read(self._workspace.path("lake"), deployment=name, arm=arm, limit=limit)

    # -----------------------------------------------------------------------------------------------------------------

    def _target(self, target: str) -> tuple[str, str]:
        self._workspace.tracking.resolve(target)
        model, _, selector = target.partition("@")
        return model, selector

    def _settings(self, target: str, given: ModelSettings | Mapping[str, Any] | None) -> ModelSettings | None:
        """Settings of its own; None where it has the stable arm's."""
        return settings_for(self._workspace.tracking.resolve(target), given) if given is not None else None

    def _refuse_canary(self, name: str, arm: str) -> None:
        rollout = self._rollouts.find(name)
        if rollout is not None and rollout.arm == arm:
            raise InvalidInput(f"arm {arm!r} belongs to a rollout: promote it, roll it back, or choose another name")

    def _change(self, name: str, change: Callable[[TrafficPolicy], TrafficPolicy]) -> TrafficPolicy:
        policy = self._deployments.change_traffic(name, change).traffic
        self._notify()
        return policy
