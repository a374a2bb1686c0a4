"""Shared fixtures: a workspace in a temporary folder, one torch thread a test process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
for _name in [name for name in os.environ if name.startswith("SIHE_")]:
    del os.environ[_name]

from sihe.core import settings  # noqa: E402 - the environment must be clean before anything reads it
from sihe.core.workspace import Workspace  # noqa: E402


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    """A workspace of its own for each test, on SQLite and a local folder."""
    with Workspace(settings.load({"home": str(tmp_path / "home")}, environ={}, directory=tmp_path)) as opened:
        yield opened
