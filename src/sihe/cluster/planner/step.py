"""Seconds of one training step: passes over the layers, the pipeline's wait, messages in the open, the update."""

from __future__ import annotations

from dataclasses import dataclass

from sihe.cluster.collectives.costs import Cost
from sihe.cluster.planner import communication, work
from sihe.cluster.planner.communication import AxisTraffic
from sihe.cluster.planner.memory import (
    MemoryEstimate,
    has_head,
    layers_of_rank,
    most_parameters,
    predict_memory,
)
from sihe.cluster.planner.pipeline import bubble
from sihe.cluster.planner.types import ClusterSpec, Layout, TransformerShape


@dataclass(frozen=True)
class StepEstimate:
    """What one step of a layout takes, on the rank that all wait for."""

    layout: Layout
    memory: MemoryEstimate
    compute_s: float
    """Forward and backward, the head on the rank that has it."""
    recompute_s: float
    """Forward work that the backward pass does again."""
    bubble_s: float
    """Waiting for the pipeline to fill and to empty."""
    update_s: float
    traffic: tuple[AxisTraffic, ...]
    tokens: int
    """Of one step, in all."""
    model_flops: float
    """Of one step, in all: what the model needs, without what is run again."""
    peak_flops: float
    """Of all devices together, a second."""

    @property
    def communication_s(self) -> float:
        """Seconds of messages that nothing hides."""
        return sum(axis.exposed_s for axis in self.traffic)

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.compute_s + self.recompute_s + self.bubble_s + self.communication_s + self.update_s

    @property
    def tokens_per_s(self) -> float:
        """Of all devices together."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Share of the peak that the model's own operations make."""
        return self.model_flops / self.seconds / self.peak_flops

    def parts(self) -> dict[str, float]:
        """The step's seconds by what they go to."""
        return {
            "compute": self.compute_s,
            "recompute": self.recompute_s,
            "bubble": self.bubble_s,
            "communication": self.communication_s,
            "update": self.update_s,
        }


def estimate_step(shape: TransformerShape, layout: Layout, cluster: ClusterSpec) -> StepEstimate:
    """Memory and time of one step. The layout must fit the model and the cluster (see `search.check`)."""
    times = layout.microbatches
    forward_s = work.layer_forward(shape, layout).seconds(cluster, layout)
    again_s = work.recomputed(shape, layout).seconds(cluster, layout)
    head_s = 3 * work.head_forward(shape, layout).seconds(cluster, layout)
    messages = _layer_messages(shape, layout, cluster)
    layer_exposed_s = sum(cost.seconds for _, _, cost in messages)
    layer_s = 3 * forward_s + again_s + layer_exposed_s
    ranks = ((layers_of_rank(shape, layout, rank), has_head(layout, rank)) for rank in range(layout.pp))
    layers, is_last = max(ranks, key=lambda rank: rank[0] * layer_s + rank[1] * head_s)  # all wait for this one
    message = communication.stage_message(shape, layout, cluster)
    hops = 2 * layout.stages_per_rank * times if layout.pp > 1 else 0
    layers_s = layers * layer_s + (hops / times) * message.seconds
    # Ranks wait while the pipeline fills and empties: for the layers, which all have, and not for the head.
    share = bubble(layout)
    waiting_s = times * layers_s * share / (1 - share)
    data = communication.data_traffic(
        shape,
        layout,
        cluster,
        forward_s=layers * (forward_s + layer_exposed_s / 3),
        backward_s=layers * (2 * forward_s + again_s + layer_exposed_s / 2),
    )
    traffic = [communication.in_the_open(axis, name, cost, layers * times) for axis, name, cost in messages]
    if hops:
        traffic.append(communication.in_the_open("pp", "send", message, hops))
    updated = most_parameters(shape, layout) / layout.shard
    tokens = layout.global_batch * shape.sequence
    return StepEstimate(
        layout,
        predict_memory(shape, layout),
        times * (layers * 3 * forward_s + is_last * head_s),
        times * layers * again_s,
        waiting_s,
        work.update(updated).seconds(cluster, layout),
        (*traffic, *data),
        tokens,
        work.model_flops(shape, layout.global_batch),
        cluster.peak_flops[layout.precision] * layout.world_size,
    )


def _layer_messages(shape: TransformerShape, layout: Layout, cluster: ClusterSpec) -> list[tuple[str, str, Cost]]:
    """Of one layer and micro-batch, both passes with what is run again: axis, collective, cost."""
    tensor = "all-gather, reduce-scatter" if layout.sequence_parallel else "all-reduce"
    experts = communication.expert_seconds(shape, layout, cluster)
    passes = {
        ("tp", tensor): communication.tensor_seconds(shape, layout, cluster),
        ("cp", "all-gather, reduce-scatter"): communication.context_seconds(shape, layout, cluster),
        ("ep", "all-to-all"): (experts, experts),
    }
    found = []
    for (axis, collective), (forward, backward) in passes.items():
        total = forward + backward
        if layout.recompute == "full":
            total = total + forward
        if total.rounds:
            found.append((axis, collective, total))
    return found
