"""The tokens of one step as flat arrays: what every way of computing it starts from.

T tokens of the step, F feeds (one a sequence), B blocks of the longest of them, O logits that are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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


@dataclass(frozen=True)
class Step:
    """The feeds of a step, side by side."""

    tokens: Ints  # [T]
    starts: Ints  # [F]
    lengths: Ints  # [F] tokens of each feed
    tables: Ints  # [F, B] its blocks, zeros behind
    adapters: Ints  # [F]
    logits: Ints  # [F] of how many of its last tokens logits are wanted

    @classmethod
    def of(cls, feeds: Sequence[Feed]) -> Step:
        """The arrays of `feeds`, in their order."""
        tokens: list[int] = []
        numbers: list[tuple[int, int, int, int]] = []
        tables = np.zeros((len(feeds), max(len(feed.blocks) for feed in feeds)), np.int32)
        for row, feed in enumerate(feeds):
            tokens += feed.tokens
            numbers.append((feed.start, len(feed.tokens), feed.adapter, feed.num_logits))
            tables[row, : len(feed.blocks)] = feed.blocks
        starts, lengths, adapters, logits = np.array(numbers, np.int32).T.copy()
        return cls(np.array(tokens, np.int32), starts, lengths, tables, adapters, logits)

    @cached_property
    def feed(self) -> Ints:
        """[T] which feed a token belongs to."""
        return np.repeat(np.arange(len(self.lengths), dtype=np.int32), self.lengths)

    @cached_property
    def positions(self) -> Ints:
        """[T] where a token stands in its sequence."""
        before_F = np.cumsum(self.lengths, dtype=np.int32) - self.lengths
        return np.arange(len(self.tokens), dtype=np.int32) + (self.starts - before_F)[self.feed]

    @cached_property
    def wanted(self) -> Ints:
        """[O] the tokens whose logits are wanted."""
        ends_F = np.cumsum(self.lengths, dtype=np.int32)
        total_F = np.cumsum(self.logits, dtype=np.int32)
        return np.arange(total_F[-1], dtype=np.int32) + np.repeat(ends_F - total_F, self.logits)


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
