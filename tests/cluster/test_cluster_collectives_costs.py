"""The alpha-beta model by hand, and the fit of its two numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sihe.cluster.collectives import costs
from sihe.cluster.collectives.costs import Cost, Link
from sihe.cluster.collectives.fit import fit_link
from sihe.core.errors import InvalidInput

ALPHA_ONLY = Link(1.0, 1e30)
BETA_ONLY = Link(0.0, 1.0)


@settings(deadline=None)
@given(alpha=st.floats(1e-6, 1e-3), beta=st.floats(1e-11, 1e-8))
def test_the_fit_finds_the_alpha_and_beta_behind_exact_times(alpha: float, beta: float) -> None:
    points = [(float(size), alpha + beta * size) for size in (4, 1024, 16384, 262144, 4194304)]
    found = fit_link(points)
    assert (found.latency_s, found.bandwidth) == pytest.approx((alpha, 1 / beta), rel=1e-5)


@pytest.mark.parametrize("points", [[], [(8.0, 1.0)], [(8.0, 1.0), (8.0, 2.0)], [(8.0, 1.0), (16.0, 0.0)]])
def test_a_fit_needs_two_sizes_and_positive_times(points: list[tuple[float, float]]) -> None:
    with pytest.raises(InvalidInput):
        fit_link(points)


def test_a_ring_has_2_n_minus_1_rounds_of_an_nth() -> None:
    assert costs.ring(1200.0, 4, ALPHA_ONLY).seconds == pytest.approx(6)
    assert costs.ring(1200.0, 4, BETA_ONLY) == Cost(6 * 300.0, 6, 6 * 300.0)
    assert costs.all_gather(1200.0, 4, BETA_ONLY) + costs.reduce_scatter(1200.0, 4, BETA_ONLY) == costs.ring(
        1200.0, 4, BETA_ONLY
    )


def test_halving_and_doubling_has_a_logarithm_of_rounds_and_the_rings_bytes() -> None:
    assert costs.halving_doubling(1024.0, 8, ALPHA_ONLY).seconds == pytest.approx(6)
    assert costs.halving_doubling(1024.0, 8, BETA_ONLY).seconds == 2 * (512 + 256 + 128)
    # Three ranks more hand all they have to a neighbour first, and get it all back.
    assert costs.halving_doubling(1024.0, 11, BETA_ONLY).seconds == 2 * (512 + 256 + 128) + 2 * 1024


def test_a_tree_takes_its_depth_and_its_chunks_twice_over_for_two_children() -> None:
    assert costs.tree_depth(8) == 3
    assert costs.binary_tree(1000.0, 8, ALPHA_ONLY, chunks=5).seconds == pytest.approx(2 * (3 + 5 - 1) * 2)
    assert costs.binary_tree(1000.0, 8, BETA_ONLY, chunks=5).seconds == pytest.approx(2 * 7 * 2 * 200)
    assert costs.double_tree(1000.0, 8, BETA_ONLY, chunks=5).seconds == pytest.approx(2 * 7 * 2 * 100)
    assert costs.binary_tree(1000.0, 2, BETA_ONLY, chunks=1).seconds == 2000


@pytest.mark.parametrize("size", [1e4, 1e6, 1e8])
@pytest.mark.parametrize("ranks", [4, 8, 64])
def test_no_other_number_of_chunks_is_faster_than_the_best(size: float, ranks: int) -> None:
    link = Link(1e-5, 1e9)
    best = costs.binary_tree(size, ranks, link).seconds
    tried = min(costs.binary_tree(size, ranks, link, chunks).seconds for chunks in range(1, 1025))
    assert best == pytest.approx(tried, rel=0.02)


def test_a_hierarchy_leaves_a_share_for_the_slow_links() -> None:
    fast, slow = Link(0.0, 100.0), Link(0.0, 1.0)
    cost = costs.hierarchical(800.0, 2, 4, fast, slow)
    assert cost.seconds == pytest.approx(2 * 3 * 200 / 100 + 2 * 1 * 100 / 1)
    assert cost.seconds < costs.ring(800.0, 8, slow).seconds


@pytest.mark.parametrize("algorithm", [costs.ring, costs.halving_doubling, costs.binary_tree, costs.double_tree])
def test_one_rank_alone_costs_nothing(algorithm: object) -> None:
    assert callable(algorithm)
    assert algorithm(1000.0, 1, Link(1.0, 1.0)) == Cost(0.0, 0, 0.0)


@pytest.mark.parametrize(("latency_s", "bandwidth"), [(-1.0, 1.0), (0.0, 0.0)])
def test_a_link_that_cannot_be_is_refused(latency_s: float, bandwidth: float) -> None:
    with pytest.raises(InvalidInput):
        Link(latency_s, bandwidth)
