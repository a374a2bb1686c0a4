"""Deployments in the records database: any process may write what is wanted, those that serve report what is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, Row, select

from sihe.core.clock import Clock
from sihe.core.errors import AlreadyExists, NotFound, UserError
from sihe.core.records import Records
from sihe.serving.gateway import reports as said
from sihe.serving.gateway.replicas.config import ReplicaConfig
from sihe.serving.gateway.settings import ModelSettings, from_mapping
from sihe.serving.gateway.traffic.shadow import ShadowReport
from sihe.serving.gateway.traffic.store import change_traffic, forget
from sihe.serving.gateway.traffic.types import TrafficPolicy
from sihe.serving.gateway.types import Deployment, DeploymentState, DeploymentStatus, target_of
from sihe.serving.tables import deployments, reports

REPORT_INTERVAL_S = 5.0
_STALE_AFTER = timedelta(seconds=4 * REPORT_INTERVAL_S)
_REMOVED_AFTER = 15 * _STALE_AFTER  # clocks of two machines differ by less


class DeploymentStore:
    """Rows of `sihe_deployments`, and of `sihe_deployment_reports`: one for each process that serves a deployment."""

    def __init__(self, records: Records, clock: Clock) -> None:
        self._records = records
        self._clock = clock

    def put(
        self,
        name: str,
        model: str,
        selector: str,
        settings: ModelSettings,
        *,
        replicas: ReplicaConfig | None = None,
    ) -> Deployment:
        """Records what is wanted under `name`, new or changed; the same wish again changes nothing.

        How requests are dealt out stays as it is.
        """
        now = self._clock.now()
        wish: dict[str, Any] = {
            "model": model,
            "selector": selector,
            "settings": settings.to_mapping(),
            "replicas": (replicas.to_mapping() if replicas is not None else None) or None,
        }
        with self._records.transaction() as connection:
            row = connection.execute(select(deployments).where(deployments.c.name == name)).one_or_none()
            if row is None:
                connection.execute(deployments.insert().values(name=name, **wish, created_at=now, updated_at=now))
            elif any(getattr(row, key) != value for key, value in wish.items()):
                connection.execute(
                    deployments.update().where(deployments.c.name == name).values(**wish, updated_at=now)
                )
        return self.get(name)

    def get(self, name: str) -> Deployment:
        """The wish under `name`. Raises `NotFound`."""
        with self._records.snapshot() as connection:
            row = self._row(connection, name)
        return _deployment(row)

    def adapters(self, name: str) -> dict[str, str]:
        """Its adapters by name, with their places; of a deployment that is unknown, none."""
        query = select(deployments.c.adapters).where(deployments.c.name == name)
        with self._records.snapshot() as connection:
            return connection.execute(query).scalar() or {}

    def change_traffic(self, name: str, change: Callable[[TrafficPolicy], TrafficPolicy]) -> Deployment:
        """Rewrites how requests of `name` are dealt out. Raises `NotFound`, and what `change` raises."""
        with self._records.transaction() as connection:
            change_traffic(connection, name, change)
        return self.get(name)

    def add_adapter(self, name: str, adapter: str, place: str) -> None:
        """Records an adapter of `name`. Raises `NotFound`, `AlreadyExists`."""

        def add(held: dict[str, str]) -> dict[str, str]:
            if adapter in held:
                raise AlreadyExists("adapter", adapter, hint="unload it first or take another name")
            return {**held, adapter: place}

        self._change_adapters(name, add)

    def remove_adapter(self, name: str, adapter: str) -> None:
        """Forgets an adapter of `name`. Raises `NotFound`."""
        self._change_adapters(name, lambda held: {key: place for key, place in held.items() if key != adapter})

    def _change_adapters(self, name: str, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
        with self._records.transaction() as connection:
            query = select(deployments.c.adapters).where(deployments.c.name == name).with_for_update()
            row = connection.execute(query).one_or_none()
            if row is None:
                raise _missing(name)
            changed = change(row.adapters or {}) or None
            connection.execute(deployments.update().where(deployments.c.name == name).values(adapters=changed))

    def all(self, on_fault: Callable[[str, Exception], None] | None = None) -> list[Deployment]:
        """Every deployment, by name.

        One that cannot be read, as a newer version wrote it, is told to `on_fault`; without that its error is raised.
        """
        found = []
        with self._records.snapshot() as connection:
            rows = connection.execute(select(deployments).order_by(deployments.c.name)).all()
        for row in rows:
            try:
                found.append(_deployment(row))
            except UserError as error:
                if on_fault is None:
                    raise
                on_fault(row.name, error)
        return found

    def remove(self, name: str) -> None:
        """Forgets `name`. Raises `NotFound`."""
        with self._records.transaction() as connection:
            if connection.execute(deployments.delete().where(deployments.c.name == name)).rowcount == 0:
                raise _missing(name)
            forget(connection, name)

    def report(self, status: DeploymentStatus, shadow: ShadowReport | None = None, *, process: str) -> None:
        """Stores what a process that serves it says, and what its shadow has shown. Reports of processes that have said
        nothing for minutes go; a deployment that was removed meanwhile stays removed."""
        name, now = status.name, self._clock.now()
        values = {"status": said.to_mapping(status, shadow), "reported_at": now}
        is_own = (reports.c.deployment == name) & (reports.c.process == process)
        is_old = (reports.c.deployment == name) & (reports.c.reported_at < now - _REMOVED_AFTER)
        wish = select(deployments.c.name).where(deployments.c.name == name).with_for_update()
        with self._records.transaction() as connection:
            if connection.execute(wish).one_or_none() is None:
                return
            connection.execute(reports.delete().where(is_old))
            if connection.execute(reports.update().where(is_own).values(**values)).rowcount == 0:
                connection.execute(reports.insert().values(deployment=name, process=process, **values))

    def withdraw(self, process: str) -> None:
        """Removes all reports of a process that serves no more."""
        with self._records.transaction() as connection:
            connection.execute(reports.delete().where(reports.c.process == process))

    def reported(
        self, name: str, live: DeploymentStatus | None = None, *, process: str | None = None
    ) -> DeploymentStatus:
        """What the processes that serve `name` have said lately, together; UNSERVED where none has.

        `live` is what the asking `process` says now, in the place of its report. Raises `NotFound`. A wish or a report
        that cannot be read, as a newer version wrote it, is the status' error.
        """
        with self._records.snapshot() as connection:
            row = self._row(connection, name)
            found = _reports(connection, name)
        return self._status(row, found, live, process)

    def shadow(self, name: str, live: ShadowReport | None = None, *, process: str | None = None) -> ShadowReport | None:
        """What the copies of all processes have shown, as last said, or as `live` for the asking one; None where
        nothing was said of the shadow that `name` has now, or nothing that can be read. Raises `NotFound`, and what is
        wrong with the wish."""
        with self._records.snapshot() as connection:
            row = self._row(connection, name)
            found = _reports(connection, name)
        wanted = _deployment(row).traffic.shadow
        shown = [live, *(said.shadow_from_mapping(one.status) for one in found if one.process != process)]
        if wanted is None:
            return None
        return said.merged_shadow([one for one in shown if one is not None and one.target == wanted.target])

    def all_reported(
        self, live: Mapping[str, DeploymentStatus] | None = None, *, process: str | None = None
    ) -> list[DeploymentStatus]:
        """The same as `reported` of every deployment, by name."""
        with self._records.snapshot() as connection:
            rows = connection.execute(select(deployments).order_by(deployments.c.name)).all()
            found = connection.execute(select(reports).order_by(reports.c.process)).all()
        return [
            self._status(row, [one for one in found if one.deployment == row.name], (live or {}).get(row.name), process)
            for row in rows
        ]

    def _status(
        self, row: Row[Any], found: Sequence[Row[Any]], live: DeploymentStatus | None, process: str | None
    ) -> DeploymentStatus:
        fault = None
        try:
            _deployment(row)
        except UserError as error:
            fault = str(error)
        unserved = _unserved(row, found)
        statuses = [] if live is None else [live]
        for one in found:
            if one.process == process or self._clock.now() - one.reported_at >= _STALE_AFTER:
                continue
            try:
                statuses.append(said.from_mapping(unserved, one.status, one.reported_at))
            except (KeyError, TypeError, ValueError) as error:
                fault = fault or f"its report cannot be read: {error!r}"
        status = said.merged(unserved, statuses)
        return replace(status, error=status.error or fault)

    def _row(self, connection: Connection, name: str) -> Row[Any]:
        row = connection.execute(select(deployments).where(deployments.c.name == name)).one_or_none()
        if row is None:
            raise _missing(name)
        return row


def _reports(connection: Connection, name: str) -> Sequence[Row[Any]]:
    return connection.execute(select(reports).where(reports.c.deployment == name).order_by(reports.c.process)).all()


def _missing(name: str) -> NotFound:
    return NotFound("deployment", name, hint="see them with  sihe deploy list")


def _unserved(row: Row[Any], found: Sequence[Row[Any]]) -> DeploymentStatus:
    return DeploymentStatus(
        name=row.name,
        target=target_of(row.model, row.selector),
        state=DeploymentState.UNSERVED,
        version=None,
        wanted=None,
        error=None,
        replicas=(),
        updated_at=row.updated_at,
        reported_at=max((one.reported_at for one in found), default=None),
        processes=0,
    )


def _deployment(row: Row[Any]) -> Deployment:
    return Deployment(
        name=row.name,
        model=row.model,
        selector=row.selector,
        settings=from_mapping(row.settings),
        created_at=row.created_at,
        updated_at=row.updated_at,
        replicas=ReplicaConfig.from_mapping(row.replicas or {}),
        traffic=TrafficPolicy.from_mapping(row.traffic),
        adapters=tuple(sorted((row.adapters or {}).items())),
    )
