"""Traffic between versions: how requests are dealt out, rollouts, and what arms were measured by; replicas wanted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from sihe.core.records.tables import UtcDateTime

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("sihe_deployments", sa.Column("replicas", sa.JSON, nullable=True))
    op.add_column("sihe_deployments", sa.Column("traffic", sa.JSON, nullable=True))
    op.create_table(
        "sihe_rollouts",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("deployment", sa.String(120), nullable=False),
        sa.Column("arm", sa.String(120), nullable=False),
        sa.Column("model", sa.String(120), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("settings", sa.JSON, nullable=True),
        sa.Column("plan", sa.JSON, nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("started_at", UtcDateTime, nullable=False),
        sa.Column("changed_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_sihe_rollouts"),
    )
    op.create_index("ix_sihe_rollouts_deployment_id", "sihe_rollouts", ["deployment", "id"])
    op.create_table(
        "sihe_experiments",
        sa.Column("deployment", sa.String(120), nullable=False),
        sa.Column("period", sa.Integer, nullable=False),
        sa.Column("split", sa.JSON, nullable=False),
        sa.Column("statistics", sa.JSON, nullable=False),
        sa.Column("started_at", UtcDateTime, nullable=False),
        sa.Column("updated_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("deployment", "period", name="pk_sihe_experiments"),
    )
