"""How much memory this process has come to hold."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_KIB = 1024
_STATUS = Path("/proc/self/status")


class ResidentMemory:
    """Counts from when it is made. Interpreter and libraries, which are there by then, do not count."""

    def __init__(self) -> None:
        self._before = _resident()

    def growth(self) -> int:
        """Bytes between what was resident at the start and the most that ever was; never less than 0."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else _KIB)
        return max(0, peak - self._before)


def _resident() -> int:
    """Bytes that are resident now; where the system does not say, the most that were so far."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * _KIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else _KIB)
