"""Small training runs with real ranks, and what their logs say."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sihe.cluster.errors import JobStopped
from sihe.cluster.launchers.local import LocalLauncher
from sihe.cluster.ports import Launcher
from sihe.cluster.types import JobEvent, ProcessJob, RestartPolicy
from sihe.training.config import ModelShape, TrainConfig
from sihe.training.loop import TrainLoop
from sihe.training.progress import EventReader
from sihe.training.ranks import Ranks
from sihe.training.types import StepDone

TESTS = Path(__file__).parents[1]
SHAPE = ModelShape(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2)


def small_config(dataset: Path, **changes: Any) -> TrainConfig:
    """Two ranks, 20 steps of 8 samples with 16 tokens, a checkpoint every 4 steps."""
    values: dict[str, Any] = {
        "dataset": str(dataset),
        "model": SHAPE,
        "model_name": "small",
        "sequence_length": 16,
        "micro_batch": 2,
        "global_batch": 8,
        "max_steps": 20,
        "peak_lr": 3e-3,
        "warmup_steps": 4,
        "world_size": 2,
        "threads_per_rank": 1,
        "checkpoint_every": 4,
        "keep_checkpoints": 2,
        "precision": "fp32",
        "background_checkpoints": False,  # so that a strike at a step finds the checkpoints of the steps before
    }
    return TrainConfig(**values | changes)


@dataclass
class DoomedLauncher:
    """A launcher, by default the local one, with ranks that have accidents (`support.doomed_ranks`)."""

    doom: str
    folder: Path
    launcher: Launcher = field(default_factory=lambda: LocalLauncher(grace_s=1))

    def run(
        self,
        job: ProcessJob,
        policy: RestartPolicy,
        *,
        on_event: Callable[[JobEvent], None] | None = None,
        on_tick: Callable[[], None] | None = None,
    ) -> int:
        env = {"DOOM": self.doom, "DOOM_FOLDER": str(self.folder), "PYTHONPATH": python_path()}
        doomed = replace(job, module="support.doomed_ranks", env=env)
        return self.launcher.run(doomed, replace(policy, first_delay_s=0), on_event=on_event, on_tick=on_tick)

    def stop(self) -> None:
        raise NotImplementedError


def python_path() -> str:
    """The search path of a rank that needs the tests' modules beside what this process has."""
    return os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH", ""))))


class InProcess:
    """A launcher that runs one rank in this process; `stop_first` interrupts the first call before its first step."""

    def __init__(self, *, stop_first: bool = False) -> None:
        self.jobs: list[ProcessJob] = []
        self._stop_next = stop_first

    def run(
        self,
        job: ProcessJob,
        policy: RestartPolicy,
        *,
        on_event: Callable[[JobEvent], None] | None = None,
        on_tick: Callable[[], None] | None = None,
    ) -> int:
        self.jobs.append(job)
        if self._stop_next:
            self._stop_next = False
            raise JobStopped(job.name, 15)
        TrainLoop(Path(job.args[0]), Ranks()).run()
        return 0

    def stop(self) -> None:
        raise NotImplementedError


def steps_of(folder: Path) -> list[StepDone]:
    """Every step in a run's log, in the order in which they were computed."""
    return [event for event in EventReader(folder / "events.jsonl").new() if isinstance(event, StepDone)]


def series(steps: list[StepDone]) -> dict[int, tuple[float, float, float, str, int]]:
    """What each step computed: loss, gradient norm, rate, samples, position. Equal means equal to the last bit."""
    found: dict[int, tuple[float, float, float, str, int]] = {}
    for done in steps:
        values = (done.loss, done.grad_norm, done.lr, done.samples, done.next_sample)
        assert found.setdefault(done.step, values) == values, f"step {done.step} came out differently when repeated"
    return found
