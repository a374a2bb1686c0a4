"""Records on both databases: migrations, two writers at once, and what a killed writer leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import func, inspect, select
from sqlalchemy.exc import StatementError

from sihe.core.errors import ConfigError, CorruptData, Unreachable
from sihe.core.records import Records, metadata
from sihe.core.records.tables import lineage

NOW = datetime(2026, 1, 2, tzinfo=UTC)

WRITER = """
import sys
from datetime import UTC, datetime
from sihe.core.records import Records
from sihe.core.records.tables import lineage
records = Records(sys.argv[1])
records.migrate()
print("ready", flush=True)
for i in range(int(sys.argv[3])):
    with records.transaction() as connection:
        edge = lineage.insert().values(child=f"{sys.argv[2]}:{i}", parent="p", created_at=datetime.now(UTC))
        connection.execute(edge)
    print(i, flush=True)
"""


def _writer(url: str, name: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, url, name, str(count)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _count(records: Records) -> int:
    with records.transaction() as connection:
        return int(connection.execute(select(func.count()).select_from(lineage)).scalar_one())


def test_processes_that_migrate_and_write_at_once_lose_nothing(database_url: str) -> None:
    writers = [_writer(database_url, name, 40) for name in ("a", "b", "c")]
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors
    records = Records(database_url)
    assert _count(records) == 120
    records.close()


def test_every_acknowledged_write_survives_a_kill(database_url: str) -> None:
    writer = _writer(database_url, "a", 100_000)
    assert writer.stdout is not None
    acknowledged = -1
    for line in writer.stdout:
        if line.strip().isdigit():
            acknowledged = int(line)
        if acknowledged >= 25:
            os.kill(writer.pid, signal.SIGKILL)
            break
    writer.communicate()
    records = Records(database_url)
    assert _count(records) >= acknowledged + 1
    records.close()


def test_an_error_rolls_the_whole_transaction_back(database_url: str) -> None:
    records = Records(database_url)
    records.migrate()
    with pytest.raises(RuntimeError, match="half way"), records.transaction() as connection:
        connection.execute(lineage.insert().values(child="a", parent="b", created_at=NOW))
        raise RuntimeError("half way")
    assert _count(records) == 0
    records.close()


def test_a_reader_sees_the_last_commit_and_waits_for_no_writer(database_url: str) -> None:
    records = Records(database_url)
    records.migrate()
    with records.transaction() as writer:
        writer.execute(lineage.insert().values(child="a", parent="b", created_at=NOW))
        with records.snapshot() as reader:  # a second writer would wait here for 30 s
            assert reader.execute(select(func.count()).select_from(lineage)).scalar_one() == 0
    with records.snapshot() as reader:
        assert reader.execute(select(func.count()).select_from(lineage)).scalar_one() == 1
    assert _count(records) == 1  # the option does not stay with the pooled connection
    records.close()


def test_times_come_back_in_utc_and_naive_ones_are_refused(database_url: str) -> None:
    records = Records(database_url)
    records.migrate()
    with records.transaction() as connection:
        connection.execute(lineage.insert().values(child="a", parent="b", created_at=NOW))
    with records.transaction() as connection:
        assert connection.execute(select(lineage.c.created_at)).scalar_one() == NOW
    with pytest.raises(StatementError, match="time zone"), records.transaction() as connection:
        connection.execute(lineage.insert().values(child="c", parent="b", created_at=datetime(2026, 1, 2)))
    records.close()


def test_migrations_build_what_the_rooms_declare(database_url: str) -> None:
    import sihe.apps.coach.tables
    import sihe.serving.tables
    import sihe.serving.tenants.tables  # noqa: F401 - the imports register the rooms' tables

    records = Records(database_url)
    records.migrate()
    records.migrate()  # a second time changes nothing
    declared = set(metadata.tables)
    with records.engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "include_object": lambda _object, name, kind, _reflected, _other: kind != "table" or name in declared,
                "version_table": "sihe_schema_version",
            },
        )
        assert compare_metadata(context, metadata) == []
        assert declared <= set(inspect(connection).get_table_names())
    records.close()


def test_every_table_of_ours_is_prefixed() -> None:
    import sihe.apps.coach.tables
    import sihe.serving.tables
    import sihe.serving.tenants.tables  # noqa: F401

    assert [name for name in metadata.tables if not name.startswith("sihe_")] == []


@pytest.mark.parametrize("url", ["mysql://x/y", "nonsense", "oracle://u@h/d"])
def test_other_databases_are_refused_by_name(url: str) -> None:
    with pytest.raises(ConfigError, match=r"records\.url"):
        Records(url)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(b"not a database, certainly" * 100)
    records = Records(f"sqlite:///{path}")
    with pytest.raises(CorruptData, match=r"x\.db"):
        records.migrate()
    records.close()


def test_a_server_that_is_not_there_is_unreachable() -> None:
    records = Records("postgresql://nobody:secret@127.0.0.1:9/none")
    with pytest.raises(Unreachable) as caught:
        records.migrate()
    assert "secret" not in str(caught.value)
    records.close()
