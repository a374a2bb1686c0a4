"""The tables of tenants, keys and usage, and the number that tells every process that keys have changed."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Boolean, Column, Date, Index, Integer, String, Table

from sihe.core.records.tables import UtcDateTime, metadata

tenants = Table(
    "sihe_tenants",
    metadata,
    Column("name", String(120), primary_key=True),
    Column("limits", JSON, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("is_isolated", Boolean, nullable=False),
    Column("is_disabled", Boolean, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
)

api_keys = Table(
    "sihe_api_keys",
    metadata,
    Column("id", String(12), primary_key=True),
    Column("name", String(120), nullable=False),
    Column("tenant", String(120), nullable=False),
    Column("rights", JSON, nullable=False),
    Column("deployments", JSON(none_as_null=True)),
    Column("limits", JSON, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("session_digest", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("disabled_at", UtcDateTime),
    Column("last_used_at", UtcDateTime),
    Index("ix_sihe_api_keys_tenant", "tenant"),
)

# One row: every change of a key or a tenant adds one, so that a process need read one number to know that it is up to
# date.
revisions = Table(
    "sihe_tenants_revision",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("revision", BigInteger, nullable=False),
)

usage = Table(
    "sihe_usage",
    metadata,
    Column("day", Date, primary_key=True),  # of UTC
    Column("tenant", String(120), primary_key=True),
    Column("key", String(40), primary_key=True),
    Column("deployment", String(120), primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Index("ix_sihe_usage_tenant_day", "tenant", "day"),
)
