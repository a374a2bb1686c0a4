"""The training worker with a chosen accident: `DOOM` is `<what>:<rank>:<step>,…`, each happens once (in `DOOM_FOLDER`).

`kill` SIGKILLs the rank before its step; `orphan` SIGKILLs the launcher; `full` makes every fsync from that step on
fail as on a full disk, for the rest of the attempt; `hang` stops the rank. `nan` spoils a gradient in that step;
`poison` spoils it whenever the step's samples come; `nans` from that step on; `spike` makes the loss of the step ten
times as large. `slow` makes every block slow from that step on. Everything else is the real worker.
"""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from sihe.cluster.launchers.rank import LAUNCHER_PID, supervised
from sihe.training.worker import main

if TYPE_CHECKING:
    from torch import Tensor

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
        what = accidents.get(step, "")
        spoilt = False
        if what == "poison" and first_time(f"poison-{step}"):
            mark(batch)
        elif what in ("nan", "spike", "nans", "slow"):
            spoilt = first_time(f"{what}-{step}") or what == "nans"
        elif what and what != "poison" and first_time(f"{what}-{step}"):
            happen(what)
        spoilt = spoilt or is_marked(batch) or any(what == "nans" and at <= step for at, what in accidents.items())
        if what == "slow":
            self._model.model.blocks[0].attention.register_forward_pre_hook(lambda *_: time.sleep(_SLOW_S))
            spoilt = False
        if spoilt and what != "spike":
            spoil(next(iter(self._model.model.parameters())))
        outcome = honest(self, step, batch)
        # As after a fault in this rank's memory, the others see nothing: that they go back too is their agreement.
        return replace(outcome, loss=outcome.loss * 10) if spoilt and what == "spike" else outcome

    TrainStep.__call__ = step_or_doom  # type: ignore[method-assign]
    main()


def spoil(weight: Tensor) -> None:
    """Makes the next gradient of `weight` NaN."""

    def once(gradient: Tensor) -> Tensor:
        handle.remove()
        return gradient * float("nan")

    handle = weight.register_hook(once)


def mark(batch: np.ndarray) -> None:
    (Path(os.environ["DOOM_FOLDER"]) / f"poisoned-{digest(batch)}").touch()


def is_marked(batch: np.ndarray) -> bool:
    return (Path(os.environ["DOOM_FOLDER"]) / f"poisoned-{digest(batch)}").exists()


def digest(batch: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(batch)).hexdigest()[:16]


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
