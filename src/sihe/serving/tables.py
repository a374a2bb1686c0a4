"""The deployments table: what is wanted (by whoever deploys) beside what is (as the serving process reports it)."""

from __future__ import annotations

from sqlalchemy import JSON, Column, String, Table

from sihe.core.records.tables import UtcDateTime, metadata

deployments = Table(
    "sihe_deployments",
    metadata,
    Column("name", String(120), primary_key=True),
    # What is wanted: the model, and the alias or version number of it to follow.
    Column("model", String(120), nullable=False),
    Column("selector", String(120), nullable=False),
    Column("settings", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    # What is: the last report of the process that serves it, and when it came. Old reports mean that nobody does.
    Column("status", JSON),
    Column("reported_at", UtcDateTime),
)
