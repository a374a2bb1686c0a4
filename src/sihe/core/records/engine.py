"""One engine for the records database, and transactions that two processes may open at once without losing a write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError

from sihe.core.errors import Busy, ConfigError, CorruptData, NoSpace, Unreachable
from sihe.core.files import exclusive
from sihe.core.lazy import require

_BUSY_TIMEOUT_S = 30.0
_READS_ONLY = "sihe_reads_only"  # a connection's option, which tells SQLite's BEGIN to take no lock
_MIGRATION_LOCK = 0x51E  # any constant that only Sihe uses on a PostgreSQL server


class Records:
    """The records database behind `url` (SQLAlchemy form). `migrate` before the first use."""

    def __init__(self, url: str) -> None:
        try:
            self.url = make_url(url)
        except ArgumentError as error:
            raise ConfigError(f"records.url is not a database URL: {error}", key="records.url") from error
        backend = self.url.get_backend_name()
        if backend == "postgresql":
            require("psycopg", extra="postgres")
            self.url = self.url.set(drivername="postgresql+psycopg")
        elif backend != "sqlite":
            raise ConfigError(f"records.url must be sqlite or postgresql, got {backend!r}", key="records.url")
        self.is_sqlite = backend == "sqlite"
        if self.is_sqlite and self.url.database:
            Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
        try:
            self.engine: Engine = create_engine(
                self.url, connect_args={"timeout": _BUSY_TIMEOUT_S} if self.is_sqlite else {}, pool_pre_ping=True
            )
        except NoSuchModuleError as error:
            raise ConfigError(f"records.url: {error}", key="records.url") from error
        if self.is_sqlite:
            _prepare_sqlite(self.engine)

    def migrate(self) -> None:
        """Brings the schema to the newest migration; one process at a time, the others wait."""
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self._migration_lock(), self.transaction() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction that commits on a clean exit and rolls back on an error.

        On SQLite it takes the write lock at once, so that two writers queue instead of failing half way.
        Raises `Busy`, `NoSpace`, `CorruptData`, `Unreachable`.
        """
        with self._errors(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A transaction that only reads, and that waits for no writer: what was committed when it began.

        Raises the same errors as `transaction`.
        """
        with (
            self._errors(),
            self.engine.connect().execution_options(**{_READS_ONLY: True}) as connection,
            connection.begin(),
        ):
            yield connection

    @contextmanager
    def _migration_lock(self) -> Iterator[None]:
        if self.is_sqlite:
            with exclusive(Path(str(self.url.database)).with_suffix(".lock")):
                yield
            return
        with self._errors(), self.engine.connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _MIGRATION_LOCK})
            try:
                yield
            finally:
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _MIGRATION_LOCK})

    @contextmanager
    def _errors(self) -> Iterator[None]:
        shown = self.url.render_as_string(hide_password=True)
        try:
            yield
        except DBAPIError as error:
            message = str(error.orig)
            if "database is locked" in message:
                raise Busy(f"{shown} stayed locked for {_BUSY_TIMEOUT_S:.0f} s: another process is writing") from error
            if "database or disk is full" in message or "No space left" in message:
                raise NoSpace(shown) from error
            if "malformed" in message or "not a database" in message:
                raise CorruptData(shown, message, hint="restore it from a backup or move it away") from error
            if isinstance(error, OperationalError) and not self.is_sqlite:
                raise Unreachable(shown, message.splitlines()[0]) from error
            raise

    def close(self) -> None:
        """Closes every pooled connection."""
        self.engine.dispose()


def _prepare_sqlite(engine: Engine) -> None:
    """WAL with full syncs (a committed record survives a power cut), foreign keys, and BEGIN IMMEDIATE."""

    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # pysqlite must not open transactions on its own
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        # In WAL mode a reader sees the last commit and blocks nobody; two writers queue at their beginning.
        reads_only = connection.get_execution_options().get(_READS_ONLY, False)
        connection.exec_driver_sql("BEGIN" if reads_only else "BEGIN IMMEDIATE")
