"""The training worker with a chosen accident: `DOOM` is `<what>:<rank>:<step>,…`, each happens once (in `DOOM_FOLDER`).

`kill` SIGKILLs the rank before its step; `orphan` SIGKILLs the launcher; `full` makes every fsync from that step on
fail as on a full disk, for the rest of the attempt; `hang` stops the rank. Everything else is the real worker.
"""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import NoReturn

import numpy as np

from sihe.cluster.launchers.rank import LAUNCHER_PID, supervised
from sihe.training.worker import main


def doomed() -> None:
    from sihe.training.step import StepOutcome, TrainStep

    accidents = {}
    for item in filter(None, os.environ["DOOM"].split(",")):
        what, rank, step = item.split(":")
        if int(rank) == int(os.environ["RANK"]):
            accidents[int(step)] = what
    honest = TrainStep.__call__

    def step_or_doom(self: TrainStep, step: int, batch: np.ndarray) -> StepOutcome:
        if step in accidents and first_time(f"{accidents[step]}-{step}"):
            happen(accidents[step])
        return honest(self, step, batch)

    TrainStep.__call__ = step_or_doom  # type: ignore[method-assign]
    main()


def first_time(name: str) -> bool:
    try:
        (Path(os.environ["DOOM_FOLDER"]) / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def happen(what: str) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "orphan":
        os.kill(int(os.environ[LAUNCHER_PID]), signal.SIGKILL)
        signal.pause()  # until the kernel takes this rank along
    elif what == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "full":
        os.fsync = no_space
    else:
        raise ValueError(what)


def no_space(_descriptor: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    supervised(doomed)
