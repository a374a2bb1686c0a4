"""Accidents from outside, at a moment that nobody chose: the launcher with a saboteur beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import pytest

from sihe.cluster.launchers.local import LocalLauncher
from sihe.cluster.types import JobEvent, ProcessJob, RanksStarted, RestartPolicy
from sihe.training import layout
from sihe.training.progress import EventReader
from sihe.training.types import StepDone


@dataclass(frozen=True)
class Moment:
    """`delay_s` after step `step` was logged, and no later than step `latest`; step 0 is the start of the ranks."""

    step: int
    delay_s: float
    latest: int

    @classmethod
    def drawn(cls, random: Random, last_step: int) -> Moment:
        """Any moment of a run of `last_step` steps, imports and meeting included, however fast the machine."""
        step = random.randrange(last_step)
        return cls(step, random.uniform(0, 4.0 if step == 0 else 0.1), latest=last_step - 1)


@dataclass
class SabotagedLauncher:
    """The local launcher; `strike(pids)` happens once, at `moment` (of all runs together)."""

    moment: Moment
    strike: Callable[[tuple[int, ...]], None]
    struck: bool = field(default=False, init=False)

    def run(
        self,
        job: ProcessJob,
        policy: RestartPolicy,
        *,
        on_event: Callable[[JobEvent], None] | None = None,
        on_tick: Callable[[], None] | None = None,
    ) -> int:
        pids: tuple[int, ...] = ()
        due_s: float | None = None
        log = EventReader(Path(job.args[0]) / layout.EVENTS)

        def watch_event(event: JobEvent) -> None:
            nonlocal pids, due_s
            if isinstance(event, RanksStarted):
                pids = event.pids
                if self.moment.step == 0:
                    due_s = due_s or time.monotonic() + self.moment.delay_s
            if on_event:
                on_event(event)

        def watch_time() -> None:
            nonlocal due_s
            newest = max((event.step for event in log.new() if isinstance(event, StepDone)), default=0)
            if due_s is None and newest >= self.moment.step > 0:
                due_s = time.monotonic() + self.moment.delay_s
            if newest >= self.moment.latest:
                due_s = 0
            if due_s is not None and time.monotonic() >= due_s and not self.struck:
                self.struck = True
                self.strike(pids)
            if on_tick:
                on_tick()

        launcher = LocalLauncher(grace_s=1, poll_s=0.01)
        return launcher.run(job, replace(policy, first_delay_s=0), on_event=watch_event, on_tick=watch_time)

    def stop(self) -> None:
        raise NotImplementedError


def signal_one(random: Random, signum: signal.Signals) -> Callable[[tuple[int, ...]], None]:
    """A strike that sends `signum` to any rank, if it still runs."""
    chosen = random.random()

    def strike(pids: tuple[int, ...]) -> None:
        with suppress(ProcessLookupError):
            os.kill(pids[int(chosen * len(pids))], signum)

    return strike


def damage_newest(random: Random, checkpoints: Path) -> None:
    """Flips a bit of any file of the newest checkpoint, or cuts the file short."""
    folders = sorted(checkpoints.glob("step-*"))
    files = sorted(path for path in folders[-1].rglob("*") if path.is_file()) if folders else []
    if not files:
        return
    path = random.choice(files)
    data = bytearray(path.read_bytes())
    if random.random() < 0.3:
        del data[random.randrange(len(data)) :]
    else:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of `size` at `folder`; skips where this process may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, *, leave: int) -> None:
    """Writes the file `ballast`, which leaves about `leave` bytes free."""
    free = os.statvfs(folder)
    with (folder / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        for _ in range(max(0, free.f_bavail * free.f_frsize - leave) // 4096):
            file.write(bytes(4096))
