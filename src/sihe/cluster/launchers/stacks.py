"""What hung ranks were doing: the stacks of their threads, and what the system says about their processes.

A rank answers a signal by writing its stacks, also while its main thread waits in native code (`faulthandler`). A
process that is stopped cannot answer, and one that has not come so far must not be asked: the signal would kill it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

STACKS_FILE = "SIHE_STACKS_FILE"
"""The environment variable through which a rank learns where its stacks go."""
DUMP_SIGNAL = signal.SIGUSR1
_WAIT_S = 2.0  # for the answers; a dump of some hundred lines takes milliseconds
_LOOK_S = 0.05


def state_of(pid: int) -> str:
    """The state of a process in the system's words, such as "S (sleeping)"; "unknown" where there is no `/proc`."""
    return _status(pid).get("State", "unknown")


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process. One that a debugger holds is not stopped in this sense."""
    with suppress(OSError, IndexError):
        # The second field is the program's name in brackets, which may itself hold brackets and blanks.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def collect(pids: Mapping[int, int], path_of: Callable[[int], Path], wait: Callable[[float], object]) -> None:
    """Appends to `path_of(rank)` the state of the process of each rank, and the stacks of those that can answer.

    `wait(s)` passes the time until they have answered.
    """
    asked: dict[Path, int] = {}
    for rank, pid in pids.items():
        path = path_of(rank)
        can_answer = _catches(pid) and not is_stopped(pid)
        # On a full disk the stacks are lost; that the ranks hang is reported all the same.
        with suppress(OSError):
            with path.open("a", encoding="utf-8") as file:
                file.write(f"rank {rank}: process {pid} is {state_of(pid)}, waits in {_waits_in(pid)}\n")
                if not can_answer:
                    file.write("it cannot answer with its stacks: it is stopped, gone, or has not come so far\n")
            asked[path] = path.stat().st_size
        if not can_answer:
            asked.pop(path, None)
            continue
        with suppress(ProcessLookupError):
            os.kill(pid, DUMP_SIGNAL)
    left_s = _WAIT_S
    while left_s > 0 and any(path.stat().st_size == size for path, size in asked.items()):
        wait(_LOOK_S)
        left_s -= _LOOK_S


def _catches(pid: int) -> bool:
    """Whether the process has a handler for the signal; where the system does not say, it is taken to have one."""
    caught = _status(pid).get("SigCgt")
    return caught is None or bool(int(caught, 16) >> (DUMP_SIGNAL - 1) & 1)


def _status(pid: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _waits_in(pid: int) -> str:
    """The kernel function in which the main thread waits, where the system tells it to us."""
    try:
        name = Path(f"/proc/{pid}/wchan").read_text().strip()
    except OSError:
        return "unknown"
    return name if name not in ("", "0") else "no kernel function"
