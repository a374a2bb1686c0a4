"""The algorithms by name, each with its cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from sihe.cluster.collectives import costs, halving, hierarchical, ring, tree
from sihe.cluster.collectives.costs import Cost, Link
from sihe.cluster.collectives.peers import Peers


class Algorithm(NamedTuple):
    """How to add a tensor over all peers in place, and what that costs: bytes, ranks, link."""

    run: Callable[[Tensor, Peers], None]
    cost: Callable[[float, int, Link], Cost]


def two_level(per_node: int) -> Algorithm:
    """The hierarchical all-reduce, as it costs where both levels have the same link and nodes are full."""

    def cost(size_bytes: float, ranks: int, link: Link) -> Cost:
        return costs.hierarchical(size_bytes, ranks // per_node, per_node, link, link)

    return Algorithm(partial(hierarchical.hierarchical, per_node=per_node), cost)


ALGORITHMS = {
    "ring": Algorithm(ring.ring, costs.ring),
    "binary tree": Algorithm(tree.binary_tree, costs.binary_tree),
    "double tree": Algorithm(tree.double_tree, costs.double_tree),
    "halving-doubling": Algorithm(halving.halving_doubling, costs.halving_doubling),
    "hierarchical": two_level(2),
}
