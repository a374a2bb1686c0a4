"""The values of the training room: what happens during a run, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sihe.cluster.types import JobEvent

if TYPE_CHECKING:
    from datetime import datetime

    from sihe.core.tracking import ModelVersion


@dataclass(frozen=True)
class RunOpened:
    """A run begins, or goes on when `resumed`."""

    run_id: str
    folder: Path
    max_steps: int
    num_parameters: int
    tokens_per_step: int
    resumed: bool


@dataclass(frozen=True)
class AttemptReady:
    """The ranks have met and go on after `step` (0: from the start)."""

    attempt: int
    step: int
    next_sample: int


@dataclass(frozen=True)
class StepDone:
    """One optimizer step. `samples` is a digest of the tokens that all ranks consumed in it, in their order."""

    attempt: int
    step: int
    loss: float
    """Mean negative log-likelihood of a target token, in nats, over the global batch."""
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    seconds: float
    samples: str
    next_sample: int
    data_seconds: float = 0.0
    """Of `seconds`, what the first rank waited for its batch."""

    @property
    def tokens_per_s(self) -> float:
        """Target tokens a second, all ranks together."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class RankMemory:
    """What the fullest rank had in memory at its peak, above what it had before there was a model."""

    peak_bytes: int


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is complete on disk."""

    step: int
    path: str
    size_bytes: int
    seconds: float


@dataclass(frozen=True)
class CheckpointSkipped:
    """A damaged checkpoint was moved aside to `path`; the run goes on from an older one."""

    path: str
    reason: str


@dataclass(frozen=True)
class StepRejected:
    """The loss or gradient norm of a step is no number, or a spike: the run goes back to its newest checkpoint."""

    attempt: int
    step: int
    loss: float
    grad_norm: float
    reason: str


@dataclass(frozen=True)
class StepsSkipped:
    """Samples [`first_sample`, `next_sample`), which were those of `step`, are left out of the run from now on."""

    attempt: int
    step: int
    first_sample: int
    next_sample: int
    reason: str


WorkerEvent = AttemptReady | StepDone | RankMemory | CheckpointSaved | CheckpointSkipped | StepRejected | StepsSkipped
TrainEvent = RunOpened | WorkerEvent | JobEvent


@dataclass(frozen=True)
class TrainResult:
    """What a finished run gives."""

    run_id: str
    model_version: ModelVersion
    folder: Path
    """The run's folder: log of steps, checkpoints, logs of the ranks."""
    steps: int
    final_loss: float
    tokens_per_s: float
    """Over all steps, without start-up and checkpoints."""
    restarts: int
    """Of this call."""


@dataclass(frozen=True)
class TrainRun:
    """A run as the listing shows it."""

    id: str
    name: str
    status: str
    """RUNNING, INTERRUPTED (its supervisor is gone; the same call continues it), FINISHED, FAILED or KILLED."""
    started_at: datetime
    step: int
    max_steps: int
    loss: float | None
    tokens_per_s: float | None
    config: dict[str, Any]
