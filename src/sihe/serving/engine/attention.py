"""Attention of one step over the KV cache: the `Attend` that the engine hands to the decoder.

A step is one flat row of tokens: first one token of each decoding sequence, ordered by slot, then the chunks of
prompts. So the weights of every layer are read once for all of them, and only attention looks at each sequence alone.

Shapes: B = 1 row, T tokens of the step, N heads, K KV heads, G heads a KV head, D head dim, R decoding rows, L cached
tokens, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sihe.serving.engine.kv_cache import KvCache


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """A sequence that feeds one token at `position`."""

    slot: int
    position: int


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """A sequence that feeds `length` tokens of its prompt from position `start`."""

    slot: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class _Run:
    """Decoding rows in neighbouring slots: one view of the slabs serves them all, without a copy."""

    rows: slice
    slots: slice
    length: int
    mask: Tensor | None  # R11L; None when every row is as long as the longest


class StepAttention:
    """Writes the step's keys and values into the cache and attends over it. Made for one step.

    `decode` must be sorted by slot.
    """

    def __init__(self, cache: KvCache, decode: Sequence[DecodeRow], prefill: Sequence[PrefillRow]) -> None:
        self._cache = cache
        self._prefill = prefill
        self._num_decode = len(decode)
        dtype = cache.keys[0].dtype
        self._slots_R = torch.tensor([row.slot for row in decode])
        self._positions_R = torch.tensor([row.position for row in decode])
        self._runs = list(_runs(decode, dtype))
        self._masks = [_chunk_mask(row, dtype) for row in prefill]

    def __call__(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """The attention output of one layer for every token of the step."""
        keys_SKCD, values_SKCD = self._cache.keys[layer], self._cache.values[layer]
        q_TND, k_TKD, v_TKD = q_BTNH[0], k_BTKH[0], v_BTKH[0]
        out_TND = torch.empty_like(q_TND)
        if self._num_decode:
            keys_SKCD[self._slots_R, :, self._positions_R] = k_TKD[: self._num_decode]
            values_SKCD[self._slots_R, :, self._positions_R] = v_TKD[: self._num_decode]
            for run in self._runs:
                _decode(run, q_TND, keys_SKCD, values_SKCD, out_TND)
        at = self._num_decode
        for row, mask_CL in zip(self._prefill, self._masks, strict=True):
            chunk, at = slice(at, at + row.length), at + row.length
            end = row.start + row.length
            keys_SKCD[row.slot, :, row.start : end] = k_TKD[chunk].transpose(0, 1)
            values_SKCD[row.slot, :, row.start : end] = v_TKD[chunk].transpose(0, 1)
            out_NCD = scaled_dot_product_attention(
                q_TND[chunk].transpose(0, 1)[None],
                keys_SKCD[row.slot, None, :, :end],
                values_SKCD[row.slot, None, :, :end],
                attn_mask=mask_CL,
                is_causal=mask_CL is None,
                enable_gqa=True,
            )[0]
            out_TND[chunk] = out_NCD.transpose(0, 1)
        return out_TND[None]


def _decode(run: _Run, q_TND: Tensor, keys_SKCD: Tensor, values_SKCD: Tensor, out_TND: Tensor) -> None:
    """The query heads that share a KV head stand side by side as if they were G queries: the cache is read once."""
    q_RND = q_TND[run.rows]
    rows, heads, dim = q_RND.shape
    kv_heads = keys_SKCD.shape[1]
    out_RKGD = scaled_dot_product_attention(
        q_RND.view(rows, kv_heads, heads // kv_heads, dim),
        keys_SKCD[run.slots, :, : run.length],
        values_SKCD[run.slots, :, : run.length],
        attn_mask=run.mask,
    )
    out_TND[run.rows] = out_RKGD.reshape(rows, heads, dim)


def _runs(decode: Sequence[DecodeRow], dtype: torch.dtype) -> list[_Run]:
    runs: list[_Run] = []
    begin = 0
    for end in range(1, len(decode) + 1):
        if end < len(decode) and decode[end].slot == decode[end - 1].slot + 1:
            continue
        lengths_R = torch.tensor([row.position + 1 for row in decode[begin:end]])
        longest = int(lengths_R.max())
        mask_R11L = None
        if int(lengths_R.min()) < longest:
            past_RL = torch.arange(longest) >= lengths_R[:, None]
            mask_R11L = torch.zeros(past_RL.shape, dtype=dtype).masked_fill_(past_RL, -torch.inf)[:, None, None]
        slots = slice(decode[begin].slot, decode[end - 1].slot + 1)
        runs.append(_Run(slice(begin, end), slots, longest, mask_R11L))
        begin = end
    return runs


def _chunk_mask(row: PrefillRow, dtype: torch.dtype) -> Tensor | None:
    """What each token of a later chunk may see; None for a first chunk, which is plainly causal."""
    if row.start == 0:
        return None
    hidden_CL = torch.ones(row.length, row.start + row.length, dtype=torch.bool).triu_(diagonal=row.start + 1)
    return torch.zeros(hidden_CL.shape, dtype=dtype).masked_fill_(hidden_CL, -torch.inf)
