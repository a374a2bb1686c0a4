"""Seconds of the messages along each axis, by the alpha-beta model, and how much of them computing hides.

For each layer and micro-batch, and hidden by nothing:

    tp    two all-reduces of the stream each way, or all-gathers and reduce-scatters when the sequence is split too
    cp    keys and values gathered, forward and again backward, and their gradients scattered
    ep    tokens to their experts and back, each way

For each micro-batch, hidden by nothing:

    pp    the stream from stage to stage, and its gradient back

Behind the passes:

    dp    once a step, gradients summed, behind the last backward pass
    shard    ZeRO 1: gradients summed so, updated weights gathered once a step, which nothing hides
             ZeRO 2: each micro-batch, weights gathered once and gradients scattered
             ZeRO 3: each micro-batch, weights gathered twice and gradients scattered
"""

from __future__ import annotations

from dataclasses import dataclass

from sihe.cluster.collectives import costs
from sihe.cluster.planner.activations import tokens_of_rank
from sihe.cluster.planner.memory import most_parameters
from sihe.cluster.planner.types import ELEMENT_BYTES, ClusterSpec, Layout, TransformerShape

_OVERLAP = 0.8
"""Share of the data axes' messages that can hide: the first and the last bucket have nothing to hide behind."""


@dataclass(frozen=True)
class AxisTraffic:
    """Messages along one axis in one step: bytes that one rank sends, all their seconds, and those not hidden."""

    axis: str
    collective: str
    sent_bytes: float
    rounds: int
    """Messages that follow each other."""
    seconds: float
    exposed_s: float


def tensor_seconds(shape: TransformerShape, layout: Layout, cluster: ClusterSpec) -> tuple[costs.Cost, costs.Cost]:
    """One layer's forward pass, and its backward pass without recomputation."""
    if layout.tp == 1:
        return costs.NOTHING, costs.NOTHING
    link = cluster.link(layout.tp, layout.stride("tp"))
    size = tokens_of_rank(shape, layout) * shape.hidden * ELEMENT_BYTES[layout.precision]
    both = costs.ring(size, layout.tp, link)  # an all-gather and a reduce-scatter send as much
    return both + both, both + both


def context_seconds(shape: TransformerShape, layout: Layout, cluster: ClusterSpec) -> tuple[costs.Cost, costs.Cost]:
    """One layer's keys and values, gathered; and backward, gathered again and their gradients scattered."""
    if layout.cp == 1:
        return costs.NOTHING, costs.NOTHING
    link = cluster.link(layout.cp, layout.stride("cp"))
    rows = 2 * shape.kv_heads * shape.head_dim / layout.tp
    size = shape.sequence * layout.micro_batch * rows * ELEMENT_BYTES[layout.precision]
    gathered = costs.all_gather(size, layout.cp, link)
    return gathered, gathered + costs.reduce_scatter(size, layout.cp, link)


def expert_seconds(shape: TransformerShape, layout: Layout, cluster: ClusterSpec) -> costs.Cost:
    """One layer's tokens to their experts and back; as much again backward."""
    if layout.ep == 1:
        return costs.NOTHING
    link = cluster.link(layout.ep, layout.stride("shard"))
    tokens = tokens_of_rank(shape, layout) / (layout.tp if layout.sequence_parallel else 1)
    size = tokens * shape.experts_per_token * shape.hidden * ELEMENT_BYTES[layout.precision]
    return costs.all_to_all(size, layout.ep, link) + costs.all_to_all(size, layout.ep, link)


def stage_message(shape: TransformerShape, layout: Layout, cluster: ClusterSpec) -> costs.Cost:
    """One micro-batch's stream from a stage to the next; tensor ranks send a share each and gather it again."""
    if layout.pp == 1:
        return costs.NOTHING
    size = tokens_of_rank(shape, layout) * shape.hidden * ELEMENT_BYTES[layout.precision] / layout.tp
    return costs.Cost(cluster.link(layout.pp, layout.stride("pp")).seconds(size), 1, size)


def data_traffic(
    shape: TransformerShape, layout: Layout, cluster: ClusterSpec, *, backward_s: float, forward_s: float
) -> list[AxisTraffic]:
    """The sums of gradients and the gathering of weights; the passes named are of one micro-batch."""
    found = []
    parameters = most_parameters(shape, layout)
    if layout.shard > 1:
        found.append(_sharded(parameters, layout, cluster, backward_s, forward_s))
    if layout.dp > 1:
        size = 4 * parameters / (layout.shard if layout.zero >= 2 else 1)
        cost = all_reduce(size, layout.dp, layout.stride("dp"), cluster)
        found.append(_overlapped("dp", "all-reduce", cost, backward_s))
    return found


def all_reduce(size_bytes: float, ranks: int, stride: int, cluster: ClusterSpec) -> costs.Cost:
    """As much as summing into shares and gathering these."""
    half = half_all_reduce(size_bytes, ranks, stride, cluster)
    return half + half


def half_all_reduce(size_bytes: float, ranks: int, stride: int, cluster: ClusterSpec) -> costs.Cost:
    """A reduce-scatter of `size_bytes` before, or an all-gather of as many after, over `ranks` that lie `stride` apart.

    The faster one of a ring over all ranks and, where the ranks fill whole nodes, of a hierarchical one.
    """
    flat = costs.reduce_scatter(size_bytes, ranks, cluster.link(ranks, stride))
    per_node = max(1, cluster.per_node // stride)
    if per_node == 1 or ranks <= per_node or ranks % per_node:
        return flat
    inside = costs.reduce_scatter(size_bytes, per_node, cluster.inside)
    levels = inside + costs.reduce_scatter(size_bytes / per_node, ranks // per_node, cluster.between)
    return min(flat, levels, key=lambda cost: cost.seconds)


def _sharded(
    parameters: float, layout: Layout, cluster: ClusterSpec, backward_s: float, forward_s: float
) -> AxisTraffic:
    ranks, stride = layout.shard, layout.stride("shard")
    gathered = half_all_reduce(parameters * ELEMENT_BYTES[layout.precision], ranks, stride, cluster)
    scattered = half_all_reduce(4 * parameters, ranks, stride, cluster)
    if layout.zero == 1:
        hidden = _overlapped("shard", "all-reduce", scattered + scattered, backward_s)
        return AxisTraffic(
            "shard",
            "all-reduce, all-gather",
            hidden.sent_bytes + gathered.sent_bytes,
            hidden.rounds + gathered.rounds,
            hidden.seconds + gathered.seconds,
            hidden.exposed_s + gathered.seconds,
        )
    # Gradients that are sharded cannot wait for the last micro-batch: they are summed after each.
    times = layout.microbatches
    one = gathered + scattered if layout.zero == 2 else gathered + gathered + scattered
    name = "all-gather, reduce-scatter" if layout.zero == 2 else "all-gather x2, reduce-scatter"
    cost = costs.Cost(times * one.seconds, times * one.rounds, times * one.sent_bytes)
    return _overlapped("shard", name, cost, times * (backward_s + forward_s))


def _overlapped(axis: str, collective: str, cost: costs.Cost, behind_s: float) -> AxisTraffic:
    hidden = min(_OVERLAP * cost.seconds, behind_s)
    return AxisTraffic(axis, collective, cost.sent_bytes, cost.rounds, cost.seconds, cost.seconds - hidden)


def in_the_open(axis: str, collective: str, cost: costs.Cost, times: int = 1) -> AxisTraffic:
    """Messages, `times` over, that no computing hides."""
    seconds = times * cost.seconds
    return AxisTraffic(axis, collective, times * cost.sent_bytes, times * cost.rounds, seconds, seconds)
