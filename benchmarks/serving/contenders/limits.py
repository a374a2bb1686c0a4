"""What this machine could do at most: the limits that a share is a share of, measured, and the work of one step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sihe.models.config import ModelConfig

# Bytes of a weight: int8 has a scale a row, int4 a 16-bit scale every 32 weights (llama.cpp's Q4_0; others are near).
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 32}
KV_BYTES = {"float32": 4, "bfloat16": 2, "int8": 2, "int4": 2}
_SIZE = 2048


@dataclass(frozen=True)
class Limits:
    """Bytes read and multiply-adds (as two operations) a second, with all threads.

    Reading is timed over as much as a precision's weights: what a large cache holds is read faster than memory is.
    """

    read_bytes_per_s: dict[str, float]
    operations_per_s: dict[str, float]

    def decode_tok_per_s(self, shape: ModelConfig, precision: str, *, batch: int, context: float) -> float:
        """Tokens a second where each step reads all weights and all keys and values once, or computes at the peak."""
        read = _matrix_weights(shape) * WEIGHT_BYTES[precision] + batch * context * _kv_bytes(shape, precision)
        compute = batch * (2 * _matrix_weights(shape) + context * _attention_operations(shape))
        return batch / max(read / self.read_bytes_per_s[precision], compute / self.operations_per_s[precision])

    def prefill_tok_per_s(self, shape: ModelConfig, precision: str, *, prompt: int) -> float:
        """Tokens a second at the peak of multiplication: all through all layers, the last one through the head."""
        head = shape.vocab_size * shape.hidden_size
        compute = 2 * (_matrix_weights(shape) - head) + 2 * head / prompt + _attention_operations(shape) * prompt / 2
        return self.operations_per_s[precision] / compute


def measure_limits(shape: ModelConfig) -> Limits:
    """Takes about three seconds."""
    weights = _matrix_weights(shape)
    reads = {precision: _read_bytes_per_s(weights * size) for precision, size in WEIGHT_BYTES.items()}
    return Limits(reads, _operations_per_s())


def _best_s(work: Callable[[], object], repeats: int = 5) -> float:
    work()
    taken = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started_s)
    return min(taken)


def _read_bytes_per_s(size: float) -> float:
    """By a product of a matrix of `size` bytes with a vector, or its sum, which read each value once."""
    matrix = torch.ones(int(size / 4 / 4096), 4096)
    vector = torch.ones(4096)
    ways: tuple[Callable[[], object], ...] = (lambda: torch.mv(matrix, vector), matrix.sum)
    return matrix.nbytes / min(_best_s(way, repeats=20) for way in ways)


def _operations_per_s() -> dict[str, float]:
    wide = torch.rand(_SIZE, _SIZE)
    half = wide.bfloat16()
    byte = torch.randint(-127, 127, (_SIZE, _SIZE), dtype=torch.int8)
    # oneDNN's product of bytes, which is the fastest here; the weight is packed once.
    scale, zero = torch.tensor(0.1), torch.tensor(128)
    packed = torch.ops.onednn.qlinear_prepack(byte, [_SIZE, _SIZE])
    scales, zeros = torch.full((_SIZE,), 0.01), torch.zeros(_SIZE, dtype=torch.int64)
    activations = byte.view(torch.uint8)

    def bytes_product() -> torch.Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            activations, scale, zero, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )

    operations = 2 * _SIZE**3
    int8 = operations / _best_s(bytes_product)
    float32 = operations / _best_s(lambda: wide @ wide)
    return {
        "float32": float32,
        # Where the processor has no fast product of bf16, widening the weights and multiplying in float32 is faster.
        "bfloat16": max(float32, operations / _best_s(lambda: half @ half)),
        "int8": int8,
        "int4": int8,  # weights are widened to bytes: no unit multiplies four bits
    }


def _matrix_weights(shape: ModelConfig) -> float:
    """Weights that every token is multiplied with: all but the embedding."""
    query, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer = shape.hidden_size * (2 * query + 2 * kv + 3 * shape.intermediate_size)
    return shape.num_layers * layer + shape.vocab_size * shape.hidden_size


def _kv_bytes(shape: ModelConfig, precision: str) -> float:
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * KV_BYTES[precision]


def _attention_operations(shape: ModelConfig) -> float:
    """Of one token for each position that it attends to: scores and sums."""
    return 4 * shape.num_layers * shape.num_heads * shape.head_dim
