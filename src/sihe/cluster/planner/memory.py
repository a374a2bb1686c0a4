"""Bytes that each pipeline rank holds at the peak of a training step.

Two accounts. `state_bytes` is ZeRO's, for any widths. `predict_memory` is that of a trainer:

- `gpt`: Megatron's mixed precision, 18 bytes a parameter (weights 2, gradients 4, masters and moments 12).
- `llama`: our own. Weights in the precision; float32 gradients in flat memory; masters and moments, where float32
  weights are their own masters. From ZeRO 2 on, the masters are FSDP's shards and what is computed with is gathered.

The peak is the largest of a few moments: the loss, the backward pass of one block, and of the last one, when the
gradients of all others are there; the update. What came before the first step is not in it: every rank of our trainer
builds the whole model in float32, 4 bytes a parameter, before it drops what is not its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from sihe.cluster.planner.activations import (
    below_bytes,
    block_bytes,
    kept_loss_bytes,
    layer_bytes,
    loss_bytes,
    stream_bytes,
    tokens_of_rank,
)
from sihe.cluster.planner.pipeline import begun, layers_of_stages, stages_of_rank
from sihe.cluster.planner.types import ELEMENT_BYTES, Layout, TransformerShape, Zero

_FLOAT = 4
_ROW_BUCKET = 32 * 2**20  # bytes of updated weights that ZeRO 1 gathers at a time, and a copy of them
_GATHERED_AHEAD = 2  # blocks whose weights FSDP holds at once: the one that computes and the next


@dataclass(frozen=True)
class StateWidths:
    """Bytes a parameter of what a rank keeps between passes."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """Of all three."""
        return self.weights + self.gradients + self.optimizer


ZERO_PAPER = StateWidths(2, 2, 12)
"""Half-precision weights and gradients; float32 master, momentum and variance (arXiv 1910.02054, section 3.1)."""
MEGATRON = StateWidths(2, 4, 12)
"""Gradients are summed in float32: 18 bytes, with which figure 1 of arXiv 2205.05198 agrees to the last digit."""


def state_bytes(parameters: float, zero: Zero, ranks: int, widths: StateWidths = ZERO_PAPER) -> StateWidths:
    """Bytes of weights, gradients and optimizer on one of `ranks` ranks (arXiv 1910.02054, section 5)."""
    return StateWidths(
        parameters * widths.weights / (ranks if zero >= 3 else 1),
        parameters * widths.gradients / (ranks if zero >= 2 else 1),
        parameters * widths.optimizer / (ranks if zero >= 1 else 1),
    )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest rank. `working` is what lives for a moment only, at the worst moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    """Gathered weights and messages on their way."""
    working: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(asdict(self).values())


def own_widths(layout: Layout, zero: Zero | None = None) -> StateWidths:
    """Of our trainer, under the layout's stage of ZeRO or another.

    Weights under ZeRO 3 are FSDP's shards, which count as masters; gathered ones are buffers.
    """
    zero, size = layout.zero if zero is None else zero, ELEMENT_BYTES[layout.precision]
    is_master = layout.precision == "fp32" and zero < 2
    return StateWidths(0 if zero == 3 else size, 4, 8 if is_master else 12)


def rank_parameters(shape: TransformerShape, layout: Layout, rank: int = 0) -> float:
    """Weights that one tensor rank of a pipeline rank computes with, whatever ZeRO does with them."""
    return layers_of_rank(shape, layout, rank) * _layer_parameters(shape, layout) + _end_parameters(shape, layout, rank)


def most_parameters(shape: TransformerShape, layout: Layout) -> float:
    """Those of the pipeline rank that has most."""
    return max(rank_parameters(shape, layout, rank) for rank in range(layout.pp))


def layers_of_rank(shape: TransformerShape, layout: Layout, rank: int = 0) -> int:
    """Layers of a pipeline rank."""
    layers = layers_of_stages(shape, layout)
    return sum(layers[stage] for stage in stages_of_rank(layout, rank))


def has_head(layout: Layout, rank: int) -> bool:
    """Whether a pipeline rank has the last stage, and with it the loss."""
    return layout.pp * layout.stages_per_rank - 1 in stages_of_rank(layout, rank)


def activation_bytes(shape: TransformerShape, layout: Layout, rank: int = 0) -> float:
    """What the layers of a pipeline rank keep, without what is below and above them."""
    layers = layers_of_stages(shape, layout)
    stages = zip(stages_of_rank(layout, rank), begun(layout, rank), strict=True)
    return sum(count * layers[stage] for stage, count in stages) * layer_bytes(shape, layout)


def predict_memory(shape: TransformerShape, layout: Layout) -> MemoryEstimate:
    """The fullest rank at the worst moment of a step."""
    return max(predict_ranks(shape, layout), key=lambda estimate: estimate.total)


def predict_ranks(shape: TransformerShape, layout: Layout) -> list[MemoryEstimate]:
    """Every pipeline rank, each at its own worst moment of a step; the ranks that share out one are alike."""
    return [max(_moments(shape, layout, rank), key=lambda moment: moment.total) for rank in range(layout.pp)]


def _moments(shape: TransformerShape, layout: Layout, rank: int) -> Iterator[MemoryEstimate]:
    parameters, ends = rank_parameters(shape, layout, rank), _end_parameters(shape, layout, rank)
    states, own = _states(shape, layout, rank)
    kept = activation_bytes(shape, layout, rank) + _around_layers(shape, layout, rank)
    received = _received(shape, layout, rank)
    resting = MemoryEstimate(states.weights, states.gradients, states.optimizer, kept, received, 0.0)
    size, working = ELEMENT_BYTES[layout.precision], block_bytes(shape, layout)
    if layout.zero < 2:
        if has_head(layout, rank):
            yield replace(resting, working=loss_bytes(shape, layout))
        yield replace(resting, working=working)
        if layout.zero == 1:
            gathered = min(_ROW_BUCKET, size * parameters) * (1 + 1 / layout.shard)
            yield replace(resting, activations=0.0, buffers=received + gathered)
        return
    # FSDP makes the shards of gradients when it sums them, and frees them before the next step. In a pipeline it sums
    # at the end of the step only: until then gradients and gathered weights are whole.
    in_pipeline = layout.pp > 1
    parameters -= own
    layer = _layer_parameters(shape, layout) - own / layers_of_rank(shape, layout, rank)
    whole = size * parameters if in_pipeline else 0.0
    fresh = state_bytes(own, 0, 1, own_widths(layout, 0)).gradients + whole
    early = replace(resting, gradients=resting.gradients if layout.microbatches > 1 and not in_pipeline else fresh)
    gathered = 0.0
    if layout.zero == 3:
        gathered = whole or size * ends
    ahead = size * layer * (_GATHERED_AHEAD - 1) if layout.zero == 3 and not in_pipeline else 0.0
    arrived = 0.0 if in_pipeline else size * layer  # what the last gathering brought, before it was put in its places
    if has_head(layout, rank):
        yield replace(early, buffers=received + gathered + arrived, working=loss_bytes(shape, layout))
    # Gradients of the block as its backward pass made them, and in float32 to be summed; those of the head wait.
    block = 0.0 if in_pipeline else size * ends + (size + _FLOAT) * layer + (size * layer if ahead else 0.0)
    yield replace(early, buffers=received + gathered + arrived + ahead + block, working=working)
    if not in_pipeline:
        there = fresh + _FLOAT * (parameters - layer - ends) / (layout.shard * layout.cp)
        last = layer_bytes(shape, layout)
        yield replace(resting, gradients=there, activations=last, buffers=gathered + block, working=working)
    summed = (size + _FLOAT) * max(layer, ends)
    yield replace(resting, activations=0.0, buffers=received + gathered + whole + summed)


def _states(shape: TransformerShape, layout: Layout, rank: int) -> tuple[StateWidths, float]:
    """Bytes of the states of one rank; and the weights that nobody else holds and ZeRO 2 and 3 leave alone."""
    parameters = rank_parameters(shape, layout, rank)
    widths = MEGATRON if shape.family == "gpt" else own_widths(layout)
    ranks = layout.shard * layout.cp if layout.zero and shape.family == "llama" else layout.shard
    if layout.ep == 1 or not layout.zero:
        return state_bytes(parameters, layout.zero, ranks, widths), 0.0
    # Experts are shared out between the ranks that hold the same ones.
    experts = shape.experts * shape.expert_parameters / layout.ep / layout.tp * layers_of_rank(shape, layout, rank)
    replicas = layout.dp * layout.shard // layout.ep * (layout.cp if layout.zero >= 2 else 1)
    rest = state_bytes(parameters - experts, layout.zero, ranks, widths)
    alone = replicas == 1
    own = state_bytes(experts, 0 if alone else layout.zero, replicas, own_widths(layout, 0) if alone else widths)
    total = StateWidths(rest.weights + own.weights, rest.gradients + own.gradients, rest.optimizer + own.optimizer)
    return total, experts if alone and layout.zero >= 2 else 0.0


def _layer_parameters(shape: TransformerShape, layout: Layout) -> float:
    """Weights of one layer on one rank."""
    experts = max(shape.experts, 1) * shape.expert_parameters
    rest = shape.attention_parameters + shape.shared_parameters
    return (rest + experts / (layout.ep if shape.experts else 1)) / layout.tp + shape.vector_parameters


def _end_parameters(shape: TransformerShape, layout: Layout, rank: int) -> float:
    """Weights below the first layer and above the last one, on one rank."""
    below, above = shape.embedding_parameters / layout.tp, shape.head_parameters / layout.tp
    if shape.tied and layout.pp > 1:
        above += shape.vocab * shape.hidden / layout.tp  # the first and the last stage each have a copy
    return (below if rank == 0 else 0.0) + (above if has_head(layout, rank) else 0.0)


def _around_layers(shape: TransformerShape, layout: Layout, rank: int) -> float:
    """What is kept of micro-batches besides the layers' own: below them, sent on, and of losses that came before."""
    if layout.pp == 1:
        return below_bytes(shape, layout)
    stages = layout.pp * layout.stages_per_rank
    kept = 0.0
    for stage, count in zip(stages_of_rank(layout, rank), begun(layout, rank), strict=True):
        kept += count * below_bytes(shape, layout) if stage == 0 else 0.0
        if stage < stages - 1:
            kept += count * tokens_of_rank(shape, layout) * stream_bytes(shape, layout)
        else:
            kept += (count - 1) * kept_loss_bytes(shape, layout)
    return kept


def _received(shape: TransformerShape, layout: Layout, rank: int) -> float:
    """Where torch's stages receive the stream and its gradients: memory of its own for every micro-batch."""
    if layout.pp == 1:
        return 0.0
    last = layout.pp * layout.stages_per_rank - 1
    sides = sum((stage > 0) + (stage < last) for stage in stages_of_rank(layout, rank))
    return sides * layout.microbatches * tokens_of_rank(shape, layout) * stream_bytes(shape, layout)
