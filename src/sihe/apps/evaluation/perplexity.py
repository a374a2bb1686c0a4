"""Negative log-likelihood of a whole split, each token but the first predicted exactly once.

    B  windows of one forward pass      T  tokens of a window

The split is cut into windows of `sequence_length` that start `stride` apart; what an earlier window has predicted
is context only. `stride = sequence_length` is the cheapest and starts each window without context; a smaller stride
gives every token at least `sequence_length - stride` tokens of context and costs as many times more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from sihe.data.loading import TokenSplit
    from sihe.models.decoder import Decoder


_PIECE = 1 << 20  # tokens read at once


@dataclass(frozen=True)
class Window:
    """Inputs `start … start + length - 1`; the first `known` of its targets were predicted before."""

    start: int
    known: int


def windows(num_tokens: int, sequence_length: int, stride: int) -> Iterator[Window]:
    """The windows of a split, in order; the last is moved back so that all are equally long."""
    targets = num_tokens - 1
    length = min(sequence_length, targets)
    predicted = 0
    start = 0
    while predicted < targets:
        first = min(start, targets - length)
        yield Window(first, predicted - first)
        predicted = first + length
        start += stride


@torch.inference_mode()
def negative_log_likelihood(
    model: Decoder,
    split: TokenSplit,
    *,
    sequence_length: int,
    stride: int,
    batch: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[float, int]:
    """Sum in nats over every token but the first, and their number.

    `on_progress` hears how many tokens of how many are predicted. `batch` (windows of one forward pass) decides memory
    and speed, and changes the sum by no more than float32 rounding.
    """
    plan = list(windows(len(split), sequence_length, stride))
    length = min(sequence_length, len(split) - 1)
    nats, counted = 0.0, 0
    for first in range(0, len(plan), batch):
        chosen = plan[first : first + batch]
        tokens_BT1 = torch.from_numpy(split.windows(np.array([window.start for window in chosen]), length + 1))
        targets_BT = tokens_BT1[:, 1:].clone()
        for row, window in enumerate(chosen):
            targets_BT[row, : window.known] = -1
        sum_nll, count = model.loss(tokens_BT1[:, :-1], targets_BT)
        nats += float(sum_nll)
        counted += int(count)
        if on_progress is not None:
            on_progress(counted, len(split) - 1)
    return nats, counted


def text_bytes(split: TokenSplit, tokenizer: Tokenizer, eos_token_id: int) -> int:
    """UTF-8 bytes of the text behind every token but the first; documents end with `eos_token_id`.

    A split that begins or ends inside a character counts its broken half as the three bytes of U+FFFD.
    """
    total = 0
    unfinished: list[np.ndarray] = []  # the document that goes on in the next piece
    for start in range(1, len(split), _PIECE):
        tokens = split.tokens(start, min(start + _PIECE, len(split)))
        *ended, rest = np.split(tokens, np.flatnonzero(tokens == eos_token_id) + 1)
        for part in ended:
            total += _bytes_of([*unfinished, part], tokenizer)
            unfinished = []
        unfinished.append(rest)
    return total + _bytes_of(unfinished, tokenizer)


def _bytes_of(parts: list[np.ndarray], tokenizer: Tokenizer) -> int:
    ids = [token for part in parts for token in part.tolist()]
    return len(tokenizer.decode(ids, skip_special_tokens=True).encode()) if ids else 0
