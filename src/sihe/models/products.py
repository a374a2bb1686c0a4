"""Matrix products of bfloat16 tensors, in the format in which this processor multiplies faster.

A product of two bfloat16 numbers has 16 bits of mantissa, so that float32 holds it exactly: factors that are widened
to float32, multiplied there and rounded once give what a bfloat16 unit with float32 sums gives. Many processors
multiply float32 faster (`precision.native_bf16` names one); on those the factors are widened for the time of a
product. What is kept for the backward pass stays bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sihe.models.precision import native_bf16

_MIN_ROWS = 64
"""With fewer rows, widening the matrix costs more than it saves: with 32 the widened product takes as long or longer,
with 64 it takes 0.8 to 0.9 of the time, with 256 about 0.6 (384 x 2048 and 1024 x 4096, one core of that Xeon)."""


class Linear(nn.Linear):
    """torch's linear layer, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, [..., I] → [..., O], in the dtype of `x`; compiled it is torch's own."""
    if torch.compiler.is_compiling() or factor_dtype(x) is x.dtype or x.numel() < _MIN_ROWS * x.shape[-1]:
        return nn.functional.linear(x, weight_OI, bias_O)
    y: Tensor = _Widened.apply(x, weight_OI, bias_O)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return y


def factor_dtype(x: Tensor) -> torch.dtype:
    """What tensors like `x` become before they are multiplied: float32 where that is faster, else their own dtype."""
    is_widened = x.dtype is torch.bfloat16 and x.device.type == "cpu" and not native_bf16()
    return torch.float32 if is_widened else x.dtype


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in float32 whatever the factors are."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


class _Widened(torch.autograd.Function):
    """`linear` with float32 factors and sums, rounded once; what is kept for the backward pass is bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        wide_bias = None if bias_O is None else bias_O.float()
        return nn.functional.linear(x.float(), weight_OI.float(), wide_bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_MO = grad.flatten(0, -2).float()
        dx = (grad_MO @ weight_OI.float()).to(x.dtype).view(x.shape) if wants_x else None
        dweight = (grad_MO.T @ x.flatten(0, -2).float()).to(weight_OI.dtype) if wants_weight else None
        dbias = grad_MO.sum(0).to(weight_OI.dtype) if wants_bias else None
        return dx, dweight, dbias
