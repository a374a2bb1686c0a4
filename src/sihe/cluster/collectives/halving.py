"""Recursive halving and doubling: as few bytes as the ring, in a logarithm of its rounds, between distant ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from sihe.cluster.collectives.peers import Peers, check, wait


def halving_doubling(tensor: Tensor, peers: Peers) -> None:
    """Adds `tensor` (one dim, contiguous) over all peers, in place (Rabenseifner; Thakur et al. 2005, section 4.5).

    In each round two ranks split what both hold: each sends the half that the other keeps, and adds what it gets.
    When every rank holds one piece of the sum, the same way back doubles the pieces. Where the number of ranks is no
    power of two, some begin by handing all they have to a neighbour, which gives them the sum at the end.
    """
    check(tensor)
    core = 1 << (peers.size.bit_length() - 1)
    doubled = peers.size - core  # ranks 0 .. 2 doubled - 1 work in pairs, of which the even one sits out
    if peers.rank < 2 * doubled and peers.rank % 2 == 0:
        wait(peers.send(tensor, peers.rank + 1))
        peers.receive(tensor, peers.rank + 1)
        return
    received = torch.empty_like(tensor)
    if peers.rank < 2 * doubled:
        peers.receive(received, peers.rank - 1)
        tensor += received
    workers = [*range(1, 2 * doubled, 2), *range(2 * doubled, peers.size)]
    _halve_and_double(tensor, received, peers, workers)
    if peers.rank < 2 * doubled:
        wait(peers.send(tensor, peers.rank - 1))


def _halve_and_double(tensor: Tensor, received: Tensor, peers: Peers, workers: list[int]) -> None:
    place = workers.index(peers.rank)
    start, end = 0, tensor.numel()
    undone: list[tuple[int, slice, slice]] = []
    distance = len(workers) // 2
    while distance:
        partner = workers[place ^ distance]
        middle = (start + end) // 2
        low, high = slice(start, middle), slice(middle, end)
        kept, given = (high, low) if place & distance else (low, high)
        incoming = received[kept]
        peers.exchange(tensor[given], partner, incoming, partner)
        tensor[kept] += incoming
        undone.append((partner, kept, given))
        start, end = kept.start, kept.stop
        distance //= 2
    for partner, kept, given in reversed(undone):
        peers.exchange(tensor[kept], partner, tensor[given], partner)
