"""Where ranks lie among links that are not equally fast: which axis goes where, and in which order a ring goes round.

A topology is a tree of levels, the innermost first: 4 devices on one NVLink switch, 2 of those on a PCIe bus, 16 such
nodes on InfiniBand. The link of a level is what one device has when it speaks to another device of that level.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations

from sihe.cluster.collectives import costs
from sihe.cluster.collectives.costs import Cost, Link
from sihe.cluster.planner.communication import AxisTraffic
from sihe.cluster.planner.types import AXES, ClusterSpec, Layout
from sihe.core.errors import InvalidInput


@dataclass(frozen=True)
class Level:
    """`size` groups of the level below (devices, at the bottom), and what they speak over."""

    name: str
    size: int
    link: Link


@dataclass(frozen=True)
class Topology:
    """Levels, the innermost first. Devices are numbered so that neighbours share the most levels."""

    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        if not self.levels or any(level.size < 1 for level in self.levels):
            raise InvalidInput(f"a topology has levels of at least one group each, got {self.levels!r}")

    @classmethod
    def of(cls, cluster: ClusterSpec) -> Topology:
        """The two levels of a cluster; one, when it has one node."""
        inside = Level("node", cluster.per_node, cluster.inside)
        between = Level("cluster", cluster.nodes, cluster.between)
        return cls((inside, between) if cluster.nodes > 1 else (inside,))

    @property
    def devices(self) -> int:
        """In all."""
        return math.prod(level.size for level in self.levels)

    def level(self, one: int, other: int) -> Level:
        """The innermost level that holds both devices."""
        for level in self.levels:
            one, other = one // level.size, other // level.size
            if one == other:
                return level
        raise InvalidInput(f"there are {self.devices} devices, got another's number")

    def spanning(self, ranks: int, stride: int) -> Level:
        """The innermost level that holds `ranks` devices, `stride` apart, counted from the start of a group."""
        return self.level(0, (ranks - 1) * stride)


# ---- all-reduce -----------------------------------------------------------------------------------------------------


def ring_order(devices: Sequence[int]) -> list[int]:
    """The ranks, rank r being on device `devices[r]`, in the order in which a ring crosses every level least often.

    Groups are visited one after the other: with groups of equal size on every level, each is entered and left once.
    """
    return sorted(range(len(devices)), key=lambda rank: devices[rank])


def crossings(topology: Topology, devices: Sequence[int]) -> dict[str, int]:
    """How many hops of the ring through `devices`, in this order and back to the first, are on each level."""
    found = {level.name: 0 for level in topology.levels}
    for one, other in pairwise([*devices, devices[0]]):
        if one != other:
            found[topology.level(one, other).name] += 1
    return found


def ring(topology: Topology, devices: Sequence[int], size_bytes: float) -> Cost:
    """All-reduce around `devices` in this order: every round takes as long as its slowest hop."""
    if len(devices) == 1:
        return costs.NOTHING
    chunk, rounds = size_bytes / len(devices), 2 * (len(devices) - 1)
    hops = pairwise([*devices, devices[0]])
    slowest = max(topology.level(one, other).link.seconds(chunk) for one, other in hops)
    return Cost(rounds * slowest, rounds, rounds * chunk)


def halving_doubling(topology: Topology, devices: Sequence[int], size_bytes: float) -> Cost:
    """All-reduce by halving and doubling: partners of the first round, with most bytes, are half of the ranks apart.

    Raises `InvalidInput` unless there are 2, 4, 8, ... devices.
    """
    ranks = len(devices)
    if ranks & (ranks - 1):
        raise InvalidInput(f"halving and doubling is modelled for powers of two, got {ranks} devices")
    total, distance, share = costs.NOTHING, ranks // 2, size_bytes / 2
    while distance:
        pairs = ((devices[rank], devices[rank ^ distance]) for rank in range(ranks))
        seconds = max(topology.level(one, other).link.seconds(share) for one, other in pairs)
        total = total + Cost(2 * seconds, 2, 2 * share)
        distance, share = distance // 2, share / 2
    return total


def hierarchical(topology: Topology, size_bytes: float) -> Cost:
    """All-reduce over all devices, level by level: summed and shared out on the way up, gathered on the way down."""
    total = costs.NOTHING
    for level in topology.levels[:-1]:
        half = costs.reduce_scatter(size_bytes, level.size, level.link)
        total, size_bytes = total + half + half, size_bytes / level.size
    return total + costs.ring(size_bytes, topology.levels[-1].size, topology.levels[-1].link)


def all_reduces(topology: Topology, size_bytes: float) -> dict[str, Cost]:
    """Every algorithm over all devices in their own order; the fastest first."""
    devices = range(topology.devices)
    outermost = topology.levels[-1].link
    found = {
        "ring": ring(topology, devices, size_bytes),
        "double tree": costs.double_tree(size_bytes, len(devices), outermost),
        "hierarchical": hierarchical(topology, size_bytes),
    }
    if len(devices) & (len(devices) - 1) == 0:
        found["halving-doubling"] = halving_doubling(topology, devices, size_bytes)
    return dict(sorted(found.items(), key=lambda item: item[1].seconds))


# ---- axes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demand:
    """What one axis sends in a step, and the share of it that no computing hides."""

    axis: str
    ranks: int
    rounds: int
    sent_bytes: float
    exposed: float = 1.0

    def seconds(self, link: Link) -> float:
        """In the open, over `link`."""
        return self.exposed * (self.rounds * link.latency_s + self.sent_bytes / link.bandwidth)


@dataclass(frozen=True)
class Placement:
    """An order of the axes, the outermost first; of each axis the level that it spans and its seconds there."""

    order: tuple[str, ...]
    levels: dict[str, str]
    seconds: dict[str, float]

    @property
    def total_s(self) -> float:
        """Of all axes."""
        return sum(self.seconds.values())


def demands(layout: Layout, traffic: Sequence[AxisTraffic]) -> list[Demand]:
    """What the axes of a layout ask of their links; experts travel along the data axes."""
    found = []
    for axis in AXES:
        mine = [t for t in traffic if t.axis == axis or (t.axis == "ep" and axis == _expert_axis(layout))]
        if getattr(layout, axis) == 1:
            continue
        seconds = sum(t.seconds for t in mine)
        exposed = sum(t.exposed_s for t in mine) / seconds if seconds else 0.0
        rounds, sent_bytes = sum(t.rounds for t in mine), sum(t.sent_bytes for t in mine)
        found.append(Demand(axis, getattr(layout, axis), rounds, sent_bytes, exposed))
    return found


def _expert_axis(layout: Layout) -> str:
    return "shard" if layout.shard > 1 else "dp"


def placements(asked: Sequence[Demand], topology: Topology) -> list[Placement]:
    """Every order of the axes, the one with the fewest seconds first; among equals the trainer's own order is."""
    ranks = math.prod(demand.ranks for demand in asked)
    if ranks > topology.devices:
        raise InvalidInput(f"the axes need {ranks} devices, and there are {topology.devices}")
    return sorted(_every_order(asked, topology), key=lambda placement: placement.total_s)


def _every_order(asked: Sequence[Demand], topology: Topology) -> Iterator[Placement]:
    for order in permutations(asked):
        stride, levels, seconds = 1, {}, {}
        for demand in reversed(order):
            level = topology.spanning(demand.ranks, stride)
            levels[demand.axis], seconds[demand.axis] = level.name, demand.seconds(level.link)
            stride *= demand.ranks
        yield Placement(tuple(demand.axis for demand in order), levels, seconds)
