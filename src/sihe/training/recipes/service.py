"""Recipes in a workspace: each seed a tracked run, its result a model version whose lineage leads to its base."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sihe.core.errors import ConfigError
from sihe.training.recipes.config import RecipeConfig
from sihe.training.recipes.types import Measured, RecipeEvent, RecipeResult, StageStep

if TYPE_CHECKING:
    from sihe.core.tracking import ModelVersion
    from sihe.core.workspace import Workspace
    from sihe.models.decoder import Decoder
    from sihe.training.recipes.ports import OpenRollout

EXPERIMENT = "post-training"
_IDENTITY_TAG = "sihe.identity"


class RecipeService:
    """Runs recipes. `open_rollout` gives the serving engine to the stages that sample with it."""

    def __init__(self, workspace: Workspace, *, open_rollout: OpenRollout | None = None) -> None:
        self._workspace = workspace
        self._open_rollout = open_rollout

    def run(
        self,
        config: RecipeConfig,
        seeds: Sequence[int] = (0,),
        *,
        on_event: Callable[[int, RecipeEvent], None] = lambda _seed, _event: None,
    ) -> list[RecipeResult]:
        """Runs the recipe once for each seed. What an earlier run has computed already, to the last
        checkpoint of a stage that both have, is taken from there.

        `on_event` is called with the seed and what happens. Raises `UserError`s of the input, `StaleRollouts`.
        """
        if not seeds:
            raise ConfigError("a recipe needs at least one seed", key="seeds")
        return [self._run(replace(config, seed=seed), on_event) for seed in seeds]

    def _run(self, config: RecipeConfig, on_event: Callable[[int, RecipeEvent], None]) -> RecipeResult:
        from sihe.training.recipes.stages import Stages

        tracking = self._workspace.tracking
        run_id = self._unfinished(config) or tracking.start_run(
            EXPERIMENT,
            f"{config.name} seed {config.seed}",
            params=_params(config),
            tags={_IDENTITY_TAG: identity_digest(config), "recipe": config.name, "seed": str(config.seed)},
        )
        tracking.end_run(run_id, "RUNNING")
        log = _Log(self._workspace, run_id, lambda event: on_event(config.seed, event))
        folder = self._workspace.path("recipes")
        started_s = self._workspace.clock.monotonic_s()
        try:
            made = Stages(config, folder, open_rollout=self._open_rollout, on_event=log).run()
            base = self._register(f"{config.name}-base", made.base, run_id, [f"run:{run_id}"])
            version = self._register(config.name, made.policy, run_id, [f"run:{run_id}", base.key])
        except BaseException as error:
            tracking.end_run(run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        tracking.end_run(run_id, "FINISHED")
        seconds = self._workspace.clock.monotonic_s() - started_s
        return RecipeResult(run_id, config.seed, base, version, tuple(log.measured), seconds)

    def _unfinished(self, config: RecipeConfig) -> str | None:
        """A run of the same recipe and seed that ended early, if there is one."""
        for run in self._workspace.tracking.runs(EXPERIMENT, limit=1000):
            if run.status in ("FAILED", "KILLED") and run.tags.get(_IDENTITY_TAG) == identity_digest(config):
                return run.id
        return None

    def _register(self, name: str, model: Decoder, run_id: str, parents: Sequence[str]) -> ModelVersion:
        from sihe.training.recipes.stages import write_model

        tracking = self._workspace.tracking
        with tempfile.TemporaryDirectory(dir=self._workspace.home) as scratch:
            target = Path(scratch) / "model"
            write_model(model, target)
            tags = {"parameters": str(model.config.num_parameters), "precision": "fp32"}
            version = tracking.register_model(name, target, run_id=run_id, tags=tags)
        tracking.link(version.key, parents)
        return version


class _Log:
    """Passes events on, keeps the measurements, and brings the curves to tracking whenever a stage is measured."""

    def __init__(self, workspace: Workspace, run_id: str, on_event: Callable[[RecipeEvent], None]) -> None:
        self._tracking = workspace.tracking
        self._run_id = run_id
        self._on_event = on_event
        self._pending: dict[int, dict[str, float]] = {}
        self.measured: list[Measured] = []

    def __call__(self, event: RecipeEvent) -> None:
        prefix = "train" if isinstance(event, StageStep) else "held_out"
        values = {f"{event.stage}/{prefix}/{name}": value for name, value in event.metrics.items()}
        self._pending.setdefault(event.step, {}).update(values)
        if isinstance(event, Measured):
            self.measured.append(event)
            self._tracking.log_steps(self._run_id, self._pending)
            self._pending = {}
        self._on_event(event)


def identity_digest(config: RecipeConfig) -> str:
    """A short name for what a run computes."""
    return hashlib.sha256(json.dumps(config.public(), sort_keys=True).encode()).hexdigest()[:16]


def _params(config: RecipeConfig) -> dict[str, object]:
    """The settings, stages by number."""
    values = config.public()
    return values | {"stages": {str(number): stage for number, stage in enumerate(values["stages"])}}
