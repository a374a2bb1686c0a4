"""Which process does a piece of work, written down so that another one can see whether it is gone."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_STARTED = 19  # field of /proc/<pid>/stat behind the name: clock ticks since boot (proc_pid_stat(5), field 22)


def this_process() -> str:
    """This process's mark: machine and boot, number, and when it started, since numbers are used again."""
    return f"{_machine()} {os.getpid()} {_started(os.getpid())}"


def is_gone(mark: str) -> bool:
    """Whether the process that made `mark` has ended. False where that cannot be told: on another machine."""
    machine, pid, started = (*mark.split(" "), "", "", "")[:3]
    return machine == _machine() and pid.isdigit() and _started(int(pid)) != started


@cache
def _machine() -> str:
    boot = ""
    with suppress(OSError):
        boot = _BOOT.read_text(encoding="ascii").strip()
    return f"{socket.gethostname()}/{boot}"


def _started(pid: int) -> str:
    """When process `pid` started, or "alive" where the system does not say; "gone" when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "gone" if fields[0] in ("Z", "X") else fields[_STARTED]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:
        pass
    return "alive"
