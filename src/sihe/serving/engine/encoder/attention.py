"""Attention over documents that lie side by side in one row, none of which sees another: the encoder's `Attend`.

Documents of equal length are neighbours, so that one call serves them all, on views: nothing is padded or copied.

Shapes: B = 1 row, T tokens of all documents, N heads, K KV heads, H head dim, D documents of a group, L their length.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from sihe.models.attention import attention


class DocumentAttention:
    """Made for one pass over documents of these lengths, in the order in which they lie."""

    def __init__(self, lengths: Sequence[int], *, causal: bool, window: int | None = None) -> None:
        self.causal = causal
        self.window = window
        self._groups: list[tuple[slice, int, Tensor | None]] = []
        start = 0
        for length, run in groupby(lengths):
            end = start + length * len(list(run))
            self._groups.append((slice(start, end), length, self._mask(length)))
            start = end

    def __call__(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """The mixed values of each token's own document."""
        out_TNH = torch.empty_like(q_BTNH[0])
        for rows, length, mask in self._groups:
            q, k, v = (x[0, rows].view(-1, length, *x.shape[2:]) for x in (q_BTNH, k_BTKH, v_BTKH))
            out_TNH[rows] = attention(q, k, v, mask, causal=self.causal).flatten(0, 1)
        return out_TNH[None]

    def _mask(self, length: int) -> Tensor | None:
        """Who sees whom, [1, 1, L, L], where a window is shorter than the documents."""
        if self.window is None or length <= self.window:
            return None
        place = torch.arange(length)
        distance_LL = place - place[:, None]
        seen_LL = distance_LL.abs() < self.window
        return (seen_LL & (distance_LL <= 0) if self.causal else seen_LL)[None, None]
