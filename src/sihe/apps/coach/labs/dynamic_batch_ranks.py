"""What the process of `batch.dynamic` runs: a small classifier at several batch sizes."""

from __future__ import annotations

import torch
from torch import nn

from sihe.apps.coach.labs.timing import best_seconds

_WIDTH = 1024
_DEPTH = 3


@torch.inference_mode()
def costs(rank: int, world_size: int, *, batches: list[int]) -> list[float]:
    """Seconds of one call at each batch size, in turns, the fastest of all."""
    del rank, world_size
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(_DEPTH):
        layers += [nn.Linear(_WIDTH, _WIDTH), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(_WIDTH, 10)).eval()
    rows = {batch: torch.randn(batch, _WIDTH) for batch in batches}
    rounds = [[best_seconds(lambda batch=batch: model(rows[batch])) for batch in batches] for _ in range(3)]  # type: ignore[misc]
    return [min(times) for times in zip(*rounds, strict=True)]
