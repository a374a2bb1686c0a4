"""The data-parallel ranks of one attempt: who this process is, and the sums over all of them (gloo, on CPU)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from sihe.training.errors import PeerSilent

# Ranks start at different times: on a busy machine, importing torch alone takes some of them many seconds longer.
_MEETING_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Ranks:
    """Rank `rank` of `world_size`. A single rank needs no process group, and every sum is the identity."""

    rank: int = 0
    world_size: int = 1
    timeout_s: float = _MEETING_TIMEOUT_S
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the logs and checkpoints."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces `tensor` by its sum over all ranks; the same bits on each of them. Raises `PeerSilent`."""
        if self.world_size > 1:
            with self.errors():
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def largest(self, value: int) -> int:
        """The largest `value` that a rank has. Raises `PeerSilent`."""
        if self.world_size == 1:
            return value
        shared = torch.tensor([value])
        with self.errors():
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.group)
        return int(shared.item())

    def from_first(self, value: int) -> int:
        """The `value` that the first rank has. Raises `PeerSilent`."""
        if self.world_size == 1:
            return value
        shared = torch.tensor([value])
        with self.errors():
            dist.broadcast(shared, src=0, group=self.group)
        return int(shared.item())

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Around collectives: one that waited too long for a peer raises `PeerSilent`."""
        try:
            yield
        except RuntimeError as error:
            # gloo has no error class for it; the words are those of gloo/transport/tcp/unbound_buffer.cc
            if "timed out" in str(error).lower():
                raise PeerSilent(self.timeout_s, str(error).splitlines()[0]) from error
            raise


@contextmanager
def joined(timeout_s: float) -> Iterator[Ranks]:
    """Joins the ranks that the launcher started, and leaves them on a clean exit.

    From then on a collective that waits for a peer longer than `timeout_s` raises `PeerSilent`.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo", timeout=timedelta(seconds=_MEETING_TIMEOUT_S))
    dist.barrier()
    group = dist.new_group(timeout=timedelta(seconds=timeout_s))
    yield Ranks(dist.get_rank(), world_size, timeout_s, group)
    # Not after an error: leaving would wait for peers that may be gone, and the process ends anyway.
    dist.destroy_process_group()
