"""What the process of `attention.cost` runs: causal attention written out, and torch's fused kernel.

H  heads      T  time      D  head dim
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sihe.apps.coach.labs.timing import best_seconds, peak_bytes


def naive_attention(q_HTD: Tensor, k_HTD: Tensor, v_HTD: Tensor) -> Tensor:
    """softmax(Q·Kᵀ/√d + mask)·V with every intermediate matrix in memory (arXiv 1706.03762, section 3.2.1)."""
    length = q_HTD.shape[-2]
    future_TT = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores_HTT = q_HTD @ k_HTD.transpose(-2, -1) / q_HTD.shape[-1] ** 0.5
    return scores_HTT.masked_fill(future_TT, float("-inf")).softmax(dim=-1) @ v_HTD


def fused_attention(q_HTD: Tensor, k_HTD: Tensor, v_HTD: Tensor) -> Tensor:
    """The same by torch's kernel, which keeps a tile of the scores at a time."""
    return scaled_dot_product_attention(q_HTD[None], k_HTD[None], v_HTD[None], is_causal=True)[0]


@torch.no_grad()
def costs(rank: int, world_size: int, *, lengths: list[int], heads: int, head_dim: int) -> dict[str, Any]:
    """Seconds and peak bytes of both forms at each length, and how far their results differ at most."""
    del rank, world_size
    taken: dict[str, Any] = {"naive_s": [], "fused_s": [], "naive_bytes": [], "fused_bytes": []}
    difference = 0.0
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        q, k, v = (torch.randn(heads, length, head_dim, generator=generator) for _ in range(3))
        difference = max(difference, (naive_attention(q, k, v) - fused_attention(q, k, v)).abs().max().item())
        for name, form in (("naive", naive_attention), ("fused", fused_attention)):

            def call(form: Any = form, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
                form(q, k, v)

            taken[f"{name}_bytes"].append(peak_bytes(call))
            taken[f"{name}_s"].append(best_seconds(call))
    return {**taken, "difference": difference}
