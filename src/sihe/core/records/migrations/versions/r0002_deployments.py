"""Deployments: which model reference each one follows, and what the serving process last said about it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from sihe.core.records.tables import UtcDateTime

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "sihe_deployments",
        sa.Column("name", sa.String(120), nullable=False),
        sa.Column("model", sa.String(120), nullable=False),
        sa.Column("selector", sa.String(120), nullable=False),
        sa.Column("settings", sa.JSON, nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.Column("updated_at", UtcDateTime, nullable=False),
        sa.Column("status", sa.JSON, nullable=True),
        sa.Column("reported_at", UtcDateTime, nullable=True),
        sa.PrimaryKeyConstraint("name", name="pk_sihe_deployments"),
    )
