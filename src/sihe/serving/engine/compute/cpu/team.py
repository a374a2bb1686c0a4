"""A team of threads that computes programs: the caller and its helpers take chunks of one operation after another.

Helpers sleep on a semaphore between steps and hold no Python lock while they work, so that whatever else runs in the
process delays no step. An operation is done when its chunks are done, not when every thread has come: a helper that the
system has put aside stops nobody.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import carray, int64, njit  # type: ignore[attr-defined]  # numba does not list its names
from numpy.typing import NDArray

from sihe.core import simd
from sihe.core.simd import (
    add_atomic,
    digest_of,
    int32_at,
    int64_at,
    load_atomic,
    post_semaphore,
    sleep_us,
    wait_semaphore,
    yield_core,
)
from sihe.serving.engine.compute.cpu import attention, attention_tiles, chunks, kernels, tiles
from sihe.serving.engine.compute.cpu.attention import attend, place
from sihe.serving.engine.compute.cpu.chunks import (
    chunks_of,
    is_wanted,
    panel_chunks,
    part_of_product,
    rows_of,
    rows_of_chunk,
)
from sihe.serving.engine.compute.cpu.kernels import (
    STEP_WIDTH,
    WIDTH,
    Code,
    activate,
    adapt,
    combine,
    embed,
    multiply_panels,
    normalise,
    route,
)

Longs = NDArray[np.int64]
_LOOKS = 2000  # at a counter, before the core is offered to others: some 20 µs
_LOOKS_AND_YIELDS = _LOOKS + 200
_LINE = 8  # int64 of a cache line: counters that threads change lie on lines of their own
_SEMAPHORE_BYTES = 64  # glibc's sem_t has 32, musl's 32
_SCRATCH = 1 << 16  # float32 of one thread

# Places in the team's shared numbers, each on a line of its own: what a run is given, and who has left it.
_OPS, _COUNT, _STEP, _LEFT, _COUNTERS, _THREADS, _RUN = (index * _LINE for index in range(7))
_SHARED = 7 * _LINE
_STOP = -1  # in the place of the number of runs


def _waiting(sources: str) -> Any:
    @njit(nogil=True, cache=True)
    def _wait_until(address: int, value: int) -> None:
        assert sources  # see `_compiled`
        looks = 0
        while load_atomic(address) < value:
            looks += 1
            if looks > _LOOKS_AND_YIELDS:  # whom we wait for does not run: spinning would only keep it from running
                sleep_us(50)
            elif looks > _LOOKS:
                yield_core()

    return _wait_until


_wait_until = _waiting(digest_of(simd))


@njit(nogil=True, error_model="numpy")
def _multiply(op: Any, step: Any, chunk: int, threads: int, scratch: int) -> None:
    """A dense product's chunk. Where the columns are queries, keys and values of the last layer and no row is wanted,
    nobody reads the queries."""
    first, last, row, end, then, then_bytes = part_of_product(op, step, chunk, threads)
    of_head, of_queries = op[24], op[25]
    if of_head == 0 or is_wanted(step, row, end):
        multiply_panels(op, first, last, row, end - row, then, then_bytes, scratch)
        return
    for head in range(first // of_head, (last - 1) // of_head + 1):
        begin, stop = max(first, head * of_head + of_queries), min(last, (head + 1) * of_head)
        if begin < stop:
            multiply_panels(op, begin, stop, row, end - row, then, then_bytes, scratch)


@njit(nogil=True, error_model="numpy")
def _do(op: Any, step: Any, chunk: int, threads: int, scratch: int) -> None:
    code = op[0]
    if code == Code.MULTIPLY and op[19] == 0:
        _multiply(op, step, chunk, threads, scratch)
        return
    if code == Code.MULTIPLY:
        chunks = panel_chunks(op[8], threads)
        expert, part = chunk // chunks, chunk % chunks
        first, last = op[8] * part // chunks, op[8] * (part + 1) // chunks
        offsets = int32_at(op[20])
        mine = op.copy()
        mine[5] += expert * op[21]
        mine[13] += expert * op[22]
        multiply_panels(mine, first, last, offsets[expert], offsets[expert + 1] - offsets[expert], 0, 0, scratch)
        return
    if code == Code.ATTEND:
        attend(op, step, chunk // op[3], chunk % op[3], scratch)
        return
    if code == Code.ROUTE:
        route(op, rows_of(op, step))
        return
    first, last = rows_of_chunk(op, step, chunk, threads)
    if code == Code.EMBED:
        embed(op, step, first, last)
    elif code == Code.NORM:
        normalise(op, first, last)
    elif code == Code.PLACE:
        place(op, step, first, last)
    elif code == Code.ACTIVATE:
        activate(op, first, last)
    elif code == Code.COMBINE:
        combine(op, first, last)
    elif code == Code.ADAPT:
        adapt(op, step, first, last, scratch)


@njit(nogil=True, error_model="numpy")
def _run(ops: Any, step: Any, counters: int, threads: int, scratch: int) -> None:
    """One thread's part in a program. `counters` are two lines an operation: chunks taken, chunks done."""
    for index in range(ops.shape[0]):
        op = ops[index]
        taken = counters + 16 * _LINE * index
        done = taken + 8 * _LINE
        chunks = chunks_of(op, step, threads)
        while True:
            chunk = add_atomic(taken, 1)
            if chunk >= chunks:
                break
            _do(op, step, chunk, threads, scratch)
            add_atomic(done, 1)
        _wait_until(done, chunks)


SOURCES = (simd, tiles, attention_tiles, kernels, attention, chunks, sys.modules[__name__])
"""The modules whose code is compiled into `_work`."""


def _compiled(sources: str) -> Any:
    """`_work`, kept on disk for as long as `sources` are the same."""

    @njit(nogil=True, cache=True)
    def _work(shared: int, semaphores: int, helpers: int, scratch: int) -> None:
        """The caller's part in one program, where there are `helpers` to wake; else a helper's life until told to stop.

        One function for both, because each function that calls the kernels is compiled with all of them.
        """
        assert sources  # a variable of the closure, which numba counts among what a compiled function depends on
        given = int64_at(shared)
        if helpers >= 0:
            add_atomic(shared + 8 * _RUN, 1)
            for helper in range(helpers):
                post_semaphore(semaphores + helper * _SEMAPHORE_BYTES)
        seen = 0
        while True:
            if helpers < 0:
                while load_atomic(shared + 8 * _RUN) == seen:  # a signal can end the wait as well
                    wait_semaphore(semaphores)
                seen += 1
                if load_atomic(shared + 8 * _RUN) == _STOP:
                    return
            ops = carray(int64_at(given[_OPS]), (given[_COUNT], WIDTH))
            step = carray(int64_at(given[_STEP]), (STEP_WIDTH,))
            _run(ops, step, given[_COUNTERS], given[_THREADS], scratch)
            if helpers >= 0:
                return
            add_atomic(shared + 8 * _LEFT, 1)

    return _work


_work = _compiled(digest_of(*SOURCES))


class Team:
    """`threads` threads, the caller one of them. One program at a time; `close` ends the helpers."""

    def __init__(self, threads: int) -> None:
        _work.compile((int64,) * 4)  # here, where a failure is somebody's error: a helper would only end
        self.threads = threads
        self._shared: Longs = np.zeros(_SHARED, np.int64)
        self._counters: Longs = np.zeros(0, np.int64)
        self._scratch = [np.zeros(_SCRATCH, np.float32) for _ in range(threads)]
        self._semaphores = np.zeros(_SEMAPHORE_BYTES * threads, np.uint8)
        self._runs = 0
        self._held: tuple[Longs, Longs] | None = None
        libc = ctypes.CDLL(None, use_errno=True)
        for helper in range(threads - 1):
            if libc.sem_init(ctypes.c_void_p(self._semaphore(helper)), 0, 0):
                raise OSError(ctypes.get_errno(), "no semaphore for a thread of the engine")
        self._helpers = [
            threading.Thread(target=self._live, args=(helper,), name=f"engine helper {helper}", daemon=True)
            for helper in range(threads - 1)
        ]
        for thread in self._helpers:
            thread.start()

    def run(self, ops: Longs, step: Longs) -> None:
        """Computes the operations of `ops` [n, WIDTH] in order, with what `step` says of this step."""
        self.settle()
        lines = 2 * _LINE * len(ops)
        if len(self._counters) < lines:
            self._counters = np.zeros(lines, np.int64)
        self._counters.fill(0)
        self._held = (ops, step)  # a helper that comes late still reads them when this call has returned
        shared = self._shared
        shared[_OPS], shared[_COUNT], shared[_STEP] = ops.ctypes.data, len(ops), step.ctypes.data
        shared[_COUNTERS], shared[_THREADS], shared[_LEFT] = self._counters.ctypes.data, self.threads, 0
        self._runs += 1
        _work(shared.ctypes.data, self._semaphores.ctypes.data, self.threads - 1, self._scratch[0].ctypes.data)

    def settle(self) -> None:
        """Waits for helpers that are still on their way out of the last run, and read what it was given."""
        if self._runs:
            _wait_until(self._shared.ctypes.data + 8 * _LEFT, self.threads - 1)

    def close(self) -> None:
        """Ends the helpers. Safe to call again."""
        if not self._helpers:
            return
        self.settle()
        libc = ctypes.CDLL(None)
        self._shared[_RUN] = _STOP  # one number: on ARM two could be seen in the other order
        for helper, thread in enumerate(self._helpers):
            libc.sem_post(ctypes.c_void_p(self._semaphore(helper)))
            thread.join()
        self._helpers = []

    def _semaphore(self, helper: int) -> int:
        return self._semaphores.ctypes.data + helper * _SEMAPHORE_BYTES

    def _live(self, helper: int) -> None:
        _work(self._shared.ctypes.data, self._semaphore(helper), -1, self._scratch[helper + 1].ctypes.data)


def keep_torch_to_one_thread() -> None:
    """Operations of torch in this thread, such as sampling, wake no others: those would spin beside the team.

    What torch does in other threads is left alone, as `torch.set_num_threads` would not.
    """
    folder = Path(torch.__file__).parent
    for path in (*folder.glob("lib/libgomp*"), *folder.parent.glob("torch.libs/libgomp*")):  # on ARM up to torch 2.9
        ctypes.CDLL(str(path)).omp_set_num_threads(1)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
