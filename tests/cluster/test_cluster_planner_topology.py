"""Links that are not equally fast, against cases worked out by hand."""

from __future__ import annotations

import pytest

from sihe.cluster.collectives.costs import Link
from sihe.cluster.planner.presets import cluster, model
from sihe.cluster.planner.step import estimate_step
from sihe.cluster.planner.topology import (
    Demand,
    Level,
    Topology,
    all_reduces,
    crossings,
    demands,
    halving_doubling,
    hierarchical,
    placements,
    ring,
    ring_order,
)
from sihe.cluster.planner.types import Layout
from sihe.core.errors import InvalidInput

NVLINK, PCIE, INFINIBAND = Link(0.0, 100.0), Link(0.0, 10.0), Link(0.0, 1.0)
# 2 nodes of 2 islands of 2 devices.
TREE = Topology((Level("island", 2, NVLINK), Level("node", 2, PCIE), Level("cluster", 2, INFINIBAND)))


def test_two_devices_speak_over_the_innermost_level_that_holds_both() -> None:
    assert TREE.devices == 8
    assert [TREE.level(0, other).name for other in range(1, 8)] == ["island", "node", "node", *["cluster"] * 4]
    assert TREE.level(5, 4).name == "island"
    with pytest.raises(InvalidInput):
        TREE.level(0, 8)


def test_the_level_that_an_axis_spans_follows_from_its_stride() -> None:
    assert TREE.spanning(2, 1).name == "island"
    assert TREE.spanning(2, 2).name == TREE.spanning(4, 1).name == "node"
    assert TREE.spanning(2, 4).name == TREE.spanning(8, 1).name == "cluster"


def test_a_ring_crosses_each_level_as_rarely_as_it_can() -> None:
    scattered = [0, 4, 1, 5, 2, 6, 3, 7]  # ranks dealt out to the nodes in turn
    order = ring_order(scattered)
    assert [scattered[rank] for rank in order] == list(range(8))
    assert crossings(TREE, scattered) == {"island": 0, "node": 0, "cluster": 8}
    assert crossings(TREE, [scattered[rank] for rank in order]) == {"island": 4, "node": 2, "cluster": 2}


def test_a_ring_is_as_fast_as_its_slowest_hop() -> None:
    assert ring(TREE, range(8), 80.0).seconds == 14 * 10 / 1.0
    assert ring(TREE, [0, 1], 80.0).seconds == 2 * 40 / 100
    assert ring(TREE, [0, 1, 2, 3], 80.0).seconds == pytest.approx(6 * 20 / 10)
    assert ring(TREE, [3], 80.0).seconds == 0


def test_halving_sends_most_bytes_over_the_slowest_link() -> None:
    assert halving_doubling(TREE, range(8), 80.0).seconds == pytest.approx(2 * (40 / 1 + 20 / 10 + 10 / 100))
    with pytest.raises(InvalidInput, match="powers of two"):
        halving_doubling(TREE, range(6), 80.0)


def test_a_hierarchy_pays_each_level_its_share() -> None:
    # Islands: 80 bytes, halves; nodes: 40 bytes, halves; cluster: a ring of 2 over 20 bytes.
    assert hierarchical(TREE, 80.0).seconds == pytest.approx(2 * 40 / 100 + 2 * 20 / 10 + 2 * 10 / 1)
    assert hierarchical(TREE, 80.0).sent_bytes == pytest.approx(2 * (40 + 20 + 10))
    assert next(iter(all_reduces(TREE, 80.0))) == "hierarchical"


def test_the_axis_that_sends_most_gets_the_fast_links() -> None:
    asked = [Demand("dp", 4, 0, 10.0), Demand("tp", 2, 0, 1000.0)]
    best, other = placements(asked, TREE)
    assert best.order == ("dp", "tp")
    assert best.levels == {"dp": "cluster", "tp": "island"}
    assert best.seconds == {"dp": 10.0, "tp": 10.0}
    assert other.order == ("tp", "dp")
    assert other.seconds == {"dp": 1.0, "tp": 1000.0}


def test_what_hides_behind_computing_does_not_count() -> None:
    asked = [Demand("dp", 4, 0, 1000.0, exposed=0.0), Demand("tp", 2, 0, 10.0)]
    assert placements(asked, TREE)[0].levels["tp"] == "island"


def test_axes_that_need_more_devices_than_there_are_are_refused() -> None:
    with pytest.raises(InvalidInput, match="need 16 devices"):
        placements([Demand("dp", 16, 0, 1.0)], TREE)


def test_a_layout_asks_what_its_estimate_sends_and_tensor_ranks_stay_in_the_node() -> None:
    spec = cluster("h100", 16)
    estimate = estimate_step(model("llama-7b"), Layout(tp=8, dp=2, microbatches=4), spec)
    asked = demands(estimate.layout, estimate.traffic)
    assert {demand.axis: demand.ranks for demand in asked} == {"dp": 2, "tp": 8}
    best = placements(asked, Topology.of(spec))[0]
    assert best.order == ("dp", "tp")
    assert best.total_s == pytest.approx(estimate.communication_s)
