"""The innermost loops of the kernels: products of a few rows with a panel of weights, and what is done to a row.

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

from collections.abc import Callable, Iterator
from typing import Any

from sihe.core.simd import (
    F32,
    F32X16,
    I8X16,
    I16,
    I16X32,
    I32,
    I32X16,
    I64,
    LANES,
    Tile,
    Value,
    byte_product,
    tile,
    vectors_in_registers,
)

PANEL = 32
"""Columns of a panel: two registers, so that each broadcast activation is used twice."""
GROUP = 32
"""Weights that share a scale in int4, as in llama.cpp's Q4_0."""
ROWS = (12, 8, 4, 2, 1)
"""How many rows a tile can take: twelve rows of two sums each, beside the factors, fill 32 registers (AVX-512)."""
ROWS_INT4 = (6, 4, 2, 1)
"""The same for int4, which sums a group in integers and then all groups in float32: four registers a row."""
_SUMS = vectors_in_registers() * 3 // 4
"""Sums that stay in registers beside their factors. Where a tile has more, it goes over its inputs several times."""
_SUMS_BFLOAT16 = _SUMS if vectors_in_registers() > 8 else _SUMS - 2
"""The same for bfloat16, of which two inputs are there at a time."""
_SUMS_INT8 = 2 * _SUMS if byte_product() == "avx2" else _SUMS
"""The same for int8: where a product takes four instructions, preparing its factors anew costs more than it saves."""
_MANY = 4
"""Rows from which on weights are fetched into the second cache only: the first one is for the rows."""
TURNS = 4
"""Inputs that one turn of a product's loop takes: the addresses of the rows are then reckoned once for all of them, on
the ports that the sums need."""
_HALVES = (0, 64)  # bytes from one register of a panel's step to the next
_SIGNS = 0x80808080 - (1 << 32)  # turned over, these bits make a signed byte of one that has 128 added


def float_tile(rows: int, kind: str) -> Any:
    """y[row, 32] = x[row] W + bias, or that added to y.

    Arguments: x, its stride, W, steps, bias, y, its stride, whether to add, where to fetch weights ahead, and how many
    bytes further at each step.
    """
    depth = 1 if kind == "float32" else 2
    turns = TURNS // depth if rows >= _MANY else 1

    def emit(t: Tile, given: list[Value]) -> None:
        x, x_stride, weights, steps, bias, y, y_stride, add, ahead, ahead_stride = given
        x_at = [t.at(x, t.b.mul(x_stride, I64(row))) for row in range(rows)]
        _fetch_results(t, rows, y, y_stride)
        for some, halves in passes(rows, 2, _SUMS if kind == "float32" else _SUMS_BFLOAT16):
            sums = {(row, h): t.variable(t.load(t.at(bias, 64 * h), F32X16)) for row in some for h in halves}
            with t.loop(t.b.udiv(steps, I64(turns))) as several:
                first_step = t.b.mul(several, I64(turns))
                panel = t.at(weights, t.b.mul(first_step, I64(128)))
                ahead_at = t.at(ahead, t.b.mul(first_step, ahead_stride))
                offset = t.b.mul(first_step, I64(4 * depth))
                for turn in range(turns):
                    if some.start == 0:
                        for half in halves:
                            place = t.at(ahead_at, t.b.mul(ahead_stride, I64(turn)), 64 * half)
                            t.prefetch(place, near=rows < _MANY)
                    columns = {half: _columns(t, t.at(panel, 128 * turn + 64 * half), kind) for half in halves}
                    for row in some:
                        for k in range(depth):
                            factor = t.broadcast(t.at(x_at[row], offset, 4 * (depth * turn + k)), F32)
                            for half in halves:
                                place = sums[row, half]
                                t.put(t.fma(factor, columns[half][k], t.get(place)), place)
            for (row, half), total in sums.items():
                _write(t, t.get(total), t.at(y, t.b.mul(y_stride, I64(row)), 64 * half), add)

    return tile(emit, "i" * 10)


def int8_tile(rows: int) -> Any:
    """As `float_tile` for int8.

    Arguments: x, its stride, W, steps, bias, y, its stride, whether to add, where to fetch ahead, bytes a step, the
    columns' scales, the rows' scales, the sums of the rows' x (int32).
    """

    def emit(t: Tile, given: list[Value]) -> None:
        x, x_stride, weights, steps, bias, y, y_stride, add, ahead, ahead_stride, scales, x_scales, x_sums = given
        x_at = [t.at(x, t.b.mul(x_stride, I64(row))) for row in range(rows)]
        _fetch_results(t, rows, y, y_stride)
        for some, halves in passes(rows, 2, _SUMS_INT8):
            sums = {(row, half): t.variable(t.constant(0, I32X16)) for row in some for half in halves}
            with t.loop(steps) as step:
                panel = t.at(weights, t.b.mul(step, I64(128)))
                if some.start == 0:
                    for half in halves:
                        t.prefetch(t.at(ahead, t.b.mul(step, ahead_stride), 64 * half), near=rows < _MANY)
                columns = {half: t.load(t.at(panel, 64 * half), I32X16) for half in halves}
                if t.takes_signed:
                    columns = {h: t.b.xor(column, t.constant(_SIGNS, I32X16)) for h, column in columns.items()}
                offset = t.b.mul(step, I64(4))
                for row in some:
                    factor = t.broadcast(t.at(x_at[row], offset), I32)
                    for half, column in columns.items():
                        dot, place = t.dot4_signed if t.takes_signed else t.dot4, sums[row, half]
                        t.put(dot(t.get(place), column, factor), place)
            for (row, half), place in sums.items():
                total = t.get(place)
                if not t.takes_signed:
                    excess = t.b.shl(t.broadcast(t.at(x_sums, 4 * row), I32), t.constant(7, I32X16))
                    total = t.b.sub(total, excess)
                scale = t.b.fmul(t.broadcast(t.at(x_scales, 4 * row), F32), t.load(t.at(scales, 64 * half), F32X16))
                value = t.fma(t.b.sitofp(total, F32X16), scale, t.load(t.at(bias, 64 * half), F32X16))
                _write(t, value, t.at(y, t.b.mul(y_stride, I64(row)), 64 * half), add)

    return tile(emit, "i" * 13)


def int4_tile(rows: int) -> Any:
    """As `int8_tile` for int4, whose steps are groups.

    The columns' scales are bfloat16 [groups, 32], the sums int32 [rows, groups], and their stride is one argument more.
    """

    def emit(t: Tile, given: list[Value]) -> None:
        x, x_stride, weights, groups, bias, y, y_stride, add, ahead, ahead_stride = given[:10]
        scales, x_scales, x_sums, x_sums_stride = given[10:]
        x_at = [t.at(x, t.b.mul(x_stride, I64(row))) for row in range(rows)]
        sums_at = [t.at(x_sums, t.b.mul(x_sums_stride, I64(row))) for row in range(rows)]
        nibbles, is_short = t.constant(0x0F0F0F0F, I32X16), t.adds_in_16_bits
        zeros = t.constant(0, I16X32 if is_short else I32X16)  # of a group all products fit: 8 times 2 * 15 * 127
        _fetch_results(t, rows, y, y_stride)
        for some, halves in passes(rows, 2, _SUMS // 2):
            totals = {(row, half): t.variable(t.constant(0.0)) for row in some for half in halves}
            with t.loop(groups) as group:
                panel = t.at(weights, t.b.mul(group, I64(PANEL * GROUP // 2)))
                sums = dict.fromkeys(totals, zeros)
                for step in range(GROUP // 8):
                    if some.start == 0:
                        place = t.b.mul(t.b.add(t.b.mul(group, I64(GROUP // 8)), I64(step)), ahead_stride)
                        for half in halves:
                            t.prefetch(t.at(ahead, place, 64 * half), near=rows < _MANY)
                    packed = {half: t.load(t.at(panel, 128 * step + 64 * half), I32X16) for half in halves}
                    low = {h: t.b.and_(value, nibbles) for h, value in packed.items()}
                    high = {h: t.b.and_(t.b.lshr(value, t.constant(4, I32X16)), nibbles) for h, value in packed.items()}
                    for row in some:
                        for k, columns in enumerate((low, high)):
                            place = t.at(x_at[row], t.b.mul(group, I64(GROUP)), 8 * step + 4 * k)
                            factor = t.broadcast(place, I32)
                            for half in halves:
                                dot = t.dot2 if is_short else t.dot4
                                sums[row, half] = dot(sums[row, half], columns[half], factor)
                scale_at = t.at(scales, t.b.mul(group, I64(2 * PANEL)))
                scale = {half: t.widened(t.at(scale_at, 2 * LANES * half), I16) for half in halves}
                for (row, half), total in sums.items():
                    excess = t.broadcast(t.at(sums_at[row], t.b.mul(group, I64(4))), I32)
                    exact = t.b.sub(t.sum_pairs(total) if is_short else total, t.b.shl(excess, t.constant(3, I32X16)))
                    place = totals[row, half]
                    t.put(t.fma(t.b.sitofp(exact, F32X16), scale[half], t.get(place)), place)
            for (row, half), total in totals.items():
                x_scale = t.broadcast(t.at(x_scales, 4 * row), F32)
                value = t.fma(t.get(total), x_scale, t.load(t.at(bias, 64 * half), F32X16))
                _write(t, value, t.at(y, t.b.mul(y_stride, I64(row)), 64 * half), add)

    return tile(emit, "i" * 14)


def _columns(t: Tile, place: Value, kind: str) -> list[Value]:
    """Half a panel as float32 for each input of one step: one, or two of bfloat16, which lie in pairs."""
    if kind == "float32":
        return [t.load(place, F32X16)]
    pair = t.load(place, I32X16)
    first = t.b.shl(pair, t.constant(16, I32X16))
    return [t.b.bitcast(half, F32X16) for half in (first, t.b.and_(pair, t.constant(-65536, I32X16)))]


def passes(rows: int, columns: int, most: int = _SUMS) -> Iterator[tuple[range, range]]:
    """Which rows and columns are summed up together, `most` sums at a time."""
    height = _evenly(rows, most)
    width = _evenly(columns, max(1, most // height))
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield range(row, min(rows, row + height)), range(column, min(columns, column + width))


def _evenly(count: int, most: int) -> int:
    """The size of parts of at most `most` that `count` falls into, as alike as can be."""
    return -(-count // -(-count // most))


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
