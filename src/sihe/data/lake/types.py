"""Values of the lake."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class Commit:
    """One version of a table: what made it, when, and how many rows it added. `key` is the append's, if it had one."""

    version: int
    at: datetime
    operation: str
    rows_added: int | None
    key: str | None
