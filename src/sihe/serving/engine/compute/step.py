"""The tokens of one step as flat arrays: what every way of computing it starts from.

T tokens of the step, F feeds (one a sequence), B blocks of the longest of them, O logits that are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sihe.models.decoder import Decoder
from sihe.models.lora import Lora

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Feed:
    """What one sequence feeds in a step: `tokens` at positions `start`, `start` + 1, …

    `blocks` hold the whole sequence up to the last of these tokens, block i positions 16 i to 16 i + 15. Logits are
    wanted of its last `num_logits` tokens. `adapter` is the number of a loaded LoRA adapter, 0 for none.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int] | Ints
    num_logits: int = 1
    adapter: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """The feeds of a step, side by side."""

    tokens: Ints  # [T]
    positions: Ints  # [T]
    feed: Ints  # [T] which feed a token belongs to
    starts: Ints  # [F]
    lengths: Ints  # [F] tokens of each feed
    tables: Ints  # [F, B] its blocks, zeros behind
    adapters: Ints  # [F]
    wanted: Ints  # [O] the tokens whose logits are wanted

    @classmethod
    def of(cls, feeds: Sequence[Feed]) -> Step:
        """The arrays of `feeds`, in their order."""
        lengths_F = np.fromiter((len(feed.tokens) for feed in feeds), np.int32, len(feeds))
        starts_F = np.fromiter((feed.start for feed in feeds), np.int32, len(feeds))
        wanted_F = np.fromiter((feed.num_logits for feed in feeds), np.int32, len(feeds))
        ends_F = np.cumsum(lengths_F, dtype=np.int32)
        tokens_T = np.empty(ends_F[-1], np.int32)
        tables_FB = np.zeros((len(feeds), max(len(feed.blocks) for feed in feeds)), np.int32)
        for row, (feed, end) in enumerate(zip(feeds, ends_F.tolist(), strict=True)):
            tokens_T[end - len(feed.tokens) : end] = feed.tokens
            tables_FB[row, : len(feed.blocks)] = feed.blocks
        feed_T = np.repeat(np.arange(len(feeds), dtype=np.int32), lengths_F)
        return cls(
            tokens=tokens_T,
            positions=_counted(starts_F, lengths_F, feed_T, ends_F),
            feed=feed_T,
            starts=starts_F,
            lengths=lengths_F,
            tables=tables_FB,
            adapters=np.fromiter((feed.adapter for feed in feeds), np.int32, len(feeds)),
            wanted=_last(ends_F, wanted_F),
        )


class Compute(Protocol):
    """A model with its pages: one step at a time, by one thread."""

    def forward(self, step: Step) -> Tensor:
        """Logits of the wanted tokens, float32 [O, V]; good until the next step. Keys and values are in their pages."""
        ...

    def set_adapter(self, number: int, lora: Lora | None) -> None:
        """What the adapter of that number is from now on; None: nothing. No step runs meanwhile."""
        ...

    def refresh(self, model: Decoder) -> None:
        """Takes the weights that `model` has now."""
        ...

    def close(self) -> None:
        """Ends what computes."""
        ...


def _counted(starts_F: Ints, lengths_F: Ints, feed_T: Ints, ends_F: Ints) -> Ints:
    """starts[f], starts[f] + 1, … for each feed."""
    return np.arange(len(feed_T), dtype=np.int32) + (starts_F - ends_F + lengths_F)[feed_T]


def _last(ends_F: Ints, wanted_F: Ints) -> Ints:
    """The numbers of the last wanted[f] tokens of each feed."""
    total_F = np.cumsum(wanted_F, dtype=np.int32)
    return np.arange(total_F[-1], dtype=np.int32) + np.repeat(ends_F - total_F, wanted_F)
