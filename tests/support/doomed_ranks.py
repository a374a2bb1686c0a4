"""The training worker with a chosen accident: `DOOM` is `<what>:<rank>:<step>,…`, each happens once (in `DOOM_FOLDER`).

Before its step, `kill` SIGKILLs the rank, `orphan` its launcher, and `hang` stops the rank; `wait` holds it until the
launcher wants another number of ranks. `nan` spoils a gradient of the step, `poison` does so whenever its samples come.
For the rest of the attempt `slow` makes the first block slow, and `full` makes every fsync fail as on a full disk.
Everything else is the real worker.
"""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from sihe.cluster.heartbeats import Heartbeat
from sihe.cluster.launchers.rank import LAUNCHER_PID, supervised
from sihe.training.worker import main

if TYPE_CHECKING:
    from torch import Tensor

    from sihe.training.parallel.apply import ParallelModel
    from sihe.training.step import StepOutcome, TrainStep

_SLOW_S = 0.05


def doomed() -> None:
    from sihe.training.step import TrainStep

    accidents = {}
    for item in filter(None, os.environ["DOOM"].split(",")):
        what, rank, step = item.split(":")
        if int(rank) == int(os.environ["RANK"]):
            accidents[int(step)] = what
    honest = TrainStep.__call__

    def step_or_doom(self: TrainStep, step: int, batch: np.ndarray) -> StepOutcome:
        what = accidents.get(step)
        if what and first_time(f"{what}-{step}"):
            happen(what, self._model, batch)
        if poisoned(batch).exists():
            spoil(self._model)
        return honest(self, step, batch)

    TrainStep.__call__ = step_or_doom  # type: ignore[method-assign]
    main()


def first_time(name: str) -> bool:
    try:
        (Path(os.environ["DOOM_FOLDER"]) / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def happen(what: str, model: ParallelModel, batch: np.ndarray) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "orphan":
        os.kill(int(os.environ[LAUNCHER_PID]), signal.SIGKILL)
        signal.pause()  # until the kernel takes this rank along
    elif what == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "wait":
        heartbeat = Heartbeat.from_environment()
        while not heartbeat.is_leave_wanted:
            time.sleep(0.01)
    elif what == "nan":
        spoil(model)
    elif what == "poison":
        poisoned(batch).touch()
    elif what == "slow":
        attention = next(part.attention for part in model.stages[0].modules() if hasattr(part, "attention"))
        attention.register_forward_pre_hook(lambda *_: time.sleep(_SLOW_S))
    elif what == "full":
        os.fsync = no_space
    else:
        raise ValueError(what)


def spoil(model: ParallelModel) -> None:
    """Makes the next gradient of one weight NaN, on this rank."""

    def once(gradient: Tensor) -> Tensor:
        handle.remove()
        return gradient * float("nan")

    handle = model.held[0].parameter.register_hook(once)


def poisoned(batch: np.ndarray) -> Path:
    """The file that says that these samples are bad."""
    digest = hashlib.sha256(np.ascontiguousarray(batch)).hexdigest()[:16]
    return Path(os.environ["DOOM_FOLDER"]) / f"poisoned-{digest}"


def no_space(_descriptor: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    supervised(doomed)
