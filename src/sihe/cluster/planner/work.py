"""The work of one layer and of the head on one rank: floating-point operations, and bytes through its memory.

    s  tokens of a sample      b  samples      h  hidden      a  heads      V  vocabulary      e  bytes of a value

Matrix products are counted by operations, everything else by the bytes that it reads and writes. A backward pass costs
two forward passes, of either. Recomputation adds forward work to the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from sihe.cluster.planner.activations import tokens_of_rank
from sihe.cluster.planner.types import ELEMENT_BYTES, ClusterSpec, Layout, TransformerShape

_ADAM_BYTES = 4 * 9 + 2
"""A parameter's update: gradient read three times (norm, clipping, update) and written twice (clipped, zeroed), master
and two moments read; masters, moments and the model's weight written. Counted from the algorithm, rounded to words."""


@dataclass(frozen=True)
class Work:
    """Operations of matrix products, and bytes through memory by all else."""

    flops: float = 0.0
    traffic_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.traffic_bytes + other.traffic_bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.traffic_bytes * times)

    def seconds(self, cluster: ClusterSpec, layout: Layout) -> float:
        """On one device; products and the rest take turns."""
        flops = cluster.peak_flops[layout.precision] * cluster.matmul_efficiency
        return self.flops / flops + self.traffic_bytes / (cluster.memory_bandwidth * cluster.memory_efficiency)


def attention_core(shape: TransformerShape, layout: Layout) -> Work:
    """Scores, softmax and weighing of one layer, forward; a causal kernel may skip half, which is not counted on.

    `gpt`: scores are read and written by the product, the masked softmax and dropout, the mask once.
    `llama`: a fused kernel reads and writes queries, keys, values and output only.
    """
    tokens, size = tokens_of_rank(shape, layout), ELEMENT_BYTES[layout.precision]
    flops = 4 * tokens * shape.sequence * shape.attention_width / layout.tp
    if shape.family == "gpt":
        scores = tokens * shape.sequence * shape.heads / layout.tp
        return Work(flops, scores * (6 * size + 1))
    rows = 2 * (shape.heads + shape.kv_heads) * shape.head_dim / layout.tp
    return Work(flops, tokens * rows * size)


def layer_forward(shape: TransformerShape, layout: Layout) -> Work:
    """One layer's forward pass over one micro-batch."""
    tokens, size = tokens_of_rank(shape, layout), ELEMENT_BYTES[layout.precision]
    products = Work(2 * tokens * shape.active_matrix_parameters / layout.tp)
    return products + Work(0.0, tokens * size * _touched(shape, layout)) + attention_core(shape, layout)


def _touched(shape: TransformerShape, layout: Layout) -> float:
    """Values that one token's elementwise work reads and writes in one layer.

    Between the products: a norm reads and writes the stream, an addition reads two and writes one (`gpt`: with bias,
    dropout and its mask, half a value more), twice each. Inside: queries, keys and values are read and written once
    (turned, or put in order); `gpt` reads and writes the wide layer for bias and GELU; `llama` reads gate and up,
    writes the activation, reads it, and writes the product.
    """
    apart = layout.tp if layout.sequence_parallel else 1
    qkv = 2 * shape.head_dim * (shape.heads + 2 * shape.kv_heads)
    width = shape.ffn * (shape.experts_per_token if shape.experts else 1) + shape.shared_ffn
    if shape.family == "gpt":
        return 2 * (2 + 3.5) * shape.hidden / apart + (qkv + 2 * width) / layout.tp
    return 2 * (2 + 3) * shape.hidden / apart + (qkv + 5 * width) / layout.tp


def head_forward(shape: TransformerShape, layout: Layout) -> Work:
    """The logits of one micro-batch, and the loss: they are written, read, and written as float32 probabilities."""
    logits = tokens_of_rank(shape, layout) * shape.vocab / layout.tp
    return Work(2 * logits * shape.hidden, logits * (2 * ELEMENT_BYTES[layout.precision] + 4))


def recomputed(shape: TransformerShape, layout: Layout) -> Work:
    """What the policy of recomputation runs again in one layer's backward pass."""
    if layout.recompute == "none":
        return Work()
    if layout.recompute == "full":
        return layer_forward(shape, layout)
    if shape.family == "gpt":
        return attention_core(shape, layout)
    tokens, size = tokens_of_rank(shape, layout), ELEMENT_BYTES[layout.precision]
    rows = shape.head_dim * (shape.heads + 2 * shape.kv_heads) / layout.tp  # the product behind attention is left out
    return attention_core(shape, layout) + Work(2 * tokens * shape.hidden * rows, tokens * size * 2 * rows)


def update(parameters: float) -> Work:
    """The optimizer's step over so many parameters, clipping included."""
    return Work(0.0, parameters * _ADAM_BYTES)


def model_flops(shape: TransformerShape, samples: float) -> float:
    """Operations that the model needs for one step over so many samples, forward and backward, nothing run again.

    6 per weight of a matrix and token, and 12 L s h for attention, in full (arXiv 2205.05198, appendix A).
    """
    tokens = samples * shape.sequence
    layer = 6 * shape.active_matrix_parameters + 12 * shape.sequence * shape.attention_width
    return tokens * (shape.layers * layer + 6 * shape.vocab * shape.hidden)
