"""Tenants: who they are, their keys, the revision that says that either has changed, and what they used."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from sihe.core.records.tables import UtcDateTime

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "sihe_tenants",
        sa.Column("name", sa.String(120), nullable=False),
        sa.Column("limits", sa.JSON, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("is_isolated", sa.Boolean, nullable=False),
        sa.Column("is_disabled", sa.Boolean, nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.Column("updated_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_sihe_tenants"),
    )
    op.create_table(
        "sihe_api_keys",
        sa.Column("id", sa.String(12), nullable=False),
        sa.Column("name", sa.String(120), nullable=False),
        sa.Column("tenant", sa.String(120), nullable=False),
        sa.Column("rights", sa.JSON, nullable=False),
        sa.Column("deployments", sa.JSON(none_as_null=True)),
        sa.Column("limits", sa.JSON, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("session_digest", sa.String(64), nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.Column("expires_at", UtcDateTime),
        sa.Column("disabled_at", UtcDateTime),
        sa.Column("last_used_at", UtcDateTime),
        sa.PrimaryKeyConstraint("id", name="pk_sihe_api_keys"),
    )
    op.create_index("ix_sihe_api_keys_tenant", "sihe_api_keys", ["tenant"])
    revisions = op.create_table(
        "sihe_tenants_revision",
        sa.Column("id", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_sihe_tenants_revision"),
    )
    op.bulk_insert(revisions, [{"id": 1, "revision": 0}])
    op.create_table(
        "sihe_usage",
        sa.Column("day", sa.Date, nullable=False),
        sa.Column("tenant", sa.String(120), nullable=False),
        sa.Column("key", sa.String(40), nullable=False),
        sa.Column("deployment", sa.String(120), nullable=False),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("failed", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("day", "tenant", "key", "deployment", name="pk_sihe_usage"),
    )
    op.create_index("ix_sihe_usage_tenant_day", "sihe_usage", ["tenant", "day"])
