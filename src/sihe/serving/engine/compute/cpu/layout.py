"""Where everything of a step lies, computed in one go: a decode step has no time for arithmetic on small arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from sihe.core.errors import InternalError
from sihe.models.config import ModelConfig
from sihe.serving.engine.compute.cpu.attention import ATTEND_ROWS, TILE_PAGES
from sihe.serving.engine.compute.cpu.kernels import STEP_WIDTH
from sihe.serving.engine.compute.cpu.program import Program
from sihe.serving.engine.compute.step import Step
from sihe.serving.engine.kv.storage import KvPages

_POSITION, _FEED, _TOKEN = range(3)
_START, _LENGTH, _ADAPTER, _FIRST, _FIRST_WANTED = range(5)


class Sheet:
    """What the operations of a program are told of a step: `STEP_WIDTH` numbers, and arrays that they point at.

    The memory is filled anew for each step, so that nothing may read the last one's any more.
    """

    def __init__(self, config: ModelConfig, pages: KvPages, program: Program, *, feeds: int, blocks: int) -> None:
        self.feeds, self.blocks = feeds, -(-blocks // TILE_PAGES) * TILE_PAGES
        group = config.num_heads // config.num_kv_heads
        self._limits = np.array((config.vocab_size, config.max_positions, pages.num_blocks), np.int64)
        self._sizes = np.array((group, ATTEND_ROWS, pages.keys[0, 0].nbytes, pages.values[0, 0].nbytes), np.int64)
        self._rows = np.zeros((3, program.rows), np.int32)
        self._feeds = np.zeros((5, feeds), np.int32)
        self._pages = np.zeros((2, feeds, self.blocks), np.int64)
        self._tasks = np.zeros((2, program.rows * group // ATTEND_ROWS + feeds, 3), np.int32)
        self._wanted = program.wanted_rows
        rows, of_feeds, places, tasks, wanted = (
            [part.ctypes.data for part in array]
            for array in (self._rows, self._feeds, self._pages, self._tasks, self._wanted)
        )
        self._given = np.array(
            (
                0, 0, 0, rows[_TOKEN], rows[_POSITION], rows[_FEED], of_feeds[_START], of_feeds[_LENGTH], *places,
                self.blocks, 0, 0, *tasks, of_feeds[_FIRST], of_feeds[_FIRST_WANTED], of_feeds[_ADAPTER], wanted[1],
                program.choices, wanted[0],
            ),
            np.int64,
        )  # fmt: skip
        assert len(self._given) == STEP_WIDTH

    def fill(self, step: Step) -> NDArray[np.int64]:
        """The numbers of `step`. Raises `InternalError` where it names what is not there: operations read anywhere."""
        is_inside = lay_out(
            step.tokens, step.starts, step.lengths, step.tables, step.adapters, step.logits, self._limits, self._sizes,
            self._rows, self._feeds, self._pages, self._tasks, self._wanted, self._given,
        )  # fmt: skip
        if not is_inside:
            raise InternalError("a step names a token, position or block that is not there")
        return self._given


@njit(nogil=True, cache=True)
def lay_out(
    tokens: Any,
    starts: Any,
    lengths: Any,
    tables: Any,
    adapters: Any,
    logits: Any,
    limits: Any,
    sizes: Any,
    rows: Any,
    feeds: Any,
    pages: Any,
    tasks: Any,
    wanted: Any,
    given: Any,
) -> bool:
    """Fills, for F feeds of T tokens in all, what the operations read; false where the step is not possible.

    limits: tokens of the vocabulary, positions, blocks. sizes: queries of one KV head, rows of a task at most, bytes of
    a page of keys, of values.

    rows [3, T]: position, feed and id of each token. feeds [5, F]: start, length, adapter, and the row of the first
    token, of all and of those that are wanted (where it would be if all were). pages [2, F, blocks]: bytes to each page
    of keys and of values. wanted [2, O]: the tokens whose logits are wanted, and the feed of each. tasks [2, n, 3] of
    attention, for all tokens and for those that are wanted: feed, first row, rows, where the rows of a feed are its
    tokens' queries of one KV head. given: see `STEP_WIDTH`.
    """
    if not _is_possible(tokens, starts, lengths, tables, logits, limits):
        return False
    group, most_rows = sizes[0], sizes[1]
    token, found = 0, 0
    given[11], given[12] = 0, 0
    for feed in range(len(lengths)):
        start, length = starts[feed], lengths[feed]
        unwanted = length - logits[feed]
        feeds[_START, feed], feeds[_LENGTH, feed], feeds[_ADAPTER, feed] = start, length, adapters[feed]
        feeds[_FIRST, feed], feeds[_FIRST_WANTED, feed] = token, found - unwanted
        for place in range(length):
            rows[_POSITION, token + place] = start + place
            rows[_FEED, token + place] = feed
            rows[_TOKEN, token + place] = tokens[token + place]
        for place in range(unwanted, length):
            wanted[0, found] = token + place
            wanted[1, found] = feed
            found += 1
        token += length
        for block in range((start + length + 15) // 16):
            for which in range(2):
                pages[which, feed, block] = sizes[2 + which] * tables[feed, block]
        for which in range(2):
            for first in range(which * unwanted * group, length * group, most_rows):
                task = given[11 + which]
                tasks[which, task, 0], tasks[which, task, 1] = feed, first
                tasks[which, task, 2] = min(most_rows, length * group - first)
                given[11 + which] += 1
    given[0], given[1], given[2] = token, found, len(lengths)
    return True


@njit(nogil=True)
def _is_possible(tokens: Any, starts: Any, lengths: Any, tables: Any, logits: Any, limits: Any) -> bool:
    """Whether every token, position and block that is named is there."""
    total = 0
    for feed in range(len(lengths)):
        start, length = starts[feed], lengths[feed]
        last = start + length - 1
        if start < 0 or length < 1 or last >= limits[1] or logits[feed] < 0 or logits[feed] > length:
            return False
        if last // 16 >= tables.shape[1]:
            return False
        total += length
        for block in range(last // 16 + 1):
            if tables[feed, block] < 0 or tables[feed, block] >= limits[2]:
                return False
    if total != len(tokens):
        return False
    is_known = True
    for token in tokens:
        is_known = is_known and 0 <= token < limits[0]
    return is_known
