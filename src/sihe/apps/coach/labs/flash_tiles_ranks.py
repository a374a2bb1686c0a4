"""What the process of `attn.flash_tiles` runs: `sihe.models.tiled_attention`, which counts each byte that it moves."""

from __future__ import annotations

from typing import Any

import torch

from sihe.models.tiled_attention import plain, tiled


@torch.no_grad()
def traffic(rank: int, world_size: int, *, lengths: list[int], head_dim: int, tile: int) -> dict[str, Any]:
    """Bytes moved by both forms and with tiles twice as tall, what the fast memory held, and how far results differ."""
    del rank, world_size
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {
        key: [] for key in ("plain_bytes", "tiled_bytes", "doubled_bytes", "fast_bytes", "doubled_fast_bytes")
    }
    found["difference"] = 0.0
    for length in lengths:
        q_TH, k_TH, v_TH = (torch.randn(length, head_dim, generator=generator) for _ in range(3))
        expected_TH, written = plain(q_TH, k_TH, v_TH)
        found["plain_bytes"].append(written.moved_bytes)
        for rows, moved, fast in (
            (tile, "tiled_bytes", "fast_bytes"),
            (2 * tile, "doubled_bytes", "doubled_fast_bytes"),
        ):
            out_TH, counted = tiled(q_TH, k_TH, v_TH, q_tile=rows, k_tile=rows)
            found[moved].append(counted.moved_bytes)
            found[fast].append(counted.fast_bytes)
            found["difference"] = max(found["difference"], (out_TH - expected_TH).abs().max().item())
    return found
