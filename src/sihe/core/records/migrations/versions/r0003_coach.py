"""The coach: attempts at labs, predictions made before them, reviews of questions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from sihe.core.records.tables import UtcDateTime

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "sihe_lab_runs",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("learner", sa.String(120), nullable=False),
        sa.Column("lab", sa.String(60), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("state", sa.String(10), nullable=False),
        sa.Column("parameters", sa.JSON, nullable=False),
        sa.Column("run_id", sa.String(64)),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.Column("started_at", UtcDateTime),
        sa.Column("ended_at", UtcDateTime),
        sa.PrimaryKeyConstraint("id", name="pk_sihe_lab_runs"),
        sa.UniqueConstraint("learner", "lab", "attempt", name="uq_sihe_lab_runs_learner_lab_attempt"),
    )
    op.create_table(
        "sihe_predictions",
        sa.Column("lab_run", sa.String(40), nullable=False),
        sa.Column("claim", sa.String(60), nullable=False),
        sa.Column("value", sa.Float, nullable=False),
        sa.Column("unit", sa.String(20), nullable=False),
        sa.Column("predicted_at", UtcDateTime, nullable=False),
        sa.Column("actual", sa.Float),
        sa.Column("ratio", sa.Float),
        sa.Column("verdict", sa.String(10)),
        sa.PrimaryKeyConstraint("lab_run", "claim", name="pk_sihe_predictions"),
        sa.ForeignKeyConstraint(["lab_run"], ["sihe_lab_runs.id"], name="fk_sihe_predictions_lab_run"),
    )
    op.create_table(
        "sihe_reviews",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("learner", sa.String(120), nullable=False),
        sa.Column("question", sa.String(60), nullable=False),
        sa.Column("rating", sa.Integer, nullable=False),
        sa.Column("reviewed_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_sihe_reviews"),
    )
    op.create_index("ix_sihe_reviews_learner_question", "sihe_reviews", ["learner", "question"])
