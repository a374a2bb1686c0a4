"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Scales each vector of the last dim to root mean square 1, then by a learnt weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The normalised vectors, in the dtype of `x`; the mean is taken in float32."""
        return nn.functional.rms_norm(x_BTD, self.weight.shape, self.weight, self.eps)
