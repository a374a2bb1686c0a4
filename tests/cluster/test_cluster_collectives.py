"""All-reduces over real processes: exact sums, and the bytes that the cost model says."""

from __future__ import annotations

import pytest
import torch

from sihe.cluster.collectives.catalog import ALGORITHMS
from sihe.cluster.collectives.costs import Link
from sihe.cluster.collectives.peers import check
from sihe.cluster.collectives.tree import Tree, balanced_tree, in_order_tree
from sihe.core.errors import InvalidInput
from support import collective_ranks
from support.gloo import run_ranks


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 7, 8])
def test_every_algorithm_sums_exactly_whatever_the_length_and_the_dtype(world_size: int) -> None:
    assert run_ranks(collective_ranks.wrong_sums, world_size) == [[]] * world_size


@pytest.mark.parametrize("world_size", [2, 4, 6, 8])
def test_no_rank_sends_more_than_the_model_says_and_one_sends_that(world_size: int) -> None:
    items = 840
    measured = run_ranks(collective_ranks.sent_bytes, world_size, items)[0]
    for name, algorithm in ALGORITHMS.items():
        modelled = algorithm.cost(items * 4, world_size, Link(1e-6, 1e9)).sent_bytes
        assert max(measured[name]) == pytest.approx(modelled), name


def test_ranks_that_are_not_among_the_peers_are_left_alone() -> None:
    assert run_ranks(collective_ranks.only_members_change, 3) == [[101.0], [10.0], [101.0]]


def test_neighbours_measure_the_same_seconds_on_every_rank() -> None:
    answers = run_ranks(collective_ranks.timed_exchanges, 3)
    assert answers[0] == answers[1] == answers[2]
    assert [size for size, _ in answers[0]] == [8.0, 4096.0]


@pytest.mark.parametrize("tensor", [torch.zeros(2, 2), torch.zeros(4)[::2], torch.zeros(())])
def test_a_tensor_that_is_no_contiguous_row_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(InvalidInput, match="one dim"):
        check(tensor)


# ---- trees ----------------------------------------------------------------------------------------------------------


def hops_to_root(tree: dict[int, Tree], rank: int) -> int:
    hops = 0
    while (parent := tree[rank].parent) is not None:
        rank, hops = parent, hops + 1
        assert hops <= len(tree), "a circle"
    return hops


@pytest.mark.parametrize("shape", [balanced_tree, in_order_tree])
@pytest.mark.parametrize("size", range(1, 70))
def test_parents_and_children_agree_and_the_tree_is_flat(shape: object, size: int) -> None:
    assert callable(shape)
    tree = {rank: shape(rank, size) for rank in range(size)}
    edges = {(rank, child) for rank in tree for child in tree[rank].children}
    assert edges == {(tree[rank].parent, rank) for rank in tree if tree[rank].parent is not None}
    assert len(edges) == size - 1
    assert max(hops_to_root(tree, rank) for rank in tree) <= size.bit_length() - (shape is balanced_tree)


@pytest.mark.parametrize("size", range(2, 70))
def test_no_rank_is_inner_in_both_halves_of_a_double_tree(size: int) -> None:
    inner = {rank for rank in range(size) if in_order_tree(rank, size).children}
    moved = {(rank + 1) % size for rank in inner}
    assert len(inner & moved) <= size % 2
