"""Bytes that the fullest rank holds at the peak of a training step.

Two accounts. `state_bytes` is ZeRO's, for any widths. `predict_memory` is that of a trainer:

- `gpt`: Megatron's mixed precision, 18 bytes a parameter (weights 2, gradients 4, masters and moments 12).
- `llama`: our own. Weights in the precision; float32 gradients in flat memory; masters and moments, where float32
  weights are their own masters. From ZeRO 2 on, the masters are FSDP's shards and what is computed with is gathered.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sihe.cluster.planner.activations import (
    below_bytes,
    block_bytes,
    layer_bytes,
    loss_bytes,
    stream_bytes,
    tokens_of_rank,
)
from sihe.cluster.planner.pipeline import in_flight
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


def own_widths(layout: Layout) -> StateWidths:
    """Of our trainer. Weights under ZeRO 3 are FSDP's shards, which count as masters; gathered ones are buffers."""
    size = ELEMENT_BYTES[layout.precision]
    is_master = layout.precision == "fp32" and layout.zero < 2
    return StateWidths(0 if layout.zero == 3 else size, 4, 8 if is_master else 12)


def stage_parameters(shape: TransformerShape, layout: Layout, stage: str = "first") -> float:
    """Weights of the fullest tensor rank of a pipeline's `first`, `middle` or `last` rank."""
    experts = max(shape.experts, 1) * shape.expert_parameters
    rest = shape.attention_parameters + shape.shared_parameters
    layer = (rest + experts / (layout.ep if shape.experts else 1)) / layout.tp + shape.vector_parameters
    below, above = shape.embedding_parameters / layout.tp, shape.head_parameters / layout.tp
    if shape.tied and layout.pp > 1:
        above += shape.vocab * shape.hidden / layout.tp  # the first and the last stage each have a copy
    ends = {"first": below, "middle": 0.0, "last": above}[stage] if layout.pp > 1 else below + above
    return layers_of_rank(shape, layout) * layer + ends


def layers_of_rank(shape: TransformerShape, layout: Layout) -> int:
    """Layers of the rank that has most."""
    stages = layout.pp * layout.stages_per_rank
    return -(-shape.layers // stages) * layout.stages_per_rank


def activation_bytes(shape: TransformerShape, layout: Layout) -> float:
    """What the layers of the first pipeline rank keep, without what is below and above them."""
    return layers_of_rank(shape, layout) * in_flight(layout) * layer_bytes(shape, layout)


def predict_memory(shape: TransformerShape, layout: Layout) -> MemoryEstimate:
    """The fullest rank at the worst moment of a step: the first rank of a pipeline, or the last."""
    ends = ("first", "last") if layout.pp > 1 else ("first",)
    return max((_of_rank(shape, layout, end) for end in ends), key=lambda estimate: estimate.total)


def _of_rank(shape: TransformerShape, layout: Layout, stage: str) -> MemoryEstimate:
    parameters = stage_parameters(shape, layout, stage)
    widths = MEGATRON if shape.family == "gpt" else own_widths(layout)
    states = state_bytes(parameters, layout.zero, layout.shard, widths)
    has_loss = layout.pp == 1 or stage == "last"
    flight = in_flight(layout) if stage == "first" else 1.0
    activations = layers_of_rank(shape, layout) * flight * layer_bytes(shape, layout)
    if stage == "first":
        activations += flight * below_bytes(shape, layout)
    working = max(block_bytes(shape, layout), loss_bytes(shape, layout) if has_loss else 0.0)
    buffers = _buffers(shape, layout, parameters)
    return MemoryEstimate(states.weights, states.gradients, states.optimizer, activations, buffers, working)


def _buffers(shape: TransformerShape, layout: Layout, parameters: float) -> float:
    """Messages on their way: weights that FSDP gathers, gradients that it is about to sum, received activations."""
    size = ELEMENT_BYTES[layout.precision]
    layer = stage_parameters(shape, layout, "middle") / layers_of_rank(shape, layout)
    ends = parameters - layers_of_rank(shape, layout) * layer
    buffers = 0.0
    if layout.zero == 3:
        buffers += size * (ends + min(_GATHERED_AHEAD, layers_of_rank(shape, layout)) * layer)
    if layout.zero >= 2:
        buffers += (size + _FLOAT) * max(layer, ends)  # as the backward pass made them, and in float32 to be summed
    if layout.zero == 1:
        buffers += 2 * min(_ROW_BUCKET, size * parameters)
    if layout.pp > 1:
        buffers += 2 * layout.stages_per_rank * tokens_of_rank(shape, layout) * stream_bytes(shape, layout)
    return buffers
