"""Lineage: what was made from what."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from sihe.core.records.tables import UtcDateTime

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "sihe_lineage",
        sa.Column("child", sa.String(255), primary_key=True),
        sa.Column("parent", sa.String(255), primary_key=True),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("child", "parent", name="pk_sihe_lineage"),
    )
    op.create_index("ix_sihe_lineage_parent", "sihe_lineage", ["parent"])
