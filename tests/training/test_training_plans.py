"""Whole runs under plans of parallelism: killed under one, continued under the next, on other data, in float16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sihe.cluster.errors import RanksLost
from sihe.core import settings
from sihe.core.errors import ConfigError
from sihe.core.workspace import Workspace
from sihe.models.checkpoint import load_model
from sihe.models.recompute_config import RecomputeConfig
from sihe.training.config import DataConfig, Mixing, ModelShape, OptimizerConfig, TrainConfig
from sihe.training.parallel.plan import ParallelPlan
from sihe.training.service import TrainingService
from support.tokens import make_dataset
from support.training_runs import SHAPE, DoomedLauncher, small_config, steps_of


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    folder = tmp_path / "home"
    with Workspace(settings.load({"home": str(folder)}, environ={}, directory=folder.parent)) as opened:
        yield opened


def under(dataset: Path, plan: ParallelPlan | None, **changes: Any) -> TrainConfig:
    return small_config(dataset, **{"world_size": 1, "parallel": plan, "max_steps": 12, **changes})


def losses(folder: Path) -> list[float]:
    """Of each step, as it was computed last."""
    return [loss for _, loss in sorted({done.step: done.loss for done in steps_of(folder)}.items())]


def test_a_run_goes_on_under_other_plans(workspace: Workspace, dataset: Path, tmp_path: Path) -> None:
    """Killed with sharded weights, killed again with split layers, finished as a pipeline: the run of one process."""
    alone = TrainingService(workspace).train(under(dataset, None))
    launcher = DoomedLauncher("kill:1:5,kill:1:9", tmp_path)
    service = TrainingService(workspace, launcher=launcher)
    with pytest.raises(RanksLost):
        service.train(under(dataset, ParallelPlan(shard=2, zero=3), model_name="moved", max_restarts=0), resume="never")
    with pytest.raises(RanksLost):
        service.train(under(dataset, ParallelPlan(tp=2), model_name="moved", max_restarts=1))
    last = under(dataset, ParallelPlan(pp=2, microbatches=2), model_name="moved", max_restarts=2)
    result = service.train(last)
    assert len({done.attempt for done in steps_of(result.folder)}) == 3
    assert losses(result.folder) == pytest.approx(losses(alone.folder), rel=2e-6)
    ours, theirs = (load_model(run.folder / "model").state_dict() for run in (result, alone))
    for name, weight in theirs.items():
        assert float((ours[name] - weight).abs().max()) < 2e-5, name


def test_packed_documents_of_a_mixture(workspace: Workspace, dataset: Path) -> None:
    """Two ranks, gradients in one pass and activations computed again, against one rank without."""
    data = DataConfig(packing="documents", document_masks=True, mixture=(Mixing({str(dataset): 1.0}),), max_epochs=40.0)
    alone = TrainingService(workspace).train(under(dataset, None, data=data))
    spread = under(
        dataset, ParallelPlan(dp=2), data=data, micro_batch=4, recompute=RecomputeConfig("full"), model_name="spread"
    )
    result = TrainingService(workspace).train(spread, resume="never")
    assert losses(result.folder) == pytest.approx(losses(alone.folder), rel=2e-6)


def test_experts_balanced_by_bias_in_float16(workspace: Workspace, dataset: Path, tmp_path: Path) -> None:
    """The biases and the loss scale come back from a checkpoint: a killed run computes what one that was not does."""
    experts = {"num_experts": 4, "experts_per_token": 2, "expert_intermediate_size": 16, "router_balance": "bias"}
    shape = ModelShape(SHAPE.hidden_size, SHAPE.num_layers, SHAPE.num_heads, SHAPE.num_kv_heads, family=experts)
    changes: dict[str, Any] = {"model": shape, "precision": "fp16", "optimizer": OptimizerConfig("lion")}
    plan = ParallelPlan(dp=2, ep=2)
    reference = TrainingService(workspace).train(under(dataset, plan, **changes))
    service = TrainingService(workspace, launcher=DoomedLauncher("kill:1:6", tmp_path))
    result = service.train(under(dataset, plan, **changes, model_name="killed"), resume="never")
    assert result.restarts == 1
    assert losses(result.folder) == losses(reference.folder)
    assert result.final_loss < losses(result.folder)[0]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"parallel": ParallelPlan(tp=4)}, "parallel.tp"),
        ({"parallel": ParallelPlan(pp=4, microbatches=4)}, "parallel.pp"),
        ({"parallel": ParallelPlan(dp=2, ep=2)}, "parallel.ep"),
        ({"optimizer": OptimizerConfig("adamw", {"momentum": 0.9})}, "optimizer.momentum"),
        ({"schedule": "wsd"}, "decay_steps"),
        ({"model": ModelShape(32, 2, 4, family={"experts": 4})}, "model.family"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_step(
    workspace: Workspace, dataset: Path, change: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingService(workspace).plan(under(dataset, None, micro_batch=1, **{"parallel": None, **change}))
    assert caught.value.key == key
