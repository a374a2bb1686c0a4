"""Training on a Ray cluster of three nodes computes what it computes on one machine, whatever happens to nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from sihe.cluster.launchers.ray.launcher import RayLauncher
from sihe.cluster.types import RankFailed, RanksStarted, WorkersChanged
from sihe.core import settings
from sihe.core.workspace import Workspace
from sihe.training.recovery import RecoveryConfig
from sihe.training.service import TrainingService
from sihe.training.types import AttemptReady, StepDone, TrainEvent
from support.ray_cluster import ray_nodes
from support.tokens import make_dataset
from support.training_runs import DoomedLauncher, series, small_config, steps_of

pytestmark = pytest.mark.ray


def open_workspace(folder: Path) -> Workspace:
    return Workspace(settings.load({"home": str(folder)}, environ={}, directory=folder.parent))


def test_a_node_is_lost_and_another_joins(tmp_path: Path) -> None:
    """The node of rank 2 crashes in step 7; two ranks go on at once. A new node comes, and three go on from step 16."""
    config = small_config(
        make_dataset(tmp_path / "datasets"), world_size=3, global_batch=12, max_steps=24, keep_checkpoints=6
    )
    elastic = config.with_changes(recovery=RecoveryConfig(min_workers=2), max_restarts=1)
    events: list[TrainEvent] = []

    with open_workspace(tmp_path / "home") as workspace, ray_nodes(3) as nodes:
        calm = TrainingService(workspace).train(config)

        def on_event(event: TrainEvent) -> None:
            events.append(event)
            if isinstance(event, StepDone) and (event.attempt, event.step) == (1, 6):
                nodes.crash(nodes.names[2])
            if isinstance(event, StepDone) and (event.attempt, event.step) == (2, 9):
                nodes.add()

        # A rank waits in step 7 until the loss was seen, and one in step 14 until the new node was.
        launcher = DoomedLauncher("wait:1:6,wait:0:13", tmp_path, RayLauncher(address=nodes.address, grace_s=1))
        result = TrainingService(workspace, launcher=launcher).train(elastic, on_event=on_event, resume="never")

    changes = [(event.before, event.after, event.slots) for event in events if isinstance(event, WorkersChanged)]
    assert changes == [(3, 2, 2), (2, 3, 3)]
    (failed,) = (event for event in events if isinstance(event, RankFailed))
    started = [event for event in events if isinstance(event, RanksStarted)]
    assert (failed.rank, failed.reason) == (2, f"was lost with its node {started[0].hosts[2]}")
    assert [len(event.pids) for event in started] == [3, 2, 3]
    assert result.restarts == 1, "to grow costs no restart"
    assert [event.step for event in events if isinstance(event, AttemptReady)] == [0, 4, 16]

    done, expected = steps_of(result.folder), {step.step: step for step in steps_of(calm.folder)}
    assert [step.step for step in done] == [*range(1, 7), *range(5, 25)]
    for step in done:
        same = expected[step.step]
        assert (step.samples, step.next_sample, step.tokens) == (same.samples, same.next_sample, same.tokens)
        if step.attempt == 1:
            assert (step.loss, step.grad_norm) == (same.loss, same.grad_norm), "to the last bit"
        assert step.loss == pytest.approx(same.loss, rel=1e-4)


def test_killed_and_hung_ranks_change_nothing(tmp_path: Path) -> None:
    """Rank 1 is killed in step 7, rank 0 stopped in step 15; the workspace's settings choose where ranks run."""
    dataset = make_dataset(tmp_path / "datasets")
    config = small_config(dataset, recovery=RecoveryConfig(hang_timeout_s=15))
    with open_workspace(tmp_path / "home") as workspace, ray_nodes(2) as nodes:
        calm = TrainingService(workspace).train(config)
        launcher = DoomedLauncher("kill:1:6,hang:0:14", tmp_path, RayLauncher(address=nodes.address, grace_s=1))
        struck = TrainingService(workspace, launcher=launcher).train(config, resume="never")
        flags = {"home": str(workspace.home), "cluster.launcher": "ray", "cluster.ray_address": nodes.address}
        with Workspace(settings.load(flags, environ={}, directory=tmp_path)) as on_ray:
            plain = TrainingService(on_ray).train(config, resume="never")
    assert struck.restarts == 2
    assert plain.restarts == 0
    expected = series(steps_of(calm.folder))
    assert series(steps_of(struck.folder)) == series(steps_of(plain.folder)) == expected
    assert len(steps_of(struck.folder)) == 20 + 2 + 2, "steps 5, 6, 13 and 14 were computed twice"
