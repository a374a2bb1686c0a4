"""Rollouts in the records database, so that they survive a restart and any process can steer.

A rollout moves only from the state and step that its mover saw: of two movers one wins, and the other reads again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Row, select

from sihe.core.clock import Clock
from sihe.core.errors import AlreadyExists, Busy, InvalidInput, NotFound, UserError
from sihe.core.records import Records
from sihe.serving.gateway.settings import from_mapping
from sihe.serving.gateway.traffic.rollout import Plan, Rollout, RolloutState
from sihe.serving.gateway.traffic.types import Arm, TrafficPolicy
from sihe.serving.tables import deployments, measurements, periods, reports, rollouts

_ACTIVE = (RolloutState.RUNNING, RolloutState.PAUSED, RolloutState.PROMOTING)
_HISTORY = 20


class RolloutStore:
    """Rows of `sihe_rollouts`, and the weight of the canary's arm in `sihe_deployments` with them."""

    def __init__(self, records: Records, clock: Clock) -> None:
        self._records = records
        self._clock = clock

    def begin(self, rollout: Rollout) -> None:
        """Records a rollout and gives its arm the first step's weight. Raises `NotFound`, `AlreadyExists`."""
        with self._records.transaction() as connection:
            change_traffic(connection, rollout.deployment, lambda policy: policy.with_new_arm(_arm(rollout)))
            active = select(rollouts.c.id).where(
                rollouts.c.deployment == rollout.deployment, rollouts.c.state.in_(_ACTIVE)
            )
            if connection.execute(active).first() is not None:
                raise AlreadyExists("rollout of", rollout.deployment, hint="promote it or roll it back first")
            connection.execute(rollouts.insert().values(**_values(rollout)))

    def active(self, on_fault: Callable[[str, Exception], None] | None = None) -> dict[str, Rollout]:
        """The rollouts that are on their way, by deployment.

        One that cannot be read, as a newer version wrote it, is told to `on_fault` with its deployment; without that
        its error is raised.
        """
        found = {}
        with self._records.snapshot() as connection:
            rows = connection.execute(select(rollouts).where(rollouts.c.state.in_(_ACTIVE))).all()
        for row in rows:
            try:
                found[row.deployment] = _rollout(row)
            except UserError as error:
                if on_fault is None:
                    raise
                on_fault(row.deployment, error)
        return found

    def history(self, deployment: str) -> list[Rollout]:
        """The latest rollouts of a deployment, newest first; but for one on its way, those that can be read.

        Raises what is wrong with one that is on its way.
        """
        query = select(rollouts).where(rollouts.c.deployment == deployment).order_by(rollouts.c.id.desc())
        with self._records.snapshot() as connection:
            rows = connection.execute(query.limit(_HISTORY)).all()
        found = []
        for row in rows:
            try:
                found.append(_rollout(row))
            except UserError:
                if row.state in _ACTIVE:
                    raise
        return found

    def find(self, deployment: str) -> Rollout | None:
        """The rollout that is on its way, if there is one. Raises what is wrong with it where it cannot be read."""
        faults: dict[str, Exception] = {}
        found = self.active(faults.__setitem__).get(deployment)
        if deployment in faults:
            raise faults[deployment]
        return found

    def of(self, deployment: str) -> Rollout:
        """The same. Raises `NotFound` too."""
        found = self.find(deployment)
        if found is None:
            raise _no_rollout(deployment)
        return found

    def move(
        self, seen: Rollout, *, state: RolloutState | None = None, step: int | None = None, reason: str = ""
    ) -> Rollout:
        """Moves a rollout on from how it was `seen`, with the weight of its arm. Raises `Busy` when it has moved since.

        A rollout that is rolled back loses its arm in the same transaction.
        """
        moved = replace(seen, state=state or seen.state, step=seen.step if step is None else step, reason=reason[:2000])
        if (moved.state, moved.step) != (seen.state, seen.step):
            moved = replace(moved, changed_at=self._clock.now())
        with self._records.transaction() as connection:
            self._compare_and_set(connection, seen, moved)
            if moved.state is RolloutState.ROLLED_BACK:
                change_traffic(connection, seen.deployment, lambda policy: _without(policy, seen.arm))
            elif moved.step != seen.step:
                change_traffic(connection, seen.deployment, lambda policy: policy.with_arm(_arm(moved)))
        return moved

    def roll_back(self, deployment: str, *, reason: str) -> None:
        """Ends the rollout that is on its way and takes its arm away. What was planned is not read: it may be what a
        newer version wrote. Raises `NotFound`, `Busy`, and `InvalidInput` where it is being promoted."""
        is_active = (rollouts.c.deployment == deployment) & rollouts.c.state.in_(_ACTIVE)
        values = {"state": RolloutState.ROLLED_BACK.value, "reason": reason[:2000], "changed_at": self._clock.now()}
        with self._records.transaction() as connection:
            row = connection.execute(select(rollouts.c.id, rollouts.c.arm, rollouts.c.state).where(is_active)).first()
            if row is None:
                raise _no_rollout(deployment)
            if row.state == RolloutState.PROMOTING.value:
                raise InvalidInput(f"the rollout of {deployment!r} is being promoted and cannot be rolled back")
            is_it = (rollouts.c.id == row.id) & (rollouts.c.state == row.state)
            if connection.execute(rollouts.update().where(is_it).values(**values)).rowcount == 0:
                raise _moved(deployment)
            change_traffic(connection, deployment, lambda policy: _without(policy, row.arm))

    def promoted(self, seen: Rollout, *, selector: str) -> Rollout:
        """Ends a PROMOTING rollout: its version is what is deployed, under `selector`, and its arm is gone.

        Raises `Busy` when another process has done so.
        """
        now = self._clock.now()
        moved = replace(seen, state=RolloutState.PROMOTED, changed_at=now)
        with self._records.transaction() as connection:
            self._compare_and_set(connection, seen, moved)
            change_traffic(connection, seen.deployment, lambda policy: _without(policy, seen.arm))
            wish: dict[str, Any] = {"model": seen.model, "selector": selector, "updated_at": now}
            if seen.settings is not None:
                wish["settings"] = seen.settings.to_mapping()
            connection.execute(deployments.update().where(deployments.c.name == seen.deployment).values(**wish))
        return moved

    def _compare_and_set(self, connection: Connection, seen: Rollout, moved: Rollout) -> None:
        changed = connection.execute(
            rollouts.update()
            .where(rollouts.c.id == seen.id, rollouts.c.state == seen.state.value, rollouts.c.step == seen.step)
            .values(state=moved.state.value, step=moved.step, reason=moved.reason, changed_at=moved.changed_at)
        )
        if changed.rowcount == 0:
            raise _moved(seen.deployment)


def change_traffic(connection: Connection, name: str, change: Callable[[TrafficPolicy], TrafficPolicy]) -> None:
    """Rewrites the traffic policy of a deployment inside a transaction. Raises `NotFound`, and what `change` raises."""
    is_it = deployments.c.name == name
    row = connection.execute(select(deployments.c.traffic).where(is_it).with_for_update()).one_or_none()
    if row is None:
        raise NotFound("deployment", name, hint="see them with  sihe deploy list")
    policy = change(TrafficPolicy.from_mapping(row.traffic))
    connection.execute(deployments.update().where(is_it).values(traffic=policy.to_mapping()))


def forget(connection: Connection, name: str) -> None:
    """Removes what is stored about a deployment that goes, but for the wish itself."""
    for table in (rollouts, reports, measurements, periods):
        connection.execute(table.delete().where(table.c.deployment == name))


def _no_rollout(deployment: str) -> NotFound:
    return NotFound("rollout of", deployment, hint="start one with  sihe deploy canary")


def _moved(deployment: str) -> Busy:
    return Busy(f"the rollout of {deployment!r} has moved since it was looked at: look again")


def _without(policy: TrafficPolicy, arm: str) -> TrafficPolicy:
    return policy.without_arm(arm) if any(other.name == arm for other in policy.arms) else policy


def _arm(rollout: Rollout) -> Arm:
    return Arm(rollout.arm, rollout.model, str(rollout.version), rollout.weight, rollout.settings)


def _values(rollout: Rollout) -> dict[str, Any]:
    return {
        "id": rollout.id,
        "deployment": rollout.deployment,
        "arm": rollout.arm,
        "model": rollout.model,
        "version": rollout.version,
        "settings": rollout.settings.to_mapping() if rollout.settings is not None else None,
        "plan": rollout.plan.to_mapping(),
        "state": rollout.state.value,
        "step": rollout.step,
        "reason": rollout.reason,
        "started_at": rollout.started_at,
        "changed_at": rollout.changed_at,
    }


def _rollout(row: Row[Any]) -> Rollout:
    return Rollout(
        id=row.id,
        deployment=row.deployment,
        arm=row.arm,
        model=row.model,
        version=row.version,
        settings=from_mapping(row.settings) if row.settings is not None else None,
        plan=Plan.from_mapping(row.plan),
        state=RolloutState(row.state),
        step=row.step,
        reason=row.reason,
        started_at=row.started_at,
        changed_at=row.changed_at,
    )
