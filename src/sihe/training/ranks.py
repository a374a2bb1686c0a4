"""The data-parallel ranks of one attempt: who this process is, and the sums over all of them (gloo, on CPU)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """Rank `rank` of `world_size`. A single rank needs no process group, and every sum is the identity."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the logs and checkpoints."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces `tensor` by its sum over all ranks; the same bits on each of them."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_first(self, value: int) -> int:
        """The `value` that the first rank has."""
        if self.world_size == 1:
            return value
        shared = torch.tensor([value])
        dist.broadcast(shared, src=0)
        return int(shared.item())


@contextmanager
def joined(timeout_s: float) -> Iterator[Ranks]:
    """Joins the ranks that the launcher started, and leaves them on a clean exit.

    A collective that waits for a peer longer than `timeout_s` raises: a rank that hangs ends the attempt loudly.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    yield Ranks(dist.get_rank(), world_size)
    # Not after an error: leaving would wait for peers that may be gone, and the process ends anyway.
    dist.destroy_process_group()
