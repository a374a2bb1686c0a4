"""The training loop of one rank: from the newest checkpoint, or the start, to the last step and the exported model."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch

from sihe.cluster.heartbeats import Heartbeat
from sihe.data.loading.prefetch import Prefetcher
from sihe.data.loading.samples import Batch
from sihe.models.decoder import Decoder
from sihe.training import layout
from sihe.training.batches import open_batches
from sihe.training.checkpoint import Checkpoint, Checkpoints
from sihe.training.errors import NothingToRewind
from sihe.training.export import DTYPES, export_checkpoint
from sihe.training.loss_scale import LossScale
from sihe.training.memory import ResidentMemory
from sihe.training.optimizer import MasterOptimizer
from sihe.training.optimizers.catalog import make_rule
from sihe.training.parallel.apply import ParallelModel
from sihe.training.parallel.mesh import ParallelMesh
from sihe.training.plan import TrainPlan
from sihe.training.progress import EventWriter
from sihe.training.pulse import Pulse
from sihe.training.ranks import Ranks
from sihe.training.recovery import resized
from sihe.training.rewinds import Rewinds
from sihe.training.step import TrainStep
from sihe.training.types import AttemptReady, RankMemory, StepDone, WorkerEvent


class TrainLoop:
    """One rank's part of the run in `folder`. The first rank also logs, saves checkpoints and exports."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.plan = TrainPlan.read(folder / layout.PLAN)
        config = self.plan.config
        self._folder = folder
        self._ranks = ranks
        self._attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) + 1
        self._events = EventWriter(folder / layout.EVENTS) if ranks.is_first else None
        self._checkpoints = Checkpoints(
            folder / layout.CHECKPOINTS,
            self.plan.identity,
            keep=config.keep_checkpoints,
            ranks=ranks,
            background=config.background_checkpoints,
        )
        self._memory = ResidentMemory()
        torch.manual_seed(config.seed)  # every rank draws the same first weights
        self.model = Decoder(self.plan.model)
        self._spread = resized(config.plan, ranks.world_size)  # an elastic run has fewer or more than it asked for
        mesh = ParallelMesh(self._spread, timeout_s=config.collective_timeout_s) if ranks.world_size > 1 else None
        self._parallel = ParallelModel(self.model, mesh, dtype=DTYPES[config.precision], recomputed=config.recompute)
        self._optimizer = MasterOptimizer(
            self._parallel.held,
            make_rule(config.optimizer.kind, config.optimizer.settings),
            clip_norm=config.clip_norm,
            ema_decay=config.ema_decay,
            mesh=mesh,
        )
        schedule = self.plan.schedule
        self._loss_scale = LossScale() if config.precision == "fp16" else None
        self._step = TrainStep(
            self._parallel,
            self._optimizer,
            schedule,
            ranks,
            micro_batch=config.micro_batch,
            loss_scale=self._loss_scale,
        )
        self._batches: Prefetcher[np.ndarray | Batch] | None = None
        self._pulse = Pulse(self.model.blocks, Heartbeat.from_environment())
        self._rewinds = Rewinds(folder, config.recovery, ranks, self._log, attempt=self._attempt)

    def run(self) -> bool:
        """Trains to the last step and exports the model; `False` when the ranks leave at a checkpoint before."""
        try:
            return self._run()
        finally:
            # A thread that still reads when the interpreter ends is torn out of foreign code, which aborts the process.
            if self._batches is not None:
                self._batches.close()

    def _run(self) -> bool:
        config = self.plan.config
        checkpoint = self._resume()
        step = checkpoint.step if checkpoint else 0
        batches = self._read_from(checkpoint.next_sample if checkpoint else 0)
        self._rewinds.resume(step)
        self._log(AttemptReady(self._attempt, step, batches.next_sample))
        while step < config.max_steps:
            step += 1
            if (first_sample := self._rewinds.next_sample(batches.next_sample)) != batches.next_sample:
                batches = self._read_from(first_sample)
            self._pulse.begin(step)
            started = time.perf_counter()
            batch = next(batches)
            waited_s = time.perf_counter() - started
            outcome = self._step(step - 1, batch)
            seconds = time.perf_counter() - started
            self._pulse.end(step)
            if self._rewinds.rejects(step, outcome, first_sample=first_sample, next_sample=batches.next_sample):
                checkpoint = self._go_back(step)
                step, batches = checkpoint.step, self._read_from(checkpoint.next_sample)
                continue
            next_sample = batches.next_sample
            self._log(
                StepDone(
                    self._attempt,
                    step,
                    **vars(outcome),
                    seconds=seconds,
                    next_sample=next_sample,
                    data_seconds=waited_s,
                )
            )
            if step % config.checkpoint_every == 0 or step == config.max_steps:
                self._save(step, next_sample)
                if step < config.max_steps and self._ranks.from_first(self._pulse.heartbeat.is_leave_wanted):
                    self._finish_saving()  # the ranks that come after these go on from it
                    return False
        self._finish_saving()
        self._log(RankMemory(self._ranks.largest(self._memory.growth())))
        if self._ranks.is_first:
            with self._pulse.heartbeat.slow():
                self._export()
        return True

    def _read_from(self, sample: int) -> Prefetcher[np.ndarray | Batch]:
        """This rank's batches from `sample` on; those that were read ahead from elsewhere are dropped."""
        if self._batches is not None:
            self._batches.close()
        stream = open_batches(
            self.plan.config,
            self.plan.dataset,
            self.plan.sources,
            cache=self.plan.cache,
            rank=self._parallel.batch_rank,
            ranks=self._spread.batch_ranks,
            start_sample=sample,
        )
        self._batches = Prefetcher(stream, depth=self.plan.config.data.prefetch)
        return self._batches

    def _save(self, step: int, next_sample: int) -> None:
        state = {"loss_scale": self._loss_scale.state()} if self._loss_scale else {}
        with self._pulse.heartbeat.slow():
            self._checkpoints.save(
                step,
                next_sample,
                self.model,
                self._optimizer,
                self._parallel.buffers(),
                of_rank=self._parallel.rank_state(),
                state=state,
            )
        self._log_saved()

    def _finish_saving(self) -> None:
        with self._pulse.heartbeat.slow():
            self._checkpoints.finish()
        self._log_saved()

    def _log_saved(self) -> None:
        for saved in self._checkpoints.completed():
            self._log(saved)

    def _go_back(self, step: int) -> Checkpoint:
        """The newest checkpoint, loaded, because `step` was not accepted. Raises `NothingToRewind`."""
        with self._pulse.heartbeat.slow():
            checkpoint = self._resume()
        if checkpoint is None:
            raise NothingToRewind(step)
        self._rewinds.back_to(checkpoint.step)
        return checkpoint

    def _resume(self) -> Checkpoint | None:
        """The newest valid checkpoint, loaded; the same on every rank."""
        checkpoint = self._checkpoints.newest(self._log)
        if checkpoint is not None:
            buffers, own = self._parallel.buffers(), self._parallel.rank_state()
            if not checkpoint.load_into(self.model, self._optimizer, buffers, own):
                self._parallel.reset_rank_state()
            if self._loss_scale is not None:
                self._loss_scale.load_state(checkpoint.manifest.state["loss_scale"])
        return checkpoint

    def _export(self) -> None:
        """Writes the model folder from the last checkpoint, since no rank need have all weights."""
        target = self._folder / layout.MODEL
        if not target.exists():  # one that is there already is whole
            export_checkpoint(self._folder, self.plan.config.max_steps, target)

    def _log(self, event: WorkerEvent) -> None:
        if self._events is not None:
            self._events.write(event)
