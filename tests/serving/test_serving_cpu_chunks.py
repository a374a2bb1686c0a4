"""How the CPU's team cuts operations: everything is computed, and once."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sihe.serving.engine.compute.cpu.chunks import chunks_of, part_of_product, rows_of_chunk
from sihe.serving.engine.compute.cpu.kernels import STEP_WIDTH, WIDTH, Code

ROWS = st.integers(1, 3000)
THREADS = st.integers(1, 9)


def operation(code: Code, rows: int) -> tuple[np.ndarray, np.ndarray]:
    op, step = np.zeros(WIDTH, np.int64), np.zeros(STEP_WIDTH, np.int64)
    op[0], step[0] = code, rows
    return op, step


@settings(deadline=None)  # the first example compiles
@given(ROWS, st.integers(1, 70), THREADS)
def test_each_panel_is_computed_once_for_each_row(rows: int, panels: int, threads: int) -> None:
    op, step = operation(Code.MULTIPLY, rows)
    op[8] = panels
    seen = np.zeros((rows, panels), np.int64)
    for chunk in range(chunks_of(op, step, threads)):
        first, last, row, end, _, _ = part_of_product(op, step, chunk, threads)
        seen[row:end, first:last] += 1
    assert (seen == 1).all()


@settings(deadline=None)
@given(ROWS, st.sampled_from([Code.EMBED, Code.NORM, Code.PLACE, Code.ACTIVATE]), THREADS)
def test_each_row_is_computed_once(rows: int, code: Code, threads: int) -> None:
    op, step = operation(code, rows)
    chunks = [rows_of_chunk(op, step, chunk, threads) for chunk in range(chunks_of(op, step, threads))]
    assert [first for first, _ in chunks] == [0, *[last for _, last in chunks[:-1]]]
    assert chunks[-1][1] == rows
