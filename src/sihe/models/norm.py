"""Normalisation: by the root mean square (Zhang and Sennrich 2019, arXiv 1910.07467), or torch's layer norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sihe.models.config import ModelConfig


def norm(config: ModelConfig) -> RMSNorm | nn.LayerNorm:
    """The norm of a model's stream, as configured."""
    if config.layers.norm == "layer":
        return nn.LayerNorm(config.hidden_size, config.norm_eps)
    return RMSNorm(config.hidden_size, config.norm_eps)


class RMSNorm(nn.Module):
    """Scales each vector of the last dim to root mean square 1, then by a learnt weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The normalised vectors, in the dtype of `x`; the mean is taken in float32."""
        return _RMSNorm.apply(x_BTD, self.weight, self.eps)  # type: ignore[no-untyped-call]  # torch's own


class _RMSNorm(torch.autograd.Function):
    """With u = x / rms(x): y = u w, and dx = (dy w - u mean(dy w u)) / rms(x).

    Composed of single operations, as `torch.nn.functional.rms_norm` is on a CPU, it costs twice the time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = (x * scale).to(x.dtype)
        ctx.save_for_backward(unit, weight, scale)
        return unit * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, weight, scale = ctx.saved_tensors
        share = grad * unit
        dweight = share.flatten(0, -2).sum(0)
        mean = (share @ weight).unsqueeze(-1).div_(unit.shape[-1])
        dx = (grad * weight).addcmul_(unit, mean, value=-1).mul_(scale.to(grad.dtype))
        return dx, dweight, None
