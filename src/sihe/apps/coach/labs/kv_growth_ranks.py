"""What the process of `kv.growth` runs: the engine's own pages, filled block by block, and the resident memory beside.

The engine's pages hold keys and values. A latent is stored here as one vector a token and layer, as its paper does; the
engine itself keeps such models expanded.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sihe.apps.coach.errors import LabFailed
from sihe.apps.coach.labs.kv_growth import HEAD_DIM, HEADS, LATENT_RANK, LATENT_ROTARY, kv_heads
from sihe.models.config import ModelConfig
from sihe.serving.engine.kv.blocks import BLOCK_TOKENS
from sihe.serving.engine.kv.storage import KvPages

_DTYPES = {2: torch.bfloat16, 4: torch.float32}
_PR_SET_THP_DISABLE = 41  # linux/prctl.h
_PROMISED = 4  # sequences that the pool has room for, of which one is filled


def grow(
    rank: int, world_size: int, *, counts: list[int], layers: int, item_bytes: int, kinds: list[str]
) -> dict[str, Any]:
    """Bytes by which resident memory grew at each of `counts` tokens, for each kind; and of a pool nobody touched."""
    del rank, world_size
    _turn_huge_pages_off()
    for kind in ("mha", "mla"):
        _store(kind, 1, BLOCK_TOKENS, item_bytes).fill(0)  # what the first use of torch and numpy costs is no cache
    resident_bytes()
    found: dict[str, Any] = {"resident_bytes": {}}
    for kind in kinds:
        before = resident_bytes()
        store = _store(kind, layers, _PROMISED * counts[-1], item_bytes)
        if kind == "mha":
            found["untouched_bytes"], found["promised_bytes"] = resident_bytes() - before, store.size_bytes
        done, sizes = 0, []
        for count in counts:
            for block in range(done, count // BLOCK_TOKENS):
                store.fill(block)
            done = count // BLOCK_TOKENS
            sizes.append(resident_bytes() - before)
        if kind == "mha":
            full = resident_bytes()
            store.fill(done)
            found["one_more_bytes"] = resident_bytes() - full
        found["resident_bytes"][kind] = sizes
        del store
    return found


def resident_bytes() -> int:
    """Memory of this process that really is in memory."""
    if sys.platform != "linux":
        raise LabFailed(
            "resident memory is read from /proc/self/statm, which this system does not have: run it on Linux"
        )
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def _turn_huge_pages_off() -> None:
    """Lets memory become resident by small pages: huge ones (2 MiB) make a short sequence look like a long one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


class _Pages:
    """The engine's storage."""

    def __init__(self, heads: int, layers: int, tokens: int, item_bytes: int) -> None:
        width = HEADS * HEAD_DIM
        config = ModelConfig(256, width, layers, HEADS, heads, HEAD_DIM, 2 * width, tokens)
        self._pages = KvPages(config, num_blocks=tokens // BLOCK_TOKENS, dtype=_DTYPES[item_bytes])
        self.size_bytes = self._pages.num_blocks * self._pages.bytes_per_block

    def fill(self, block: int) -> None:
        """Writes the keys and values of 16 tokens in every layer."""
        self._pages.keys[:, block] = 1.0
        self._pages.values[:, block] = 1.0


class _Latents:
    """One vector a token and layer, in blocks like the engine's."""

    def __init__(self, layers: int, tokens: int, item_bytes: int) -> None:
        shape = (layers, tokens // BLOCK_TOKENS, BLOCK_TOKENS, (LATENT_RANK + LATENT_ROTARY) * item_bytes)
        self._latents = np.zeros(shape, np.uint8)  # mapped lazily, as the engine's pages are
        self.size_bytes = self._latents.nbytes

    def fill(self, block: int) -> None:
        """Writes the latents of 16 tokens in every layer."""
        self._latents[:, block] = 1


def _store(kind: str, layers: int, tokens: int, item_bytes: int) -> _Pages | _Latents:
    if kind == "mla":
        return _Latents(layers, tokens, item_bytes)
    return _Pages(kv_heads(kind), layers, tokens, item_bytes)
