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
    page_offsets: Any,
    firsts: Any,
    tasks: Any,
    counts: Any,
    wanted: Any,
) -> None:
    """Fills, for F feeds of T tokens in all, what the operations read.

    rows [2, T]: position and feed of each token. page_offsets [2, F, blocks]: bytes to each of its pages of keys and of
    values. wanted [2, O]: the tokens whose logits are wanted, and the feed of each.

    The rest is there twice, for all tokens and for those that are wanted. firsts [2, F]: the row of each feed's first
    token (of wanted rows: where it would be if all were). tasks [2, n, 3] of attention: feed, first row, rows
    (`most_rows` at most), where the rows of a feed are its tokens' queries of one KV head (`group` a token). counts
    [2]: how many tasks there are.
    """
    token, found = 0, 0
    counts[0], counts[1] = 0, 0
    for feed in range(len(lengths)):
        length = lengths[feed]
        unwanted = length - logits[feed]
        firsts[0, feed], firsts[1, feed] = token, found - unwanted
        for place in range(length):
            rows[0, token + place] = starts[feed] + place
            rows[1, token + place] = feed
        for place in range(unwanted, length):
            wanted[0, found] = token + place
            wanted[1, found] = feed
            found += 1
        token += length
        for block in range((starts[feed] + length + 15) // 16):
            page_offsets[0, feed, block] = key_bytes * tables[feed, block]
            page_offsets[1, feed, block] = value_bytes * tables[feed, block]
        for which in range(2):
            for first in range(which * unwanted * group, length * group, most_rows):
                task = counts[which]
                tasks[which, task, 0], tasks[which, task, 1] = feed, first
                tasks[which, task, 2] = min(most_rows, length * group - first)
                counts[which] += 1
