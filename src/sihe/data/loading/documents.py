"""Where documents begin and end in a row of tokens: each ends with the end-of-sequence token, which belongs to it."""

from __future__ import annotations

import numpy as np

from sihe.data.loading.dataset import TokenSplit

_PIECE = 1 << 22  # tokens that are looked at together


def document_starts(split: TokenSplit, eos_token_id: int) -> np.ndarray:
    """int64 [documents + 1]: the first token of each document, and the end of the last, closed or not.

    Complexity: one pass over the split.
    """
    ends = [np.zeros(1, np.int64)]
    for start in range(0, len(split), _PIECE):
        tokens = split.tokens(start, min(start + _PIECE, len(split)))
        ends.append(np.flatnonzero(tokens == eos_token_id) + start + 1)
    starts = np.concatenate(ends)
    return starts if starts[-1] == len(split) else np.append(starts, len(split))


def document_ids(tokens_BT: np.ndarray, eos_token_id: int) -> np.ndarray:
    """int64 [B, T]: the number of each token's document in its row, from 0."""
    ids = np.zeros(tokens_BT.shape, np.int64)
    np.cumsum(tokens_BT[:, :-1] == eos_token_id, axis=1, out=ids[:, 1:])
    return ids
