"""Deployments: what is wanted (by whoever deploys) beside what is (as each process that serves them reports it);
rollouts, and what the arms of a deployment were measured by, period by period."""

from __future__ import annotations

from sqlalchemy import JSON, Column, Index, Integer, String, Table, Text

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
    # How many replicas, and how requests are dealt out between versions; null where it is the default.
    Column("replicas", JSON(none_as_null=True)),
    Column("traffic", JSON(none_as_null=True)),
    # LoRA adapters that were loaded while it served: name → place in the object store.
    Column("adapters", JSON(none_as_null=True)),
)

# What is: the last report of each process that serves a deployment, and when it came. Old ones say nothing.
reports = Table(
    "sihe_deployment_reports",
    metadata,
    Column("deployment", String(120), primary_key=True),
    Column("process", String(40), primary_key=True),
    Column("status", JSON, nullable=False),
    Column("reported_at", UtcDateTime, nullable=False),
)

rollouts = Table(
    "sihe_rollouts",
    metadata,
    Column("id", String(40), primary_key=True),  # sorts by time
    Column("deployment", String(120), nullable=False),
    Column("arm", String(120), nullable=False),
    Column("model", String(120), nullable=False),
    Column("version", Integer, nullable=False),
    Column("settings", JSON(none_as_null=True)),
    Column("plan", JSON, nullable=False),
    Column("state", String(20), nullable=False),
    Column("step", Integer, nullable=False),
    Column("reason", Text, nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("changed_at", UtcDateTime, nullable=False),
    Index("ix_sihe_rollouts_deployment_id", "deployment", "id"),
)

# In which arms, weights and versions stayed as they are; the same for all processes.
periods = Table(
    "sihe_periods",
    metadata,
    Column("deployment", String(120), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("split", JSON, nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
)

# What a period was measured by: a row for each stay of a process in it, which only that process writes.
measurements = Table(
    "sihe_measurements",
    metadata,
    Column("deployment", String(120), primary_key=True),
    Column("period", Integer, primary_key=True, autoincrement=False),
    Column("writer", String(40), primary_key=True),  # the process, a dot, and which of its stays
    Column("revision", Integer, nullable=False),  # grows with every write: readers see what they have read already
    Column("statistics", JSON, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
)
