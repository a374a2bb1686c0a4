"""Checkpoints: whole or absent, checked, the newest valid one found, none of another run taken."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from sihe.core.errors import NoSpace
from sihe.training.checkpoint import Checkpoints
from sihe.training.errors import WrongCheckpoint
from sihe.training.optimizer import MasterOptimizer
from sihe.training.types import CheckpointSkipped
from support.training_runs import small_config

IDENTITY = small_config(Path("data")).identity()


def new_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 256), nn.Linear(256, 64), nn.LayerNorm(64)).to(dtype)


def trained(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, MasterOptimizer]:
    model = new_model(dtype)
    optimizer = MasterOptimizer(model)
    move(model, optimizer)
    return model, optimizer


def move(model: nn.Module, optimizer: MasterOptimizer) -> None:
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    optimizer.step(1e-2)


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
    checkpoints.save(7, 56, model, optimizer, state={"loss_scale": 2.0**15}, extras=["rank 0"])
    (report,) = checkpoints.completed()
    assert checkpoints.completed() == []
    assert report.size_bytes == sum(file.stat().st_size for file in Path(report.path).iterdir())
    other = new_model(dtype)
    other_optimizer = MasterOptimizer(other)
    found = checkpoints.newest(refuse)
    assert found is not None
    assert (found.step, found.next_sample) == (7, 56)
    assert (found.manifest.state, found.manifest.extras) == ({"loss_scale": 2.0**15}, [["rank 0"]])
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


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json"])
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_a_damaged_checkpoint_is_moved_aside(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002" / name)
    skipped: list[CheckpointSkipped] = []
    found = checkpoints.newest(skipped.append)
    assert found is not None
    assert found.step == 1
    (event,) = skipped
    assert name in event.reason
    assert Path(event.path).name == "damaged-step-00000002-1"
    model, optimizer = trained()
    checkpoints.save(2, 16, model, optimizer)  # its name is free again
    assert checkpoints.steps() == [1, 2]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(WrongCheckpoint, match=r"peak_lr was 0.003 and is 0.1; seed was 0 and is 5") as caught:
        Checkpoints(tmp_path, IDENTITY | {"peak_lr": 0.1, "seed": 5}, keep=1).newest(refuse)
    assert caught.value.differences == {"peak_lr": (0.003, 0.1), "seed": (0, 5)}


@pytest.mark.parametrize("background", [False, True])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    saved(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, IDENTITY, keep=3, background=background)
    model, optimizer = trained()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(NoSpace):
        patch.setattr(os, "fsync", full)
        checkpoints.save(2, 16, model, optimizer)
        checkpoints.finish()
    assert checkpoints.completed() == []
    assert checkpoints.steps() == [1]
    assert not list(tmp_path.glob(".*tmp*"))
    checkpoints.save(2, 16, model, optimizer)  # with space it goes on
    checkpoints.finish()
    assert checkpoints.steps() == [1, 2]


def test_what_changes_after_the_snapshot_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer is held up until the next steps are done; each of three saves must hold its own step."""
    model, optimizer = trained()
    checkpoints = Checkpoints(tmp_path, IDENTITY, keep=3, background=True)
    checkpoints.reserve(model, optimizer)
    real_fsync, go_on = os.fsync, threading.Event()

    def late(descriptor: int) -> None:
        go_on.wait()
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", late)
    kept = {}
    for step in (1, 2, 3):
        kept[step] = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
        checkpoints.save(step, step * 8, model, optimizer)
        assert step not in checkpoints.steps()
        move(model, optimizer)
        go_on.set()
        checkpoints.finish()
        go_on.clear()
    go_on.set()
    assert [event.step for event in checkpoints.completed()] == [1, 2, 3]
    for step, state in kept.items():
        other = new_model()
        other_optimizer = MasterOptimizer(other)
        checkpoints.at(step).load_into(other, other_optimizer)
        theirs = other_optimizer.state_tensors()
        assert all(tensor.equal(theirs[name]) for name, tensor in state.items())


def test_a_model_that_is_not_the_one_that_was_saved(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    other = nn.Sequential(nn.Embedding(96, 32), nn.Linear(32, 256))
    optimizer = MasterOptimizer(other)
    before = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    with pytest.raises(WrongCheckpoint, match=r"mean\.0\.weight") as caught:
        checkpoints.at(1).load_into(other, optimizer)
    assert caught.value.differences["mean.0.weight"] == ("float32[96, 64]", "float32[96, 32]")
    assert caught.value.differences["mean.2.bias"] == ("float32[64]", "absent")
    assert all(tensor.equal(before[name]) for name, tensor in optimizer.state_tensors().items())
    with pytest.raises(WrongCheckpoint, match=r"weight\.0\.weight"):
        checkpoints.at(1).load_weights(other)


def test_frozen_weights_and_further_tensors_are_kept(tmp_path: Path) -> None:
    model = new_model()
    model[1].requires_grad_(False)
    optimizer = MasterOptimizer(model)
    average = torch.randn(3, 4)
    checkpoints = Checkpoints(tmp_path, IDENTITY, keep=1)
    checkpoints.save(1, 8, model, optimizer, {"average": average})
    other, read = new_model(), torch.zeros(3, 4)
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    other[1].requires_grad_(False)
    checkpoints.at(1).load_into(other, MasterOptimizer(other), {"average": read})
    assert read.equal(average)
    assert all(weight.equal(other.state_dict()[name]) for name, weight in model.state_dict().items())


def test_weights_alone_are_rounded_to_the_model(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    exported = new_model(torch.bfloat16)
    checkpoints.at(1).load_weights(exported)
    for name, weight in trained()[0].state_dict().items():
        assert weight.bfloat16().equal(exported.state_dict()[name])


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    for leftover in (".step-00000009.tmp-abc", ".removed-step-00000000"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "__0_0.distcp").write_bytes(b"half")
    found = checkpoints.newest(refuse)
    assert found is not None
    assert found.step == 1
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"step-00000001"}


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
