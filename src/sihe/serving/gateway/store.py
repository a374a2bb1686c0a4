"""Deployments in the records database: any process may write what is wanted, the serving one reports what is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

from sqlalchemy import Row, select

from sihe.core.clock import Clock
from sihe.core.errors import AlreadyExists, NotFound, UserError
from sihe.core.records import Records
from sihe.serving.gateway.replicas.config import ReplicaConfig
from sihe.serving.gateway.settings import ModelSettings, from_mapping
from sihe.serving.gateway.traffic.shadow import ShadowReport
from sihe.serving.gateway.traffic.store import change_traffic, forget
from sihe.serving.gateway.traffic.types import ArmStatus, TrafficPolicy
from sihe.serving.gateway.types import (
    Deployment,
    DeploymentState,
    DeploymentStatus,
    ReplicaState,
    ReplicaStatus,
    target_of,
)
from sihe.serving.tables import deployments

REPORT_INTERVAL_S = 5.0
_REPORTED = ("state", "version", "wanted", "error", "replicas", "arms", "rollout_note")
_STALE_AFTER = timedelta(seconds=4 * REPORT_INTERVAL_S)


class DeploymentStore:
    """Rows of `sihe_deployments`."""

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
        return _deployment(self._row(name))

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

    def report(self, status: DeploymentStatus, shadow: ShadowReport | None = None) -> None:
        """Stores what the serving process says, and what its shadow has shown; a deployment that was removed meanwhile
        stays removed."""
        said = asdict(status)
        values = {key: said[key] for key in _REPORTED} | {"shadow": None if shadow is None else asdict(shadow)}
        with self._records.transaction() as connection:
            connection.execute(
                deployments.update()
                .where(deployments.c.name == status.name)
                .values(status=values, reported_at=self._clock.now())
            )

    def reported(self, name: str) -> DeploymentStatus:
        """What was last said about `name`; UNSERVED when that is too long ago. Raises `NotFound`.

        A wish or a report that cannot be read, as a newer version wrote it, is the status' error.
        """
        return self._status(self._row(name))

    def shadow(self, name: str) -> ShadowReport | None:
        """What was last said about the shadow of `name`; None where nothing was of the one that it has now, or nothing
        that can be read. Raises `NotFound`, and what is wrong with the wish."""
        row = self._row(name)
        wanted = _deployment(row).traffic.shadow
        said = (row.status or {}).get("shadow")
        if wanted is None or said is None:
            return None
        try:
            found = ShadowReport(**said)
        except TypeError:  # a newer version wrote it
            return None
        return found if found.target == wanted.target else None

    def all_reported(self) -> list[DeploymentStatus]:
        """The same of every deployment, by name."""
        with self._records.snapshot() as connection:
            rows = connection.execute(select(deployments).order_by(deployments.c.name)).all()
        return [self._status(row) for row in rows]

    def _status(self, row: Row[Any]) -> DeploymentStatus:
        fault = None
        try:
            _deployment(row)
        except UserError as error:
            fault = str(error)
        is_fresh = row.reported_at is not None and self._clock.now() - row.reported_at < _STALE_AFTER
        try:
            status = _said(row) if is_fresh else _unserved(row)
        except (KeyError, TypeError, ValueError) as error:
            status, fault = _unserved(row), fault or f"its report cannot be read: {error!r}"
        return replace(status, error=status.error or fault)

    def _row(self, name: str) -> Row[Any]:
        with self._records.snapshot() as connection:
            row = connection.execute(select(deployments).where(deployments.c.name == name)).one_or_none()
        if row is None:
            raise _missing(name)
        return row


def _missing(name: str) -> NotFound:
    return NotFound("deployment", name, hint="see them with  sihe deploy list")


def _unserved(row: Row[Any]) -> DeploymentStatus:
    return DeploymentStatus(
        name=row.name,
        target=target_of(row.model, row.selector),
        state=DeploymentState.UNSERVED,
        version=None,
        wanted=None,
        error=None,
        replicas=(),
        updated_at=row.updated_at,
        reported_at=row.reported_at,
    )


def _said(row: Row[Any]) -> DeploymentStatus:
    """What the serving process said. Raises `KeyError`, `TypeError` or `ValueError` where that has another form."""
    said = row.status
    return replace(
        _unserved(row),
        state=DeploymentState(said["state"]),
        version=said["version"],
        wanted=said["wanted"],
        error=said["error"],
        replicas=tuple(
            ReplicaStatus(item["version"], ReplicaState(item["state"]), item["in_flight"]) for item in said["replicas"]
        ),
        arms=tuple(ArmStatus(**item) for item in said.get("arms", ())),
        rollout_note=said.get("rollout_note", ""),
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
