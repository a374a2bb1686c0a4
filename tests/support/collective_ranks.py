"""All-reduces of our own, run by each rank of a gloo group in `tests/cluster/test_cluster_collectives.py`."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.distributed as dist

from sihe.cluster.collectives.catalog import ALGORITHMS
from sihe.cluster.collectives.hierarchical import hierarchical
from sihe.cluster.collectives.peers import Peers
from sihe.cluster.collectives.tree import binary_tree, double_tree

LENGTHS = (0, 1, 2, 3, 5, 7, 840, 1001)
DTYPES = (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bfloat16, torch.float16)
RUNS = {
    **{name: algorithm.run for name, algorithm in ALGORITHMS.items()},
    "binary tree, chunks": partial(binary_tree, chunk_bytes=64),
    "double tree, chunks": partial(double_tree, chunk_bytes=64),
    "hierarchical, 3 a node": partial(hierarchical, per_node=3),
    "hierarchical, 4 a node": partial(hierarchical, per_node=4),
}


def wrong_sums() -> list[str]:
    """Every case whose sum is not the exact one. The numbers are small and whole, so that no dtype rounds."""
    rank, size = dist.get_rank(), dist.get_world_size()
    wrong = []
    cases = [(torch.float32, length) for length in LENGTHS] + [(dtype, 13) for dtype in DTYPES]
    for name, run in RUNS.items():
        for dtype, length in cases:
            every = [(torch.arange(length) * 7 + 3 * other) % 11 for other in range(size)]
            mine = every[rank].to(dtype, copy=True)
            run(mine, Peers())
            if not torch.equal(mine, sum(every, torch.zeros(length, dtype=torch.int64)).to(dtype)):
                wrong.append(f"{name}, {dtype}, {length} items, rank {rank} of {size}")
    return wrong


def sent_bytes(items: int) -> dict[str, list[int]]:
    """Of each algorithm, the bytes that every rank sent to add `items` float32."""
    found = {}
    for name, algorithm in ALGORITHMS.items():
        peers = Peers()
        algorithm.run(torch.zeros(items), peers)
        counts = torch.zeros(dist.get_world_size(), dtype=torch.int64)
        counts[dist.get_rank()] = peers.sent_bytes
        dist.all_reduce(counts)
        found[name] = counts.tolist()
    return found


def only_members_change() -> list[float]:
    """An all-reduce among ranks 2 and 0, in that order, while the others do nothing."""
    tensor = torch.tensor([float(10 ** dist.get_rank())])
    if dist.get_rank() in (0, 2):
        ALGORITHMS["ring"].run(tensor, Peers([2, 0]))
    return tensor.tolist()


def timed_exchanges() -> list[tuple[float, float]]:
    """What measuring neighbours gives: bytes and seconds of each message."""
    from sihe.cluster.collectives.measurement import neighbour_exchanges

    points = neighbour_exchanges(Peers(), sizes=(8, 4096), repeats=3)
    assert all(math.isfinite(seconds) and seconds > 0 for _, seconds in points)
    return points
