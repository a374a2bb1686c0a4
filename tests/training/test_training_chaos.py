"""Accidents at random moments: the run always recovers, and computes what a run without accidents computes.

`CHAOS_MOMENTS` is how many moments of each kind (20), `CHAOS_SEED` makes other ones (0). The moment is in the output of
a test that fails. Losses are compared bit by bit; where the number of workers changes, to 1e-4.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from random import Random

import pytest

from sihe.cluster.types import RankFailed
from sihe.core import settings
from sihe.core.errors import NoSpace
from sihe.core.workspace import Workspace
from sihe.training import layout
from sihe.training.config import TrainConfig
from sihe.training.recovery import RecoveryConfig
from sihe.training.service import TrainingService
from sihe.training.types import RunOpened, StepDone, StepRejected, StepsSkipped, TrainEvent
from support.chaos import Moment, SabotagedLauncher, damage_newest, fill, signal_one, small_disk
from support.tokens import make_dataset
from support.training_runs import DoomedLauncher, series, small_config, steps_of

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("CHAOS_SEED", "0"))
MOMENTS = range(int(os.environ.get("CHAOS_MOMENTS", "20")))
STEPS = 20


def config_of(dataset: Path, **changes: object) -> TrainConfig:
    # The budget is wide: on a busy machine a rank that waits for its turn may be taken for one that hangs.
    recovery = RecoveryConfig(hang_timeout_s=8)
    return small_config(dataset, **{"max_restarts": 10, "recovery": recovery, **changes})


def open_workspace(folder: Path) -> Workspace:
    return Workspace(settings.load({"home": str(folder)}, environ={}, directory=folder.parent))


def random_for(kind: str, number: int) -> Random:
    return Random(f"{SEED}:{kind}:{number}")


def say(*what: object) -> None:
    """Leaves the moment in the output of a test that fails."""
    sys.stdout.write(f"seed {SEED}: {what}\n")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[StepDone]:
    with open_workspace(tmp_path_factory.mktemp("undisturbed") / "home") as workspace:
        return steps_of(TrainingService(workspace).train(config_of(dataset)).folder)


@pytest.mark.parametrize("number", MOMENTS)
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["SIGKILL", "SIGSTOP"])
def test_a_signal(
    undisturbed: list[StepDone], dataset: Path, tmp_path: Path, signum: signal.Signals, number: int
) -> None:
    random = random_for(signum.name, number)
    launcher = SabotagedLauncher(Moment.drawn(random, STEPS), signal_one(random, signum))
    say(launcher.moment)
    with open_workspace(tmp_path / "home") as workspace:
        result = TrainingService(workspace, launcher=launcher).train(config_of(dataset))
    assert launcher.struck
    assert series(steps_of(result.folder)) == series(undisturbed)


@pytest.mark.parametrize("number", MOMENTS)
def test_a_nan(undisturbed: list[StepDone], dataset: Path, tmp_path: Path, number: int) -> None:
    random = random_for("nan", number)
    doom = f"nan:{random.randrange(2)}:{random.randrange(STEPS)}"
    say(doom)
    events: list[TrainEvent] = []
    with open_workspace(tmp_path / "home") as workspace:
        service = TrainingService(workspace, launcher=DoomedLauncher(doom, tmp_path))
        result = service.train(config_of(dataset), on_event=events.append)
    assert series(steps_of(result.folder)) == series(undisturbed)
    assert sum(isinstance(event, StepRejected) for event in events) == 1
    assert not any(isinstance(event, StepsSkipped) for event in events)


@pytest.mark.parametrize("number", MOMENTS)
def test_a_damaged_checkpoint(undisturbed: list[StepDone], dataset: Path, tmp_path: Path, number: int) -> None:
    """A rank dies, and the newest checkpoint is not what was written."""
    random = random_for("damage", number)
    launcher = SabotagedLauncher(Moment.drawn(random, STEPS), signal_one(random, signal.SIGKILL))
    say(launcher.moment)
    folder = tmp_path

    def on_event(event: TrainEvent) -> None:
        nonlocal folder
        if isinstance(event, RunOpened):
            folder = event.folder
        if isinstance(event, RankFailed):
            damage_newest(random, folder / layout.CHECKPOINTS)

    with open_workspace(tmp_path / "home") as workspace:
        result = TrainingService(workspace, launcher=launcher).train(config_of(dataset), on_event=on_event)
    assert series(steps_of(result.folder)) == series(undisturbed)


@pytest.mark.parametrize("number", MOMENTS)
def test_a_full_disk(undisturbed: list[StepDone], dataset: Path, tmp_path: Path, number: int) -> None:
    random = random_for("disk", number)
    leave = random.choice((0, 4096, random.randrange(500_000)))
    with small_disk(tmp_path / "disk", "32m") as disk, open_workspace(disk / "home") as workspace:
        launcher = SabotagedLauncher(Moment.drawn(random, STEPS), lambda _pids: fill(disk, leave=leave))
        say(launcher.moment, leave)
        service = TrainingService(workspace, launcher=launcher)
        try:
            result = service.train(config_of(dataset))
        except NoSpace:
            (disk / "ballast").unlink()
            result = service.train(config_of(dataset))
        assert launcher.struck
        assert series(steps_of(result.folder)) == series(undisturbed)


@pytest.mark.parametrize("number", MOMENTS)
def test_four_two_three_workers(dataset: Path, tmp_path: Path, number: int) -> None:
    """Of four ranks one dies and there is room for two; at another moment there is room for three."""
    random = random_for("workers", number)
    launcher = SabotagedLauncher(Moment.drawn(random, 10), signal_one(random, signal.SIGKILL))
    again_at = random.randrange(launcher.moment.step + 1, 16)
    say(launcher.moment, again_at)
    recovery = RecoveryConfig(hang_timeout_s=20, min_workers=1)
    config = config_of(dataset, world_size=4, global_batch=12, micro_batch=3, checkpoint_every=2, recovery=recovery)
    folder, failed = tmp_path, False

    def on_event(event: TrainEvent) -> None:
        nonlocal folder, failed
        if isinstance(event, RunOpened):
            folder = event.folder
        if isinstance(event, RankFailed) and not failed:
            failed = True
            (folder / layout.WORKERS).write_text("2\n")
        if isinstance(event, StepDone) and failed and event.step >= again_at:
            (folder / layout.WORKERS).write_text("3\n")

    with open_workspace(tmp_path / "home") as workspace:
        alone = TrainingService(workspace).train(config.with_changes(world_size=1, recovery=RecoveryConfig()))
        expected = steps_of(alone.folder)
        service = TrainingService(workspace, launcher=launcher)
        steps = steps_of(service.train(config, on_event=on_event, resume="never").folder)
    by_step = {done.step: done for done in steps}
    assert sorted(by_step) == list(range(1, STEPS + 1))
    for done in steps:
        assert done.samples == expected[done.step - 1].samples
        assert done.loss == pytest.approx(expected[done.step - 1].loss, rel=1e-4)
