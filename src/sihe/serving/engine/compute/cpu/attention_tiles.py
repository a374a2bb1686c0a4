"""The innermost loops of attention: scores, the running softmax, and mixes of values.

As in `tiles`, a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir

from sihe.core.simd import F32, F32X16, I8, I16, I32, I32X16, I64, LANES, Tile, Value, tile
from sihe.serving.engine.compute.cpu.tiles import TURNS, passes

_KINDS: dict[str, tuple[Any, int]] = {"float32": (F32, 4), "bfloat16": (I16, 2), "int8": (I8, 1)}
_LOWEST = -3e38


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
        q_at = [t.at(q, t.b.mul(q_stride, I64(row))) for row in range(rows)]
        scales_at = t.b.mul(dims, I64(LANES * size))
        for some, these in passes(rows, pages):
            sums = {(row, page): t.variable(t.constant(0.0)) for row in some for page in these}
            with t.loop(dims) as dim:
                offset = t.b.mul(dim, I64(LANES * size))
                keys = {page: t.widened(t.at(at[page], offset), element) for page in these}
                if some.start == 0:
                    for page in these:
                        t.prefetch(t.at(next_at[page], offset))
                for row in some:
                    factor = t.broadcast(t.at(q_at[row], t.b.mul(dim, I64(4))), F32)
                    for page, key in keys.items():
                        t.put(t.fma(factor, key, t.get(sums[row, page])), sums[row, page])
            for (row, page), total in sums.items():
                score = t.get(total)
                if kind == "int8":
                    score = t.b.fmul(score, t.load(t.at(at[page], scales_at), F32X16))
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
        p_at = [t.at(p, t.b.mul(p_stride, I64(row))) for row in range(rows)]
        fetched = LANES * size * vectors  # bytes: as many dims of a sixteenth of a page
        for some, these in passes(rows, vectors):
            sums = {
                (row, vector): t.variable(t.load(t.at(out_at[row], 4 * LANES * vector), F32X16))
                for row in some
                for vector in these
            }
            with t.loop(t.b.udiv(t.b.add(tokens, I64(LANES - 1)), I64(LANES))) as page:
                base = t.at(t.load(t.at(page_list, t.b.mul(page, I64(8))), I64), inside)
                next_at = t.at(t.load(t.at(next_list, t.b.mul(page, I64(8))), I64), next_inside)
                left = t.b.sub(tokens, t.b.mul(page, I64(LANES)))
                count = t.b.select(t.b.icmp_signed("<", left, I64(LANES)), left, I64(LANES))

                for token in _each(t, count, TURNS):
                    value_at = t.at(base, t.b.mul(token, token_stride))
                    values = {v: t.widened(t.at(value_at, LANES * size * v), element) for v in these}
                    if some.start == 0 and these.start == 0:
                        for offset in range(0, fetched, 64):
                            t.prefetch(t.at(next_at, t.b.mul(token, I64(fetched)), offset))
                    place = t.b.mul(t.b.add(t.b.mul(page, I64(LANES)), token), I64(4))
                    for row in some:
                        factor = t.broadcast(t.at(p_at[row], place), F32)
                        for vector, value in values.items():
                            t.put(t.fma(factor, value, t.get(sums[row, vector])), sums[row, vector])
            for (row, vector), total in sums.items():
                t.store(t.get(total), t.at(out_at[row], 4 * LANES * vector))

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


def _each(t: Tile, count: Value, turns: int) -> Iterator[Value]:
    """0, 1, …, count - 1, of which `turns` are written behind each other in one turn of a loop. What follows is written
    once for each turn, and once more for the rest."""
    whole = t.b.udiv(count, I64(turns))
    with t.loop(whole) as several:
        for turn in range(turns):
            yield t.b.add(t.b.mul(several, I64(turns)), I64(turn))
    with t.loop(t.b.urem(count, I64(turns))) as rest:
        yield t.b.add(t.b.mul(whole, I64(turns)), rest)
