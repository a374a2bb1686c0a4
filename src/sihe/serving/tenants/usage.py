"""What was used: one row a day, tenant, key and deployment, to which every server process adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, Literal, NamedTuple

from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql, sqlite

from sihe.core.records import Records
from sihe.serving.tenants.limits import Scope
from sihe.serving.tenants.tables import usage

Outcome = Literal["completed", "failed", "aborted"]


class Account(NamedTuple):
    """What one row is about."""

    day: date
    tenant: str
    key: str
    deployment: str


@dataclass(frozen=True, slots=True)
class Tally:
    """Requests that ended, and their tokens. `cached_tokens` are among `prompt_tokens`."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.requests + other.requests,
            self.failed + other.failed,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
        )

    @property
    def tokens(self) -> int:
        """What quotas count."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class UsageRow:
    """A row as it is shown; what it is not grouped by is empty."""

    day: date | None
    tenant: str
    key: str
    deployment: str
    tally: Tally

    def to_mapping(self) -> dict[str, Any]:
        """Flat, for JSON and tables."""
        where = {"day": self.day.isoformat() if self.day else "", "tenant": self.tenant, "key": self.key}
        return {**where, "deployment": self.deployment, **asdict(self.tally)}


GroupBy = Literal["day", "tenant", "key", "deployment"]
GROUPS: tuple[GroupBy, ...] = ("day", "tenant", "key", "deployment")
_SUMS = ("requests", "failed", "prompt_tokens", "cached_tokens", "completion_tokens")


class UsageStore:
    """Rows of `sihe_usage`."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def add(self, batch: Mapping[Account, Tally]) -> None:
        """Adds to the rows, in one transaction."""
        if not batch:
            return
        # Sorted: two processes that lock the same rows do so in the same order.
        rows = [{**account._asdict(), **asdict(tally)} for account, tally in sorted(batch.items())]
        insert = sqlite.insert if self._records.is_sqlite else postgresql.insert
        statement = insert(usage)
        statement = statement.on_conflict_do_update(
            index_elements=list(Account._fields),
            set_={name: usage.c[name] + statement.excluded[name] for name in _SUMS},
        )
        with self._records.transaction() as connection:
            connection.execute(statement, rows)

    def tokens_since(self, scope: Scope, since: date) -> int:
        """Tokens of a tenant or a key from a day on."""
        total = func.coalesce(func.sum(usage.c.prompt_tokens + usage.c.completion_tokens), 0)
        column = usage.c.tenant if scope.kind == "tenant" else usage.c.key
        with self._records.snapshot() as connection:
            query = select(total).where(column == scope.name, usage.c.day >= since)
            return int(connection.execute(query).scalar_one())

    def read(
        self,
        *,
        since: date | None = None,
        until: date | None = None,
        tenant: str | None = None,
        key: str | None = None,
        by: tuple[GroupBy, ...] = GROUPS,
    ) -> list[UsageRow]:
        """Sums from `since` to `until`, both included, one row for each value of what it is grouped `by`."""
        columns = [usage.c[name] for name in by]
        query = select(*columns, *(func.sum(usage.c[name]).label(name) for name in _SUMS))
        query = query.group_by(*columns).order_by(*columns) if columns else query
        for condition in (
            usage.c.day >= since if since else None,
            usage.c.day <= until if until else None,
            usage.c.tenant == tenant if tenant is not None else None,
            usage.c.key == key if key is not None else None,
        ):
            query = query if condition is None else query.where(condition)
        with self._records.snapshot() as connection:
            rows = connection.execute(query).mappings().all()
        return [
            UsageRow(
                day=row.get("day"),
                tenant=row.get("tenant", ""),
                key=row.get("key", ""),
                deployment=row.get("deployment", ""),
                tally=Tally(**{name: int(row[name]) for name in _SUMS}),
            )
            for row in rows
            if row["requests"] is not None  # the sum over nothing, where there is no group
        ]
