"""Drawing tokens on a CPU: a row of logits is passed over once, and sorted only as far as its nucleus goes.

Sorting the likeliest few thousand of 32,000 logits takes torch a millisecond a row, and a batch of 32 then spends three
times as long on choosing its tokens as on computing them. Here a row becomes weights and sums of blocks in one pass,
and what must be ranked is first found by its size. Rows are computed one by one: none depends on those beside it.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numba import float32, njit
from numpy.typing import NDArray

from sihe.core import simd
from sihe.core.simd import F32, F32X16, I64, LANES, Tile, Value, digest_of, float32_at, tile

BLOCK = 256  # weights that are summed as one before the drawn one is looked for among them
_SURPLUS = 1.0001  # of a nucleus' weight that is ranked: sums in float32 are nearer than this
_SMALLEST = -87.0  # e to this is about the smallest float32 that is exact: what is less likely has no weight


def _weights_tile() -> Any:
    """Weights e^((x - best) / temperature) of a block, 0 where that quotient is below `least`, and their sum.

    Arguments: x, weights, registers, the address of three float32 (best, temperature, least), the address of the sum.
    """

    def emit(t: Tile, given: list[Value]) -> None:
        x, weights, vectors, settings, sum_at = given
        best, temperature, least = (t.broadcast(t.at(settings, 4 * place), F32) for place in range(3))
        total = t.variable(t.constant(0.0))
        with t.loop(vectors) as vector:
            offset = t.b.mul(vector, I64(4 * LANES))
            scaled = t.b.fdiv(t.b.fsub(t.load(t.at(x, offset), F32X16), best), temperature)
            weight = t.b.select(t.b.fcmp_ordered(">=", scaled, least), t.exp(scaled), t.constant(0.0))
            t.store(weight, t.at(weights, offset))
            t.put(t.b.fadd(t.get(total), weight), total)
        t.store(t.first(t.across(t.b.fadd, t.get(total))), sum_at)

    return tile(emit, "i" * 5)


_weigh = _weights_tile()


@njit(nogil=True, error_model="numpy")
def _in_order(weights: Any, sums: Any, share: float) -> int:
    """The token at `share` of the cumulative distribution over the vocabulary in its own order."""
    total = 0.0
    for block in range(len(sums)):
        total += sums[block]
    target, before, found = share * total, 0.0, len(sums) - 1
    for block in range(len(sums)):
        if before + sums[block] > target:
            found = block
            break
        before += sums[block]
    # Two sums of the same weights may differ in their last bit: then it is the block's last token that has any weight.
    last, reached = -1, before
    for token in range(found * BLOCK, min(len(weights), (found + 1) * BLOCK)):
        if weights[token] > 0:
            last = token
            reached += weights[token]
            if reached > target:
                return token
    if last >= 0:
        return last
    for token in range(len(weights) - 1, -1, -1):
        if weights[token] > 0:
            return token
    return 0


@njit(nogil=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
def _mass_from(weights: Any, threshold: float) -> Any:
    """How many weights are at least `threshold`, and their sum."""
    count, mass, least = 0, float32(0.0), float32(threshold)
    for token in range(len(weights)):
        is_in = weights[token] >= least
        count += is_in
        mass += weights[token] if is_in else float32(0.0)
    return count, mass


@njit(nogil=True, error_model="numpy")
def _ranked(weights: Any, total: float, top_k: int, top_p: float) -> Any:
    """Bits of weights and ids of the likeliest tokens, at least as many as top-k and top-p leave, best first."""
    threshold = 0.125
    while threshold > 1e-37:
        count, mass = _mass_from(weights, threshold)
        if (top_k > 0 and count >= top_k) or (top_k == 0 and mass >= top_p * total * _SURPLUS):
            break
        threshold /= 4
    if threshold <= 1e-37:
        threshold = 1.2e-38  # all that have a weight
        count, _ = _mass_from(weights, threshold)
    least, bits = float32(threshold), weights.view(np.int32)
    keys, found = np.empty(count, np.int64), 0
    for token in range(len(weights)):
        if weights[token] >= least:
            keys[found] = (np.int64(0x7FFFFFFF - bits[token]) << 32) | token  # positive floats rank as their bits
            found += 1
    keys.sort()
    return keys


@njit(nogil=True, error_model="numpy")
def _by_rank(weights: Any, sums: Any, share: float, top_k: int, top_p: float) -> int:
    """The token at `share` of the distribution over the likeliest ones, best first, that top-k and top-p leave."""
    total = 0.0
    for block in range(len(sums)):
        total += sums[block]
    keys = _ranked(weights, total, top_k, top_p)
    if len(keys) == 0:
        return 0  # a row that has no weights at all, whose token means nothing
    most = min(top_k, len(keys)) if top_k > 0 else len(keys)
    whole = total
    if top_k > 0:
        whole = 0.0
        for rank in range(most):
            whole += weights[keys[rank] & 0xFFFFFFFF]
    mass, kept = 0.0, 0
    while kept < most and (kept == 0 or mass / whole < top_p):
        mass += weights[keys[kept] & 0xFFFFFFFF]
        kept += 1
    target, reached = share * mass, 0.0
    for rank in range(kept):
        reached += weights[keys[rank] & 0xFFFFFFFF]
        if reached > target:
            return keys[rank] & 0xFFFFFFFF
    return keys[kept - 1] & 0xFFFFFFFF


def _compiled(sources: str) -> Any:
    """`draw_rows`, kept on disk for as long as `sources` are the same."""

    @njit(nogil=True, cache=True, error_model="numpy")
    def draw_rows(
        logits: int, row_bytes: int, vocabulary: int, best: Any, rows: Any, settings: Any, top_k: Any, tokens: Any
    ) -> None:
        """Fills in `tokens` [rows]. `settings` [rows, 4]: temperature, min-p's logarithm, top-p, share."""
        assert sources  # a variable of the closure, which numba counts among what a compiled function depends on
        blocks = (vocabulary + BLOCK - 1) // BLOCK
        weights = np.zeros(blocks * BLOCK, np.float32)
        rest = np.full(BLOCK, -np.inf, np.float32)
        sums, given = np.empty(blocks, np.float32), np.empty(3, np.float32)
        for place in range(len(rows)):
            row = rows[place]
            given[0], given[1] = best[row], max(settings[place, 0], 1e-6)
            given[2] = max(settings[place, 1], _SMALLEST)
            for block in range(blocks):
                begin = block * BLOCK
                source = logits + row * row_bytes + 4 * begin
                if begin + BLOCK > vocabulary:
                    last = float32_at(source)
                    for token in range(vocabulary - begin):
                        rest[token] = last[token]
                    source = np.int64(rest.ctypes.data)  # unsigned, both together would become a float
                weight_at, sum_at = weights.ctypes.data + 4 * begin, sums.ctypes.data + 4 * block
                _weigh(source, weight_at, BLOCK // LANES, given.ctypes.data, sum_at)
            share, top_p = settings[place, 3], settings[place, 2]
            if top_k[place] > 0 or top_p < 1:
                tokens[place] = _by_rank(weights[:vocabulary], sums, share, top_k[place], top_p)
            else:
                tokens[place] = _in_order(weights[:vocabulary], sums, share)

    return draw_rows


_draw_rows = _compiled(digest_of(simd, sys.modules[__name__]))


def draw_rows(
    logits_BV: NDArray[np.float32],
    best_B: NDArray[np.float32],
    rows: NDArray[np.int64],
    settings: NDArray[np.float64],
    top_k: NDArray[np.int64],
) -> NDArray[np.int64]:
    """The tokens of some `rows`, whose logits are finite or minus infinity and have their largest in `best_B`.

    `settings` [rows, 4]: temperature, the logarithm of min-p (minus infinity: none), top-p, and the uniform number in
    (0, 1) that decides. `top_k` [rows], 0 for none. Among equal weights the lower id ranks first.
    """
    tokens = np.empty(len(rows), np.int64)
    where = logits_BV.ctypes.data, logits_BV.strides[0], logits_BV.shape[1]
    _draw_rows(*where, np.ascontiguousarray(best_B), rows, settings, top_k, tokens)
    return tokens
