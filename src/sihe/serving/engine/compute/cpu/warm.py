"""Everything that is compiled, compiled: by a program of no operations."""

from __future__ import annotations

import numpy as np

from sihe.serving.engine.compute.cpu.draws import draw_rows
from sihe.serving.engine.compute.cpu.kernels import STEP_WIDTH, WIDTH
from sihe.serving.engine.compute.cpu.layout import lay_out
from sihe.serving.engine.compute.cpu.team import Team


def compile_kernels() -> None:
    """Compiles the kernels for this processor, or finds them in the cache on disk."""
    team = Team(2)
    team.run(np.zeros((0, WIDTH), np.int64), np.zeros(STEP_WIDTH, np.int64))
    team.close()
    none = np.zeros(0, np.int64)
    draw_rows(np.zeros((0, 1), np.float32), np.zeros(0, np.float32), none, np.zeros((0, 4)), none)
    ints, table, numbers = np.zeros(0, np.int32), np.zeros((0, 0), np.int32), np.zeros(STEP_WIDTH, np.int64)
    pages, tasks = np.zeros((2, 0, 0), np.int64), np.zeros((2, 0, 3), np.int32)
    lay_out(ints, ints, ints, table, ints, ints, numbers, numbers, table, table, pages, tasks, table, numbers)
