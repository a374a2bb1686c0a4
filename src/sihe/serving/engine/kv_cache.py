"""Keys and values of every running sequence: one contiguous slab a slot.

On a CPU contiguous slabs beat paged storage several times over, because a decode step reads all of a sequence's cache
and gathering pages costs more than the attention itself. What is logical (which slot, how many tokens) is kept apart
from the tensors, so that another storage can stand behind the same names.

Shapes: S slots, K KV heads, C capacity in tokens, D head dim.
"""

from __future__ import annotations

import heapq
import math

import numpy as np
import torch
from torch import Tensor

from sihe.models.config import ModelConfig
from sihe.serving.errors import NoMemory


class KvCache:
    """Slots for whole sequences. `keys[layer]` and `values[layer]` are the SKCD tensors that attention reads.

    A slot is as long as the context, so a sequence that was given one never runs out. Memory that no token has touched
    is not resident.
    """

    def __init__(self, config: ModelConfig, *, slots: int, capacity: int, dtype: torch.dtype) -> None:
        self.slots = slots
        self.capacity = capacity
        shape = (slots, config.num_kv_heads, capacity, config.head_dim)
        self.keys = [_zeros(shape, dtype) for _ in range(config.num_layers)]
        self.values = [_zeros(shape, dtype) for _ in range(config.num_layers)]
        self._free = list(range(slots))  # a heap: low slots first keeps the slots in use side by side
        self._lengths = [0] * slots

    @property
    def used_tokens(self) -> int:
        """Tokens whose keys and values are held."""
        return sum(self._lengths)

    @property
    def free_slots(self) -> int:
        """Slots that no sequence holds."""
        return len(self._free)

    def allocate(self) -> int:
        """An empty slot, the lowest free one. The caller sees to it that there is one."""
        return heapq.heappop(self._free)

    def extend(self, slot: int, tokens: int) -> None:
        """Records that `tokens` more have been written to `slot`."""
        assert self._lengths[slot] + tokens <= self.capacity, "a sequence outgrew its slot"
        self._lengths[slot] += tokens

    def free(self, slot: int) -> None:
        """Takes `slot` back."""
        self._lengths[slot] = 0
        heapq.heappush(self._free, slot)


def bytes_per_slot(config: ModelConfig, capacity: int, dtype: torch.dtype) -> int:
    """Bytes of one slot: keys and values of `capacity` tokens in every layer."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * capacity * dtype.itemsize


def slots_within(config: ModelConfig, *, wanted: int, capacity: int, dtype: torch.dtype, budget_bytes: int) -> int:
    """As many of the `wanted` slots as the budget holds. Raises `NoMemory` where it holds none."""
    each = bytes_per_slot(config, capacity, dtype)
    if each > budget_bytes:
        raise NoMemory(
            f"the KV cache of one sequence of {capacity} tokens",
            needed_bytes=each,
            available_bytes=budget_bytes,
            hint="lower max_context or raise kv_cache_bytes",
        )
    return min(wanted, budget_bytes // each)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that the system maps lazily (`calloc`), where `torch.zeros` would touch every page.

    Zeros, because attention reads past a short sequence's end under a mask, and what is masked must still be finite.
    """
    size_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size_bytes, np.uint8)).view(dtype).view(shape)
