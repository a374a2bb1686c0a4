"""Causal attention by tiles, as kernels in Triton: forward, and backward to keys and values and to queries.

    B  batch      T  time      N  query heads      K  key-value heads      H  head dim      M  rows of a tile

One program owns one tile of rows and walks over the tiles on its other side, so that no two programs write to one
place: in the forward pass and for the gradient of queries a tile of queries of one head, for the gradients of keys and
values a tile of keys of one key-value head, which sums over the query heads of its group. Softmax is taken online
(Milakov and Gimelshein 2018, arXiv 1805.02867), the order of the loops is that of FlashAttention-2 (Dao 2023, arXiv
2307.08691, algorithms 1 and 2).

All tensors are contiguous, [B, T, heads, H]; `lse` and `delta` are float32 [B, N, T]. `WINDOW` keys are seen by each
query, itself the last; 0 means all. Triton decides when this file is loaded whether kernels are compiled or, with
TRITON_INTERPRET=1 in the environment, interpreted on the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

_MASKED = tl.constexpr(-1e30)  # finite: a tile may mask a whole row, and the difference of infinities is no number


@triton.jit
def _tile(base, batch, head, heads, t_M, T, H: tl.constexpr):
    """Pointers to [M, H] of one head."""
    return base + ((batch * T + t_M) * heads + head)[:, None] * H + tl.arange(0, H)[None, :]


@triton.jit
def _seen(q_t_M, k_t_M, T, WINDOW: tl.constexpr):
    """Which keys each query sees, [M, M]."""
    seen = (k_t_M[None, :] <= q_t_M[:, None]) & (k_t_M[None, :] < T) & (q_t_M[:, None] < T)
    if WINDOW > 0:
        seen = seen & (q_t_M[:, None] - k_t_M[None, :] < WINDOW)
    return seen


@triton.jit
def _first_key(tile, M: tl.constexpr, WINDOW: tl.constexpr):
    """Where the keys begin that a tile of queries sees, at the edge of a tile."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(tile * M - WINDOW + 1, 0) // M * M
    return first


@triton.jit
def forward(q, k, v, o, lse, scale, T, N, K, H: tl.constexpr, M: tl.constexpr, WINDOW: tl.constexpr):
    """o = softmax(q kᵀ scale) v, and the logarithm of each softmax's denominator."""
    tile, batch, head = tl.program_id(0), tl.program_id(1) // N, tl.program_id(1) % N
    kv_head = head // (N // K)
    q_t_M = tile * M + tl.arange(0, M)
    rows = (q_t_M < T)[:, None]
    q_MH = tl.load(_tile(q, batch, head, N, q_t_M, T, H), mask=rows, other=0.0)
    top_M = tl.full([M], _MASKED, tl.float32)
    sum_M = tl.zeros([M], tl.float32)
    o_MH = tl.zeros([M, H], tl.float32)
    for start in range(_first_key(tile, M, WINDOW), tl.minimum((tile + 1) * M, T), M):
        k_t_M = start + tl.arange(0, M)
        inside = (k_t_M < T)[:, None]
        k_MH = tl.load(_tile(k, batch, kv_head, K, k_t_M, T, H), mask=inside, other=0.0)
        v_MH = tl.load(_tile(v, batch, kv_head, K, k_t_M, T, H), mask=inside, other=0.0)
        seen = _seen(q_t_M, k_t_M, T, WINDOW)
        s_MM = tl.where(seen, tl.dot(q_MH, tl.trans(k_MH), input_precision="ieee") * scale, _MASKED)
        new_M = tl.maximum(top_M, tl.max(s_MM, 1))
        p_MM = tl.where(seen, tl.exp(s_MM - new_M[:, None]), 0.0)
        shrink_M = tl.exp(top_M - new_M)
        sum_M = sum_M * shrink_M + tl.sum(p_MM, 1)
        o_MH = o_MH * shrink_M[:, None] + tl.dot(p_MM.to(v_MH.dtype), v_MH, input_precision="ieee")
        top_M = new_M
    sum_M = tl.where(q_t_M < T, sum_M, 1.0)
    o_MH = (o_MH / sum_M[:, None]).to(o.dtype.element_ty)
    tl.store(_tile(o, batch, head, N, q_t_M, T, H), o_MH, mask=rows)
    tl.store(lse + tl.program_id(1) * T + q_t_M, top_M + tl.log(sum_M), mask=q_t_M < T)


@triton.jit
def backward_q(q, k, v, do, lse, delta, dq, scale, T, N, K, H: tl.constexpr, M: tl.constexpr, WINDOW: tl.constexpr):
    """dq, with the probabilities computed anew from `lse`; `delta` is the sum of do · o over H."""
    tile, batch, head = tl.program_id(0), tl.program_id(1) // N, tl.program_id(1) % N
    kv_head = head // (N // K)
    q_t_M = tile * M + tl.arange(0, M)
    rows = (q_t_M < T)[:, None]
    q_MH = tl.load(_tile(q, batch, head, N, q_t_M, T, H), mask=rows, other=0.0)
    do_MH = tl.load(_tile(do, batch, head, N, q_t_M, T, H), mask=rows, other=0.0)
    lse_M = tl.load(lse + tl.program_id(1) * T + q_t_M, mask=q_t_M < T, other=0.0)
    delta_M = tl.load(delta + tl.program_id(1) * T + q_t_M, mask=q_t_M < T, other=0.0)
    dq_MH = tl.zeros([M, H], tl.float32)
    for start in range(_first_key(tile, M, WINDOW), tl.minimum((tile + 1) * M, T), M):
        k_t_M = start + tl.arange(0, M)
        inside = (k_t_M < T)[:, None]
        k_MH = tl.load(_tile(k, batch, kv_head, K, k_t_M, T, H), mask=inside, other=0.0)
        v_MH = tl.load(_tile(v, batch, kv_head, K, k_t_M, T, H), mask=inside, other=0.0)
        seen = _seen(q_t_M, k_t_M, T, WINDOW)
        s_MM = tl.where(seen, tl.dot(q_MH, tl.trans(k_MH), input_precision="ieee") * scale, _MASKED)
        p_MM = tl.exp(s_MM - lse_M[:, None])
        ds_MM = p_MM * (tl.dot(do_MH, tl.trans(v_MH), input_precision="ieee") - delta_M[:, None]) * scale
        dq_MH += tl.dot(ds_MM.to(k_MH.dtype), k_MH, input_precision="ieee")
    tl.store(_tile(dq, batch, head, N, q_t_M, T, H), dq_MH.to(dq.dtype.element_ty), mask=rows)


@triton.jit
def backward_kv(
    q, k, v, do, lse, delta, dk, dv, scale, T, N, K, H: tl.constexpr, M: tl.constexpr, WINDOW: tl.constexpr
):
    """dk and dv of one key-value head, summed over its query heads."""
    tile, batch, kv_head = tl.program_id(0), tl.program_id(1) // K, tl.program_id(1) % K
    k_t_M = tile * M + tl.arange(0, M)
    inside = (k_t_M < T)[:, None]
    k_MH = tl.load(_tile(k, batch, kv_head, K, k_t_M, T, H), mask=inside, other=0.0)
    v_MH = tl.load(_tile(v, batch, kv_head, K, k_t_M, T, H), mask=inside, other=0.0)
    dk_MH = tl.zeros([M, H], tl.float32)
    dv_MH = tl.zeros([M, H], tl.float32)
    end = T
    if WINDOW > 0:
        end = tl.minimum(T, (tile + 1) * M + WINDOW - 1)
    for member in range(0, N // K):
        head = kv_head * (N // K) + member
        row = (batch * N + head) * T
        for start in range(tile * M, end, M):
            q_t_M = start + tl.arange(0, M)
            rows = (q_t_M < T)[:, None]
            q_MH = tl.load(_tile(q, batch, head, N, q_t_M, T, H), mask=rows, other=0.0)
            do_MH = tl.load(_tile(do, batch, head, N, q_t_M, T, H), mask=rows, other=0.0)
            lse_M = tl.load(lse + row + q_t_M, mask=q_t_M < T, other=0.0)
            delta_M = tl.load(delta + row + q_t_M, mask=q_t_M < T, other=0.0)
            seen = _seen(q_t_M, k_t_M, T, WINDOW)
            s_MM = tl.where(seen, tl.dot(q_MH, tl.trans(k_MH), input_precision="ieee") * scale, _MASKED)
            p_MM = tl.exp(s_MM - lse_M[:, None])
            dv_MH += tl.dot(tl.trans(p_MM).to(do_MH.dtype), do_MH, input_precision="ieee")
            ds_MM = p_MM * (tl.dot(do_MH, tl.trans(v_MH), input_precision="ieee") - delta_M[:, None]) * scale
            dk_MH += tl.dot(tl.trans(ds_MM).to(q_MH.dtype), q_MH, input_precision="ieee")
    tl.store(_tile(dk, batch, kv_head, K, k_t_M, T, H), dk_MH.to(dk.dtype.element_ty), mask=inside)
    tl.store(_tile(dv, batch, kv_head, K, k_t_M, T, H), dv_MH.to(dv.dtype.element_ty), mask=inside)
