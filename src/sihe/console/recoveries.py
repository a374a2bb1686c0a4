"""What a training's own log says beyond its curves: where it went on after a failure, and whether anyone runs it."""

from __future__ import annotations

from sihe.core.tracking import Run
from sihe.core.workspace import Workspace
from sihe.training import layout
from sihe.training.progress import EventReader
from sihe.training.service import EXPERIMENT, TrainingService
from sihe.training.types import AttemptReady


class Recoveries:
    """The steps from which a run went on; reads its log once, and then only what was added."""

    def __init__(self, workspace: Workspace, run_id: str) -> None:
        self._reader = EventReader(workspace.path("runs", run_id, layout.EVENTS))
        self._attempts: list[int] = []

    def steps(self) -> list[int]:
        """One step for each attempt after the first."""
        self._attempts += [event.step for event in self._reader.new() if isinstance(event, AttemptReady)]
        return self._attempts[1:]


def status_of(workspace: Workspace, run: Run) -> str:
    """The run's status; INTERRUPTED for one that says it runs although nobody runs it any more."""
    if run.status == "RUNNING" and run.experiment == EXPERIMENT:
        return TrainingService(workspace).run(run.id).status  # a supervisor may be on another machine
    return "INTERRUPTED" if run.is_abandoned else run.status
