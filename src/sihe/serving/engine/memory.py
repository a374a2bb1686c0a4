"""How much memory is free, so that what does not fit is refused before the system kills the process for it; and when
Python looks for objects that nobody holds."""

from __future__ import annotations

import gc
import os
from functools import cache
from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that can be allocated without swapping: the machine's, or the control group's if that has fewer."""
    candidates = [_machine(root)]
    limit = _read(root / "sys/fs/cgroup/memory.max")
    used = _read(root / "sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        candidates.append(max(0, limit - used))
    return min(candidates)


@cache
def collect_garbage_once() -> None:
    """Goes through all objects now, and not while the first requests are answered.

    The libraries alone bring 400,000 of them: some 160 ms in which no thread runs. From then on they count as old, and
    Python goes through those again only when a quarter as many others have grown old.
    """
    gc.collect()


def _machine(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux: what the machine has in all is the best that the standard library knows
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    values = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines)}
    return values["MemAvailable"] * 1024


def _read(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such control group, or "max"
        return None
