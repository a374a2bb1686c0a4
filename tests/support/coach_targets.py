"""What the ranks of the coach's tests run: functions that a fresh process can import by name."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def echo(rank: int, world_size: int, *, word: str) -> dict[str, Any]:
    threads = int(os.environ["OMP_NUM_THREADS"])
    return {"rank": rank, "of": world_size, "word": word, "pid": os.getpid(), "threads": threads}


def sleep_for_ever(rank: int, world_size: int, *, pid_file: str) -> None:
    Path(pid_file).write_text(str(os.getpid()))
    while True:
        time.sleep(0.05)


def second_fails(rank: int, world_size: int, *, pid_folder: str) -> None:
    """Rank 1 raises while rank 0 waits for a message that will never come."""
    import torch
    import torch.distributed as dist

    (Path(pid_folder) / str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        raise ValueError("the words of rank one")
    dist.recv(torch.zeros(1), 1)


def ring_sums(rank: int, world_size: int, *, sizes: list[int]) -> dict[str, Any]:
    """The ring over tensors whose sum is known: rank r holds (r + 1) · [0, 1, 2, …]."""
    import torch

    from sihe.cluster.collectives.peers import Peers
    from sihe.cluster.collectives.ring import ring

    wrong, sent = [], []
    for size in sizes:
        tensor = torch.arange(size, dtype=torch.float32) * (rank + 1)
        peers = Peers()
        ring(tensor, peers)
        sent.append(peers.sent_bytes)
        total = sum(range(1, world_size + 1))
        if not torch.equal(tensor, torch.arange(size, dtype=torch.float32) * total):
            wrong.append(size)
    return {"wrong": wrong, "sent": sent}
