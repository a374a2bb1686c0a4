"""The contenders as processes, of which one at a time is awake: a signal stops the others, so that none spins."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import HERE, python_of

OURS = "sihe"
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ContenderFailed(Exception):
    """A contender is not installed, does not load, or cannot do what was ordered."""


@dataclass(frozen=True)
class Entry:
    """Who contends: a module of this package, in the project's environment or in that of `peers-<environment>.txt`."""

    module: str
    precision: str
    environment: str | None = None

    @property
    def name(self) -> str:
        """Unique within a run."""
        return f"{self.module} {self.precision}"


@dataclass(frozen=True)
class Measured:
    """One order carried out: how long it took, what share of the machine others had meanwhile, the first answer."""

    seconds: float
    disturbed: float
    first: tuple[int, ...]


class Contender:
    """One engine in a process of its own, asleep but for `measure`. `close` it when done."""

    def __init__(self, entry: Entry, folder: Path, *, context: int, log: Path, urgent: bool = False) -> None:
        self.entry = entry
        self._urgent = urgent
        python = python_of("serving", entry.environment) if entry.environment else Path(sys.executable)
        if python is None:
            raise ContenderFailed(f"{entry.name} is not installed: make peers ROOM=serving")
        self._log = log
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [
                    str(python),
                    "-m",
                    f"benchmarks.serving.contenders.{entry.module}",
                    str(folder),
                    entry.precision,
                    str(context),
                ],
                cwd=HERE.parent,
                env=os.environ | {"OMP_NUM_THREADS": str(THREADS), "NUMBA_NUM_THREADS": str(THREADS)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                text=True,
            )
        try:
            self._answer()
        except ContenderFailed:
            self.close()
            raise
        os.killpg(self._process.pid, signal.SIGSTOP)

    def measure(self, *, batch: int, prompt: int, tokens: int, seed: int) -> Measured:
        """Greedy answers of `tokens` tokens to `batch` new prompts of `prompt` tokens. Raises `ContenderFailed`."""
        order = {"batch": batch, "prompt": prompt, "tokens": tokens, "seed": seed}
        assert self._process.stdin is not None
        with first(self._process.pid, really=self._urgent):
            started_s, busy_s = time.perf_counter(), _busy_s()
            os.killpg(self._process.pid, signal.SIGCONT)
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            found = self._answer()
            os.killpg(self._process.pid, signal.SIGSTOP)
        others_s = _busy_s() - busy_s - float(found["cpu_seconds"])
        disturbed = max(0.0, others_s / THREADS / (time.perf_counter() - started_s))
        return Measured(float(found["seconds"]), disturbed, tuple(found["first"]))

    def close(self) -> None:
        """Ends the process and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line else {"error": f"its process ended, see {self._log}"}
        if "error" in found:
            raise ContenderFailed(f"{self.entry.name}: {found['error']}")
        return found


def _busy_s() -> float:
    """Seconds that this machine's processors have worked since it started; 0 where the system does not say."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _idle, _waiting, interrupts, soft, stolen = map(int, path.read_text().split()[1:9])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def first(process: int, *, really: bool = True) -> Iterator[None]:
    """A process goes before all others on a machine that is not idle (Linux, as root); `really` false: it does not.

    Niceness is not enough: it counts within a session, and sessions share evenly (sched(7), "The autogroup feature").
    """
    if not really:
        yield
        return
    _set_policy(process, os.SCHED_FIFO, 1)
    try:
        yield
    finally:
        _set_policy(process, os.SCHED_OTHER, 0)


def _set_policy(process: int, policy: int, priority: int) -> None:
    for thread in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setscheduler(int(thread.name), policy, os.sched_param(priority))


def end_on_signal() -> None:
    """Lets a signal to end this process run its `finally`s, which end those that it started."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


@contextlib.contextmanager
def quiet(lock: Path | None) -> Iterator[None]:
    """Holds the file at `lock`, which whoever else computes on this machine shares, so that timings are undisturbed."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
