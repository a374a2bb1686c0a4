"""The tensors behind the blocks: keys and values of 16 tokens each, in every layer.

A page holds the keys of one block and one head as [D, 16], so that a kernel finds the same dim of 16 tokens side by
side and scores them in one register; values lie as [16, V]. As int8 a page is bytes: the codes in that order, then 16
float32, the scale of each token, so that what a token becomes depends on itself alone. Which sequence a block belongs
to, and which blocks are free, is not known here (`blocks.py`).

Shapes: L layers, P blocks, K KV heads, D head dim, V width of a value.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sihe.models.config import ModelConfig
from sihe.serving.engine.kv.blocks import BLOCK_TOKENS, blocks_of
from sihe.serving.engine.large_pages import zeros
from sihe.serving.errors import NoMemory


class KvPages:
    """`keys` is [L, P, K, D, 16] and `values` [L, P, K, 16, V]; as int8 [L, P, K, bytes of a page].

    Unless it `is_resident` from the start, memory is not before a token has touched it or the large page that it lies
    in. V, `width`, is `value_dim`
    rounded up to whole registers; what is behind it means nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        is_resident: bool = False,
    ) -> None:
        self.num_blocks = num_blocks
        self.bytes_per_block = bytes_per_block(config, dtype)
        common = (config.num_layers, num_blocks, config.num_kv_heads)
        self.value_dim = _value_dim(config)
        self.width = _padded(self.value_dim)
        keys: tuple[int, ...] = (config.head_dim, BLOCK_TOKENS)
        values: tuple[int, ...] = (BLOCK_TOKENS, self.width)
        if dtype == torch.int8:
            keys, values = ((_page_bytes(dim, dtype),) for dim in (config.head_dim, self.width))
        self.keys = _zeros((*common, *keys), dtype, device)
        self.values = _zeros((*common, *values), dtype, device)
        if is_resident:
            self.keys.zero_()
            self.values.zero_()

    def copy(self, source: int, target: int) -> None:
        """Makes block `target` hold what `source` does."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]


def bytes_per_block(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one block: keys and values of `BLOCK_TOKENS` tokens in every layer."""
    head = _page_bytes(config.head_dim, dtype) + _page_bytes(_padded(_value_dim(config)), dtype)
    return config.num_layers * config.num_kv_heads * head


def blocks_within(config: ModelConfig, *, sequences: int, context: int, dtype: torch.dtype, budget_bytes: int) -> int:
    """Blocks for `sequences` of `context` tokens each, or as many as the budget holds.

    Raises `NoMemory` where it does not hold one sequence.
    """
    each, one = bytes_per_block(config, dtype), blocks_of(context)
    if one * each > budget_bytes:
        raise NoMemory(
            f"the KV cache of one sequence of {context} tokens",
            needed_bytes=one * each,
            available_bytes=budget_bytes,
            hint="lower max_context or raise kv_cache_bytes",
        )
    return min(sequences * one, budget_bytes // each)


def _page_bytes(dim: int, dtype: torch.dtype) -> int:
    scales = BLOCK_TOKENS * torch.float32.itemsize if dtype == torch.int8 else 0
    return BLOCK_TOKENS * dim * dtype.itemsize + scales


def _value_dim(config: ModelConfig) -> int:
    latent = config.attention.latent
    return config.head_dim if latent is None else latent.value_dim


def _padded(width: int) -> int:
    return -(-width // 16) * 16


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Zeros; on a CPU such that the system maps lazily, where `torch.zeros` would touch every page.

    Zeros, because attention reads to the end of a block under a mask, and what is masked must still be finite.
    """
    if device is not None and device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(zeros((math.prod(shape) * dtype.itemsize,), np.uint8)).view(dtype).view(shape)
