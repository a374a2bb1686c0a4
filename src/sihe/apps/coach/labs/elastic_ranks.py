"""What the process of `elastic.kill` runs: the same training twice, once undisturbed and once with a rank killed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sihe.apps.coach.labs.elastic_worker import KILL_MARK, KILL_RANK, KILL_STEP
from sihe.cluster.launchers.local import LocalLauncher
from sihe.cluster.types import JobEvent, ProcessJob, RestartPolicy
from sihe.core.settings import Settings
from sihe.core.workspace import Workspace
from sihe.data.loading import write_dataset
from sihe.training import layout
from sihe.training.config import ModelShape, TrainConfig
from sihe.training.progress import EventReader
from sihe.training.recipes.arithmetic import write_tokenizer
from sihe.training.service import TrainingService
from sihe.training.types import AttemptReady, StepDone

GLOBAL_BATCH = 8
MAX_STEPS = 12
_RANKS = 2
_TIME = 16
_VOCABULARY = 64


@dataclass(frozen=True)
class DoomedLauncher:
    """The local launcher, with ranks of which one dies at its step."""

    kill_rank: int
    kill_step: int
    mark: Path
    launcher: LocalLauncher = field(default_factory=lambda: LocalLauncher(grace_s=1))

    def run(
        self,
        job: ProcessJob,
        policy: RestartPolicy,
        *,
        on_event: Callable[[JobEvent], None] | None = None,
        on_tick: Callable[[], None] | None = None,
    ) -> int:
        """As `LocalLauncher.run`."""
        env = {KILL_RANK: str(self.kill_rank), KILL_STEP: str(self.kill_step), KILL_MARK: str(self.mark)}
        doomed = replace(job, module="sihe.apps.coach.labs.elastic_worker", env={**job.env, **env})
        return self.launcher.run(doomed, policy, on_event=on_event, on_tick=on_tick)

    def stop(self) -> None:
        """As `LocalLauncher.stop`."""
        self.launcher.stop()


def kill(rank: int, world_size: int, *, kill_rank: int, kill_step: int, checkpoint_every: int) -> dict[str, Any]:
    """Events of both runs, as plain values."""
    del rank, world_size
    with (
        tempfile.TemporaryDirectory(prefix="sihe-lab-elastic-") as name,
        Workspace(Settings(home=Path(name, "home"))) as workspace,
    ):
        config = _config(_dataset(Path(name, "noise")), checkpoint_every)
        calm = _run(TrainingService(workspace), config)
        launcher = DoomedLauncher(kill_rank, kill_step, Path(name, "mark"))
        struck = _run(TrainingService(workspace, launcher=launcher), config)
    return {"calm": calm, "struck": struck}


def _dataset(folder: Path) -> Path:
    """Noise: what the tokens mean does not matter here."""
    write_tokenizer(folder.with_name("tokenizer"))
    with write_dataset(
        folder,
        name=folder.name,
        version="1",
        vocab_size=_VOCABULARY,
        eos_token_id=1,
        created_at="2026-01-01T00:00:00+00:00",
    ) as writer:
        tokens = np.random.default_rng(0).integers(4, 17, 2 * MAX_STEPS * GLOBAL_BATCH * _TIME)
        writer.append("train", tokens)
        writer.append("held_out", tokens[:256])
        for path in sorted(folder.with_name("tokenizer").iterdir()):
            writer.add_file(path.name, path.read_bytes())
    return folder


def _config(dataset: Path, checkpoint_every: int) -> TrainConfig:
    return TrainConfig(
        dataset=str(dataset),
        model=ModelShape(hidden_size=32, num_layers=2, num_heads=4),
        model_name="struck",
        sequence_length=_TIME,
        micro_batch=2,
        global_batch=GLOBAL_BATCH,
        max_steps=MAX_STEPS,
        peak_lr=3e-3,
        warmup_steps=2,
        world_size=_RANKS,
        threads_per_rank=1,
        checkpoint_every=checkpoint_every,
        precision="fp32",
        background_checkpoints=False,  # a death at a step then finds the checkpoints of all steps before
    )


def _run(service: TrainingService, config: TrainConfig) -> dict[str, Any]:
    result = service.train(config, resume="never")
    events = list(EventReader(result.folder / layout.EVENTS).new())
    return {
        "steps": [
            (done.step, done.loss, done.grad_norm, done.samples, done.next_sample)
            for done in events
            if isinstance(done, StepDone)
        ],
        "ready": [(one.attempt, one.step, one.next_sample) for one in events if isinstance(one, AttemptReady)],
        "restarts": result.restarts,
    }
