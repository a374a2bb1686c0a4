"""How the team cuts an operation: into how many chunks, and which rows or panels of weights one of them takes.

A result never depends on the cut, which decides only who computes it and what lies in whose cache. A product of few
rows is cut by panels: each thread reads weights of its own, once. One of many rows is cut by blocks of rows, and so is
what goes row by row between two products: a thread then finds in its own cache what it wrote there a moment ago.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from sihe.core.simd import int32_at, int64_at
from sihe.serving.engine.compute.cpu.kernels import Code
from sihe.serving.engine.compute.cpu.tiles import ROWS

ROW_CHUNK = 4
PAGE_CHUNK = 16
"""Rows whose keys one thread puts in their places: those of neighbouring tokens share the lines of the caches."""
_PANEL_CHUNKS = 4
"""Chunks of panels for each thread: few enough to count, enough for a slow thread to take fewer."""
_BLOCK_ROWS = 132
"""Rows of a block at most: weights are read once for each block, and a slow thread shall take fewer blocks."""
_LAST_PARTS = 2
"""Chunks for each thread that a block among the last ones is cut into."""
_MANY_ROWS = 192
"""Rows for each thread from which on there are blocks."""
_TILE_ROWS = ROWS[0]

_pure = njit(nogil=True, error_model="numpy")


@_pure
def rows_of(op: Any, step: Any) -> int:
    """How many rows an operation has: of all tokens or the wanted ones; from 2 on of all their choices of experts."""
    rows = step[op[1] % 2]
    return rows if op[1] < 2 else rows * step[19]


@_pure
def chunks_of(op: Any, step: Any, threads: int) -> int:
    """Into how many chunks an operation is cut."""
    code, rows = op[0], rows_of(op, step)
    if code == Code.MULTIPLY:
        blocks = _row_blocks(rows, threads)
        if op[19] == 0 and blocks > 0:
            return blocks - threads + threads * _LAST_PARTS * threads
        return max(1, op[19]) * panel_chunks(op[8], threads)
    if code == Code.ATTEND:
        return step[11 + op[1]] * op[3]
    if code == Code.ROUTE:
        return 1
    if code in (Code.NORM, Code.PLACE) and _row_blocks(rows, threads) > 0:
        return _row_blocks(rows, threads)
    size = _row_chunk(code, rows)
    return (rows + size - 1) // size


@_pure
def rows_of_chunk(op: Any, step: Any, chunk: int, threads: int) -> tuple[int, int]:
    """The first row of a chunk of an operation that goes row by row, and the one after its last."""
    code, rows = op[0], rows_of(op, step)
    blocks = _row_blocks(rows, threads)
    if code in (Code.NORM, Code.PLACE) and blocks > 0:
        return _rows_of_block(rows, blocks, chunk)
    size = _row_chunk(code, rows)
    return chunk * size, min(rows, (chunk + 1) * size)


@_pure
def _row_chunk(code: int, rows: int) -> int:
    return PAGE_CHUNK if code == Code.PLACE and rows >= 4 * PAGE_CHUNK else ROW_CHUNK


@_pure
def panel_chunks(panels: int, threads: int) -> int:
    """Into how many chunks a product of few rows is cut, or that of one expert."""
    return min(panels, _PANEL_CHUNKS * threads) if threads > 1 else 1


@_pure
def part_of_product(op: Any, step: Any, chunk: int, threads: int) -> tuple[int, int, int, int, int, int]:
    """A dense product's chunk: first panel, the one after the last, first row, the one after the last; then where lies
    what this thread is likely to read next, and the bytes of a panel there."""
    rows, panels = rows_of(op, step), op[8]
    blocks = _row_blocks(rows, threads)
    if blocks == 0:
        chunks = panel_chunks(panels, threads)
        then, then_bytes = _panel_after(op, chunk + threads, threads)
        return panels * chunk // chunks, panels * (chunk + 1) // chunks, 0, rows, then, then_bytes
    first, last, block = 0, panels, chunk
    whole = blocks - threads
    if chunk >= whole:  # the last block of each thread is shared out among all, so that they end together
        parts = _LAST_PARTS * threads
        part, block = (chunk - whole) % parts, whole + (chunk - whole) // parts
        first, last = panels * part // parts, panels * (part + 1) // parts
    begin, end = _rows_of_block(rows, blocks, block)
    if block < blocks - 1 or op[18] == 0:
        return first, last, begin, end, op[5] + first * op[6], op[6]
    following = int64_at(op[18])
    return first, last, begin, end, following[5], following[6]


@_pure
def is_wanted(step: Any, begin: int, end: int) -> bool:
    """Whether one of the rows `begin` .. `end` - 1 is of a token whose logits are wanted."""
    wanted = int32_at(step[20])
    low, high = 0, step[1]
    while low < high:  # the first wanted row from `begin` on
        middle = (low + high) // 2
        if wanted[middle] < begin:
            low = middle + 1
        else:
            high = middle
    return low < step[1] and wanted[low] < end


@_pure
def _row_blocks(rows: int, threads: int) -> int:
    """Into how many blocks many rows are cut, as many for each thread; 0 where they are few."""
    if rows < _MANY_ROWS * threads:
        return 0
    return -(-rows // (_BLOCK_ROWS * threads)) * threads


@_pure
def _rows_of_block(rows: int, blocks: int, block: int) -> tuple[int, int]:
    """Where a block begins and ends: whole tiles, and the larger blocks come first."""
    tiles = -(-rows // _TILE_ROWS)
    size, larger = tiles // blocks, tiles % blocks
    first, last = block * size + min(block, larger), (block + 1) * size + min(block + 1, larger)
    return first * _TILE_ROWS, min(rows, last * _TILE_ROWS)


@_pure
def _panel_after(op: Any, chunk: int, threads: int) -> tuple[int, int]:
    """Where a chunk of panels begins, and the bytes of a panel; behind the last one, of the product after it."""
    chunks = panel_chunks(op[8], threads)
    if chunk < chunks:
        return op[5] + op[8] * chunk // chunks * op[6], op[6]
    if op[18] == 0:
        return op[5], 0
    following = int64_at(op[18])
    others = panel_chunks(following[8], threads)
    return following[5] + following[8] * min(chunk - chunks, others - 1) // others * following[6], following[6]
