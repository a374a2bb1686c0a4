"""The service without ranks: what is refused before the first step, which run is continued, and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sihe.cluster.errors import JobStopped
from sihe.cluster.types import JobEvent, ProcessJob, RestartPolicy
from sihe.core import terminal
from sihe.core.errors import ConfigError, CorruptData, NoSpace, NotFound
from sihe.core.workspace import Workspace
from sihe.data.errors import DatasetTooSmall
from sihe.training import commands, layout
from sihe.training.config import ModelShape
from sihe.training.loop import TrainLoop
from sihe.training.plan import TrainPlan
from sihe.training.ranks import Ranks
from sihe.training.service import TrainingService
from sihe.training.types import RunOpened, TrainEvent
from support.tokens import make_dataset
from support.training_runs import small_config


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


@pytest.fixture
def dataset(workspace: Workspace) -> Path:
    return make_dataset(workspace.path("datasets"))


def test_a_run_in_this_process(workspace: Workspace, dataset: Path) -> None:
    config = small_config(dataset, world_size=1, max_steps=6, log_every=4, alias="best", checkpoint_every=100)
    service = TrainingService(workspace, launcher=InProcess())
    result = service.train(config.with_changes(dataset="court@v1"))
    assert result.model_version.key == "model:small@1"
    assert workspace.tracking.resolve("small@best").version == 1
    assert [point.step for point in workspace.tracking.history(result.run_id, "loss")] == [4, 6]
    again = service.train(config)
    assert again.run_id != result.run_id, "a finished run is not continued"
    assert again.final_loss == result.final_loss
    assert workspace.tracking.resolve("small@best").version == 2
    assert service.register_checkpoint(again.run_id, 6).version == 3
    with pytest.raises(NotFound, match="6"):
        service.register_checkpoint(again.run_id, 5)


def test_an_interrupted_run_goes_on_under_its_id(workspace: Workspace, dataset: Path) -> None:
    config = small_config(dataset, world_size=1, max_steps=3, warmup_steps=1)
    service = TrainingService(workspace, launcher=InProcess(stop_first=True))
    with pytest.raises(JobStopped):
        service.train(config)
    (stopped,) = service.runs()
    assert stopped.status == "KILLED"
    events: list[TrainEvent] = []
    other = service.train(config.with_changes(seed=1), on_event=events.append)
    assert other.run_id != stopped.id, "another seed is another run"
    fresh = service.train(config, resume="never")
    assert fresh.run_id not in (stopped.id, other.run_id)
    result = service.train(config.with_changes(micro_batch=4), on_event=events.append)
    assert result.run_id == stopped.id
    assert [event.resumed for event in events if isinstance(event, RunOpened)] == [False, True]
    assert TrainPlan.read(result.folder / layout.PLAN).config.micro_batch == 4


def test_a_version_is_registered_once(workspace: Workspace, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor dies after it registered the model and before it closed the run."""
    config = small_config(dataset, world_size=1, max_steps=2, warmup_steps=1)
    service = TrainingService(workspace, launcher=InProcess())
    with monkeypatch.context() as patch:
        patch.setattr(type(workspace.tracking), "end_run", lambda *_: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            service.train(config)
    (left,) = service.runs()
    assert left.status == "INTERRUPTED"
    result = service.train(config)
    assert result.run_id == left.id
    assert [version.version for version in workspace.tracking.model_versions("small")] == [1]


def test_what_is_refused_before_the_first_step(
    workspace: Workspace, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = TrainingService(workspace, launcher=InProcess())
    config = small_config(dataset)
    with pytest.raises(NotFound, match="there are: court"):
        service.train(config.with_changes(dataset="absent"))
    with pytest.raises(NotFound, match="v1"):
        service.train(config.with_changes(dataset="court@v9"))
    with pytest.raises(DatasetTooSmall):
        service.train(config.with_changes(sequence_length=100_000))
    shape = ModelShape(hidden_size=32, num_layers=1, num_heads=4, max_positions=8)
    with pytest.raises(ConfigError, match=r"max_positions.*sequence_length \(16\)"):
        service.train(config.with_changes(model=shape))
    odd = ModelShape(hidden_size=32, num_layers=1, num_heads=4, head_dim=7)
    with pytest.raises(ConfigError, match="head_dim"):
        service.train(config.with_changes(model=odd))
    huge = ModelShape(hidden_size=1 << 17, num_layers=500, num_heads=4)
    with pytest.raises(NoSpace, match="MB needed"):
        service.train(config.with_changes(model=huge))
    (dataset / "tokenizer.json").rename(dataset / "elsewhere")
    with pytest.raises(NotFound, match="tokenizer file"):
        service.train(config)
    (dataset / "elsewhere").rename(dataset / "tokenizer.json")
    shard = dataset / "train-00000.bin"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptData, match=r"train-00000\.bin"):
        service.train(config)
    assert service.runs() == [], "nothing was opened"


def test_a_run_that_is_no_training(workspace: Workspace) -> None:
    run_id = workspace.tracking.start_run("evaluation", "perplexity")
    with pytest.raises(NotFound, match="evaluation"):
        TrainingService(workspace).run(run_id)


def test_a_torn_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"config": {')
    with pytest.raises(CorruptData, match="not a training plan"):
        TrainPlan.read(tmp_path / "plan.json")


def test_the_command_line(workspace: Workspace, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sihe.cluster.launchers.local.LocalLauncher", InProcess)
    terminal.set_flags({"home": str(workspace.home)})
    monkeypatch.chdir(workspace.home)

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(commands.app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    small = ["world_size=1", "max_steps=4", "warmup_steps=1", "sequence_length=16", "model.num_layers=1"]
    settings = [part for item in small for part in ("--set", item)]
    outcome = json.loads(call("run", "--config", "nano-1m", "--dataset", "court", *settings, "--json"))
    assert outcome["model"] == "nano-1m@1"
    assert outcome["steps"] == 4
    (listed,) = json.loads(call("list", "--json"))
    assert (listed["id"], listed["status"], listed["step"]) == (outcome["run"], "FINISHED", 4)
    assert json.loads(call("show", outcome["run"], "--json"))["config"]["model"]["num_layers"] == 1
    assert "4/4" in call("list")
    assert "nano-10m" in call("presets")
    with pytest.raises(ConfigError, match="max_stepz"):
        call("run", "--config", "nano-1m", "--dataset", "court", "--set", "max_stepz=4")
