"""The operations of a program, in Numba: what one thread does of one operation.

An operation is a row of whole numbers: its code, then addresses and sizes, in the order of the `…Op` tables below. Each
operation is cut into chunks; every chunk is computed by whichever thread takes it first, always in the same way.

T tokens of the step, D hidden, K KV heads, G query heads of one KV head, H head dim, F intermediate, S stride in bytes.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any

from numba import int32, int64, njit, uint16

from sihe.core.simd import float32_at, int32_at, int64_at, uint16_at
from sihe.serving.engine.compute.cpu.tiles import (
    PANEL,
    activation_tile,
    float_tile,
    int4_tile,
    int8_tile,
    mix_tile,
    quantise_tile,
    score_tile,
    softmax_tile,
)

WIDTH = 24
"""Numbers of one operation."""


STEP_WIDTH = 16
"""Numbers of one step: T, O, feeds, then addresses of tokens, positions, feed of each token, starts, lengths, pages of
keys [F, B] (offset of each in bytes), of values, B, tasks of attention, the tasks [n, 3] (feed, first row, rows),
adapter of each feed, first token of each feed, rows of all choices of experts."""


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
ROW_CHUNK = 4
TILE_PAGES = 4
TILE_TOKENS = 16 * TILE_PAGES
ATTEND_ROWS = 12
_FAST = {"reassoc", "nsz", "contract", "arcp"}  # sums in registers; NaN and infinity are kept, they must be seen

_F32_12, _F32_8, _F32_4, _F32_2, _F32_1 = (float_tile(rows, "float32") for rows in (12, 8, 4, 2, 1))
_BF16_12, _BF16_8, _BF16_4, _BF16_2, _BF16_1 = (float_tile(rows, "bfloat16") for rows in (12, 8, 4, 2, 1))
_INT8_12, _INT8_8, _INT8_4, _INT8_2, _INT8_1 = (int8_tile(rows) for rows in (12, 8, 4, 2, 1))
_INT4_6, _INT4_4, _INT4_2, _INT4_1 = (int4_tile(rows) for rows in (6, 4, 2, 1))
_softmax = softmax_tile()
_quantise = quantise_tile()
_SCORE_F32_12, _SCORE_F32_6, _SCORE_F32_3, _SCORE_F32_2, _SCORE_F32_1 = (
    score_tile(rows, 2 if rows == 12 else 4, "float32") for rows in (12, 6, 3, 2, 1)
)
_SCORE_BF16_12, _SCORE_BF16_6, _SCORE_BF16_3, _SCORE_BF16_2, _SCORE_BF16_1 = (
    score_tile(rows, 2 if rows == 12 else 4, "bfloat16") for rows in (12, 6, 3, 2, 1)
)
_MIX_F32_6, _MIX_F32_3, _MIX_F32_2, _MIX_F32_1 = (mix_tile(rows, 4, "float32") for rows in (6, 3, 2, 1))
_MIX_BF16_6, _MIX_BF16_3, _MIX_BF16_2, _MIX_BF16_1 = (mix_tile(rows, 4, "bfloat16") for rows in (6, 3, 2, 1))
_MIX_F32_6_REST, _MIX_F32_1_REST = (mix_tile(rows, 1, "float32") for rows in (6, 1))
_MIX_BF16_6_REST, _MIX_BF16_1_REST = (mix_tile(rows, 1, "bfloat16") for rows in (6, 1))
_silu_gated, _gelu_gated, _gelu_tanh_gated, _relu_gated = (activation_tile(name, True) for name in ACTIVATIONS)
_silu, _gelu, _gelu_tanh, _relu = (activation_tile(name, False) for name in ACTIVATIONS)

_compiled = njit(nogil=True, error_model="numpy")
_compiled_fast = njit(nogil=True, error_model="numpy", fastmath=_FAST)


# ---- products ------------------------------------------------------------------------------------------------------


@_compiled
def multiply_panels(op: Any, first: int, last: int, row: int, rows: int) -> None:
    """Columns of panels `first` .. `last` - 1 of the product, for `rows` rows from `row`.

    op: code, which rows, kind, x, its S, weights, bytes of a panel, steps, panels, bias, y, its S, add, scales, bytes
    of a panel's scales, x scales, x sums, their S, nothing, experts (0: dense), offsets of the experts' rows, bytes of
    an expert's weights, of its scales.
    """
    kind, x, x_s, weights, panel_s, steps = op[2], op[3], op[4], op[5], op[6], op[7]
    bias, y, y_s, add, scales, scales_s, x_scales, x_sums, sums_s = (
        op[9], op[10], op[11], op[12], op[13], op[14], op[15], op[16], op[17],
    )  # fmt: skip
    for panel in range(first, last):
        w, b, out, sc = (
            weights + panel * panel_s,
            bias + panel * 4 * PANEL,
            y + panel * 4 * PANEL,
            scales + panel * scales_s,
        )
        at, end = row, row + rows
        while at < end:
            left = end - at
            xa, ya = x + at * x_s, out + at * y_s
            if kind == 0:
                if left >= 12:
                    _F32_12(xa, x_s, w, steps, b, ya, y_s, add)
                    at += 12
                elif left >= 8:
                    _F32_8(xa, x_s, w, steps, b, ya, y_s, add)
                    at += 8
                elif left >= 4:
                    _F32_4(xa, x_s, w, steps, b, ya, y_s, add)
                    at += 4
                elif left >= 2:
                    _F32_2(xa, x_s, w, steps, b, ya, y_s, add)
                    at += 2
                else:
                    _F32_1(xa, x_s, w, steps, b, ya, y_s, add)
                    at += 1
            elif kind == 1:
                if left >= 12:
                    _BF16_12(xa, x_s, w, steps, b, ya, y_s, add)
                    at += 12
                elif left >= 8:
                    _BF16_8(xa, x_s, w, steps, b, ya, y_s, add)
                    at += 8
                elif left >= 4:
                    _BF16_4(xa, x_s, w, steps, b, ya, y_s, add)
                    at += 4
                elif left >= 2:
                    _BF16_2(xa, x_s, w, steps, b, ya, y_s, add)
                    at += 2
                else:
                    _BF16_1(xa, x_s, w, steps, b, ya, y_s, add)
                    at += 1
            elif kind == 2:
                xsc, xsum = x_scales + 4 * at, x_sums + at * sums_s
                if left >= 12:
                    _INT8_12(xa, x_s, w, steps, b, ya, y_s, add, sc, xsc, xsum)
                    at += 12
                elif left >= 8:
                    _INT8_8(xa, x_s, w, steps, b, ya, y_s, add, sc, xsc, xsum)
                    at += 8
                elif left >= 4:
                    _INT8_4(xa, x_s, w, steps, b, ya, y_s, add, sc, xsc, xsum)
                    at += 4
                elif left >= 2:
                    _INT8_2(xa, x_s, w, steps, b, ya, y_s, add, sc, xsc, xsum)
                    at += 2
                else:
                    _INT8_1(xa, x_s, w, steps, b, ya, y_s, add, sc, xsc, xsum)
                    at += 1
            else:
                xsc, xsum = x_scales + 4 * at, x_sums + at * sums_s
                if left >= 6:
                    _INT4_6(xa, x_s, w, steps, b, ya, y_s, add, sc, xsc, xsum, sums_s)
                    at += 6
                elif left >= 4:
                    _INT4_4(xa, x_s, w, steps, b, ya, y_s, add, sc, xsc, xsum, sums_s)
                    at += 4
                elif left >= 2:
                    _INT4_2(xa, x_s, w, steps, b, ya, y_s, add, sc, xsc, xsum, sums_s)
                    at += 2
                else:
                    _INT4_1(xa, x_s, w, steps, b, ya, y_s, add, sc, xsc, xsum, sums_s)
                    at += 1


# ---- rows ----------------------------------------------------------------------------------------------------------


@_compiled_fast
def norm_row(x: int, y: int, size: int, kind: int, weight: int, bias: int, eps: float) -> None:
    """y = x normalised: 1 by its root mean square, 2 by mean and deviation; 0 copies."""
    source, out, w = float32_at(x), float32_at(y), float32_at(weight)
    if kind == 0:
        for i in range(size):
            out[i] = source[i]
        return
    mean = 0.0
    if kind == 2:
        for i in range(size):
            mean += source[i]
        mean /= size
    square = 0.0
    for i in range(size):
        off = source[i] - mean
        square += off * off
    factor = 1 / math.sqrt(square / size + eps)
    if kind == 1:
        for i in range(size):
            out[i] = source[i] * factor * w[i]
    else:
        b = float32_at(bias)
        for i in range(size):
            out[i] = (source[i] - mean) * factor * w[i] + b[i]


@_compiled
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


@_compiled
def embed(op: Any, step: Any, first: int, last: int) -> None:
    """x of tokens `first` .. `last` - 1. op: code, which rows, kind, table, D, x, its S, table of places (0: none)."""
    tokens, positions, size = int32_at(step[3]), int32_at(step[4]), op[4]
    for row in range(first, last):
        out = float32_at(op[5] + row * op[6])
        if op[2] == 0:
            source = float32_at(op[3] + 4 * size * tokens[row])
            for i in range(size):
                out[i] = source[i]
        else:
            _widen(op[3] + 2 * size * tokens[row], op[5] + row * op[6], size)
        if op[7] != 0:
            place = float32_at(op[7] + 4 * size * positions[row])
            for i in range(size):
                out[i] += place[i]


@_compiled
def _widen(source: int, target: int, size: int) -> None:
    """bfloat16 to float32: the upper half of its bits."""
    bits, out = uint16_at(source), int32_at(target)
    for i in range(size):
        out[i] = int32(bits[i]) << 16


@_compiled
def activate(op: Any, first: int, last: int) -> None:
    """Rows of activation(x), or activation(gate) * up, then quantised if asked for.

    op: code, which rows, activation, x, its S, F, whether gated, y, its S, codes, their S, scales, sums, their S,
    groups, registers of a group.
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


# ---- attention -----------------------------------------------------------------------------------------------------


@_compiled_fast
def place(op: Any, step: Any, first: int, last: int) -> None:
    """Queries and keys of tokens `first` .. `last` - 1, normed and turned; keys and values go into their pages.

    op: code, which rows, qkv, its S, cosines, sines (0: none), rotary dims / 2, K, G, H, query norm, key norm (0:
    none), eps, queries [K, T, G, H], kind of the pages, the layer's keys, bytes of a head, the layer's values, bytes of
    a head, bytes of a token's values, the scale of queries.
    """
    positions, feeds = int32_at(step[4]), int32_at(step[5])
    key_pages, value_pages, width = int64_at(step[8]), int64_at(step[9]), step[10]
    half, heads, group, size, kind = op[6], op[7], op[8], op[9], op[14]
    eps, query_scale, tokens = float32_at(op[12])[0], float32_at(op[20])[0], step[0]
    for row in range(first, last):
        position = positions[row]
        page = feeds[row] * width + position // 16
        inside = position % 16
        cosines, sines = float32_at(op[4] + 4 * half * position), float32_at(op[5] + 4 * half * position)
        for head in range(heads):
            source = op[2] + row * op[3] + 4 * head * (group + 2) * size
            for member in range(group + 1):
                x = float32_at(source + 4 * member * size)
                norm = op[10] if member < group else op[11]
                if norm != 0:
                    weight = float32_at(norm)
                    square = 0.0
                    for i in range(size):
                        square += x[i] * x[i]
                    factor = 1 / math.sqrt(square / size + eps)
                    for i in range(size):
                        x[i] = x[i] * factor * weight[i]
                for i in range(half):
                    low, high = x[i], x[i + half]
                    x[i] = low * cosines[i] - high * sines[i]
                    x[i + half] = high * cosines[i] + low * sines[i]
                if member < group:
                    out = float32_at(op[13] + 4 * size * ((head * tokens + row) * group + member))
                    for i in range(size):
                        out[i] = x[i] * query_scale
            key, value = float32_at(source + 4 * group * size), float32_at(source + 4 * (group + 1) * size)
            keys_at = op[15] + key_pages[page] + head * op[16]
            values_at = op[17] + value_pages[page] + head * op[18] + inside * op[19]
            if kind == 0:
                keys, values = float32_at(keys_at), float32_at(values_at)
                for i in range(size):
                    keys[16 * i + inside] = key[i]
                    values[i] = value[i]
            else:
                keys_16, values_16 = uint16_at(keys_at), uint16_at(values_at)
                key_bits, value_bits = int32_at(source + 4 * group * size), int32_at(source + 4 * (group + 1) * size)
                for i in range(size):
                    keys_16[16 * i + inside] = _rounded(key_bits[i])
                    values_16[i] = _rounded(value_bits[i])


@_compiled
def _rounded(bits: int) -> Any:
    """float32 bits to bfloat16's, to the nearest even; NaN stays one."""
    wide = int64(bits) & 0xFFFFFFFF
    if (wide & 0x7FFFFFFF) > 0x7F800000:
        return uint16(0x7FC0)
    return uint16((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16)


@_compiled
def attend(op: Any, step: Any, task: int, head: int, scratch: int) -> None:
    """Up to 12 rows of one feed and KV head: consecutive tokens' queries over all that they see.

    op: code, which rows, queries [K, T, G, H], K, G, H, kind of the pages, the layer's keys, bytes of a head, the
    layer's values, bytes of a head, bytes of a token's values, window (0: none), out [T, K, G, H], its S, width of a
    value.
    scratch: scores [12, 64], sums [12, H], states [12, 4], float32.
    """
    group, size, kind, width = op[4], op[5], op[6], op[15]
    tasks, starts, firsts = int32_at(step[12]), int32_at(step[6]), int32_at(step[14])
    feed, begin, rows = tasks[3 * task], tasks[3 * task + 1], tasks[3 * task + 2]
    start, tokens = starts[feed], step[0]
    q_s = 4 * size
    queries = op[2] + q_s * ((head * tokens + firsts[feed]) * group + begin)
    scores, sums, states = (
        scratch,
        scratch + 4 * ATTEND_ROWS * TILE_TOKENS,
        scratch + 4 * ATTEND_ROWS * (TILE_TOKENS + width),
    )
    total, state = float32_at(sums), float32_at(states)
    for i in range(rows * width):
        total[i] = 0.0
    for row in range(rows):
        state[4 * row] = -3e38
        state[4 * row + 1] = 0.0
    newest, oldest = start + (begin + rows - 1) // group, start + begin // group
    first_tile = 0 if op[12] == 0 else max(0, oldest - op[12] + 1) // TILE_TOKENS
    for tile in range(first_tile, newest // TILE_TOKENS + 1):
        begins = tile * TILE_TOKENS
        key_pages = step[8] + 8 * (feed * step[10] + tile * TILE_PAGES)
        value_pages = step[9] + 8 * (feed * step[10] + tile * TILE_PAGES)
        _score(kind, queries, q_s, rows, key_pages, op[7] + head * op[8], size, scores)
        for row in range(rows):
            position = start + (begin + row) // group
            first = 0 if op[12] == 0 else max(0, position - op[12] + 1 - begins)
            last = min(TILE_TOKENS, position + 1 - begins)
            _softmax(scores + 4 * TILE_TOKENS * row, TILE_PAGES, first, last, states + 16 * row)
            factor = state[4 * row + 2]
            for i in range(width):
                total[row * width + i] *= factor
        seen = min(TILE_TOKENS, newest + 1 - begins)
        _mix(kind, scores, rows, value_pages, op[9] + head * op[10], seen, op[11], sums, width)
    for row in range(rows):
        token = firsts[feed] + (begin + row) // group
        out = float32_at(op[13] + token * op[14] + 4 * size * (head * group + (begin + row) % group))
        inverse = 1 / state[4 * row + 1]
        for i in range(size):
            out[i] = total[row * width + i] * inverse


@_compiled
def _score(kind: int, q: int, q_s: int, rows: int, pages: int, inside: int, size: int, scores: int) -> None:
    s = 4 * TILE_TOKENS
    at = 0
    while at < rows:
        left, qa, sa = rows - at, q + at * q_s, scores + at * s
        if kind == 0:
            if left >= 12:
                _SCORE_F32_12(qa, q_s, pages, inside, size, sa, s)
                _SCORE_F32_12(qa, q_s, pages + 16, inside, size, sa + 128, s)
                at += 12
            elif left >= 6:
                _SCORE_F32_6(qa, q_s, pages, inside, size, sa, s)
                at += 6
            elif left >= 3:
                _SCORE_F32_3(qa, q_s, pages, inside, size, sa, s)
                at += 3
            elif left >= 2:
                _SCORE_F32_2(qa, q_s, pages, inside, size, sa, s)
                at += 2
            else:
                _SCORE_F32_1(qa, q_s, pages, inside, size, sa, s)
                at += 1
        elif left >= 12:
            _SCORE_BF16_12(qa, q_s, pages, inside, size, sa, s)
            _SCORE_BF16_12(qa, q_s, pages + 16, inside, size, sa + 128, s)
            at += 12
        elif left >= 6:
            _SCORE_BF16_6(qa, q_s, pages, inside, size, sa, s)
            at += 6
        elif left >= 3:
            _SCORE_BF16_3(qa, q_s, pages, inside, size, sa, s)
            at += 3
        elif left >= 2:
            _SCORE_BF16_2(qa, q_s, pages, inside, size, sa, s)
            at += 2
        else:
            _SCORE_BF16_1(qa, q_s, pages, inside, size, sa, s)
            at += 1


@_compiled
def _mix(
    kind: int, p: int, rows: int, pages: int, inside: int, tokens: int, token_s: int, out: int, width: int
) -> None:
    p_s, out_s = 4 * TILE_TOKENS, 4 * width
    element = 4 if kind == 0 else 2
    at = 0
    while at < rows:
        left, pa = rows - at, p + at * p_s
        taken = 6 if left >= 6 else (3 if left >= 3 else (2 if left >= 2 else 1))
        dim = 0
        while dim < width:
            oa, ia = out + at * out_s + 4 * dim, inside + element * dim
            if width - dim >= 64:
                if kind == 0:
                    if taken == 6:
                        _MIX_F32_6(pa, p_s, pages, ia, tokens, token_s, oa, out_s)
                    elif taken == 3:
                        _MIX_F32_3(pa, p_s, pages, ia, tokens, token_s, oa, out_s)
                    elif taken == 2:
                        _MIX_F32_2(pa, p_s, pages, ia, tokens, token_s, oa, out_s)
                    else:
                        _MIX_F32_1(pa, p_s, pages, ia, tokens, token_s, oa, out_s)
                elif taken == 6:
                    _MIX_BF16_6(pa, p_s, pages, ia, tokens, token_s, oa, out_s)
                elif taken == 3:
                    _MIX_BF16_3(pa, p_s, pages, ia, tokens, token_s, oa, out_s)
                elif taken == 2:
                    _MIX_BF16_2(pa, p_s, pages, ia, tokens, token_s, oa, out_s)
                else:
                    _MIX_BF16_1(pa, p_s, pages, ia, tokens, token_s, oa, out_s)
                dim += 64
            else:
                if taken == 6:
                    if kind == 0:
                        _MIX_F32_6_REST(pa, p_s, pages, ia, tokens, token_s, oa, out_s)
                    else:
                        _MIX_BF16_6_REST(pa, p_s, pages, ia, tokens, token_s, oa, out_s)
                else:
                    for row in range(taken):
                        if kind == 0:
                            _MIX_F32_1_REST(pa + row * p_s, p_s, pages, ia, tokens, token_s, oa + row * out_s, out_s)
                        else:
                            _MIX_BF16_1_REST(pa + row * p_s, p_s, pages, ia, tokens, token_s, oa + row * out_s, out_s)
                dim += 16
        at += taken


# ---- mixtures of experts -------------------------------------------------------------------------------------------


@_compiled
def route(op: Any, step: Any) -> None:
    """Each token's experts and their weights, then the choices sorted by expert; by one thread.

    op: code, which rows, scores, their S, experts E, experts of a token k, what is added for choosing [E] (0: nothing),
    weights [T, k], rows [T, k] (where a choice lies), tokens [T k] (whose each row is), offsets [E + 1].
    """
    experts, chosen, tokens = op[4], op[5], step[0]
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


@_compiled
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


@_compiled_fast
def adapt(op: Any, step: Any, first: int, last: int, scratch: int) -> None:
    """y += scale B (A x) for the tokens that have an adapter.

    op: code, which rows, x, its S, y, its S, in, out, the place's adapters [number, 3] (address of A [rank, in], of B
    [rank, out], rank; 0: none here). The scale is in B.
    """
    feeds, adapters, table = int32_at(step[5]), int32_at(step[13]), int64_at(op[8])
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
