"""What a rank of `allreduce.ring` runs: the ring, gloo's own all-reduce, and the ping-pong behind the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sihe.cluster.collectives.peers import Peers
from sihe.cluster.collectives.ring import ring

_PING_PONG_ITEMS = (1, 256, 4096, 65536, 262144, 1048576)


def times(rank: int, world_size: int, *, items: list[int], repeats: int) -> dict[str, Any]:
    """Best seconds of both all-reduces for each size, the bytes sent, the largest difference, and the ping-pong."""
    ring_s, gloo_s, sent_bytes, difference = [], [], [], 0.0
    for size in items:
        ours, theirs = _numbers(size, rank), _numbers(size, rank)
        peers = Peers(range(world_size))
        ring(ours, peers)
        sent_bytes.append(peers.sent_bytes)
        dist.all_reduce(theirs)
        difference = max(difference, (ours - theirs).abs().max().item())
        buffer = torch.zeros(size)  # sums of zeros stay zeros however often they are repeated

        def our_ring(buffer: Tensor = buffer) -> None:
            ring(buffer, Peers())

        def gloo(buffer: Tensor = buffer) -> None:
            dist.all_reduce(buffer)

        ring_s.append(_best_seconds(our_ring, repeats))
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
