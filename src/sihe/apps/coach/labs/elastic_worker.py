"""The training worker with an appointment: the rank `KILL_RANK` SIGKILLs itself when `KILL_STEP` steps are done, once.

The rest is the real worker. A death at an exact step needs the worker's help: seen from outside, a step of so small a
model is over before a signal arrives.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from sihe.cluster.launchers.rank import supervised
from sihe.training.worker import main

if TYPE_CHECKING:
    import numpy as np

    from sihe.data.loading.samples import Batch
    from sihe.training.step import StepOutcome, TrainStep

KILL_RANK, KILL_STEP, KILL_MARK = "LAB_KILL_RANK", "LAB_KILL_STEP", "LAB_KILL_MARK"


def doomed() -> None:
    """The worker's `main`, with the appointment kept."""
    from sihe.training.step import TrainStep

    honest = TrainStep.__call__
    fatal, mark = int(os.environ[KILL_STEP]), Path(os.environ[KILL_MARK])

    def step_or_die(self: TrainStep, step: int, batch: np.ndarray | Batch) -> StepOutcome:
        if step == fatal and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(self, step, batch)

    if os.environ["RANK"] == os.environ[KILL_RANK]:
        TrainStep.__call__ = step_or_die  # type: ignore[method-assign]
    main()


if __name__ == "__main__":
    supervised(doomed)
