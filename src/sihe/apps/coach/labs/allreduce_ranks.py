"""What a rank of `allreduce.ring` runs: the ring itself, gloo's own all-reduce, and the ping-pong behind the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_PING_PONG_ITEMS = (1, 256, 4096, 65536, 262144, 1048576)


def ring_all_reduce(tensor: Tensor, rank: int, world_size: int) -> int:
    """Adds `tensor` (1-D, contiguous) over all ranks, in place; the bytes that this rank sent.

    Reduce-scatter, then all-gather (Patarasuk and Yuan, 2009, section 3): the tensor is cut into as many chunks as
    there are ranks. In step s each rank passes one chunk to its right neighbour and adds the one from its left; after
    N − 1 steps rank r owns the whole sum of chunk r + 1. In N − 1 further steps the finished chunks go round.
    """
    chunks = tensor.tensor_split(world_size)
    received = torch.empty_like(chunks[0])
    left, right = (rank - 1) % world_size, (rank + 1) % world_size
    sent_bytes = 0
    for step in range(2 * (world_size - 1)):
        outgoing = chunks[(rank - step) % world_size]
        target = chunks[(rank - step - 1) % world_size]
        reducing = step < world_size - 1
        incoming = received[: target.numel()] if reducing else target
        sending = dist.isend(outgoing, right)
        dist.recv(incoming, left)
        assert sending is not None
        sending.wait()
        if reducing:
            target += incoming
        sent_bytes += outgoing.numel() * outgoing.element_size()
    return sent_bytes


def times(rank: int, world_size: int, *, items: list[int], repeats: int) -> dict[str, Any]:
    """Best seconds of both all-reduces for each size, the bytes sent, the largest difference, and the ping-pong."""
    ring_s, gloo_s, sent_bytes, difference = [], [], [], 0.0
    for size in items:
        ours, theirs = _numbers(size, rank), _numbers(size, rank)
        sent_bytes.append(ring_all_reduce(ours, rank, world_size))
        dist.all_reduce(theirs)
        difference = max(difference, (ours - theirs).abs().max().item())
        buffer = torch.zeros(size)  # sums of zeros stay zeros however often they are repeated

        def ring(buffer: Tensor = buffer) -> None:
            ring_all_reduce(buffer, rank, world_size)

        def gloo(buffer: Tensor = buffer) -> None:
            dist.all_reduce(buffer)

        ring_s.append(_best_seconds(ring, repeats))
        gloo_s.append(_best_seconds(gloo, repeats))
    return {
        "ring_s": ring_s,
        "gloo_s": gloo_s,
        "sent_bytes": sent_bytes,
        "difference": difference,
        "ping_pong": _ping_pong(rank, repeats),
    }


def _numbers(size: int, rank: int) -> Tensor:
    """Small whole numbers: their sums are exact in float32, so that both algorithms must agree to the last bit."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-1000, 1000, (size,), generator=generator).float()


def _best_seconds(operation: Callable[[], None], repeats: int) -> float:
    """The fastest of `repeats`: what the machine can do when nothing else disturbs it."""
    taken = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        operation()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _ping_pong(rank: int, repeats: int) -> list[tuple[int, float]]:
    """(items, seconds of one message) between ranks 0 and 1; the others wait."""
    found = []
    for size in _PING_PONG_ITEMS:
        ball = torch.zeros(size)

        def there_and_back(ball: Tensor = ball) -> None:
            if rank == 0:
                dist.send(ball, 1)
                dist.recv(ball, 1)
            elif rank == 1:
                dist.recv(ball, 0)
                dist.send(ball, 0)

        found.append((size, _best_seconds(there_and_back, repeats) / 2))
    return found
