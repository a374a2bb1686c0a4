"""Where everything of a step lies, computed in one go: a decode step has no time for arithmetic on small arrays."""

from __future__ import annotations

from typing import Any

from numba import njit


@njit(nogil=True, cache=True)
def lay_out(
    starts: Any,
    lengths: Any,
    logits: Any,
    tables: Any,
    group: int,
    most_rows: int,
    key_bytes: int,
    value_bytes: int,
    rows: Any,
    firsts: Any,
    page_offsets: Any,
    tasks: Any,
    wanted: Any,
) -> int:
    """Fills, for F feeds of T tokens in all, what the operations read; returns how many tasks of attention there are.

    rows [2, T]: position and feed of each token. firsts [F]: the first token of each feed. page_offsets [2, F, blocks]:
    bytes to each of its pages of keys and of values. tasks [n, 3]: feed, first row, rows (`most_rows` at most), where
    the rows of a feed are its tokens' queries of one KV head (`group` a token). wanted [O]: the tokens whose logits are
    wanted.
    """
    token, task, found = 0, 0, 0
    for feed in range(len(lengths)):
        length = lengths[feed]
        firsts[feed] = token
        for place in range(length):
            rows[0, token + place] = starts[feed] + place
            rows[1, token + place] = feed
        for place in range(length - logits[feed], length):
            wanted[found] = token + place
            found += 1
        token += length
        for block in range((starts[feed] + length + 15) // 16):
            page_offsets[0, feed, block] = key_bytes * tables[feed, block]
            page_offsets[1, feed, block] = value_bytes * tables[feed, block]
        for first in range(0, length * group, most_rows):
            tasks[task, 0], tasks[task, 1] = feed, first
            tasks[task, 2] = min(most_rows, length * group - first)
            task += 1
    return task
