"""Tenants and keys in the records database. Any process may write here; servers read by way of the directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, select

from sihe.core.clock import Clock
from sihe.core.errors import InvalidInput, NotFound
from sihe.core.records import Records
from sihe.serving.tenants.secret import Secret, new_secret
from sihe.serving.tenants.tables import api_keys, revisions, tenants
from sihe.serving.tenants.types import DEFAULT_TENANT, ApiKey, Limits, Right, Tenant, parse_rights

MAX_GRACE_S = 90 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key with what tells whether a token is it."""

    key: ApiKey
    digest: str
    session_digest: str


class TenantStore:
    """Rows of `sihe_tenants` and `sihe_api_keys`."""

    def __init__(self, records: Records, clock: Clock) -> None:
        self._records = records
        self._clock = clock

    # ---- tenants ----------------------------------------------------------------------------------------------------

    def put_tenant(self, tenant: Tenant) -> Tenant:
        """Records a tenant, new or changed."""
        with self._change() as (connection, now):
            self._put_tenant(connection, tenant, now)
        return tenant

    def tenants(self) -> list[Tenant]:
        """Every tenant, by name; the default one is there before anybody records it."""
        with self._records.snapshot() as connection:
            return _tenants(connection)

    def tenant(self, name: str) -> Tenant:
        """One tenant. Raises `NotFound`."""
        for tenant in self.tenants():
            if tenant.name == name:
                return tenant
        raise NotFound("tenant", name, hint="see them with  sihe keys tenants")

    # ---- keys -------------------------------------------------------------------------------------------------------

    def create_key(
        self,
        name: str,
        *,
        tenant: str = DEFAULT_TENANT,
        rights: frozenset[Right] = frozenset({Right.INFER}),
        deployments: frozenset[str] | None = None,
        limits: Limits | None = None,
        expires_at: datetime | None = None,
    ) -> tuple[ApiKey, Secret]:
        """A new key, and the secret that nobody can read again. A tenant that is not there yet is recorded too."""
        secret, now = new_secret(), self._clock.now()
        key = ApiKey(secret.id, name, tenant, rights, deployments, limits or Limits(), now, expires_at)
        if expires_at is not None and expires_at <= now:
            raise InvalidInput(f"a key that expires at {expires_at.isoformat()} is dead already: name a later time")
        with self._change() as (connection, _):
            if not any(known.name == tenant for known in _tenants(connection)):
                self._put_tenant(connection, Tenant(tenant), now)
            connection.execute(api_keys.insert().values(**_row(key), **_digests(secret)))
        return key, secret

    def rotate_key(self, id: str, *, grace_s: float = 0.0) -> tuple[ApiKey, Secret]:
        """A new key with all that the old one has; the old one works for `grace_s` more. Raises `NotFound`."""
        if not 0 <= grace_s <= MAX_GRACE_S:
            raise InvalidInput(f"grace_s is 0 to {MAX_GRACE_S:.0f} (90 days), got {grace_s!r}")
        secret = new_secret()
        with self._change() as (connection, now):
            old = _key(_find(connection, id))
            if not old.opens_at(now):
                raise InvalidInput(f"key {id} is disabled or has expired: create a new one")
            new = replace(old, id=secret.id, created_at=now, last_used_at=None)
            connection.execute(api_keys.insert().values(**_row(new), **_digests(secret)))
            end = now + timedelta(seconds=grace_s)
            connection.execute(
                api_keys.update()
                .where(api_keys.c.id == id)
                .values(expires_at=min(end, old.expires_at) if old.expires_at else end)
            )
        return new, secret

    def set_enabled(self, id: str, *, enabled: bool) -> ApiKey:
        """Disables a key, or takes that back. Raises `NotFound`."""
        with self._change() as (connection, now):
            _find(connection, id)
            connection.execute(
                api_keys.update().where(api_keys.c.id == id).values(disabled_at=None if enabled else now)
            )
            return _key(_find(connection, id))

    def set_limits(self, id: str, limits: Limits) -> ApiKey:
        """Gives a key other limits. Raises `NotFound`."""
        with self._change() as (connection, _):
            _find(connection, id)
            connection.execute(api_keys.update().where(api_keys.c.id == id).values(limits=limits.to_mapping()))
            return _key(_find(connection, id))

    def keys(self, tenant: str | None = None) -> list[ApiKey]:
        """Every key, or a tenant's, oldest first; disabled and expired ones too."""
        query = select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
        with self._records.snapshot() as connection:
            return [
                _key(row)
                for row in connection.execute(query if tenant is None else query.where(api_keys.c.tenant == tenant))
            ]

    def key(self, id: str) -> ApiKey:
        """One key. Raises `NotFound`."""
        with self._records.snapshot() as connection:
            return _key(_find(connection, id))

    def touch(self, used: Mapping[str, datetime]) -> None:
        """Records when keys were last used. No revision changes: nobody need hear of it."""
        if not used:
            return
        with self._records.transaction() as connection:
            for id, at in used.items():
                connection.execute(api_keys.update().where(api_keys.c.id == id).values(last_used_at=at))

    # ---- what a directory reads -------------------------------------------------------------------------------------

    def revision(self) -> int:
        """A number that grows with every change of a tenant or a key."""
        with self._records.snapshot() as connection:
            return _revision(connection)

    def everything(self) -> tuple[int, list[Tenant], list[StoredKey]]:
        """A revision with all tenants and keys, which are as of it or newer."""
        with self._records.snapshot() as connection:
            revision = _revision(connection)  # first: what is committed while we read is then read again
            rows = connection.execute(select(api_keys)).all()
            return (
                revision,
                _tenants(connection),
                [StoredKey(_key(row), row.digest, row.session_digest) for row in rows],
            )

    # ---- writing ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _change(self) -> Iterator[tuple[Connection, datetime]]:
        """A transaction that raises the revision, so that every directory reads anew."""
        with self._records.transaction() as connection:
            # First: on PostgreSQL the row stays locked until the commit, so that two changes have an order.
            connection.execute(revisions.update().values(revision=revisions.c.revision + 1))
            yield connection, self._clock.now()

    def _put_tenant(self, connection: Connection, tenant: Tenant, now: datetime) -> None:
        values = {**asdict(tenant), "limits": tenant.limits.to_mapping(), "updated_at": now}
        changed = connection.execute(tenants.update().where(tenants.c.name == tenant.name).values(**values))
        if changed.rowcount == 0:
            connection.execute(tenants.insert().values(**values, created_at=now))


def _revision(connection: Connection) -> int:
    return int(connection.execute(select(revisions.c.revision)).scalar_one())


def _tenants(connection: Connection) -> list[Tenant]:
    found = [
        Tenant(row.name, Limits.from_mapping(row.limits), row.priority, row.is_isolated, row.is_disabled)
        for row in connection.execute(select(tenants).order_by(tenants.c.name))
    ]
    return found if any(tenant.name == DEFAULT_TENANT for tenant in found) else [Tenant(), *found]


def _find(connection: Connection, id: str) -> Row[Any]:
    row = connection.execute(select(api_keys).where(api_keys.c.id == id)).one_or_none()
    if row is None:
        raise NotFound("key", id, hint="see them with  sihe keys list")
    return row


def _row(key: ApiKey) -> dict[str, Any]:
    return {
        **asdict(key),
        "rights": sorted(key.rights),
        "deployments": None if key.deployments is None else sorted(key.deployments),
        "limits": key.limits.to_mapping(),
    }


def _digests(secret: Secret) -> dict[str, str]:
    return {"digest": secret.digest, "session_digest": secret.session_digest}


def _key(row: Row[Any]) -> ApiKey:
    return ApiKey(
        id=row.id,
        name=row.name,
        tenant=row.tenant,
        rights=parse_rights(row.rights),
        deployments=None if row.deployments is None else frozenset(row.deployments),
        limits=Limits.from_mapping(row.limits),
        created_at=row.created_at,
        expires_at=row.expires_at,
        disabled_at=row.disabled_at,
        last_used_at=row.last_used_at,
    )
