"""What ranks do with checkpoints in the tests: save, load, die, stay away."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sihe.core.errors import NoSpace
from sihe.training.checkpoint import Checkpoints
from sihe.training.errors import PeerSilent
from sihe.training.optimizer import MasterOptimizer
from sihe.training.ranks import Ranks
from sihe.training.types import CheckpointSkipped
from support.forked_ranks import tell, wait_until_told
from support.sharded_states import Layout, local_of

IDENTITY = {"seed": 0}
STEPS_A_SAVE = 3


class Filled:
    """A state of which every number is the step: what a reader finds says which step it belongs to, and whether all
    of it does. Sharded as `layout` says."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def step(self, lr: float) -> float:
        for tensor in self.tensors.values():
            local_of(tensor).add_(1)
        return lr

    def state_tensors(self) -> Mapping[str, Tensor]:
        return self.tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            local_of(self.tensors[name]).copy_(local_of(tensor))

    def fill(self, value: float) -> Filled:
        for tensor in self.tensors.values():
            local_of(tensor).fill_(value)
        return self

    def values(self) -> set[float]:
        return {value for tensor in self.tensors.values() for value in local_of(tensor).unique().tolist()}


def checkpoints_of(ranks: Ranks, folder: Path, *, background: bool = True, keep: int = 2) -> Checkpoints:
    return Checkpoints(folder, IDENTITY, keep=keep, ranks=ranks, background=background)


def save_for_ever(ranks: Ranks, folder: Path, layout: Layout) -> None:
    """Steps with a sum over ranks, and a checkpoint every few of them in the background, until it is killed."""
    state = Filled(layout(ranks)).fill(0)
    checkpoints = checkpoints_of(ranks, folder)
    for step in range(1, 1_000_000):
        state.step(1.0)
        ranks.sum_(torch.ones(1000))
        if step % STEPS_A_SAVE == 0:
            checkpoints.save(step, step * 8, nn.Module(), state, extras=ranks.rank)
        for saved in checkpoints.completed():
            if ranks.is_first:
                (folder.parent / "reported").write_text(str(saved.step))


def load(ranks: Ranks, folder: Path, layout: Layout) -> tuple[int | None, set[float], list[str]]:
    """The step that was found, the numbers that it holds, and the reasons for which others were skipped."""
    skipped: list[CheckpointSkipped] = []
    found = checkpoints_of(ranks, folder).newest(skipped.append)
    state = Filled(layout(ranks)).fill(float("nan"))
    if found is not None:
        found.load_into(nn.Module(), state)
    return found.step if found else None, state.values(), [event.reason for event in skipped]


def save_steps(ranks: Ranks, folder: Path, layout: Layout, *steps: int) -> list[int]:
    """Saves the steps in the background; those that came to be."""
    checkpoints = checkpoints_of(ranks, folder, keep=10)
    state = Filled(layout(ranks))
    for step in steps:
        checkpoints.save(step, step * 8, nn.Module(), state.fill(step))
        state.fill(-1)  # the next step is being computed
    checkpoints.finish()
    return [saved.step for saved in checkpoints.completed()]


def stay_away(ranks: Ranks, folder: Path, layout: Layout, from_what: str) -> str:
    """Rank 1 does not come; the message of the others' error."""
    checkpoints = checkpoints_of(ranks, folder)
    if ranks.rank == 1:
        wait_until_told("over")
        return ""
    try:
        if from_what == "save":
            checkpoints.save(9, 72, nn.Module(), Filled(layout(ranks)))
            checkpoints.finish()
        else:
            checkpoints.newest(lambda _skipped: None)
    except PeerSilent as error:
        return str(error)
    finally:
        tell("over")
    return "nothing was raised"


def one_disk_full(ranks: Ranks, folder: Path, layout: Layout) -> tuple[str, list[int]]:
    """The disk of rank 1 is full in the second of three saves: what was raised, and by which call; what is there."""
    checkpoints = checkpoints_of(ranks, folder)
    state = Filled(layout(ranks))
    checkpoints.save(1, 8, nn.Module(), state.fill(1))
    checkpoints.finish()
    real_fsync = os.fsync
    if ranks.rank == 1:
        os.fsync = _full
    checkpoints.save(2, 16, nn.Module(), state.fill(2))
    raised = ""
    try:
        checkpoints.save(3, 24, nn.Module(), state.fill(3))
    except NoSpace as error:
        raised = str(error)
    os.fsync = real_fsync
    if ranks.is_first:  # which removes them; the others may hear of the error before
        leftovers = [path.name for path in folder.glob(".*tmp*")]
        assert not leftovers, leftovers
    checkpoints.save(3, 24, nn.Module(), state.fill(3))
    checkpoints.finish()
    return raised, checkpoints.steps()


def _full(_descriptor: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def train(ranks: Ranks, folder: Path, *, until: int, save_at: int | None, resume: bool) -> dict[str, Tensor]:
    """Data-parallel steps of a real optimizer; the state in the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    optimizer = MasterOptimizer(model)
    checkpoints = checkpoints_of(ranks, folder)
    done = 0
    if resume:
        found = checkpoints.newest(lambda _skipped: None)
        assert found is not None
        found.load_into(model, optimizer)
        done = found.step
    for step in range(done + 1, until + 1):
        inputs = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        share = inputs.chunk(ranks.world_size)[ranks.rank]
        model(share).square().sum().backward()
        for weight in model.parameters():
            if weight.grad is not None:
                ranks.sum_(weight.grad)
        optimizer.step(1e-2)
        if step == save_at:
            checkpoints.save(step, step * 8, model, optimizer)
    checkpoints.finish()
    return {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
