"""LoRA adapters that were loaded while a deployment served: their names, and where their files are kept."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("sihe_deployments", sa.Column("adapters", sa.JSON, nullable=True))
