"""Attention in Numba: keys and values into their pages, and queries over the pages where they lie.

Up to 12 rows (queries of one KV head and neighbouring tokens) are computed together, by 64 tokens at a time with a
running softmax. Where a row's share of 64 begins and ends goes by positions alone, so that its result does not depend
on the rows beside it or on where its prompt was cut.

T tokens of the step, K KV heads, G query heads of one KV head, H head dim, S stride in bytes.
"""

from __future__ import annotations

import math
from typing import Any

from numba import float32, int8, int32, int64, uint16

from sihe.core.simd import float32_at, int8_at, int32_at, int64_at, uint16_at
from sihe.serving.engine.compute.cpu.attention_tiles import mix_tile, scale_tile, score_tile, softmax_tile
from sihe.serving.engine.compute.cpu.kernels import Kind, compiled, compiled_fast

TILE_PAGES = 4
TILE_TOKENS = 16 * TILE_PAGES
ATTEND_ROWS = 12

_softmax_4, _softmax_3, _softmax_2, _softmax_1 = (softmax_tile(rows, TILE_PAGES) for rows in (4, 3, 2, 1))
_softmax_partly_4, _softmax_partly_1 = (softmax_tile(rows, TILE_PAGES, partly=True) for rows in (4, 1))
_scale_by = scale_tile()


def _scorer(kind: str) -> Any:
    """Scores of all rows over a tile's pages of keys, of which `seen` tokens are wanted; `then` are its values, fetched
    meanwhile. What is behind the wanted tokens may be left as it was."""
    rows_12, rows_6, rows_3, rows_2, rows_1 = (score_tile(n, 2 if n == 12 else 4, kind) for n in (12, 6, 3, 2, 1))

    @compiled
    def score(
        q: int, q_s: int, rows: int, pages: int, inside: int, size: int, scores: int, then: int, then_in: int, seen: int
    ) -> None:
        s = 4 * TILE_TOKENS
        at = 0
        while at < rows:
            left, qa, sa = rows - at, q + at * q_s, scores + at * s
            if left >= 12:
                rows_12(qa, q_s, pages, inside, size, sa, s, then, then_in)
                if seen > TILE_TOKENS // 2:
                    rows_12(qa, q_s, pages + 16, inside, size, sa + 128, s, then + 16, then_in)
                at += 12
            elif left >= 6:
                rows_6(qa, q_s, pages, inside, size, sa, s, then, then_in)
                at += 6
            elif left >= 3:
                rows_3(qa, q_s, pages, inside, size, sa, s, then, then_in)
                at += 3
            elif left >= 2:
                rows_2(qa, q_s, pages, inside, size, sa, s, then, then_in)
                at += 2
            else:
                rows_1(qa, q_s, pages, inside, size, sa, s, then, then_in)
                at += 1

    return score


def _mixer(kind: str, element: int) -> Any:
    """Adds what all rows take of a tile's values; the keys of the next one, at `then`, are fetched meanwhile."""
    rows_6, rows_3, rows_2, rows_1 = (mix_tile(rows, 4, kind) for rows in (6, 3, 2, 1))
    rest_6, rest_1 = (mix_tile(rows, 1, kind) for rows in (6, 1))

    @compiled
    def mix(
        p: int,
        rows: int,
        pages: int,
        inside: int,
        tokens: int,
        token_s: int,
        out: int,
        width: int,
        then: int,
        then_in: int,
    ) -> None:
        p_s, out_s = 4 * TILE_TOKENS, 4 * width
        at = 0
        while at < rows:
            left, pa = rows - at, p + at * p_s
            taken = 6 if left >= 6 else (3 if left >= 3 else (2 if left >= 2 else 1))
            dim = 0
            while dim < width:
                oa, ia = out + at * out_s + 4 * dim, inside + element * dim
                na = then_in + 16 * element * dim
                if width - dim >= 64:
                    if taken == 6:
                        rows_6(pa, p_s, pages, ia, tokens, token_s, oa, out_s, then, na)
                    elif taken == 3:
                        rows_3(pa, p_s, pages, ia, tokens, token_s, oa, out_s, then, na)
                    elif taken == 2:
                        rows_2(pa, p_s, pages, ia, tokens, token_s, oa, out_s, then, na)
                    else:
                        rows_1(pa, p_s, pages, ia, tokens, token_s, oa, out_s, then, na)
                    dim += 64
                else:
                    if taken == 6:
                        rest_6(pa, p_s, pages, ia, tokens, token_s, oa, out_s, then, na)
                    else:
                        for row in range(taken):
                            rest_1(pa + row * p_s, p_s, pages, ia, tokens, token_s, oa + row * out_s, out_s, then, na)
                    dim += 16
            at += taken

    return mix


_score_float32, _score_bfloat16, _score_int8 = (_scorer(kind) for kind in ("float32", "bfloat16", "int8"))
_mix_float32, _mix_bfloat16, _mix_int8 = (
    _mixer(kind, size) for kind, size in (("float32", 4), ("bfloat16", 2), ("int8", 1))
)


@compiled
def _softmax(scores: int, rows: int, states: int, bounds: int, is_whole: bool) -> None:
    """All rows' share of the softmax, four side by side."""
    s, row = 4 * TILE_TOKENS, 0
    while row < rows:
        left, at, state, bound = rows - row, scores + s * row, states + 16 * row, bounds + 8 * row
        taken = min(left, 4)
        if not is_whole and left < 4:
            _softmax_partly_1(at, s, state, bound)
            taken = 1
        elif not is_whole:
            _softmax_partly_4(at, s, state, bound)
        elif left >= 4:
            _softmax_4(at, s, state, bound)
        elif left == 3:
            _softmax_3(at, s, state, bound)
        elif left == 2:
            _softmax_2(at, s, state, bound)
        else:
            _softmax_1(at, s, state, bound)
        row += taken


@compiled_fast
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
            if kind == Kind.FLOAT32:
                keys, values = float32_at(keys_at), float32_at(values_at)
                for i in range(size):
                    keys[16 * i + inside] = key[i]
                    values[i] = value[i]
            elif kind == Kind.BFLOAT16:
                keys_16, values_16 = uint16_at(keys_at), uint16_at(values_at)
                key_bits, value_bits = int32_at(source + 4 * group * size), int32_at(source + 4 * (group + 1) * size)
                for i in range(size):
                    keys_16[16 * i + inside] = _rounded(key_bits[i])
                    values_16[i] = _rounded(value_bits[i])
            else:
                key_codes, value_codes = int8_at(keys_at), int8_at(values_at)
                values_begin = values_at - inside * op[19]
                key_scale, key_factor = _quantising(source + 4 * group * size, size)
                value_scale, value_factor = _quantising(source + 4 * (group + 1) * size, size)
                for i in range(size):
                    key_codes[16 * i + inside] = _code(key[i], key_factor)
                    value_codes[i] = _code(value[i], value_factor)
                float32_at(keys_at + 16 * size)[inside] = key_scale
                float32_at(values_begin + 16 * op[19])[inside] = value_scale


@compiled
def _quantising(x: int, size: int) -> Any:
    """The scale that brings the largest of `size` numbers to 127, NaN where one is not finite, and one over it."""
    numbers, largest, spoilt = float32_at(x), float32(0.0), float32(0.0)
    for i in range(size):
        largest = max(largest, abs(numbers[i]))
        spoilt += numbers[i] * float32(0.0)
    factor = float32(127.0) / largest if largest > float32(1e-30) and spoilt == float32(0.0) else float32(0.0)
    return largest / float32(127.0) + spoilt, factor


@compiled
def _code(number: Any, factor: Any) -> Any:
    exact = number * factor
    half = float32(0.5) if exact >= float32(0.0) else float32(-0.5)
    return int8(int32(exact + half))


@compiled
def _rounded(bits: int) -> Any:
    """float32 bits to bfloat16's, to the nearest even; NaN stays one."""
    wide = int64(bits) & 0xFFFFFFFF
    if (wide & 0x7FFFFFFF) > 0x7F800000:
        return uint16(0x7FC0)
    return uint16((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16)


@compiled
def attend(op: Any, step: Any, task: int, head: int, scratch: int) -> None:
    """Up to 12 rows of one feed and KV head: consecutive tokens' queries over all that they see.

    op: code, which rows, queries [K, T, G, H], K, G, H, kind of the pages, the layer's keys, bytes of a head, the
    layer's values, bytes of a head, bytes of a token's values, window (0: none), out [T, K, G, H], its S, width of a
    value. Of wanted rows alone the result is [O, K, G, H].
    scratch: scores [12, 64], sums [12, H], states [12, 4], float32, and bounds [12, 2], int32.
    """
    group, size, kind, width = op[4], op[5], op[6], op[15]
    tasks, starts, firsts = int32_at(step[13 + op[1]]), int32_at(step[6]), int32_at(step[15])
    feed, begin, rows = tasks[3 * task], tasks[3 * task + 1], tasks[3 * task + 2]
    start, tokens = starts[feed], step[0]
    q_s = 4 * size
    queries = op[2] + q_s * ((head * tokens + firsts[feed]) * group + begin)
    scores, sums, states = (
        scratch,
        scratch + 4 * ATTEND_ROWS * TILE_TOKENS,
        scratch + 4 * ATTEND_ROWS * (TILE_TOKENS + width),
    )
    bounds = states + 16 * ATTEND_ROWS
    total, state, bound = float32_at(sums), float32_at(states), int32_at(bounds)
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
        seen = min(TILE_TOKENS, newest + 1 - begins)
        keys_in, values_in = op[7] + head * op[8], op[9] + head * op[10]
        if kind == Kind.FLOAT32:
            _score_float32(queries, q_s, rows, key_pages, keys_in, size, scores, value_pages, values_in, seen)
        elif kind == Kind.BFLOAT16:
            _score_bfloat16(queries, q_s, rows, key_pages, keys_in, size, scores, value_pages, values_in, seen)
        else:
            _score_int8(queries, q_s, rows, key_pages, keys_in, size, scores, value_pages, values_in, seen)
        is_whole = begins + TILE_TOKENS <= oldest + 1 and (op[12] == 0 or newest - op[12] < begins)
        if not is_whole:
            for row in range(rows):
                position = start + (begin + row) // group
                bound[2 * row] = 0 if op[12] == 0 else max(0, position - op[12] + 1 - begins)
                bound[2 * row + 1] = min(TILE_TOKENS, position + 1 - begins)
        _softmax(scores, rows, states, bounds, is_whole)
        for row in range(rows):
            factor = state[4 * row + 2]
            if factor != 1.0:  # as it is wherever none of these scores is the largest so far
                for i in range(width):
                    total[row * width + i] *= factor
        next_pages = key_pages + 8 * TILE_PAGES if tile < newest // TILE_TOKENS else key_pages
        if kind == Kind.FLOAT32:
            _mix_float32(scores, rows, value_pages, values_in, seen, op[11], sums, width, next_pages, keys_in)
        elif kind == Kind.BFLOAT16:
            _mix_bfloat16(scores, rows, value_pages, values_in, seen, op[11], sums, width, next_pages, keys_in)
        else:
            for page in range(TILE_PAGES):
                scales = int64_at(value_pages)[page] + values_in + 16 * width
                _scale_by(scores + 64 * page, 4 * TILE_TOKENS, rows, scales)
            _mix_int8(scores, rows, value_pages, values_in, seen, op[11], sums, width, next_pages, keys_in)
    results = int32_at(step[15 + op[1]])
    for row in range(rows):
        token = results[feed] + (begin + row) // group
        out = float32_at(op[13] + token * op[14] + 4 * size * (head * group + (begin + row) % group))
        inverse = 1 / state[4 * row + 1]
        for i in range(size):
            out[i] = total[row * width + i] * inverse
