"""Next-token loss that never holds the logits of a whole batch.

    M  tokens of the batch (B * T)      C  tokens of one chunk      D  hidden      V  vocabulary

The logits are the largest tensor of a small model's training step. Here one chunk's logits live at a time: they are
turned into their own gradient in place and multiplied into the gradients of hidden states and head at once, so that
nothing of size M x V is kept for the backward pass, which only scales. The softmax is taken in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sihe.models.products import add_product, factor_dtype

_CHUNK = 512  # tokens: 512 x 8192 float32 logits are 16 MB


class _FusedCrossEntropy(torch.autograd.Function):
    """Sum of negative log-likelihoods of `targets_M` under `x_MD @ head_VD.T`; targets below 0 do not count."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, head_VD: Tensor, targets_M: Tensor) -> Tensor:
        wants_x, wants_head, _ = ctx.needs_input_grad
        ctx.x_dtype, ctx.head_dtype = x_MD.dtype, head_VD.dtype
        exact = factor_dtype(x_MD)
        x_MD, head_VD = x_MD.to(exact), head_VD.to(exact)
        dx_MD = torch.empty_like(x_MD) if wants_x else None
        dhead_VD = torch.zeros_like(head_VD, dtype=torch.float32) if wants_head else None
        total = torch.zeros((), dtype=torch.float32, device=x_MD.device)
        for start in range(0, x_MD.shape[0], _CHUNK):
            chunk = slice(start, start + _CHUNK)
            x_CD, counted_C = x_MD[chunk], targets_M[chunk] >= 0
            target_C1 = targets_M[chunk].clamp(min=0).unsqueeze(1)
            log_p_CV = torch.log_softmax(x_CD @ head_VD.T, dim=1, dtype=torch.float32)
            nll_C = -log_p_CV.gather(1, target_C1).squeeze(1)
            total += (nll_C * counted_C).sum()
            if not (wants_x or wants_head):
                continue
            # d nll / d logits = softmax - one-hot, in the memory of the log-probabilities
            dlogits_CV = log_p_CV.exp_()
            dlogits_CV.scatter_add_(1, target_C1, torch.full_like(nll_C.unsqueeze(1), -1.0))
            if not counted_C.all():
                dlogits_CV *= counted_C.unsqueeze(1)
            dlogits_CV = dlogits_CV.to(exact)
            if dx_MD is not None:
                torch.mm(dlogits_CV, head_VD, out=dx_MD[chunk])
            if dhead_VD is not None:
                add_product(dhead_VD, dlogits_CV.T, x_CD)
        ctx.save_for_backward(dx_MD, dhead_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dx_MD, dhead_VD = ctx.saved_tensors
        (scale,) = grads
        dx = None if dx_MD is None else (dx_MD * scale.to(dx_MD.dtype)).to(ctx.x_dtype)
        dhead = None if dhead_VD is None else (dhead_VD * scale).to(ctx.head_dtype)
        return dx, dhead, None


def cross_entropy(x_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum over counted targets (those >= 0) of the negative log-likelihood in nats, as a float32 scalar."""
    loss: Tensor = _FusedCrossEntropy.apply(x_BTD.flatten(0, 1), head_VD, targets_BT.flatten())  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return loss
