"""Context parallelism: each rank of `cp` has a part of every sequence, and its attention sees the keys of all parts.

    B  batch      T  time of the whole sequence      S  this rank's share of it, T / cp      C  one chunk, T / (2 cp)
    N  query heads      K  key-value heads      H  head dim      R  ranks of the axis

Everything but attention works on single positions and needs nothing of the other parts. Keys and values are gathered
before attention; with grouped queries they are a small share of the activations, and gathering them once sends as much
as passing them round in a ring (Llama Team 2024, arXiv 2407.21783, section 3.3.2).

With causal attention the end of a sequence is more work than its beginning. So the time is cut into 2 cp chunks, and
rank r has the chunks r and 2 cp - 1 - r: every rank attends over the same number of keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sihe.core.errors import ConfigError
from sihe.models.products import factor_dtype

if TYPE_CHECKING:
    from sihe.training.parallel.mesh import Axis

_TIME = 1


def share_of_sequence(x_BT: Tensor, axis: Axis) -> Tensor:
    """This rank's chunks of tokens, targets, positions or anything else with time as dim 1: [B, S, …].

    Raises `ConfigError` where 2 cp does not divide the time.
    """
    time, chunks = x_BT.shape[_TIME], 2 * axis.size
    if time % chunks:
        raise ConfigError(f"2 cp ({chunks}) divides the length of a sequence, got {time} tokens", key="parallel.cp")
    parts = x_BT.chunk(chunks, _TIME)
    return torch.cat((parts[axis.rank], parts[chunks - 1 - axis.rank]), _TIME)


def whole_sequence(parts_RBS: Tensor) -> Tensor:
    """The sequence [B, T, …] from the shares of all ranks, stacked in their order."""
    early, late = parts_RBS.chunk(2, 1 + _TIME)
    return torch.cat((early, late.flip(0))).movedim(0, _TIME).flatten(_TIME, _TIME + 1)


def positions_of_share(time: int, axis: Axis) -> Tensor:
    """Where this rank's share of a sequence of `time` tokens stands in it: [1, S]."""
    return share_of_sequence(torch.arange(time).unsqueeze(0), axis)


class ContextAttention:
    """An `Attend`: causal attention of this rank's queries over the whole sequence.

    Queries and keys carry the rotation of their places in the whole sequence. All ranks of the axis call it together.
    """

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def __call__(self, layer: int, q_BSNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor) -> Tensor:
        """The mixed values of this rank's positions, [B, S, N, H]."""
        del layer  # all layers attend alike
        # Keys and values side by side, so that one message gathers both.
        kv_BTK2H: Tensor = _GatherSequence.apply(torch.cat((k_BSKH, v_BSKH), -1), self._axis)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        k_BTKH, v_BTKH = kv_BTK2H.chunk(2, -1)
        early_BCNH, late_BCNH = q_BSNH.chunk(2, _TIME)
        length = early_BCNH.shape[_TIME]
        ends = (length * (self._axis.rank + 1), length * (2 * self._axis.size - self._axis.rank))
        mixed = [
            _causal_end(q_BCNH, k_BTKH[:, :end], v_BTKH[:, :end])
            for q_BCNH, end in zip((early_BCNH, late_BCNH), ends, strict=True)
        ]
        return torch.cat(mixed, _TIME)


def _causal_end(q_BCNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    """Causal attention of queries that are the last ones of the sequence: [B, C, N, H]."""
    from torch.nn.attention.bias import causal_lower_right  # half a second of imports that few runs need

    q, k, v = (x.transpose(1, 2).to(factor_dtype(x)) for x in (q_BCNH, k_BTKH, v_BTKH))
    grouped = q.shape[1] != k.shape[1]
    # A mask that kernels which know it never write down; where there is none it is C x T.
    mask = causal_lower_right(q.shape[2], k.shape[2])
    o = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return o.to(q_BCNH.dtype).transpose(1, 2)


class _GatherSequence(torch.autograd.Function):
    """Shares of the sequence → the whole of it on every rank; back, each rank's gradients of the whole are summed."""

    @staticmethod
    def forward(ctx: Any, x_BS: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        parts = x_BS.new_empty(axis.size * len(x_BS), *x_BS.shape[1:])
        dist.all_gather_single(parts, x_BS.contiguous(), group=axis.group)
        return whole_sequence(parts.view(axis.size, *x_BS.shape))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        axis: Axis = ctx.axis
        chunks = grads[0].chunk(2 * axis.size, _TIME)
        parts = torch.cat(
            [torch.cat((chunks[rank], chunks[2 * axis.size - 1 - rank]), _TIME) for rank in range(axis.size)]
        )
        share_BS = parts.new_empty(len(parts) // axis.size, *parts.shape[1:])
        dist.reduce_scatter_single(share_BS, parts, group=axis.group)
        return share_BS, None
