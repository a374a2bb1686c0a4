"""What a run remembers besides its optimizer: the average of its weights, and the errors of compressed gradients.

Real ranks over gloo, real SIGKILLs. What is continued is held against a run that nobody disturbed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sihe.cluster.errors import RanksLost
from sihe.core import settings
from sihe.core.errors import ConfigError
from sihe.core.workspace import Workspace
from sihe.models.decoder import Decoder
from sihe.training import layout
from sihe.training.checkpoint import Checkpoints
from sihe.training.parallel.plan import ParallelPlan
from sihe.training.plan import TrainPlan
from sihe.training.service import TrainingService
from sihe.training.types import TrainResult
from support.tokens import make_dataset
from support.training_runs import DoomedLauncher, InProcess, series, small_config, steps_of

COMPRESSED = ParallelPlan(dp=2, compression="powersgd", powersgd_rank=2)
SHARDED = ParallelPlan(shard=2, zero=3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("datasets"))


def trained(folder: Path, dataset: Path, *, doom: str = "", **changes: Any) -> TrainResult:
    """A run of ten steps in a home of its own; `doom` as in `support.doomed_ranks`."""
    folder.mkdir(exist_ok=True)
    loaded = settings.load({"home": str(folder / "home")}, environ={}, directory=folder)
    config = small_config(dataset, max_steps=10, warmup_steps=2, **changes)
    with Workspace(loaded) as workspace:
        launcher = DoomedLauncher(doom, folder) if doom else None
        return TrainingService(workspace, launcher=launcher).train(config)


def weights_of(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(result.folder / layout.MODEL / "model.safetensors")


def test_the_model_of_a_run_is_the_average_of_its_weights(dataset: Path, tmp_path: Path) -> None:
    loaded = settings.load({"home": str(tmp_path / "home")}, environ={}, directory=tmp_path)
    config = small_config(
        dataset,
        max_steps=3,
        warmup_steps=1,
        ema_decay=0.25,
        world_size=1,
        micro_batch=8,
        checkpoint_every=1,
        keep_checkpoints=3,
    )
    with Workspace(loaded) as workspace:
        service = TrainingService(workspace, launcher=InProcess())
        result = service.train(config)
        early = workspace.tracking.download(service.register_checkpoint(result.run_id, 1))
    plan = TrainPlan.read(result.folder / layout.PLAN)
    checkpoints = Checkpoints(result.folder / layout.CHECKPOINTS, plan.identity, keep=3)
    torch.manual_seed(config.seed)
    model = Decoder(plan.model)
    average = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    exported = []
    for step in (1, 2, 3):
        checkpoints.at(step).load_weights(model)
        decay = min(0.25, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * weight for name, weight in model.named_parameters()}
        checkpoints.at(step).load_weights(model, averaged=True)
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight, average[name])
        exported.append(model.embedding.weight.detach().clone())
    assert torch.equal(weights_of(result)["model.embed_tokens.weight"], exported[-1])
    assert torch.equal(load_file(early / "model.safetensors")["model.embed_tokens.weight"], exported[0])


@pytest.mark.slow
def test_an_average_goes_on_to_the_last_bit_and_on_another_number_of_ranks(dataset: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"ema_decay": 0.9, "parallel": SHARDED}
    undisturbed = trained(tmp_path / "undisturbed", dataset, **changes)
    killed = trained(tmp_path / "killed", dataset, doom="kill:1:6", **changes)
    assert killed.restarts == 1
    assert series(steps_of(killed.folder)) == series(steps_of(undisturbed.folder))
    expected = weights_of(undisturbed)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(killed).items())
    with pytest.raises(RanksLost):
        trained(tmp_path / "moved", dataset, doom="kill:0:6", max_restarts=0, **changes)
    moved = trained(tmp_path / "moved", dataset, ema_decay=0.9, world_size=1)
    assert [done.step for done in steps_of(moved.folder)][-6:] == [5, 6, 7, 8, 9, 10]
    for name, weight in weights_of(moved).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)
    last = trained(tmp_path / "last", dataset, parallel=SHARDED)
    assert any(not torch.equal(weight, expected[name]) for name, weight in weights_of(last).items())


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_that_cannot_be_names_its_key(dataset: Path, decay: float) -> None:
    with pytest.raises(ConfigError) as raised:
        small_config(dataset, ema_decay=decay)
    assert raised.value.key == "ema_decay"


def test_runs_without_an_average_keep_their_identity(dataset: Path) -> None:
    assert "ema_decay" not in small_config(dataset).identity()
    assert small_config(dataset, ema_decay=0.9).identity()["ema_decay"] == 0.9


@pytest.mark.slow
def test_compressed_gradients_go_on_to_the_last_bit_and_start_anew_elsewhere(dataset: Path, tmp_path: Path) -> None:
    undisturbed = trained(tmp_path / "undisturbed", dataset, parallel=COMPRESSED)
    expected = series(steps_of(undisturbed.folder))
    killed = trained(tmp_path / "killed", dataset, doom="kill:1:6", parallel=COMPRESSED)
    assert killed.restarts == 1
    assert series(steps_of(killed.folder)) == expected
    plain = trained(tmp_path / "plain", dataset, parallel=ParallelPlan(dp=2))
    assert series(steps_of(plain.folder)) != expected
    with pytest.raises(RanksLost):
        trained(tmp_path / "moved", dataset, doom="kill:0:6", max_restarts=0, parallel=COMPRESSED)
    moved = trained(tmp_path / "moved", dataset, world_size=1)
    assert [done.step for done in steps_of(moved.folder)][-6:] == [5, 6, 7, 8, 9, 10]
    assert moved.final_loss == pytest.approx(undisturbed.final_loss, rel=0.05)
