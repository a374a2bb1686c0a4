"""The coach's tables: attempts at a lab, the predictions made in them, and reviews of questions."""

from __future__ import annotations

from sqlalchemy import JSON, Column, Float, ForeignKey, Index, Integer, String, Table, UniqueConstraint

from sihe.core.records.tables import UtcDateTime, metadata

# One attempt of one learner at one lab: open (predictions are taken), running, done or failed.
lab_runs = Table(
    "sihe_lab_runs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("learner", String(120), nullable=False),
    Column("lab", String(60), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("state", String(10), nullable=False),
    Column("parameters", JSON, nullable=False),
    Column("run_id", String(64)),
    Column("created_at", UtcDateTime, nullable=False),
    Column("started_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
    UniqueConstraint("learner", "lab", "attempt"),
)

# What the learner said before the run; actual, ratio and verdict come after it.
predictions = Table(
    "sihe_predictions",
    metadata,
    Column("lab_run", String(40), ForeignKey("sihe_lab_runs.id", name="fk_sihe_predictions_lab_run"), primary_key=True),
    Column("claim", String(60), primary_key=True),
    Column("value", Float, nullable=False),
    Column("unit", String(20), nullable=False),
    Column("predicted_at", UtcDateTime, nullable=False),
    Column("actual", Float),
    Column("ratio", Float),
    Column("verdict", String(10)),
)

# How well the learner recalled a question: 1 forgotten, 2 with effort, 3 known, 4 at once.
reviews = Table(
    "sihe_reviews",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("learner", String(120), nullable=False),
    Column("question", String(60), nullable=False),
    Column("rating", Integer, nullable=False),
    Column("reviewed_at", UtcDateTime, nullable=False),
    Index("ix_sihe_reviews_learner_question", "learner", "question"),
)
