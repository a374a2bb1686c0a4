"""Messages with a clock beside them: what the fit of a link is made from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from sihe.cluster.collectives.peers import Peers

SIZES = (8, 1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24)


def neighbour_exchanges(peers: Peers, sizes: Sequence[int] = SIZES, *, repeats: int = 5) -> list[tuple[float, float]]:
    """(bytes, seconds) of one message of each size, while every rank sends one to its right neighbour.

    That is the round of which rings are made: where ranks share cores or a wire, a single pair would look too fast.
    The slowest rank counts; the fastest of `repeats` does, as what the machine can do when nothing disturbs it.
    """
    left, right = (peers.rank - 1) % peers.size, (peers.rank + 1) % peers.size
    found = []
    for size in sizes:
        outgoing, incoming = torch.zeros(2, size, dtype=torch.uint8)

        def exchange(outgoing: torch.Tensor = outgoing, incoming: torch.Tensor = incoming) -> None:
            peers.exchange(outgoing, right, incoming, left)

        found.append((float(size), best_seconds(exchange, repeats=repeats)))
    return found


def best_seconds(operation: Callable[[], object], *, repeats: int) -> float:
    """The fastest of `repeats` (after one to warm up), each as long as it took the slowest rank; the same on all."""
    operation()
    slowest = torch.zeros(repeats, dtype=torch.float64)
    for number in range(repeats):
        dist.barrier()
        started = time.perf_counter()
        operation()
        slowest[number] = time.perf_counter() - started
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest.min())
