"""Where the real traces and judgments lie that some tests use; the product itself never needs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_data(name: str) -> Path:
    """The file or folder `name` of the shared data; skips the test, visibly, where it is absent."""
    root = Path(os.environ.get("TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    path = root / name
    if not path.exists():
        pytest.skip(f"shared test data {name!r} is not here (set TEST_DATA to its folder)")
    return path
