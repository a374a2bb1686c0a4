"""Several processes that serve one deployment: each reports and measures in rows of its own, in periods of all.

What one process had said and measured until now becomes that of a process of its own, which is gone: it counts on.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from sihe.core.records.tables import UtcDateTime

revision = "0007"
down_revision = "0006"

_FORMER = "srv_before"


def upgrade() -> None:
    op.create_table(
        "sihe_deployment_reports",
        sa.Column("deployment", sa.String(120), nullable=False),
        sa.Column("process", sa.String(40), nullable=False),
        sa.Column("status", sa.JSON, nullable=False),
        sa.Column("reported_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("deployment", "process", name="pk_sihe_deployment_reports"),
    )
    op.create_table(
        "sihe_periods",
        sa.Column("deployment", sa.String(120), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("split", sa.JSON, nullable=False),
        sa.Column("started_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("deployment", "number", name="pk_sihe_periods"),
    )
    op.create_table(
        "sihe_measurements",
        sa.Column("deployment", sa.String(120), nullable=False),
        sa.Column("period", sa.Integer, nullable=False),
        sa.Column("writer", sa.String(40), nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("statistics", sa.JSON, nullable=False),
        sa.Column("updated_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("deployment", "period", "writer", name="pk_sihe_measurements"),
    )
    # From table to table inside the database: neither times nor JSON are read and written anew.
    op.execute(
        "INSERT INTO sihe_deployment_reports (deployment, process, status, reported_at) "
        f"SELECT name, '{_FORMER}', status, reported_at FROM sihe_deployments "
        "WHERE status IS NOT NULL AND reported_at IS NOT NULL"
    )
    op.execute(
        "INSERT INTO sihe_periods (deployment, number, split, started_at) "
        "SELECT deployment, period, split, started_at FROM sihe_experiments"
    )
    op.execute(
        "INSERT INTO sihe_measurements (deployment, period, writer, revision, statistics, updated_at) "
        f"SELECT deployment, period, '{_FORMER}.1', 0, statistics, updated_at FROM sihe_experiments"
    )
    op.drop_table("sihe_experiments")
    with op.batch_alter_table("sihe_deployments") as table:  # SQLite before 3.35 cannot drop a column
        table.drop_column("status")
        table.drop_column("reported_at")
