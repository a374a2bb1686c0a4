"""The ring: each rank speaks to two neighbours only, and sends the fewest bytes that an all-reduce can."""

from __future__ import annotations

import torch
from torch import Tensor

from sihe.cluster.collectives.peers import Peers, check


def ring(tensor: Tensor, peers: Peers) -> None:
    """Adds `tensor` (one dim, contiguous) over all peers, in place (Patarasuk and Yuan 2009, section 3).

    The tensor is cut into as many chunks as there are ranks. In round i each rank passes one chunk to its right
    neighbour and adds the one from its left; after N - 1 rounds rank r owns the whole sum of chunk r + 1. In N - 1
    further rounds the finished chunks go round.
    """
    check(tensor)
    reduce_scatter(tensor, peers)
    all_gather(tensor, peers)


def reduce_scatter(tensor: Tensor, peers: Peers) -> Tensor:
    """Leaves the whole sum in one of as many chunks as there are peers, chunk rank + 1, and returns that."""
    chunks = tensor.tensor_split(peers.size)
    received = torch.empty_like(chunks[0])
    left, right = (peers.rank - 1) % peers.size, (peers.rank + 1) % peers.size
    for step in range(peers.size - 1):
        target = chunks[(peers.rank - step - 1) % peers.size]
        incoming = received[: target.numel()]
        peers.exchange(chunks[(peers.rank - step) % peers.size], right, incoming, left)
        target += incoming
    return chunks[(peers.rank + 1) % peers.size]


def all_gather(tensor: Tensor, peers: Peers) -> None:
    """Completes `tensor`, of which each peer has chunk rank + 1 right."""
    chunks = tensor.tensor_split(peers.size)
    left, right = (peers.rank - 1) % peers.size, (peers.rank + 1) % peers.size
    for step in range(peers.size - 1):
        outgoing = chunks[(peers.rank + 1 - step) % peers.size]
        peers.exchange(outgoing, right, chunks[(peers.rank - step) % peers.size], left)
