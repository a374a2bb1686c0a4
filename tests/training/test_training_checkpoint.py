"""Checkpoints: whole or absent, checked, the newest valid one found, none of another run taken."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sihe.core.errors import NoSpace
from sihe.models.decoder import Decoder
from sihe.training.checkpoint import Checkpoints
from sihe.training.errors import WrongCheckpoint
from sihe.training.optimizer import MasterAdamW
from sihe.training.ranks import Ranks
from sihe.training.types import CheckpointSkipped
from support.gradient_ranks import global_batch, step_for
from support.training_runs import small_config

IDENTITY = small_config(Path("data")).identity()


def trained(dtype: torch.dtype = torch.float32) -> tuple[Decoder, MasterAdamW]:
    model, step = step_for(dtype, Ranks(), 4)
    optimizer = MasterAdamW(model)
    step.accumulate(global_batch(ragged=False))
    optimizer.step(1e-2)
    return model, optimizer


def refuse(event: CheckpointSkipped) -> None:
    raise AssertionError(event)


def saved(folder: Path, *steps: int, keep: int = 3) -> Checkpoints:
    checkpoints = Checkpoints(folder, IDENTITY, keep=keep)
    model, optimizer = trained()
    for step in steps:
        checkpoints.save(step, step * 8, model, optimizer)
    return checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_gives_back_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model, optimizer = trained(dtype)
    checkpoints = Checkpoints(tmp_path, IDENTITY, keep=2)
    report = checkpoints.save(7, 56, model, optimizer)
    assert report.size_bytes == sum(file.stat().st_size for file in Path(report.path).iterdir())
    other, _ = step_for(dtype, Ranks(), 4)
    other_optimizer = MasterAdamW(other)
    found = checkpoints.newest(refuse)
    assert found is not None
    assert (found.step, found.next_sample) == (7, 56)
    found.load_into(other, other_optimizer)
    for name, weight in model.state_dict().items():
        assert weight.equal(other.state_dict()[name])
    theirs = other_optimizer.state_tensors()
    assert all(tensor.equal(theirs[name]) for name, tensor in optimizer.state_tensors().items())


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", IDENTITY, keep=1).newest(refuse) is None


def test_the_newest_stay(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3, keep=2)
    assert checkpoints.steps() == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")) == [
        "step-00000002",
        "step-00000003",
    ]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_a_damaged_checkpoint_is_moved_aside(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002" / name)
    skipped: list[CheckpointSkipped] = []
    found = checkpoints.newest(skipped.append)
    assert found is not None
    assert found.step == 1
    (event,) = skipped
    assert name in event.reason or "missing" in event.reason
    assert Path(event.path).name == "damaged-step-00000002-1"
    model, optimizer = trained()
    checkpoints.save(2, 16, model, optimizer)  # its name is free again
    assert checkpoints.steps() == [1, 2]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(WrongCheckpoint, match=r"peak_lr was 0.003 and is 0.1; seed was 0 and is 5") as caught:
        Checkpoints(tmp_path, IDENTITY | {"peak_lr": 0.1, "seed": 5}, keep=1).newest(refuse)
    assert caught.value.differences == {"peak_lr": (0.003, 0.1), "seed": (0, 5)}


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, 1)
    model, optimizer = trained()

    def fail() -> dict[str, torch.Tensor]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(optimizer, "state_tensors", fail)
    with pytest.raises(NoSpace):
        checkpoints.save(2, 16, model, optimizer)
    assert checkpoints.steps() == [1]
    assert not list(tmp_path.glob(".*tmp*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here (needs root)")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    checkpoints = Checkpoints(small_disk, IDENTITY, keep=100)
    model, optimizer = trained()
    with pytest.raises(NoSpace, match="no space left"):
        for step in range(1, 100):
            checkpoints.save(step, step, model, optimizer)
    steps = checkpoints.steps()
    assert 1 <= len(steps) < 99
    found = checkpoints.newest(refuse)
    assert found is not None
    assert found.step == steps[-1]
