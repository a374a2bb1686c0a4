"""What an all-reduce costs in the alpha-beta model: a message of n bytes takes alpha + beta n.

Each rank sends one message and receives one at a time, both at once. S bytes are summed over N ranks:

    ring                  2 (N - 1) rounds of S / N bytes
    halving, doubling     2 log2 N rounds of S/2, S/4, ... S/N bytes and back
    binary tree           k chunks go up and down a tree of depth d: 2 (d + k - 1) rounds of 2 messages of S / k bytes
    double tree           the same with half of the bytes: two trees carry one half each, at the same time
    hierarchical          rings inside the nodes, which leave 1 / L of the bytes for the rings between them

The first two lines are from Thakur, Rabenseifner and Gropp 2005 (Optimization of Collective Communication Operations in
MPICH, section 4.5); the double tree is Sanders, Speck and Traeff's (2009, Two-tree algorithms for full bandwidth
broadcast, reduction and scan). Time spent on adding is not modelled.

Pure: no torch, no I/O.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sihe.core.errors import InvalidInput


@dataclass(frozen=True)
class Link:
    """What carries messages between two ranks: latency in seconds, and bytes a second in each direction."""

    latency_s: float
    bandwidth: float

    def __post_init__(self) -> None:
        if self.latency_s < 0 or not self.bandwidth > 0:
            raise InvalidInput(f"a link has a latency of at least 0 and a positive bandwidth, got {self!r}")

    def seconds(self, size_bytes: float) -> float:
        """Time of one message."""
        return self.latency_s + size_bytes / self.bandwidth


@dataclass(frozen=True)
class Cost:
    """One collective: its time, the rounds that follow each other, and the most bytes that one rank sends."""

    seconds: float
    rounds: int
    sent_bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.rounds + other.rounds, self.sent_bytes + other.sent_bytes)


NOTHING = Cost(0.0, 0, 0.0)


def ring(size_bytes: float, ranks: int, link: Link) -> Cost:
    """All-reduce by a ring: the least bytes, the most rounds."""
    return _ring_half(size_bytes, ranks, link) + _ring_half(size_bytes, ranks, link)


def reduce_scatter(size_bytes: float, ranks: int, link: Link) -> Cost:
    """By a ring. `size_bytes` is what each rank has before."""
    return _ring_half(size_bytes, ranks, link)


def all_gather(size_bytes: float, ranks: int, link: Link) -> Cost:
    """By a ring. `size_bytes` is what each rank has after."""
    return _ring_half(size_bytes, ranks, link)


def all_to_all(size_bytes: float, ranks: int, link: Link) -> Cost:
    """Each rank sends an equal share of its `size_bytes` to every rank, itself included, one after the other."""
    return _ring_half(size_bytes, ranks, link)


def halving_doubling(size_bytes: float, ranks: int, link: Link) -> Cost:
    """All-reduce by recursive halving, then doubling.

    Ranks beyond a power of two hand over all they have before and get the sum after, in two more rounds.
    """
    core = 1 << (ranks.bit_length() - 1)
    rounds = core.bit_length() - 1
    bytes_each_way = size_bytes * (core - 1) / core
    cost = Cost(2 * (rounds * link.latency_s + bytes_each_way / link.bandwidth), 2 * rounds, 2 * bytes_each_way)
    return cost if core == ranks else cost + Cost(2 * link.seconds(size_bytes), 2, size_bytes)


def tree_depth(ranks: int) -> int:
    """Edges from the root of a balanced binary tree to its deepest rank."""
    return ranks.bit_length() - 1


def best_chunks(size_bytes: float, ranks: int, link: Link, *, most: int = 1024) -> int:
    """Into how many chunks a message is best cut on its way through a binary tree: where the time's derivative is 0."""
    hops = tree_depth(ranks) - 1
    if hops < 1 or link.latency_s == 0:
        return 1 if hops < 1 else most
    return max(1, min(most, round(math.sqrt(hops * size_bytes / (link.bandwidth * link.latency_s)))))


def binary_tree(size_bytes: float, ranks: int, link: Link, chunks: int | None = None) -> Cost:
    """All-reduce over one tree. From 6 ranks on, one has two children and a parent, and sends 3 S bytes."""
    if ranks == 1:
        return NOTHING
    chunks = chunks or best_chunks(size_bytes, ranks, link)
    children = min(2, ranks - 1)
    rounds = 2 * (tree_depth(ranks) + chunks - 1) * children
    sent = size_bytes * (1 if ranks == 2 else 2 if ranks < 6 else 3)
    return Cost(rounds * link.seconds(size_bytes / chunks), rounds, sent)


def double_tree(size_bytes: float, ranks: int, link: Link, chunks: int | None = None) -> Cost:
    """All-reduce over two trees at once, each with half of the bytes; who is inner in one is a leaf in the other.

    So a rank sends at most 3 halves as inner rank and one as leaf: 2 S bytes.
    """
    if ranks == 1:
        return NOTHING
    one = binary_tree(size_bytes / 2, ranks, link, chunks)
    sent = size_bytes * (1 if ranks == 2 else 1.5 if ranks == 3 else 2)
    return Cost(one.seconds, one.rounds, sent)


def hierarchical(size_bytes: float, nodes: int, per_node: int, inside: Link, between: Link) -> Cost:
    """All-reduce in three steps: summed and shared out inside each node, then between nodes, then gathered.

    The ranks of a node send over `between` at the same time, each its share: `between` is the link of one rank.
    """
    return (
        reduce_scatter(size_bytes, per_node, inside)
        + ring(size_bytes / per_node, nodes, between)
        + all_gather(size_bytes, per_node, inside)
    )


def _ring_half(size_bytes: float, ranks: int, link: Link) -> Cost:
    rounds = ranks - 1
    return Cost(rounds * link.seconds(size_bytes / ranks), rounds, rounds * size_bytes / ranks)
