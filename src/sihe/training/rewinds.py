"""Going back over a step that was not accepted: one rank's side of it, and the record in the run's folder.

The record says what was repeated and what was skipped. Whoever continues the run reads it first, so that the order of
samples stays a function of the seed, the position and this file. All ranks judge the same numbers and agree on the
verdict; the first one writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sihe.core.errors import CorruptData
from sihe.core.files import write_file
from sihe.training import layout
from sihe.training.errors import Diverged
from sihe.training.progress import EventReader
from sihe.training.recovery import LossGuard, RecoveryConfig, Rewind, after_skips, next_rewind
from sihe.training.types import StepDone, StepRejected, StepsSkipped, WorkerEvent

if TYPE_CHECKING:
    from sihe.training.ranks import Ranks
    from sihe.training.step import StepOutcome


class Rewinds:
    """The rewinds of the run in `folder`, past and coming. Raises `CorruptData`."""

    def __init__(
        self, folder: Path, config: RecoveryConfig, ranks: Ranks, log: Callable[[WorkerEvent], None], *, attempt: int
    ) -> None:
        self._path = folder / layout.REWINDS
        self._events = folder / layout.EVENTS
        self._config = config
        self._ranks = ranks
        self._log = log
        self._attempt = attempt
        self._past = read_rewinds(self._path)
        self._guard = LossGuard(config)

    def resume(self, step: int) -> None:
        """Takes the losses up to `step`, with which later ones are compared, from the log of the run."""
        if self._config.spike_factor is None and self._config.spike_zscore is None:
            return
        steps = (event for event in EventReader(self._events).new() if isinstance(event, StepDone))
        self._guard = LossGuard(self._config, {done.step: done.loss for done in steps if done.step <= step})

    def next_sample(self, sample: int) -> int:
        """Where the order goes on when it has come to `sample`."""
        return after_skips(sample, self._past)

    def rejects(self, step: int, outcome: StepOutcome, *, first_sample: int, next_sample: int) -> bool:
        """Whether the run must go back over `step`, on all ranks or none. Raises `Diverged` when it did so too often.

        What happens about it is then on disk.
        """
        objection = self._guard.objection(step, outcome.loss, outcome.grad_norm)
        # A fault in one rank's memory, after the sums, is seen by that rank only: one objection counts for all.
        votes = self._ranks.sum_(torch.tensor([int(objection is not None)]))
        if not int(votes):
            return False
        reason = objection or "another rank does not accept it"
        rewind = next_rewind(
            self._config, self._past, step=step, first_sample=first_sample, next_sample=next_sample, reason=reason
        )
        self._log(StepRejected(self._attempt, step, outcome.loss, outcome.grad_norm, reason))
        if rewind is None:
            raise Diverged(step, outcome.loss, outcome.grad_norm, rewinds=len(self._past))
        self._past = (*self._past, rewind)
        if self._ranks.is_first:
            write_rewinds(self._path, self._past)
        if rewind.action == "skip":
            self._log(StepsSkipped(self._attempt, step, first_sample, next_sample, reason))
        return True

    def back_to(self, step: int) -> None:
        """Forgets the losses after `step`."""
        self._guard.rewind(step)


def read_rewinds(path: Path) -> tuple[Rewind, ...]:
    """The rewinds that are recorded at `path`, oldest first; none without the file. Raises `CorruptData`."""
    try:
        return tuple(Rewind(**values) for values in json.loads(path.read_bytes()))
    except FileNotFoundError:
        return ()
    except (ValueError, TypeError) as error:
        raise CorruptData(path, f"it is not a record of rewinds: {error}") from error


def write_rewinds(path: Path, rewinds: tuple[Rewind, ...]) -> None:
    """Records `rewinds` at `path`, durably. Raises `NoSpace`."""
    write_file(path, json.dumps([asdict(rewind) for rewind in rewinds], indent=1).encode())
