"""Alembic's entry: runs the migrations on the connection that `Records.migrate` holds."""

from __future__ import annotations

from alembic import context

from sihe.core.records.tables import metadata

connection = context.config.attributes["connection"]
# MLflow's own Alembic uses the default version table in the same database.
context.configure(connection=connection, target_metadata=metadata, version_table="sihe_schema_version")
context.run_migrations()
