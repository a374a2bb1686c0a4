"""Ranks that hang, lag or compute no numbers, a full disk, and other numbers of workers: the run goes on, and computes
what a run without accidents computes.

Real ranks over gloo. Accidents of one rank are in `support.doomed_ranks`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sihe.cluster.types import RankFailed, RankHung, RanksStarted, StragglerSeen, WorkersChanged
from sihe.core import settings
from sihe.core.errors import NoSpace
from sihe.core.workspace import Workspace
from sihe.training import layout
from sihe.training.errors import Diverged
from sihe.training.loop import TrainLoop
from sihe.training.progress import EventReader
from sihe.training.ranks import Ranks
from sihe.training.recovery import RecoveryConfig
from sihe.training.rewinds import read_rewinds
from sihe.training.service import TrainingService
from sihe.training.step import StepOutcome, TrainStep
from sihe.training.types import (
    AttemptReady,
    CheckpointSaved,
    RunOpened,
    StepDone,
    StepRejected,
    StepsSkipped,
    TrainEvent,
)
from support.chaos import fill, small_disk
from support.tokens import make_dataset
from support.training_runs import DoomedLauncher, InProcess, series, small_config, steps_of


def open_workspace(folder: Path) -> Workspace:
    return Workspace(settings.load({"home": str(folder)}, environ={}, directory=folder.parent))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def reference(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[StepDone]:
    """The steps of a run of two ranks without accidents."""
    with open_workspace(tmp_path_factory.mktemp("reference") / "home") as workspace:
        return steps_of(TrainingService(workspace).train(small_config(dataset)).folder)


def test_a_stopped_rank_is_replaced(reference: list[StepDone], dataset: Path, tmp_path: Path) -> None:
    events: list[TrainEvent] = []
    config = small_config(dataset, recovery=RecoveryConfig(hang_timeout_s=4))
    with open_workspace(tmp_path / "home") as workspace:
        launcher = DoomedLauncher("hang:1:6", tmp_path)
        result = TrainingService(workspace, launcher=launcher).train(config, on_event=events.append)
    (hung,) = (event for event in events if isinstance(event, RankHung))
    assert (hung.rank, hung.step, hung.state) == (1, 7, "T (stopped)")
    assert "all_reduce" in (hung.stacks.parents[1] / "rank-0" / "stacks.log").read_text(), "where the other one waits"
    assert result.restarts == 1
    assert series(steps_of(result.folder)) == series(reference)


def test_a_fault_that_does_not_come_again_leaves_nothing_behind(
    reference: list[StepDone], dataset: Path, tmp_path: Path
) -> None:
    """NaN before the first checkpoint, and after it; then one rank becomes slow."""
    events: list[TrainEvent] = []
    recovery = RecoveryConfig(straggler_window=3)
    with open_workspace(tmp_path / "home") as workspace:
        launcher = DoomedLauncher("nan:0:1,nan:1:6,slow:1:8", tmp_path)
        service = TrainingService(workspace, launcher=launcher)
        result = service.train(small_config(dataset, recovery=recovery), on_event=events.append)
    rejected = [event for event in events if isinstance(event, StepRejected)]
    assert [(event.step, event.reason) for event in rejected] == [(2, "gradient norm nan"), (7, "gradient norm nan")]
    assert result.restarts == 1, "only without a checkpoint must the ranks start over"
    assert [event.step for event in events if isinstance(event, AttemptReady)] == [0, 0]
    steps = steps_of(result.folder)
    assert [done.step for done in steps] == [1, *range(1, 7), *range(5, 21)]
    assert series(steps) == series(reference)
    stragglers = [event for event in events if isinstance(event, StragglerSeen)]
    # On a busy machine the other rank may look slow once, too.
    assert any(event.rank == 1 and event.median_s > 0.05 for event in stragglers)


def test_samples_that_are_at_fault_are_skipped_for_good(
    reference: list[StepDone], dataset: Path, tmp_path: Path
) -> None:
    """The samples of step 7 give NaN each time; later a rank is killed, and the others' record says what to skip."""
    events: list[TrainEvent] = []
    with open_workspace(tmp_path / "home") as workspace:
        launcher = DoomedLauncher("poison:1:6,kill:0:9,kill:1:13", tmp_path)
        result = TrainingService(workspace, launcher=launcher).train(small_config(dataset), on_event=events.append)
    assert [event.step for event in events if isinstance(event, StepRejected)] == [7, 7]
    (skipped,) = (event for event in events if isinstance(event, StepsSkipped))
    assert (skipped.step, skipped.first_sample, skipped.next_sample) == (7, 48, 56)
    assert [rewind.action for rewind in read_rewinds(result.folder / layout.REWINDS)] == ["repeat", "skip"]
    assert [event.step for event in events if isinstance(event, AttemptReady)] == [0, 8, 12]
    ours, theirs = series(steps_of(result.folder)), series(reference)
    samples = {done.step: done.samples for done in reference}
    assert all(ours[step] == theirs[step] for step in range(1, 7))
    assert [ours[step][3] for step in range(7, 20)] == [samples[step] for step in range(8, 21)]
    assert ours[20][4] == theirs[20][4] + 8


# ---- in one process: what the guard makes of it ---------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, losses: dict[int, list[float]]) -> None:
    """Lets the steps give these losses instead of their own, from the first visit on."""
    honest = TrainStep.__call__

    def step(self: TrainStep, number: int, batch: np.ndarray) -> StepOutcome:
        outcome = honest(self, number, batch)
        return replace(outcome, loss=losses[number + 1].pop(0)) if losses.get(number + 1) else outcome

    monkeypatch.setattr(TrainStep, "__call__", step)


def test_what_never_becomes_a_number_ends(workspace: Workspace, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {7: [float("nan")] * 100})
    config = small_config(dataset, world_size=1, recovery=RecoveryConfig(max_rewinds=3))
    service = TrainingService(workspace, launcher=InProcess())
    for _ in range(2):  # another call does not have another budget
        with pytest.raises(
            Diverged, match=r"step 7 after 3 returns to a checkpoint \(recovery.max_rewinds\): loss nan"
        ):
            service.train(config)
    (run,) = service.runs()
    assert (run.status, run.step) == ("FAILED", 6)
    folder = service.folder(run.id)
    assert [rewind.action for rewind in read_rewinds(folder / layout.REWINDS)] == ["repeat", "skip", "repeat"]
    assert all(np.isfinite(done.loss) for done in steps_of(folder))
    (service.folder(run.id) / layout.REWINDS).unlink()
    monkeypatch.undo()
    assert service.train(config).run_id == run.id, "weights and checkpoints were never touched by it"


def test_a_spike_is_met_like_a_nan(workspace: Workspace, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = TrainingService(workspace, launcher=InProcess())
    config = small_config(dataset, world_size=1, recovery=RecoveryConfig(spike_factor=1.5, spike_window=6))
    undisturbed = service.train(config)
    spoil(monkeypatch, {11: [50.0], 14: [50.0, 50.0]})
    result = service.train(config, resume="never")
    events = list(EventReader(result.folder / layout.EVENTS).new())
    assert [event.step for event in events if isinstance(event, StepRejected)] == [11, 14, 14]
    assert [event.first_sample for event in events if isinstance(event, StepsSkipped)] == [13 * 8]
    ours, theirs = (series(steps_of(folder)) for folder in (result.folder, undisturbed.folder))
    assert all(ours[step] == theirs[step] for step in range(1, 14))
    assert ours[14][3] == theirs[15][3]


def test_a_resumed_run_knows_a_spike_when_it_sees_one(
    workspace: Workspace, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window is read back from the log: who resumes decides like who never stopped."""
    service = TrainingService(workspace, launcher=InProcess(stop_first=True))
    config = small_config(dataset, world_size=1, recovery=RecoveryConfig(spike_factor=1.5, spike_window=6))
    with pytest.raises(Exception, match="stopped"):
        service.train(config)
    (run,) = service.runs()
    first = TrainLoop(service.folder(run.id), Ranks())
    spoil(monkeypatch, {10: [50.0]})
    monkeypatch.setattr(first, "_save", stop_after(8, first._save))
    with pytest.raises(KeyboardInterrupt):
        first.run()
    result = service.train(config)
    events = list(EventReader(result.folder / layout.EVENTS).new())
    assert [event.step for event in events if isinstance(event, AttemptReady)] == [0, 8]
    assert [event.step for event in events if isinstance(event, StepRejected)] == [10]


def stop_after(last: int, save: object) -> object:
    def save_and_stop(step: int, next_sample: int) -> None:
        assert callable(save)
        save(step, next_sample)
        if step == last:
            raise KeyboardInterrupt

    return save_and_stop


# ---- workers --------------------------------------------------------------------------------------------------------


def test_four_then_two_then_three_workers(dataset: Path, tmp_path: Path) -> None:
    """A rank dies and two are left; when there is room for three, the run goes on with three from a checkpoint."""
    config = small_config(dataset, world_size=4, global_batch=12, micro_batch=3, max_steps=12, checkpoint_every=3)
    elastic = config.with_changes(recovery=RecoveryConfig(min_workers=1), max_restarts=1)
    events: list[TrainEvent] = []
    folder = tmp_path

    def on_event(event: TrainEvent) -> None:
        nonlocal folder
        events.append(event)
        match event:
            case RunOpened():
                folder = event.folder
            case RankFailed():
                (folder / layout.WORKERS).write_text("2\n")
            case CheckpointSaved(step=6):
                (folder / layout.WORKERS).write_text("3\n")
            case _:
                pass

    with open_workspace(tmp_path / "home") as workspace:
        alone = TrainingService(workspace).train(config.with_changes(world_size=1))
        # A rank waits in step 8 until the launcher has seen that there is room again.
        service = TrainingService(workspace, launcher=DoomedLauncher("kill:3:4,wait:1:7", tmp_path))
        result = service.train(elastic, on_event=on_event, resume="never")
    changes = [(event.before, event.after, event.slots) for event in events if isinstance(event, WorkersChanged)]
    assert changes == [(4, 2, 2), (2, 3, 3)]
    assert [len(event.pids) for event in events if isinstance(event, RanksStarted)] == [4, 2, 3]
    assert result.restarts == 1, "to grow costs no restart"
    assert [event.step for event in events if isinstance(event, AttemptReady)] == [0, 3, 9]
    steps, expected = steps_of(result.folder), steps_of(alone.folder)
    assert [done.step for done in steps] == [1, 2, 3, 4, *range(4, 13)]
    by_step = {done.step: done for done in steps}
    for done in expected:
        assert by_step[done.step].samples == done.samples
        assert by_step[done.step].loss == pytest.approx(done.loss, rel=1e-4)


# ---- a full disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", [0, 8_192, 200_000], ids=["nothing", "two-pages", "half-a-checkpoint"])
def test_a_disk_that_fills_up(reference: list[StepDone], dataset: Path, tmp_path: Path, leave: int) -> None:
    """It is full in step 6: the log, a checkpoint or both do not fit. One error; with room the same call goes on."""
    with small_disk(tmp_path / "disk", "24m") as disk, open_workspace(disk / "home") as workspace:
        events: list[TrainEvent] = []

        def on_event(event: TrainEvent) -> None:
            events.append(event)
            if isinstance(event, StepDone) and event.step == 6 and len(starts(events)) == 1:
                fill(disk, leave=leave)

        config = small_config(dataset)
        # A slow rank: the disk is full before the checkpoint of step 8.
        service = TrainingService(workspace, launcher=DoomedLauncher("slow:1:4", tmp_path))
        with pytest.raises(NoSpace, match="free some"):
            service.train(config, on_event=on_event)
        assert len(starts(events)) == 1, "no restart would change it"
        (disk / "ballast").unlink()
        result = service.train(config, on_event=on_event)
        assert series(steps_of(result.folder)) == series(reference)
        assert len(starts(events)) == 2
        assert [run.status for run in service.runs()] == ["FINISHED"]


def starts(events: list[TrainEvent]) -> list[RanksStarted]:
    return [event for event in events if isinstance(event, RanksStarted)]
