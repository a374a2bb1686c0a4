"""Rollouts, steered: from any process, through the records; the one that serves follows, and moves them by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sihe.core.errors import InvalidInput
from sihe.core.ids import new_id
from sihe.core.workspace import Workspace
from sihe.serving.gateway.settings import ModelSettings, settings_for
from sihe.serving.gateway.store import DeploymentStore
from sihe.serving.gateway.traffic.rollout import Plan, Rollout, RolloutState
from sihe.serving.gateway.traffic.store import RolloutStore
from sihe.serving.gateway.traffic.types import CANARY


class RolloutControl:
    """`notify` brings changes about at once in the process that serves."""

    def __init__(self, workspace: Workspace, deployments: DeploymentStore, *, notify: Callable[[], None]) -> None:
        self._workspace = workspace
        self._deployments = deployments
        self._rollouts = RolloutStore(workspace.records, workspace.clock)
        self._notify = notify

    def start(
        self,
        name: str,
        target: str,
        plan: Plan | None = None,
        *,
        arm: str = CANARY,
        settings: ModelSettings | Mapping[str, Any] | None = None,
    ) -> Rollout:
        """Begins to bring the version behind `target` in, step by step. The version is fixed now, whatever moves later.

        Raises `NotFound`, and `AlreadyExists` while another rollout is on its way.
        """
        version = self._workspace.tracking.resolve(target)
        now = self._workspace.clock.now()
        rollout = Rollout(
            id=new_id("roll"),
            deployment=name,
            arm=arm,
            model=version.name,
            version=version.version,
            settings=settings_for(version, settings) if settings is not None else None,
            plan=plan or Plan(),
            state=RolloutState.RUNNING,
            step=0,
            reason="",
            started_at=now,
            changed_at=now,
        )
        self._rollouts.begin(rollout)
        self._notify()
        return rollout

    def history(self, name: str) -> list[Rollout]:
        """The latest rollouts, newest first; but for one on its way, those that can be read."""
        self._deployments.get(name)
        return self._rollouts.history(name)

    def active(self, on_fault: Callable[[str, Exception], None] | None = None) -> dict[str, Rollout]:
        """The rollouts that are on their way, by deployment; one that cannot be read is told to `on_fault`."""
        return self._rollouts.active(on_fault)

    def find(self, name: str) -> Rollout | None:
        """The rollout that is on its way, if there is one."""
        return self._rollouts.find(name)

    def promote(self, name: str, *, reason: str = "promoted by hand") -> Rollout:
        """Makes the canary the stable version now. Raises `NotFound`, `Busy`."""
        seen = self._rollouts.of(name)
        if seen.state is not RolloutState.PROMOTING:
            seen = self._rollouts.move(seen, state=RolloutState.PROMOTING, reason=reason)
        done = self.finish(seen)
        self._notify()
        return done

    def finish(self, seen: Rollout) -> Rollout:
        """The second half of a promotion, which a process that was killed may have left undone. May be repeated.

        Where the deployment follows an alias of the same model, the alias moves: it says what is in production. Else
        the deployment follows the version itself.
        """
        deployment = self._deployments.get(seen.deployment)
        selector = deployment.selector
        if deployment.model == seen.model and selector and not selector.isdigit():
            self._workspace.tracking.set_alias(seen.model, selector, seen.version)
        else:
            selector = str(seen.version)
        return self._rollouts.promoted(seen, selector=selector)

    def roll_back(self, name: str, *, reason: str = "rolled back by hand") -> None:
        """Takes the canary away, also of a rollout that cannot be read; the stable version was never touched.

        Raises `NotFound`, `Busy`, and `InvalidInput` where it is being promoted.
        """
        self._rollouts.roll_back(name, reason=reason)
        self._notify()

    def pause(self, name: str, *, paused: bool = True) -> Rollout:
        """Lets the canary stay at its step, or go on. Raises `NotFound`, `Busy`."""
        state = RolloutState.PAUSED if paused else RolloutState.RUNNING
        seen = self._rollouts.of(name)
        if seen.state is RolloutState.PROMOTING:
            raise InvalidInput(f"the rollout of {name!r} is being promoted and cannot become {state.value}")
        moved = seen if seen.state is state else self._rollouts.move(seen, state=state)
        self._notify()
        return moved

    def advance(
        self, seen: Rollout, *, state: RolloutState | None = None, step: int | None = None, reason: str
    ) -> Rollout:
        """Moves a rollout on from how it was seen. Raises `Busy`."""
        return self._rollouts.move(seen, state=state, step=step, reason=reason)
