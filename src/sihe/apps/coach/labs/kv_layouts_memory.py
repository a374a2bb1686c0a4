"""What each layout of the KV cache reserves, counted to the token with the engine's own blocks. Pure.

A slab is one contiguous piece for the longest sequence that may come; pages are blocks of 16 tokens, given as a
sequence grows. Nothing is allocated here: the block tables are the engine's, without the tensors behind them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sihe.serving.engine.kv.blocks import BLOCK_TOKENS, BlockPool, BlockTable, blocks_of, chain, root_key


@dataclass(frozen=True, slots=True)
class Reserved:
    """Tokens that sequences have, and tokens that slabs and pages set aside for them."""

    used: int
    slabs: int
    pages: int

    @property
    def slab_waste(self) -> float:
        """The share of the slabs that holds nothing."""
        return 1 - self.used / self.slabs

    @property
    def page_waste(self) -> float:
        """The share of the pages that holds nothing: the ends of last blocks."""
        return 1 - self.used / self.pages


def lengths_of(mean: float, longest: int) -> Iterator[int]:
    """Lengths of conversations without end: exponential, cut at `longest`; the same ones at each call."""
    draws = random.Random(3)
    while True:
        yield min(longest, max(1, round(draws.expovariate(1 / mean))))


def reserved(lengths: Sequence[int], longest: int) -> Reserved:
    """What the sequences of `lengths` take when each has a slab of `longest` tokens, and when they have pages."""
    pool = BlockPool(len(lengths) * blocks_of(longest))
    for length in lengths:
        BlockTable(pool, b"", []).grow(length)
    return Reserved(sum(lengths), len(lengths) * longest, pool.num_used * BLOCK_TOKENS)


def admitted(lengths: Iterator[int], num_blocks: int) -> int:
    """Sequences of `lengths`, in their order, that a pool of `num_blocks` blocks holds at once."""
    pool = BlockPool(num_blocks)
    count = 0
    for length in lengths:
        if blocks_of(length) > pool.num_available:
            break
        BlockTable(pool, b"", []).grow(length)
        count += 1
    return count


@dataclass(frozen=True, slots=True)
class Prefixed:
    """Blocks of sequences that begin alike: where each has its own, and where they refer to the same ones."""

    copied: int
    shared: int


def prefixed(prefix: int, tails: Sequence[int]) -> Prefixed:
    """The blocks of sequences of `prefix` common tokens and as many of their own as `tails` say."""
    return Prefixed(_held(prefix, tails, is_shared=False), _held(prefix, tails, is_shared=True))


def _held(prefix: int, tails: Sequence[int], *, is_shared: bool) -> int:
    """Blocks that are held when all sequences are there. Under a root of its own a sequence finds nobody else's."""
    pool = BlockPool(sum(blocks_of(prefix + tail) for tail in tails))
    for row, tail in enumerate(tails):
        root = root_key(b"lab" if is_shared else f"lab {row}".encode())
        keys = chain(root, [*range(prefix), *[prefix + row] * tail])
        table = BlockTable(pool, root, keys)
        table.reuse(pool.find(keys))
        table.grow(prefix + tail)
        table.publish(prefix + tail)
    return pool.num_used
