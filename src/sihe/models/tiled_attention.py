"""Attention by tiles: no matrix of all scores exists (FlashAttention: Dao et al. 2022, arXiv 2205.14135).

    B  batch      T  time      N  query heads      K  key-value heads      H  head dim

`TiledAttend` runs our Triton kernels and can be handed to the decoder in place of torch's own attention, which stays
the default. `tiled` and `plain` are the same arithmetic in torch for one head, with every byte counted that moves
between a large slow memory and a small fast one: they are there to be measured and taught from, not to be fast.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sihe.core.errors import ConfigError, InvalidInput
from sihe.core.lazy import require

HEAD_DIMS = (16, 32, 64, 128)


@dataclass(frozen=True)
class TiledAttend:
    """Causal attention of whole sequences by tiles of `tile` rows; an `Attend`.

    With `window`, each position sees that many keys, its own the last. Raises `MissingExtra` without Triton and
    `InvalidInput` for a head dim that is not in `HEAD_DIMS` or a tensor on the CPU where Triton does not interpret.
    """

    window: int | None = None
    tile: int = 64

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window is at least 1 key, got {self.window}", key="attention.window")
        if self.tile not in (16, 32, 64, 128):
            raise ConfigError(f"tile is 16, 32, 64 or 128 rows, got {self.tile}", key="attention.tile")

    def __call__(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """The mixed values, [B, T, N, H]."""
        if q_BTNH.shape[-1] not in HEAD_DIMS:
            raise InvalidInput(f"tiled attention takes a head dim of {HEAD_DIMS}, got {q_BTNH.shape[-1]}")
        kernels = require("sihe.models.tiled_attention_kernels", extra="triton")
        if not q_BTNH.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise InvalidInput("tiled attention on the CPU needs TRITON_INTERPRET=1: use torch's own attention there")
        out: Tensor = _Tiled.apply(q_BTNH, k_BTKH, v_BTKH, kernels, self.window or 0, self.tile)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        return out


class _Tiled(torch.autograd.Function):
    """Keeps q, k, v, the output and one number a row; the backward pass computes the probabilities anew."""

    @staticmethod
    def forward(
        ctx: Any, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, kernels: Any, window: int, tile: int
    ) -> Tensor:
        q, k, v = q_BTNH.contiguous(), k_BTKH.contiguous(), v_BTKH.contiguous()
        (batch, time, heads, head_dim), kv_heads = q.shape, k.shape[2]
        out, lse = torch.empty_like(q), q.new_empty(batch, heads, time, dtype=torch.float32)
        ctx.sizes = (head_dim**-0.5, time, heads, kv_heads, head_dim, tile, window)
        ctx.kernels = kernels
        kernels.forward[(-(-time // tile), batch * heads)](q, k, v, out, lse, *ctx.sizes)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        _, time, heads, kv_heads, _, tile, _ = ctx.sizes
        grad = grad.contiguous()
        delta = (grad.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        tiles = -(-time // tile)
        ctx.kernels.backward_q[(tiles, q.shape[0] * heads)](q, k, v, grad, lse, delta, dq, *ctx.sizes)
        ctx.kernels.backward_kv[(tiles, q.shape[0] * kv_heads)](q, k, v, grad, lse, delta, dk, dv, *ctx.sizes)
        return dq, dk, dv, None, None, None


# ---- the same for one head, with its traffic -----------------------------------------------------------------------


@dataclass
class Traffic:
    """Bytes between the large memory and the small one, and the most that the small one held at a time."""

    read_bytes: int = 0
    written_bytes: int = 0
    fast_bytes: int = 0

    @property
    def moved_bytes(self) -> int:
        """Both ways."""
        return self.read_bytes + self.written_bytes

    def read(self, tensor: Tensor) -> Tensor:
        """Counts `tensor` as read."""
        self.read_bytes += tensor.nbytes
        return tensor

    def write(self, target: Tensor, tensor: Tensor) -> None:
        """Writes `tensor` to `target` and counts it."""
        target.copy_(tensor)
        self.written_bytes += tensor.nbytes

    def hold(self, *tensors: Tensor) -> None:
        """Counts tensors that are in the small memory together."""
        self.fast_bytes = max(self.fast_bytes, sum(tensor.nbytes for tensor in tensors))


def plain(q_TH: Tensor, k_TH: Tensor, v_TH: Tensor) -> tuple[Tensor, Traffic]:
    """Causal attention of one head that writes scores and probabilities out, [T, H], with its traffic.

    Three passes, each by one row of queries: scores, softmax, mixing (algorithm 0 of the paper).
    """
    traffic, out_TH = Traffic(), torch.empty_like(q_TH)
    scores_TT = q_TH.new_empty(len(q_TH), len(k_TH))
    q_TH, k_TH, v_TH = traffic.read(q_TH), traffic.read(k_TH), v_TH
    traffic.write(scores_TT, (q_TH @ k_TH.T) * q_TH.shape[1] ** -0.5)
    unseen_TT = torch.ones_like(scores_TT, dtype=torch.bool).triu(1)
    traffic.write(scores_TT, traffic.read(scores_TT).masked_fill(unseen_TT, float("-inf")).softmax(1))
    traffic.write(out_TH, traffic.read(scores_TT) @ traffic.read(v_TH))
    traffic.hold(scores_TT[0], q_TH[0], k_TH[0])
    return out_TH, traffic


def tiled(q_TH: Tensor, k_TH: Tensor, v_TH: Tensor, *, q_tile: int = 64, k_tile: int = 64) -> tuple[Tensor, Traffic]:
    """Causal attention of one head by tiles of `q_tile` queries and `k_tile` keys, [T, H], with its traffic.

    Queries are read and results written once, keys and values once for each tile of queries that sees them: of the
    order T² H / q_tile numbers in place of `plain`'s T² (theorem 2 of the paper, where the tile fills the fast memory).
    """
    traffic, out_TH = Traffic(), torch.empty_like(q_TH)
    for first in range(0, len(q_TH), q_tile):
        q_MH = traffic.read(q_TH[first : first + q_tile])
        end = first + len(q_MH)
        top_M1 = q_MH.new_full((len(q_MH), 1), float("-inf"))
        sum_M1, mixed_MH = torch.zeros_like(top_M1), torch.zeros_like(q_MH)
        for start in range(0, end, k_tile):
            k_MH = traffic.read(k_TH[start : min(start + k_tile, end)])
            v_MH = traffic.read(v_TH[start : min(start + k_tile, end)])
            scores_MM = (q_MH @ k_MH.T) * q_TH.shape[1] ** -0.5
            later_MM = torch.arange(start, start + len(k_MH)) > torch.arange(first, end)[:, None]
            scores_MM = scores_MM.masked_fill(later_MM, float("-inf"))
            # Key 0 is seen by every query, so that the maximum is finite from the first tile on.
            new_M1 = torch.maximum(top_M1, scores_MM.amax(1, keepdim=True))
            p_MM, shrink_M1 = (scores_MM - new_M1).exp(), (top_M1 - new_M1).exp()
            sum_M1 = sum_M1 * shrink_M1 + p_MM.sum(1, keepdim=True)
            mixed_MH = mixed_MH * shrink_M1 + p_MM @ v_MH
            top_M1 = new_M1
            traffic.hold(q_MH, k_MH, v_MH, scores_MM, mixed_MH, sum_M1, top_M1)
        traffic.write(out_TH[first:end], mixed_MH / sum_M1)
    return out_TH, traffic
