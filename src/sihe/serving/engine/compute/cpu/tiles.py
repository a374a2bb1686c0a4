"""The innermost loops of the kernels: products of a few rows with a panel of weights, scores, and mixes of values.

A row's result is computed by the same operations in the same order whatever rows are computed beside it: this is where
the engine's answers come to be independent of the batch.

**Weights** are packed in panels of 32 columns (outputs), so that a tile reads memory from front to back:

| kind | a panel | factors |
|---|---|---|
| float32 | [K, 32] | activations float32 |
| bfloat16 | [K / 2, 32, 2], pairs of k | widened in registers, activations float32 |
| int8 | [K / 4, 32, 4], stored + 128 | activations int8, a scale a row; sums in int32; a scale a column |
| int4 | [K / 8, 32, 4], low nibbles k .. k + 3, high ones k + 4 .. k + 7, + 8 | as int8, a scale a column and 32 k |

Bytes of weights are unsigned because the processor's product of bytes takes one unsigned and one signed factor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from sihe.core.simd import F32, F32X16, I8, I8X16, I16, I32, I32X16, I64, LANES, Tile, Value, tile

PANEL = 32
"""Columns of a panel: two registers, so that each broadcast activation is used twice."""
GROUP = 32
"""Weights that share a scale in int4, as in llama.cpp's Q4_0."""
ROWS = (12, 8, 4, 2, 1)
"""How many rows a tile can take: twelve rows of two sums each, beside the factors, fill the 32 registers."""
ROWS_INT4 = (6, 4, 2, 1)
"""The same for int4, which sums a group in integers and then all groups in float32: four registers a row."""
_MANY = 4
"""Rows from which on weights are fetched into the second cache only: the first one is for the rows."""
_TURNS = 4
"""Inputs that one turn of a product's loop takes: the addresses of the rows are then reckoned once for all of them, on
the ports that the sums need."""
_HALVES = (0, 64)  # bytes from one register of a panel's step to the next


def float_tile(rows: int, kind: str) -> Any:
    """y[row, 32] = x[row] W + bias, or that added to y.

    Arguments: x, its stride, W, steps, bias, y, its stride, whether to add, where to fetch weights ahead, and how many
    bytes further at each step.
    """
    depth = 1 if kind == "float32" else 2
    turns = _TURNS // depth if rows >= _MANY else 1

    def emit(t: Tile, given: list[Value]) -> None:
        x, x_stride, weights, steps, bias, y, y_stride, add, ahead, ahead_stride = given
        sums = _sums(t, rows, lambda half: t.load(t.at(bias, 64 * half), F32X16))
        x_at = [t.at(x, t.b.mul(x_stride, I64(row))) for row in range(rows)]
        _fetch_results(t, rows, y, y_stride)
        with t.loop(t.b.udiv(steps, I64(turns))) as several:
            first_step = t.b.mul(several, I64(turns))
            panel, ahead_at = (
                t.at(weights, t.b.mul(first_step, I64(128))),
                t.at(ahead, t.b.mul(first_step, ahead_stride)),
            )
            offset = t.b.mul(first_step, I64(4 * depth))
            for turn in range(turns):
                for half in _HALVES:
                    t.prefetch(t.at(ahead_at, t.b.mul(ahead_stride, I64(turn)), half), near=rows < _MANY)
                columns = _columns(t, t.at(panel, 128 * turn), kind)
                for row in range(rows):
                    for k, halves in enumerate(columns):
                        factor = t.broadcast(t.at(x_at[row], offset, 4 * (depth * turn + k)), F32)
                        for half, column in enumerate(halves):
                            place = sums[row][half]
                            t.put(t.fma(factor, column, t.get(place)), place)
        for row in range(rows):
            for half in range(2):
                _write(t, t.get(sums[row][half]), t.at(y, t.b.mul(y_stride, I64(row)), 64 * half), add)

    return tile(emit, "i" * 10)


def int8_tile(rows: int) -> Any:
    """As `float_tile` for int8.

    Arguments: x, its stride, W, steps, bias, y, its stride, whether to add, where to fetch ahead, bytes a step, the
    columns' scales, the rows' scales, the sums of the rows' x (int32).
    """

    def emit(t: Tile, given: list[Value]) -> None:
        x, x_stride, weights, steps, bias, y, y_stride, add, ahead, ahead_stride, scales, x_scales, x_sums = given
        sums = _sums(t, rows, lambda _: t.constant(0, I32X16))
        x_at = [t.at(x, t.b.mul(x_stride, I64(row))) for row in range(rows)]
        _fetch_results(t, rows, y, y_stride)
        with t.loop(steps) as step:
            panel = t.at(weights, t.b.mul(step, I64(128)))
            for offset in _HALVES:
                t.prefetch(t.at(ahead, t.b.mul(step, ahead_stride), offset), near=rows < _MANY)
            columns = [t.load(t.at(panel, offset), I32X16) for offset in _HALVES]
            offset = t.b.mul(step, I64(4))
            for row in range(rows):
                factor = t.broadcast(t.at(x_at[row], offset), I32)
                for half, column in enumerate(columns):
                    place = sums[row][half]
                    t.put(t.dot4(t.get(place), column, factor), place)
        for row in range(rows):
            x_scale = t.broadcast(t.at(x_scales, 4 * row), F32)
            excess = t.b.shl(t.broadcast(t.at(x_sums, 4 * row), I32), t.constant(7, I32X16))
            for half in range(2):
                exact = t.b.sitofp(t.b.sub(t.get(sums[row][half]), excess), F32X16)
                scale = t.b.fmul(x_scale, t.load(t.at(scales, 64 * half), F32X16))
                value = t.fma(exact, scale, t.load(t.at(bias, 64 * half), F32X16))
                _write(t, value, t.at(y, t.b.mul(y_stride, I64(row)), 64 * half), add)

    return tile(emit, "i" * 13)


def int4_tile(rows: int) -> Any:
    """As `int8_tile` for int4, whose steps are groups.

    The columns' scales are bfloat16 [groups, 32], the sums int32 [rows, groups], and their stride is one argument more.
    """

    def emit(t: Tile, given: list[Value]) -> None:
        x, x_stride, weights, groups, bias, y, y_stride, add, ahead, ahead_stride = given[:10]
        scales, x_scales, x_sums, x_sums_stride = given[10:]
        totals = _sums(t, rows, lambda _: t.constant(0.0))
        x_at = [t.at(x, t.b.mul(x_stride, I64(row))) for row in range(rows)]
        sums_at = [t.at(x_sums, t.b.mul(x_sums_stride, I64(row))) for row in range(rows)]
        _fetch_results(t, rows, y, y_stride)
        with t.loop(groups) as group:
            panel = t.at(weights, t.b.mul(group, I64(PANEL * GROUP // 2)))
            sums: list[list[Value]] = [[t.constant(0, I32X16)] * 2 for _ in range(rows)]
            for step in range(GROUP // 8):
                place = t.b.mul(t.b.add(t.b.mul(group, I64(GROUP // 8)), I64(step)), ahead_stride)
                for offset in _HALVES:
                    t.prefetch(t.at(ahead, place, offset), near=rows < _MANY)
                packed = [t.load(t.at(panel, 128 * step, offset), I32X16) for offset in _HALVES]
                low = [t.b.and_(value, t.constant(0x0F0F0F0F, I32X16)) for value in packed]
                shifted = [t.b.lshr(value, t.constant(4, I32X16)) for value in packed]
                high = [t.b.and_(value, t.constant(0x0F0F0F0F, I32X16)) for value in shifted]
                for row in range(rows):
                    for k, columns in enumerate((low, high)):
                        place = t.at(x_at[row], t.b.mul(group, I64(GROUP)), 8 * step + 4 * k)
                        factor = t.broadcast(place, I32)
                        sums[row] = [t.dot4(s, c, factor) for s, c in zip(sums[row], columns, strict=True)]
            scale_at = t.at(scales, t.b.mul(group, I64(2 * PANEL)))
            scale = [t.widened(t.at(scale_at, 2 * LANES * half), I16) for half in range(2)]
            for row in range(rows):
                sum_at = t.at(sums_at[row], t.b.mul(group, I64(4)))
                excess = t.b.shl(t.broadcast(sum_at, I32), t.constant(3, I32X16))
                for half in range(2):
                    exact = t.b.sitofp(t.b.sub(sums[row][half], excess), F32X16)
                    place = totals[row][half]
                    t.put(t.fma(exact, scale[half], t.get(place)), place)
        for row in range(rows):
            x_scale = t.broadcast(t.at(x_scales, 4 * row), F32)
            for half in range(2):
                value = t.fma(t.get(totals[row][half]), x_scale, t.load(t.at(bias, 64 * half), F32X16))
                _write(t, value, t.at(y, t.b.mul(y_stride, I64(row)), 64 * half), add)

    return tile(emit, "i" * 14)


def score_tile(rows: int, pages: int, kind: str) -> Any:
    """scores[row, 16 page + token] = q[row] · k[token] over neighbouring pages of keys [D, 16], times int8's scales.

    Arguments: q, its stride, the addresses of the pages (int64 each), the bytes from a page's address to its keys, D,
    scores, their stride, and pages that are wanted next and fetched meanwhile: their addresses, and the bytes from
    these.
    """
    element, size = _KINDS[kind]

    def emit(t: Tile, given: list[Value]) -> None:
        q, q_stride, page_list, inside, dims, scores, stride, next_list, next_inside = given
        at = [t.at(t.load(t.at(page_list, 8 * page), I64), inside) for page in range(pages)]
        next_at = [t.at(t.load(t.at(next_list, 8 * page), I64), next_inside) for page in range(pages)]
        sums = [[t.variable(t.constant(0.0)) for _ in range(pages)] for _ in range(rows)]
        q_at = [t.at(q, t.b.mul(q_stride, I64(row))) for row in range(rows)]
        with t.loop(dims) as dim:
            offset = t.b.mul(dim, I64(LANES * size))
            keys = [t.widened(t.at(address, offset), element) for address in at]
            for address in next_at:
                t.prefetch(t.at(address, offset))
            for row in range(rows):
                factor = t.broadcast(t.at(q_at[row], t.b.mul(dim, I64(4))), F32)
                for page, key in enumerate(keys):
                    t.put(t.fma(factor, key, t.get(sums[row][page])), sums[row][page])
        scales_at = t.b.mul(dims, I64(LANES * size))
        scales = [t.load(t.at(address, scales_at), F32X16) for address in at] if kind == "int8" else []
        for row in range(rows):
            for page in range(pages):
                score = t.get(sums[row][page])
                if scales:
                    score = t.b.fmul(score, scales[page])
                t.store(score, t.at(scores, t.b.mul(stride, I64(row)), 4 * LANES * page))

    return tile(emit, "i" * 9)


def mix_tile(rows: int, vectors: int, kind: str) -> Any:
    """out[row] += sum over tokens of p[row, token] v[token], for 16 * `vectors` dims, over pages of values [16, V].

    Of int8 the codes are summed: whoever calls has multiplied p by the scales.

    Arguments: p, its stride, the addresses of the pages, the bytes from a page's address to these dims, how many
    tokens, the bytes from one token's values to the next one's, out, its stride, and pages that are wanted next, as
    with `score_tile`. What lies behind the last token is not read.
    """
    element, size = _KINDS[kind]

    def emit(t: Tile, given: list[Value]) -> None:
        p, p_stride, page_list, inside, tokens, token_stride, out, out_stride, next_list, next_inside = given
        out_at = [t.at(out, t.b.mul(out_stride, I64(row))) for row in range(rows)]
        sums = [
            [t.variable(t.load(t.at(address, 4 * LANES * vector), F32X16)) for vector in range(vectors)]
            for address in out_at
        ]
        p_at = [t.at(p, t.b.mul(p_stride, I64(row))) for row in range(rows)]
        with t.loop(t.b.udiv(t.b.add(tokens, I64(LANES - 1)), I64(LANES))) as page:
            base = t.at(t.load(t.at(page_list, t.b.mul(page, I64(8))), I64), inside)
            next_at = t.at(t.load(t.at(next_list, t.b.mul(page, I64(8))), I64), next_inside)
            left = t.b.sub(tokens, t.b.mul(page, I64(LANES)))
            count = t.b.select(t.b.icmp_signed("<", left, I64(LANES)), left, I64(LANES))
            fetched = LANES * size * vectors  # bytes: as many dims of a sixteenth of a page

            def add_token(token: Value) -> None:
                values = [
                    t.widened(t.at(base, t.b.mul(token, token_stride), LANES * size * vector), element)
                    for vector in range(vectors)
                ]
                for offset in range(0, fetched, 64):
                    t.prefetch(t.at(next_at, t.b.mul(token, I64(fetched)), offset))
                place = t.b.mul(t.b.add(t.b.mul(page, I64(LANES)), token), I64(4))
                for row in range(rows):
                    factor = t.broadcast(t.at(p_at[row], place), F32)
                    for vector, value in enumerate(values):
                        t.put(t.fma(factor, value, t.get(sums[row][vector])), sums[row][vector])

            whole = t.b.udiv(count, I64(_TURNS))
            with t.loop(whole) as several:
                for turn in range(_TURNS):
                    add_token(t.b.add(t.b.mul(several, I64(_TURNS)), I64(turn)))
            with t.loop(t.b.urem(count, I64(_TURNS))) as rest:
                add_token(t.b.add(t.b.mul(whole, I64(_TURNS)), rest))
        for row in range(rows):
            for vector in range(vectors):
                t.store(t.get(sums[row][vector]), t.at(out_at[row], 4 * LANES * vector))

    return tile(emit, "i" * 10)


def scale_tile() -> Any:
    """p[row, 0 .. 15] times 16 scales. Arguments: p, its stride, rows, scales."""

    def emit(t: Tile, given: list[Value]) -> None:
        p, p_stride, rows, scales_at = given
        scales = t.load(scales_at, F32X16)
        with t.loop(rows) as row:
            place = t.at(p, t.b.mul(row, p_stride))
            t.store(t.b.fmul(t.load(place, F32X16), scales), place)

    return tile(emit, "i" * 4)


_KINDS: dict[str, tuple[Any, int]] = {"float32": (F32, 4), "bfloat16": (I16, 2), "int8": (I8, 1)}


def _columns(t: Tile, panel: Value, kind: str) -> list[list[Value]]:
    """A panel's two registers of float32 for each input of one step: one, or two of bfloat16, which lie in pairs."""
    if kind == "float32":
        return [[t.load(t.at(panel, offset), F32X16) for offset in _HALVES]]
    pairs = [t.load(t.at(panel, offset), I32X16) for offset in _HALVES]
    first = [t.b.bitcast(t.b.shl(pair, t.constant(16, I32X16)), F32X16) for pair in pairs]
    return [first, [t.b.bitcast(t.b.and_(pair, t.constant(-65536, I32X16)), F32X16) for pair in pairs]]


def _sums(t: Tile, rows: int, start: Callable[[int], Value]) -> list[list[Value]]:
    return [[t.variable(start(half)) for half in range(2)] for _ in range(rows)]


def _fetch_results(t: Tile, rows: int, y: Value, y_stride: Value) -> None:
    """Asks for the rows of results while they are computed: of a wide matrix each lies on a page of its own."""
    for row in range(rows):
        for offset in _HALVES:
            t.prefetch(t.at(y, t.b.mul(y_stride, I64(row)), offset), to_write=True)


def _write(t: Tile, value: Value, address: Value, add: Value) -> None:
    """Stores, or adds to what is there."""
    is_sum = t.b.icmp_signed("!=", add, I64(0))
    before = t.b.select(is_sum, t.load(address, F32X16), t.constant(0.0))
    t.store(t.b.fadd(value, before), address)


def quantise_tile() -> Any:
    """A row as int8 codes of one scale, the largest at 127, with the sums of the codes of each group.

    Arguments: x, codes, the address of its scale, those of the sums (int32), groups, registers of a group.
    """

    def emit(t: Tile, given: list[Value]) -> None:
        x, codes, scale, sums, groups, vectors = given
        largest, spoilt = t.variable(t.constant(0.0)), t.variable(t.constant(0.0))
        with t.loop(t.b.mul(groups, vectors)) as vector:
            value = t.load(t.at(x, t.b.mul(vector, I64(4 * LANES))), F32X16)
            t.put(t.maximum(t.b.fsub(t.constant(0.0), value), t.maximum(value, t.get(largest))), largest)
            t.put(t.fma(value, t.constant(0.0), t.get(spoilt)), spoilt)  # NaN where a value is NaN or infinite
        top = t.first(t.b.fadd(t.across(t.maximum, t.get(largest)), t.across(t.b.fadd, t.get(spoilt))))
        t.store(t.b.fmul(top, F32(1 / 127)), scale)  # a NaN goes on to the logits, where it is seen
        is_usable = t.b.fcmp_ordered(">", top, F32(1e-30))
        factor = t.splat(t.b.select(is_usable, t.b.fdiv(F32(127), top), F32(0.0)))
        magic = t.constant(12582912.0)  # 1.5 * 2^23: rounds, and leaves the number in the lowest bits
        with t.loop(groups) as group:
            total = t.variable(t.constant(0, I32X16))
            with t.loop(vectors) as vector:
                place = t.b.mul(t.b.add(t.b.mul(group, vectors), vector), I64(LANES))
                value = t.load(t.at(x, t.b.mul(place, I64(4))), F32X16)
                value = t.b.select(t.b.fcmp_ordered("ord", value, value), value, t.constant(0.0))
                code = t.b.bitcast(t.fma(value, factor, magic), I32X16)
                code = t.b.sub(code, t.constant(0x4B400000, I32X16))
                t.put(t.b.add(t.get(total), code), total)
                t.store(t.b.trunc(code, I8X16), t.at(codes, place))
            t.store(t.first(t.across(t.b.add, t.get(total))), t.at(sums, t.b.mul(group, I64(4))))

    return tile(emit, "i" * 6)


def softmax_tile(rows: int, vectors: int, *, partly: bool = False) -> Any:
    """A tile's share of a running softmax (Milakov and Gimelshein 2018, arXiv 1805.02867): 16 `vectors` scores a row.

    Scores are to the base of 2. They become weights 2^(score - largest so far), and what was summed up before is scaled
    to the new largest; of rows that see them only `partly`, those outside of first .. last - 1 become 0. Arguments:
    scores, their stride, the address of four float32 a row (the largest so far, the sum so far, where the factor for
    earlier sums goes, nothing), that of first and last of each row (int32).

    The rows are written side by side, instruction by instruction, for each waits long for its own results.
    """

    def emit(t: Tile, given: list[Value]) -> None:
        scores, stride, state, bounds = given
        state_at = [t.at(state, 16 * row) for row in range(rows)]
        at = [[t.at(scores, t.b.mul(stride, I64(row)), 4 * LANES * v) for row in range(rows)] for v in range(vectors)]

        def masked(vector: int, row: int, value: Value, otherwise: float) -> Value:
            if not partly:
                return value
            place = ir.Constant(I32X16, list(range(LANES * vector, LANES * (vector + 1))))
            first, last = (t.broadcast(t.at(bounds, 8 * row, offset), I32) for offset in (0, 4))
            is_seen = t.b.and_(t.b.icmp_signed(">=", place, first), t.b.icmp_signed("<", place, last))
            return t.b.select(is_seen, value, t.constant(otherwise))

        def found(vector: int, row: int) -> Value:
            return masked(vector, row, t.load(at[vector][row], F32X16), _LOWEST)

        before = [t.broadcast(address, F32) for address in state_at]
        tops = before
        for vector in range(vectors):
            tops = [t.maximum(found(vector, row), top) for row, top in enumerate(tops)]
        tops = t.across_each(t.maximum, tops)
        totals = [t.constant(0.0)] * rows
        for vector in range(vectors):
            weights = t.exp2([t.b.fsub(found(vector, row), top) for row, top in enumerate(tops)])
            weights = [masked(vector, row, weight, 0.0) for row, weight in enumerate(weights)]
            for weight, address in zip(weights, at[vector], strict=True):
                t.store(weight, address)
            totals = [t.b.fadd(total, weight) for total, weight in zip(totals, weights, strict=True)]
        totals = t.across_each(t.b.fadd, totals)
        factors = t.exp2([t.b.fsub(old, new) for old, new in zip(before, tops, strict=True)])
        for address, top, total, factor in zip(state_at, tops, totals, factors, strict=True):
            total = t.fma(t.broadcast(t.at(address, 4), F32), factor, total)
            for place, value in ((0, top), (4, total), (8, factor)):
                t.store(t.first(value), t.at(address, place))

    return tile(emit, "i" * 4)


def activation_tile(name: str, gated: bool) -> Any:
    """y = activation(x), times the other half of x if `gated`.

    Arguments: x, the address of its other half, y, registers.
    """

    def emit(t: Tile, given: list[Value]) -> None:
        x, other, y, vectors = given
        with t.loop(vectors) as vector:
            offset = t.b.mul(vector, I64(4 * LANES))
            value = _ACTIVATIONS[name](t, t.load(t.at(x, offset), F32X16))
            if gated:
                value = t.b.fmul(value, t.load(t.at(other, offset), F32X16))
            t.store(value, t.at(y, offset))

    return tile(emit, "i" * 4)


def gate_tile() -> Any:
    """y[row, 0 .. 15] = silu(x[row, 0 .. 15]) x[row, 16 .. 31], of rows of x that lie behind each other.

    Arguments: x, y, its stride, rows.
    """

    def emit(t: Tile, given: list[Value]) -> None:
        x, y, y_stride, rows = given
        with t.loop(rows) as row:
            gate, up = (t.load(t.at(x, t.b.mul(row, I64(4 * PANEL)), offset), F32X16) for offset in _HALVES)
            t.store(t.b.fmul(_silu(t, gate), up), t.at(y, t.b.mul(row, y_stride)))

    return tile(emit, "i" * 4)


_LOWEST = -3e38


def _sigmoid(t: Tile, x: Value) -> Value:
    """1 / (1 + e^-x), by the power of the negative of |x|, which cannot overflow."""
    negative = t.b.fcmp_ordered("<", x, t.constant(0.0))
    power = t.exp(t.b.select(negative, x, t.b.fneg(x)))
    top = t.b.select(negative, power, t.constant(1.0))
    return t.b.fdiv(top, t.b.fadd(power, t.constant(1.0)))


def _silu(t: Tile, x: Value) -> Value:
    return t.b.fmul(x, _sigmoid(t, x))


def _relu(t: Tile, x: Value) -> Value:
    return t.maximum(x, t.constant(0.0))


def _gelu_tanh(t: Tile, x: Value) -> Value:
    """x sigmoid(2 u), where u = sqrt(2 / pi) (x + 0.044715 x^3): (1 + tanh u) / 2 is that sigmoid."""
    cube = t.b.fmul(t.b.fmul(x, x), x)
    inner = t.fma(cube, t.constant(0.044715), x)
    return t.b.fmul(x, _sigmoid(t, t.b.fmul(inner, t.constant(2 * 0.7978845608028654))))


def _gelu(t: Tile, x: Value) -> Value:
    """x (1 + erf(x / sqrt 2)) / 2, erf to 1.5e-7: Abramowitz and Stegun 1964, 7.1.26."""
    z = t.b.fmul(x, t.constant(0.7071067811865476))
    negative = t.b.fcmp_ordered("<", z, t.constant(0.0))
    size = t.b.select(negative, t.b.fneg(z), z)
    s = t.b.fdiv(t.constant(1.0), t.fma(size, t.constant(0.3275911), t.constant(1.0)))
    p = t.constant(1.061405429)
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = t.fma(p, s, t.constant(c))
    tail = t.b.fmul(t.b.fmul(p, s), t.exp(t.b.fneg(t.b.fmul(size, size))))
    erf = t.b.fsub(t.constant(1.0), tail)
    erf = t.b.select(negative, t.b.fneg(erf), erf)
    return t.b.fmul(t.b.fmul(x, t.constant(0.5)), t.b.fadd(erf, t.constant(1.0)))


_ACTIVATIONS: dict[str, Callable[[Tile, Value], Value]] = {
    "silu": _silu,
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
