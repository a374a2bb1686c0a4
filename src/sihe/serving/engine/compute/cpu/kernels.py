"""The operations of a program, in Numba: what one thread does of one operation.

An operation is a row of whole numbers: its code, then addresses and sizes, in the order that its function names. Each
operation is cut into chunks; every chunk is computed by whichever thread takes it first, always in the same way.

T tokens of the step, D hidden, K KV heads, G query heads of one KV head, H head dim, F intermediate, S stride in bytes.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any

from numba import float32, int32, njit

from sihe.core.simd import float32_at, int32_at, int64_at, uint16_at
from sihe.serving.engine.compute.cpu.tiles import (
    PANEL,
    ROWS,
    ROWS_INT4,
    activation_tile,
    float_tile,
    gate_tile,
    int4_tile,
    int8_tile,
    quantise_tile,
)

WIDTH = 26
"""Numbers of one operation."""


STEP_WIDTH = 21
"""Numbers of one step: T, O, feeds, then addresses of tokens, positions, feed of each token, starts, lengths, pages of
keys [F, B] (offset of each in bytes), of values, B, then for all tokens and for the wanted ones each: how many tasks of
attention (11, 12), the tasks [n, 3] (feed, first row, rows; 13, 14), the row of each feed's first token (15, 16); at
last the adapter of each feed (17), the feed of each wanted token (18), how many experts a token chooses (19), and the
wanted tokens, in order (20)."""


class Code(IntEnum):
    """What an operation does; the arguments are named where it is computed."""

    EMBED = 0
    NORM = 1
    MULTIPLY = 2
    PLACE = 3
    ATTEND = 4
    ACTIVATE = 5
    ROUTE = 6
    COMBINE = 7
    ADAPT = 8


class Kind(IntEnum):
    """How numbers are stored."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    INT4 = 3


class NormKind(IntEnum):
    """What NORM does to a row before it is handed on."""

    NONE = 0
    RMS = 1
    LAYER = 2


ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
_BLOCK_BYTES = 1 << 19
"""Of rows that are multiplied by all panels of a chunk before the next rows: they stay in the second cache."""
_STEP_BYTES = 128  # of a panel, one step of a tile
_AHEAD_BYTES = 4096
"""How far weights are fetched ahead within a panel: with bfloat16, one row and weights in memory, two threads read
33 GB/s so, and 25 where it is left to the processor, whose own fetching ends at each small page (Emerald Rapids)."""
_FAST = {"reassoc", "nsz", "contract", "arcp"}  # sums in registers; NaN and infinity are kept, they must be seen

_F32_12, _F32_8, _F32_4, _F32_2, _F32_1 = (float_tile(rows, "float32") for rows in ROWS)
_BF16_12, _BF16_8, _BF16_4, _BF16_2, _BF16_1 = (float_tile(rows, "bfloat16") for rows in ROWS)
_INT8_12, _INT8_8, _INT8_4, _INT8_2, _INT8_1 = (int8_tile(rows) for rows in ROWS)
_INT4_6, _INT4_4, _INT4_2, _INT4_1 = (int4_tile(rows) for rows in ROWS_INT4)
_quantise, _gate = quantise_tile(), gate_tile()
_silu_gated, _gelu_gated, _gelu_tanh_gated, _relu_gated = (activation_tile(name, True) for name in ACTIVATIONS)
_silu, _gelu, _gelu_tanh, _relu = (activation_tile(name, False) for name in ACTIVATIONS)

compiled = njit(nogil=True, error_model="numpy")
compiled_fast = njit(nogil=True, error_model="numpy", fastmath=_FAST)


# ---- products ------------------------------------------------------------------------------------------------------


@compiled
def multiply_panels(
    op: Any, first: int, last: int, row: int, rows: int, then: int, then_bytes: int, scratch: int
) -> None:
    """Columns of panels `first` .. `last` - 1 of the product, for `rows` rows from `row`.

    What this thread is likely to read after them, `then_bytes` at `then`, is fetched beside the last panel. Where a
    panel is 16 columns of a gate and the 16 that it opens, y gets what is let through.

    op: code, which rows, kind, x, its S, weights, bytes of a panel, steps, panels, bias, y, its S, add, scales, bytes
    of a panel's scales, x scales, x sums, their S, the next product's op (0: none), experts (0: dense), offsets of the
    experts' rows, bytes of an expert's weights, of its scales, whether panels are gated, panels of a KV head (0: all
    are needed of all rows), and how many of these, the first ones, are read of wanted tokens only.
    scratch: a tile's results [12, 32], float32.
    """
    kind, x, x_s, weights, panel_s, steps = op[2], op[3], op[4], op[5], op[6], op[7]
    bias, y, add, scales, scales_s, x_scales, x_sums, sums_s = (
        op[9], op[10], op[12], op[13], op[14], op[15], op[16], op[17],
    )  # fmt: skip
    is_gated = op[23] != 0
    y_s = 4 * PANEL if is_gated else op[11]
    tallest = 6 if kind == Kind.INT4 else 12
    block = max(tallest, _BLOCK_BYTES // x_s // tallest * tallest)
    end = row
    while end < row + rows:
        top, end = end, end + block
        if row + rows - end < block // 2:  # a rest is not worth reading all panels for
            end = row + rows
        height = end - top
        for panel in range(first, last):
            next_at, next_bytes = weights + (panel + 1) * panel_s, panel_s
            if panel == last - 1:
                next_at, next_bytes = (then, then_bytes) if end == row + rows else (weights + first * panel_s, panel_s)
            w, b, out, sc = (
                weights + panel * panel_s,
                bias + panel * 4 * PANEL,
                y + panel * 4 * PANEL,
                scales + panel * scales_s,
            )
            at, ahead, ahead_s = top, w + _AHEAD_BYTES, _STEP_BYTES
            while at < end:
                left, begun = end - at, at
                if height > tallest:  # tiles share the fetching of the next panel by their rows, and memory never rests
                    ahead = next_at + (at - top) * next_bytes // height
                    ahead_s = -(-_STEP_BYTES * next_bytes * min(left, tallest) // (panel_s * height))
                xa, ya = x + at * x_s, scratch if is_gated else out + at * y_s
                if kind == Kind.FLOAT32:
                    if left >= 12:
                        _F32_12(xa, x_s, w, steps, b, ya, y_s, add, ahead, ahead_s)
                        at += 12
                    elif left >= 8:
                        _F32_8(xa, x_s, w, steps, b, ya, y_s, add, ahead, ahead_s)
                        at += 8
                    elif left >= 4:
                        _F32_4(xa, x_s, w, steps, b, ya, y_s, add, ahead, ahead_s)
                        at += 4
                    elif left >= 2:
                        _F32_2(xa, x_s, w, steps, b, ya, y_s, add, ahead, ahead_s)
                        at += 2
                    else:
                        _F32_1(xa, x_s, w, steps, b, ya, y_s, add, ahead, ahead_s)
                        at += 1
                elif kind == Kind.BFLOAT16:
                    if left >= 12:
                        _BF16_12(xa, x_s, w, steps, b, ya, y_s, add, ahead, ahead_s)
                        at += 12
                    elif left >= 8:
                        _BF16_8(xa, x_s, w, steps, b, ya, y_s, add, ahead, ahead_s)
                        at += 8
                    elif left >= 4:
                        _BF16_4(xa, x_s, w, steps, b, ya, y_s, add, ahead, ahead_s)
                        at += 4
                    elif left >= 2:
                        _BF16_2(xa, x_s, w, steps, b, ya, y_s, add, ahead, ahead_s)
                        at += 2
                    else:
                        _BF16_1(xa, x_s, w, steps, b, ya, y_s, add, ahead, ahead_s)
                        at += 1
                elif kind == Kind.INT8:
                    xsc, xsum = x_scales + 4 * at, x_sums + at * sums_s
                    if left >= 12:
                        _INT8_12(xa, x_s, w, steps, b, ya, y_s, add, ahead, ahead_s, sc, xsc, xsum)
                        at += 12
                    elif left >= 8:
                        _INT8_8(xa, x_s, w, steps, b, ya, y_s, add, ahead, ahead_s, sc, xsc, xsum)
                        at += 8
                    elif left >= 4:
                        _INT8_4(xa, x_s, w, steps, b, ya, y_s, add, ahead, ahead_s, sc, xsc, xsum)
                        at += 4
                    elif left >= 2:
                        _INT8_2(xa, x_s, w, steps, b, ya, y_s, add, ahead, ahead_s, sc, xsc, xsum)
                        at += 2
                    else:
                        _INT8_1(xa, x_s, w, steps, b, ya, y_s, add, ahead, ahead_s, sc, xsc, xsum)
                        at += 1
                else:
                    xsc, xsum = x_scales + 4 * at, x_sums + at * sums_s
                    if left >= 6:
                        _INT4_6(xa, x_s, w, steps, b, ya, y_s, add, ahead, ahead_s, sc, xsc, xsum, sums_s)
                        at += 6
                    elif left >= 4:
                        _INT4_4(xa, x_s, w, steps, b, ya, y_s, add, ahead, ahead_s, sc, xsc, xsum, sums_s)
                        at += 4
                    elif left >= 2:
                        _INT4_2(xa, x_s, w, steps, b, ya, y_s, add, ahead, ahead_s, sc, xsc, xsum, sums_s)
                        at += 2
                    else:
                        _INT4_1(xa, x_s, w, steps, b, ya, y_s, add, ahead, ahead_s, sc, xsc, xsum, sums_s)
                        at += 1
                if is_gated:
                    _gate(scratch, y + panel * 2 * PANEL + begun * op[11], op[11], at - begun)


# ---- rows ----------------------------------------------------------------------------------------------------------


@compiled_fast
def norm_row(x: int, y: int, size: int, kind: int, weight: int, bias: int, eps: float) -> None:
    """y = x normalised by what `kind`, a `NormKind`, says; NONE copies what is not there already."""
    if kind == NormKind.NONE and x == y:
        return
    source, out, w = float32_at(x), float32_at(y), float32_at(weight)
    if kind == NormKind.NONE:
        for i in range(size):
            out[i] = source[i]
        return
    mean = float32(0.0)
    if kind == NormKind.LAYER:
        for i in range(size):
            mean += source[i]
        mean = float32(mean / size)
    square = float32(0.0)
    for i in range(size):
        off = source[i] - mean
        square += off * off
    factor = float32(1 / math.sqrt(square / size + eps))
    if kind == NormKind.RMS:
        for i in range(size):
            out[i] = source[i] * factor * w[i]
    else:
        b = float32_at(bias)
        for i in range(size):
            out[i] = (source[i] - mean) * factor * w[i] + b[i]


@compiled
def normalise(op: Any, first: int, last: int) -> None:
    """Rows `first` .. `last` - 1, normalised, as float32 and, if asked for, quantised.

    op: code, which rows, norm, x, its S, row numbers (0: as they come), size, weight, bias, eps, y, its S, codes (0:
    none), their S, scales, sums, their S, groups, registers of a group.
    """
    gather, eps = int32_at(op[5]), float32_at(op[9])
    for row in range(first, last):
        source = gather[row] if op[5] != 0 else row
        y = op[10] + row * op[11]
        norm_row(op[3] + source * op[4], y, op[6], op[2], op[7], op[8], eps[0])
        if op[12] != 0:
            _quantise(y, op[12] + row * op[13], op[14] + 4 * row, op[15] + row * op[16], op[17], op[18])


@compiled
def embed(op: Any, step: Any, first: int, last: int) -> None:
    """x of tokens `first` .. `last` - 1. op: code, which rows, kind, table, D, x, its S, table of places (0: none)."""
    tokens, positions, size = int32_at(step[3]), int32_at(step[4]), op[4]
    for row in range(first, last):
        out = float32_at(op[5] + row * op[6])
        if op[2] == Kind.FLOAT32:
            source = float32_at(op[3] + 4 * size * tokens[row])
            for i in range(size):
                out[i] = source[i]
        else:
            _widen(op[3] + 2 * size * tokens[row], op[5] + row * op[6], size)
        if op[7] != 0:
            place = float32_at(op[7] + 4 * size * positions[row])
            for i in range(size):
                out[i] += place[i]


@compiled
def _widen(source: int, target: int, size: int) -> None:
    """bfloat16 to float32: the upper half of its bits."""
    bits, out = uint16_at(source), int32_at(target)
    for i in range(size):
        out[i] = int32(bits[i]) << 16


@compiled
def activate(op: Any, first: int, last: int) -> None:
    """Rows of activation(x), or activation(gate) * up, then quantised if asked for.

    op: code, which rows, activation (its place in `ACTIVATIONS`), x, its S, F, whether gated, y, its S, codes, their
    S, scales, sums, their S, groups, registers of a group.
    """
    kind, size = op[2], op[5]
    vectors = size // 16
    for row in range(first, last):
        x, y = op[3] + row * op[4], op[7] + row * op[8]
        if op[6] != 0:
            up = x + 4 * size
            if kind == 0:
                _silu_gated(x, up, y, vectors)
            elif kind == 1:
                _gelu_gated(x, up, y, vectors)
            elif kind == 2:
                _gelu_tanh_gated(x, up, y, vectors)
            else:
                _relu_gated(x, up, y, vectors)
        elif kind == 0:
            _silu(x, x, y, vectors)
        elif kind == 1:
            _gelu(x, x, y, vectors)
        elif kind == 2:
            _gelu_tanh(x, x, y, vectors)
        else:
            _relu(x, x, y, vectors)
        if op[9] != 0:
            _quantise(y, op[9] + row * op[10], op[11] + 4 * row, op[12] + row * op[13], op[14], op[15])


# ---- mixtures of experts -------------------------------------------------------------------------------------------


@compiled
def route(op: Any, tokens: int) -> None:
    """Each token's experts and their weights, then the choices sorted by expert; by one thread.

    op: code, which rows (T of them), scores, their S, experts E, experts of a token k, what is added for choosing [E]
    (0: nothing), weights [T, k], rows [T, k] (where a choice lies), tokens [T k] (whose each row is), offsets [E + 1].
    """
    experts, chosen = op[4], op[5]
    bias = float32_at(op[6])
    weights, rows, owners, offsets = float32_at(op[7]), int32_at(op[8]), int32_at(op[9]), int32_at(op[10])
    for expert in range(experts + 1):
        offsets[expert] = 0
    for token in range(tokens):
        score = float32_at(op[2] + token * op[3])
        top, total = score[0], 0.0
        for expert in range(1, experts):
            top = max(top, score[expert])
        for expert in range(experts):
            score[expert] = math.exp(score[expert] - top)
            total += score[expert]
        kept = 0.0
        for rank in range(chosen):
            best, found = -3e38, 0
            for expert in range(experts):
                value = score[expert] / total
                if op[6] != 0:
                    value += bias[expert]
                is_taken = False
                for before in range(rank):
                    is_taken = is_taken or rows[token * chosen + before] == expert
                if not is_taken and value > best:
                    best, found = value, expert
            rows[token * chosen + rank] = found
            weights[token * chosen + rank] = score[found] / total
            kept += score[found] / total
            offsets[found + 1] += 1
        for rank in range(chosen):
            weights[token * chosen + rank] /= kept
    for expert in range(experts):
        offsets[expert + 1] += offsets[expert]
    for choice in range(tokens * chosen):
        expert = rows[choice]
        owners[offsets[expert]] = choice // chosen
        rows[choice] = offsets[expert]
        offsets[expert] += 1
    for expert in range(experts, 0, -1):
        offsets[expert] = offsets[expert - 1]
    offsets[0] = 0


@compiled
def combine(op: Any, first: int, last: int) -> None:
    """x += the weighted results of each token's experts, best first.

    op: code, which rows, results, their S, k, weights [T, k], rows [T, k], D, x, its S.
    """
    chosen, size = op[4], op[7]
    weights, rows = float32_at(op[5]), int32_at(op[6])
    for token in range(first, last):
        x = float32_at(op[8] + token * op[9])
        for rank in range(chosen):
            weight = weights[token * chosen + rank]
            y = float32_at(op[2] + rows[token * chosen + rank] * op[3])
            for i in range(size):
                x[i] += weight * y[i]


# ---- adapters ------------------------------------------------------------------------------------------------------


@compiled_fast
def adapt(op: Any, step: Any, first: int, last: int, scratch: int) -> None:
    """y += scale B (A x) for the tokens that have an adapter.

    op: code, which rows, x, its S, y, its S, in, out, the place's adapters [number, 3] (address of A [rank, in], of B
    [rank, out], rank; 0: none here). The scale is in B.
    """
    feeds, adapters, table = int32_at(step[5] if op[1] == 0 else step[18]), int32_at(step[17]), int64_at(op[8])
    narrow = float32_at(scratch)
    for row in range(first, last):
        number = adapters[feeds[row]]
        rank = table[3 * number + 2]
        if number == 0 or rank == 0:
            continue
        x, y = float32_at(op[2] + row * op[3]), float32_at(op[4] + row * op[5])
        for r in range(rank):
            a, total = float32_at(table[3 * number] + 4 * r * op[6]), 0.0
            for i in range(op[6]):
                total += a[i] * x[i]
            narrow[r] = total
        for r in range(rank):
            b, factor = float32_at(table[3 * number + 1] + 4 * r * op[7]), narrow[r]
            for i in range(op[7]):
                y[i] += b[i] * factor
