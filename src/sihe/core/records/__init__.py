"""Records: small facts in tables, on SQLite by default and on PostgreSQL by setting.

Rooms declare their tables on `metadata` in their own `tables.py`, each name prefixed `sihe_` (MLflow keeps its tables
in the same database); the numbered migrations in `migrations/versions` create them.
"""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {"Records": "sihe.core.records.engine", "metadata": "sihe.core.records.tables"},
)
