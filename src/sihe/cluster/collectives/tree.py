"""Trees: a logarithm of rounds for the first byte, and chunks that follow each other so that all links are busy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sihe.cluster.collectives.peers import Peers, check, wait

_CHUNK_BYTES = 1 << 18  # below it a message costs about its latency, on loopback as on InfiniBand


@dataclass(frozen=True)
class Tree:
    """The place of one rank in a tree of ranks."""

    parent: int | None
    children: tuple[int, ...]


def balanced_tree(rank: int, size: int) -> Tree:
    """The tree that halves a range of ranks: its root is the middle one, each half hangs below by its own middle.

    Read from left to right it gives 0 .. size - 1, so that every second rank is a leaf or has one child.
    """
    low, high, parent = 0, size, None
    while (root := (low + high) // 2) != rank:
        parent = root
        low, high = (low, root) if rank < root else (root + 1, high)
    halves = ((low, root), (root + 1, high))
    return Tree(parent, tuple((first + last) // 2 for first, last in halves if first < last))


def in_order_tree(rank: int, size: int) -> Tree:
    """The tree of inner ranks 1, 3, 5, ... and leaves 0, 2, 4, ...: rank r is as high as the zeros that end r + 1.

    Moved by one rank, inner ranks and leaves change roles (Sanders, Speck and Traeff 2009, section 4).
    """
    number = rank + 1
    height = number & -number
    children = tuple(
        child - 1
        for child in (number - height // 2, _within(number + height // 2, height // 2, size))
        if height > 1 and child is not None
    )
    root = 1 << (size.bit_length() - 1)
    if number == root:
        return Tree(None, children)
    above = number - height if number & (height << 1) else number + height
    while above > size:  # a parent that is not there: its own parent on the left takes its place
        above -= above & -above
    return Tree(above - 1, children)


def _within(number: int, height: int, size: int) -> int | None:
    """The root of the right subtree around `number` with the most ranks below that exist; None when there is none."""
    while number > size and height > 1:
        height //= 2
        number -= height
    return number if number <= size else None


def binary_tree(tensor: Tensor, peers: Peers, *, chunk_bytes: int = _CHUNK_BYTES) -> None:
    """Adds `tensor` (one dim, contiguous) over all peers, in place: sums rise to the root, the result comes down."""
    check(tensor)
    _climb_and_descend([(balanced_tree(peers.rank, peers.size), tensor)], peers, chunk_bytes)


def double_tree(tensor: Tensor, peers: Peers, *, chunk_bytes: int = _CHUNK_BYTES) -> None:
    """Adds `tensor` (one dim, contiguous) over all peers, in place, each half over a tree of its own.

    In one tree the leaves are idle half of the time. The second tree is the first one moved by one rank, so that the
    leaves of one are the inner ranks of the other (but for one rank, where their number is odd).
    """
    check(tensor)
    size = peers.size
    first = in_order_tree(peers.rank, size)
    second = in_order_tree((peers.rank - 1) % size, size)
    moved = Tree(
        None if second.parent is None else (second.parent + 1) % size,
        tuple((child + 1) % size for child in second.children),
    )
    low, high = tensor.tensor_split(2)
    _climb_and_descend([(first, low), (moved, high)], peers, chunk_bytes)


def _climb_and_descend(trees: list[tuple[Tree, Tensor]], peers: Peers, chunk_bytes: int) -> None:
    """Runs every tree at once, chunk by chunk; the number of a tree is the tag of its messages."""
    size = trees[0][1].element_size()
    items = max(1, chunk_bytes // size)
    longest = max(part.numel() for _, part in trees)
    starts = range(0, longest, items)
    received = torch.empty_like(trees[0][1][:items])
    sending: list[dist.Work] = []
    for start in starts:
        for tag, (tree, part) in enumerate(trees):
            chunk = part[start : start + items]
            for child in tree.children:
                incoming = received[: chunk.numel()]
                peers.receive(incoming, child, tag=tag)
                chunk += incoming
            if tree.parent is not None:
                sending += peers.send(chunk, tree.parent, tag=tag)
    wait(sending)
    sending = []
    for start in starts:
        for tag, (tree, part) in enumerate(trees):
            chunk = part[start : start + items]
            if tree.parent is not None:
                peers.receive(chunk, tree.parent, tag=tag)
            for child in tree.children:
                sending += peers.send(chunk, child, tag=tag)
    wait(sending)
