"""The loop that every stage of every recipe runs: loss, gradients summed over ranks, update, measurement, checkpoint.

An objective gives a sum over its items and how many they are, so that the step is the same however the global batch
is shared out over ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sihe.core.files import write_file
from sihe.training.errors import Diverged
from sihe.training.gradients import GradientBuffer
from sihe.training.optimizer import MasterOptimizer
from sihe.training.optimizers.adamw import AdamW
from sihe.training.ranks import Ranks
from sihe.training.recipes.config import Update
from sihe.training.recipes.types import Measured, RecipeEvent, StageStep
from sihe.training.schedule import CosineSchedule

if TYPE_CHECKING:
    from sihe.training.checkpoint import Checkpoints
    from sihe.training.recipes.ports import Objective


class StageLoop:
    """Trains one objective to its last step, from its newest checkpoint where there is one."""

    def __init__(
        self,
        name: str,
        objective: Objective,
        update: Update,
        ranks: Ranks,
        *,
        checkpoints: Checkpoints | None = None,
        history: Path | None = None,
        checkpoint_every: int = 100,
        on_event: Callable[[RecipeEvent], None] = lambda _event: None,
    ) -> None:
        self._name = name
        self._objective = objective
        self._update = update
        self._ranks = ranks
        self._checkpoints = checkpoints
        self._history = history
        self._every = checkpoint_every
        self._on_event = on_event
        self._gradients = GradientBuffer(objective.module.parameters())
        self._optimizer = MasterOptimizer(
            objective.module, AdamW(weight_decay=update.weight_decay), clip_norm=update.clip_norm
        )
        self._schedule = CosineSchedule(
            peak_lr=update.peak_lr,
            warmup_steps=update.warmup_steps,
            total_steps=update.steps,
            min_ratio=update.min_lr_ratio,
        )

    def run(self) -> None:
        """Trains. Measurements of the steps that a checkpoint has behind it come first, from `history`.

        Raises `Diverged`.
        """
        done = self._resume()
        measured = self._replay(done)
        if done == 0:
            self._measure(0, measured)
        for step in range(done + 1, self._update.steps + 1):
            self._on_event(StageStep(self._name, step, self.step(step - 1)))
            if step % self._update.eval_every == 0 or step == self._update.steps:
                self._measure(step, measured)
            if step % self._every == 0 or step == self._update.steps:
                self._save(step)

    def step(self, step: int) -> dict[str, float]:
        """One update; its metrics as means over the global batch. The gradients stay until the next."""
        self._gradients.zero_()
        terms = self._objective.terms(step)
        if terms.weight > 0:
            terms.loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        sums = {"loss": float(terms.loss.detach()), **terms.metrics}
        shared = self._ranks.sum_(torch.tensor([*sums.values(), terms.weight], dtype=torch.float64)).tolist()
        weight = max(shared[-1], 1e-12)
        self._ranks.sum_(self._gradients.flat)
        self._gradients.flat.mul_(1 / weight)
        lr = self._schedule.at(step)
        norm = self._optimizer.step(lr)
        means = {name: value / weight for name, value in zip(sums, shared, strict=False)}
        if not (math.isfinite(means["loss"]) and math.isfinite(norm)):
            raise Diverged(step + 1, means["loss"], norm)
        return {**means, "grad_norm": norm, "lr": lr}

    def _measure(self, step: int, measured: list[Measured]) -> None:
        if self._ranks.is_first:
            event = Measured(self._name, step, self._objective.measure())
            measured.append(event)
            if self._history is not None:
                lines = [[item.step, dict(item.metrics)] for item in measured]
                write_file(self._history, json.dumps(lines).encode())
            self._on_event(event)

    def _replay(self, done: int) -> list[Measured]:
        """What an earlier attempt measured up to step `done`."""
        if self._history is None or not self._history.exists():
            return []
        past = [Measured(self._name, step, metrics) for step, metrics in json.loads(self._history.read_bytes())]
        kept = [event for event in past if done and event.step <= done]
        if self._ranks.is_first:
            for event in kept:
                self._on_event(event)
        return kept

    def _save(self, step: int) -> None:
        if self._checkpoints is not None:
            self._checkpoints.save(step, 0, self._objective.module, self._optimizer)

    def _resume(self) -> int:
        """The step of the newest valid checkpoint, loaded; 0 without one."""
        if self._checkpoints is None:
            return 0
        newest = self._checkpoints.newest(lambda _skipped: None)
        if newest is None:
            return 0
        newest.load_into(self._objective.module, self._optimizer)
        return newest.step
