"""The records database under test: the same tests on SQLite and on a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sihe.core import settings
from sihe.core.workspace import Workspace
from support.debian import postgres_server


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    with postgres_server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh, empty database on each backend."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'records.db'}"
    import psycopg

    server: str = request.getfixturevalue("postgres_url")
    name = f"t{abs(hash(str(tmp_path))):x}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return server.rpartition("/")[0] + f"/{name}"


@pytest.fixture
def both(tmp_path: Path, database_url: str) -> Iterator[Workspace]:
    """A workspace on each backend in turn."""
    flags = {"home": str(tmp_path / "home"), "records.url": database_url}
    with Workspace(settings.load(flags, environ={}, directory=tmp_path)) as opened:
        yield opened
