"""What is added to attention scores for the distance between two places: ALiBi's slopes and T5's learnt buckets.

    T  time of the queries      S  time of the keys      N  query heads      U  buckets

Both hold one tensor with a dim of heads, of which a process may keep a share.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn


class ScoreBias(Protocol):
    """Distances [T, S], key position less query position, → what is added to the scores, [N, T, S]."""

    def __call__(self, distance_TS: Tensor, dtype: torch.dtype) -> Tensor:
        """In `dtype`, that of the queries."""
        ...


class AlibiBias:
    """Scores fall with the distance, at a fixed slope per head (Press et al. 2021, arXiv 2108.12409, section 3).

    `slopes_N` is no buffer, so that a cast of the model does not round it.
    """

    def __init__(self, num_heads: int) -> None:
        self.slopes_N = torch.tensor(slopes(num_heads), dtype=torch.float32, device="cpu")

    def __call__(self, distance_TS: Tensor, dtype: torch.dtype) -> Tensor:
        """-slope |distance|, [N, T, S]."""
        if self.slopes_N.device != distance_TS.device:
            self.slopes_N = self.slopes_N.to(distance_TS.device)
        exact = torch.promote_types(dtype, torch.float32)
        return (self.slopes_N[:, None, None].to(exact) * -distance_TS.abs()).to(dtype)


def slopes(num_heads: int) -> list[float]:
    """2^(-8/n), 2^(-16/n), … for n heads, a power of two; else those of the power below, then each other of twice it.

    Source: the authors' code, github.com/ofirpress/attention_with_linear_biases.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    first = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    between = [2.0 ** (-4 * (head + 1) / power) for head in range(0, 2 * (num_heads - power), 2)]
    return first + between


class RelativeBias(nn.Module):
    """A learnt number per head and bucket of distances (Raffel et al. 2019, arXiv 1910.10683, section 2.1).

    Half of the buckets are for keys behind the query where it sees both sides. Each layer has a table of its own; T5
    has one for all layers.
    """

    def __init__(self, num_heads: int, buckets: int, max_distance: int, *, causal: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(buckets, num_heads))
        self.max_distance = max_distance
        self.causal = causal

    def forward(self, distance_TS: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, S] → [N, T, S]."""
        buckets_TS = bucket_of(distance_TS, self.table.shape[0], self.max_distance, causal=self.causal)
        return nn.functional.embedding(buckets_TS, self.table).permute(2, 0, 1).to(dtype)


def bucket_of(distance: Tensor, buckets: int, max_distance: int, *, causal: bool) -> Tensor:
    """The bucket of each distance: one each for the near half, then evenly by its logarithm up to `max_distance`."""
    if causal:
        side, far = torch.zeros_like(distance), (-distance).clamp(min=0)
    else:
        buckets //= 2
        side, far = (distance > 0) * buckets, distance.abs()
    near = buckets // 2
    growth = torch.log(far.clamp(min=1).float() / near) / math.log(max_distance / near)
    step = near + (growth * (buckets - near)).long()
    return side + torch.where(far < near, far, step.clamp(max=buckets - 1))
