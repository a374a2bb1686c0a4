"""Until when logged requests are kept, and what removes them from the lake then.

The time is each deployment's own; what was logged of one that is there no more is kept for the usual time.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path

from sihe.serving.gateway.traffic.types import KEEP_DAYS

EVERY = timedelta(hours=1)  # between looks: a day's last record goes an hour late at most
PURGE_AFTER_H = 1  # who began to read a version before the removal has so long to read it


def expired(keep_days: Mapping[str, int], now: datetime, *, otherwise: int = KEEP_DAYS) -> str:
    """The SQL predicate of records that have been kept long enough. `keep_days` are those of the deployments."""
    groups: dict[int, list[str]] = {}
    for name, days in sorted(keep_days.items()):
        groups.setdefault(days, []).append(quoted(name))
    parts = [f"(deployment IN ({', '.join(names)}) AND {_before(now, days)})" for days, names in groups.items()]
    known = ", ".join(name for names in groups.values() for name in names)
    others = f"deployment NOT IN ({known}) AND " if known else ""
    return " OR ".join([*parts, f"({others}{_before(now, otherwise)})"])


def remove_expired(
    folder: Path, table: str, keep_days: Mapping[str, int], now: datetime, *, purge_after_h: int = PURGE_AFTER_H
) -> bool:
    """Removes what is `expired` from a table of the lake in `folder`, and purges what was removed before that.

    Whether there was anything to remove. Raises what the lake raises.
    """
    from sihe.data.lake.lake import Lake

    found = Lake(folder).table(table)
    removed = found.remove(expired(keep_days, now))
    found.purge(older_than_h=purge_after_h)
    return removed is not None


def quoted(text: str) -> str:
    """A text in SQL."""
    return "'" + text.replace("'", "''") + "'"


def moment(time: datetime) -> str:
    """A time in SQL."""
    return f"'{time.isoformat(timespec='microseconds')}'"


def _before(now: datetime, days: int) -> str:
    return f"time < {moment(now - timedelta(days=days))}"
