"""A run that is killed and goes on computes what a run that was never killed computes, to the last bit.

Real ranks over gloo, real SIGKILLs at chosen steps. The undisturbed run is the reference for all.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sihe.cluster.errors import RanksLost
from sihe.cluster.types import RankFailed, RanksStarted
from sihe.core import settings
from sihe.core.errors import NoSpace
from sihe.core.workspace import Workspace
from sihe.data.loading.dataset import TokenDataset
from sihe.data.loading.stream import BatchStream
from sihe.models.checkpoint import load_model
from sihe.training.checkpoint import Checkpoints
from sihe.training.recovery import RecoveryConfig
from sihe.training.service import TrainingService
from sihe.training.step import samples_digest
from sihe.training.types import AttemptReady, CheckpointSkipped, RunOpened, TrainEvent, TrainResult
from support.tokens import make_dataset
from support.training_runs import DoomedLauncher, python_path, series, small_config, steps_of


def open_workspace(folder: Path) -> Workspace:
    return Workspace(settings.load({"home": str(folder)}, environ={}, directory=folder.parent))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def reference(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workspace, TrainResult]]:
    with open_workspace(tmp_path_factory.mktemp("reference") / "home") as workspace:
        yield workspace, TrainingService(workspace).train(small_config(dataset))


def test_an_undisturbed_run(reference: tuple[Workspace, TrainResult], dataset: Path) -> None:
    workspace, result = reference
    steps = steps_of(result.folder)
    assert [done.step for done in steps] == list(range(1, 21))
    assert result.final_loss == steps[-1].loss < steps[0].loss
    assert result.restarts == 0
    assert result.tokens_per_s == pytest.approx(20 * 8 * 16 / sum(done.seconds for done in steps))
    stream = BatchStream(TokenDataset.open(dataset), split="train", sequence_length=16, global_batch=8, seed=0)
    assert [done.samples for done in steps] == [f"{samples_digest(next(stream), first=0):012x}" for _ in steps]

    run = workspace.tracking.run(result.run_id)
    assert run.status == "FINISHED"
    assert run.params["model.hidden_size"] == "32"
    assert run.params["settings.locale"] == "en"
    history = workspace.tracking.history(result.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(done.step, done.loss) for done in steps]
    version = result.model_version
    assert (version.key, f"run:{result.run_id}") in workspace.tracking.ancestors(version.key)
    assert (f"run:{result.run_id}", "dataset:court@v1") in workspace.tracking.ancestors(version.key)
    model_folder = workspace.tracking.download(version)
    assert load_model(model_folder).config.bos_token_id == 0
    assert {path.name for path in model_folder.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    (described,) = TrainingService(workspace).runs()
    assert (described.id, described.step, described.status) == (result.run_id, 20, "FINISHED")


def test_killed_ranks_and_a_damaged_checkpoint(
    reference: tuple[Workspace, TrainResult], dataset: Path, tmp_path: Path
) -> None:
    """Rank 1 dies in step 7, between two checkpoints; rank 0 in step 15, and the newest checkpoint is damaged."""
    events: list[TrainEvent] = []
    with open_workspace(tmp_path / "home") as workspace:

        def on_event(event: TrainEvent) -> None:
            events.append(event)
            if isinstance(event, RankFailed) and event.rank == 0:
                (opened,) = (event for event in events if isinstance(event, RunOpened))
                weights = opened.folder / "checkpoints" / "step-00000012" / "__0_0.distcp"
                data = bytearray(weights.read_bytes())
                data[-3] ^= 1
                weights.write_bytes(data)

        launcher = DoomedLauncher("kill:1:6,kill:0:14", tmp_path)
        result = TrainingService(workspace, launcher=launcher).train(small_config(dataset), on_event=on_event)
        assert result.restarts == 2
        assert [(event.rank, event.signal) for event in events if isinstance(event, RankFailed)] == [
            (1, "SIGKILL"),
            (0, "SIGKILL"),
        ]
        assert [event.step for event in events if isinstance(event, AttemptReady)] == [0, 4, 8]
        (skipped,) = (event for event in events if isinstance(event, CheckpointSkipped))
        assert "SHA-256" in skipped.reason
        assert Path(skipped.path).is_dir()
        steps = steps_of(result.folder)
        assert len(steps) == 20 + 2 + 6, "steps 5, 6 and 9 to 14 were computed twice"
        assert series(steps) == series(steps_of(reference[1].folder))
        history = workspace.tracking.client.get_metric_history(result.run_id, "loss")
        assert [point.step for point in history] == list(range(1, 21)), "no point of the curve is there twice"
        first, second = (load_model(folder / "model") for folder in (result.folder, reference[1].folder))
        for name, weight in first.state_dict().items():
            assert weight.equal(second.state_dict()[name]), name


SUPERVISE = """
import sys
from pathlib import Path
from support.training_runs import DoomedLauncher, small_config
from sihe.core import settings
from sihe.core.workspace import Workspace
from sihe.training.service import TrainingService

home, dataset, doom = sys.argv[1:]
with Workspace(settings.load({"home": home}, environ={}, directory=Path(home).parent)) as workspace:
    launcher = DoomedLauncher(doom, Path(home).parent)
    TrainingService(workspace, launcher=launcher).train(small_config(Path(dataset)))
"""


def test_a_killed_supervisor(reference: tuple[Workspace, TrainResult], dataset: Path, tmp_path: Path) -> None:
    """All processes are gone in step 7; the same call goes on under the same run."""
    home = tmp_path / "home"
    command = [sys.executable, "-c", SUPERVISE, str(home), str(dataset), "orphan:1:6"]
    killed = subprocess.run(command, env={"PYTHONPATH": python_path()}, capture_output=True, timeout=200, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with open_workspace(home) as workspace:
        service = TrainingService(workspace)
        (interrupted,) = service.runs()
        assert interrupted.status == "INTERRUPTED"
        assert interrupted.step in (5, 6), "the ranks died with their launcher"
        events: list[TrainEvent] = []
        result = service.train(small_config(dataset), on_event=events.append)
        assert result.run_id == interrupted.id
        assert isinstance(events[0], RunOpened)
        assert events[0].resumed
        assert [event.step for event in events if isinstance(event, AttemptReady)] == [4]
        assert series(steps_of(result.folder)) == series(steps_of(reference[1].folder))
        points = workspace.tracking.client.get_metric_history(result.run_id, "loss")
        assert [point.step for point in points] == list(range(1, 21))
        assert [run.status for run in service.runs()] == ["FINISHED"]
        assert [event.attempt for event in events if isinstance(event, RanksStarted)] == [2]


def test_a_full_disk(dataset: Path, tmp_path: Path) -> None:
    """The disk fills before the checkpoint of step 8: one clear error, no restart, and with space it goes on."""
    events: list[TrainEvent] = []
    config = small_config(dataset, world_size=1)
    with open_workspace(tmp_path / "home") as workspace:
        service = TrainingService(workspace, launcher=DoomedLauncher("full:0:5", tmp_path))
        with pytest.raises(NoSpace, match="free some"):
            service.train(config, on_event=events.append)
        assert sum(isinstance(event, RanksStarted) for event in events) == 1
        (failed,) = service.runs()
        assert failed.status == "FAILED"
        checkpoints = service.folder(failed.id) / "checkpoints"
        assert Checkpoints(checkpoints, {}, keep=2).steps() == [4], "what was there stays, nothing is half there"
        assert not list(checkpoints.glob(".*tmp*"))
        result = service.train(config)
        assert result.run_id == failed.id
        steps = steps_of(result.folder)
        assert [done.step for done in steps] == [*range(1, 9), *range(5, 21)]
        assert len(series(steps)) == 20, "steps 5 to 8 came out the same twice"


def test_a_silent_rank_is_a_loud_error(dataset: Path, tmp_path: Path) -> None:
    """A rank that stops without dying: the others say so, and nothing waits for ever."""
    recovery = RecoveryConfig(hang_timeout_s=60)  # the ranks themselves notice earlier
    config = small_config(dataset, collective_timeout_s=3.0, max_restarts=0, recovery=recovery)
    with open_workspace(tmp_path / "home") as workspace:
        service = TrainingService(workspace, launcher=DoomedLauncher("hang:1:6", tmp_path))
        with pytest.raises(RanksLost, match=r"rank 0 failed with PeerSilent: .* 3 s"):
            service.train(config)
        (failed,) = service.runs()
        assert (failed.status, failed.step) == ("FAILED", 6)
