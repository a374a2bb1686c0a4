"""Log-probabilities of given tokens, and divergences of next tokens, without the logits of a whole batch.

    B  batch      T  time      D  hidden      V  vocabulary      M  tokens (B * T)      C  tokens of a chunk

One chunk's logits live at a time, forward and backward: the backward pass computes them again from the hidden states,
which costs one more product with the head and saves [M, V] numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from sihe.models.products import add_product, factor_dtype, linear

if TYPE_CHECKING:
    from sihe.models.decoder import Decoder

_CHUNK = 512  # tokens, as in the pretraining loss


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(x @ head.T) at `targets_M`, [M] float32."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, head_VD: Tensor, targets_M: Tensor, chunk: int) -> Tensor:
        exact = factor_dtype(x_MD)
        factors_VD = head_VD.to(exact)
        logps_M = torch.empty(len(targets_M), dtype=torch.float32, device=x_MD.device)
        normalisers_M = torch.empty_like(logps_M)
        for start in range(0, len(targets_M), chunk):
            part = slice(start, start + chunk)
            logits_CV = (x_MD[part].to(exact) @ factors_VD.T).float()
            normalisers_M[part] = logits_CV.logsumexp(1)
            logps_M[part] = logits_CV.gather(1, targets_M[part, None])[:, 0] - normalisers_M[part]
        ctx.save_for_backward(x_MD, head_VD, targets_M, normalisers_M)
        ctx.chunk = chunk
        return logps_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_MD, head_VD, targets_M, normalisers_M = ctx.saved_tensors
        x_dtype, head_dtype, exact = x_MD.dtype, head_VD.dtype, factor_dtype(x_MD)
        x_MD, head_VD = x_MD.to(exact), head_VD.to(exact)
        wants_x, wants_head = ctx.needs_input_grad[:2]
        dx_MD = torch.empty_like(x_MD) if wants_x else None
        dhead_VD = torch.zeros_like(head_VD, dtype=torch.float32) if wants_head else None
        for start in range(0, len(targets_M), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            x_CD = x_MD[part]
            # d logp / d logits = one-hot - softmax
            dlogits_CV = (x_CD @ head_VD.T).float().sub_(normalisers_M[part, None]).exp_()
            dlogits_CV.mul_(-grad_M[part, None])
            dlogits_CV.scatter_add_(1, targets_M[part, None], grad_M[part, None])
            dlogits_CV = dlogits_CV.to(exact)
            if dx_MD is not None:
                torch.mm(dlogits_CV, head_VD, out=dx_MD[part])
            if dhead_VD is not None:
                add_product(dhead_VD, dlogits_CV.T, x_CD)
        dx = None if dx_MD is None else dx_MD.to(x_dtype)
        return dx, None if dhead_VD is None else dhead_VD.to(head_dtype), None, None


def token_logprobs(x_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, *, chunk: int = _CHUNK) -> Tensor:
    """The log-probability of each of `targets_BT` under hidden states `x_BTD`, [B, T] float32, differentiable."""
    logps_M: Tensor = _TokenLogprobs.apply(x_BTD.flatten(0, 1), head_VD, targets_BT.flatten(), chunk)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return logps_M.view(targets_BT.shape)


def next_token_logprobs(model: Decoder, tokens_BT: Tensor, *, chunk: int = _CHUNK) -> Tensor:
    """The log-probability of each token after the first, given those before it, [B, T - 1] float32."""
    return token_logprobs(model.hidden(tokens_BT[:, :-1]), model.head_weight, tokens_BT[:, 1:], chunk=chunk)


def chunked_divergence(
    student_BTD: Tensor,
    student_head_VD: Tensor,
    teacher_BTD: Tensor,
    teacher_head_VD: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor],
    *,
    chunk: int = _CHUNK,
) -> Tensor:
    """`divergence(student logits, teacher logits)` of each position, [B, T] (the two may differ in width D)."""
    student_MD, teacher_MD = student_BTD.flatten(0, 1), teacher_BTD.flatten(0, 1)

    def of_chunk(student_CD: Tensor, head_VD: Tensor, teacher_CD: Tensor) -> Tensor:
        return divergence(linear(student_CD, head_VD), linear(teacher_CD, teacher_head_VD))

    parts = [
        checkpoint(of_chunk, student_CD, student_head_VD, teacher_CD, use_reentrant=False)
        for student_CD, teacher_CD in zip(torch.split(student_MD, chunk), torch.split(teacher_MD, chunk), strict=True)
    ]
    return torch.cat(parts).view(student_BTD.shape[:2])
