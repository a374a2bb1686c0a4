"""Two levels: inside a node, where links are fast, everything; between nodes only what each rank is responsible for."""

from __future__ import annotations

from torch import Tensor

from sihe.cluster.collectives.peers import Peers, check
from sihe.cluster.collectives.ring import all_gather, reduce_scatter, ring
from sihe.cluster.collectives.tree import binary_tree
from sihe.core.errors import InvalidInput


def hierarchical(tensor: Tensor, peers: Peers, *, per_node: int) -> None:
    """Adds `tensor` (one dim, contiguous) over all peers, in place; ranks r with the same r // per_node share a node.

    Each node sums and shares out, so that a rank has the node's sum of one chunk; the ranks with the same chunk sum it
    over the nodes; each node gathers. When the last node has fewer ranks its chunks are others: then the first rank of
    each node speaks for all of it.
    """
    check(tensor)
    if per_node < 1:
        raise InvalidInput(f"per_node must be at least 1, got {per_node!r}")
    node = peers.rank // per_node
    inside = range(node * per_node, min((node + 1) * per_node, peers.size))
    if peers.size % per_node:
        _by_leaders(tensor, peers, inside, per_node)
        return
    at_home, abroad = peers.among(inside), peers.among(range(peers.rank % per_node, peers.size, per_node))
    ring(reduce_scatter(tensor, at_home), abroad)
    all_gather(tensor, at_home)
    peers.sent_bytes += at_home.sent_bytes + abroad.sent_bytes


def _by_leaders(tensor: Tensor, peers: Peers, inside: range, per_node: int) -> None:
    at_home = peers.among(inside)
    binary_tree(tensor, at_home)
    peers.sent_bytes += at_home.sent_bytes
    leaders = range(0, peers.size, per_node)
    if peers.rank in leaders:
        abroad = peers.among(leaders)
        ring(tensor, abroad)
        peers.sent_bytes += abroad.sent_bytes
    for member in inside[1:]:
        if peers.rank == inside[0]:
            for work in peers.send(tensor, member):
                work.wait()
        elif peers.rank == member:
            peers.receive(tensor, inside[0])
