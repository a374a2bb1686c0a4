"""Vocabulary parallelism: each rank of `tp` has some rows of the embedding and of the head.

    B  batch      T  time      S  this rank's share of the time, T / tp      M  tokens, B * T      C  those of one chunk
    D  hidden      W  this rank's share of the vocabulary, V / tp

The logits are never put together: their maximum, the sum of their exponentials and the target's logit are one number a
token, and those are reduced over the ranks (Shoeybi et al. 2019, arXiv 1909.08053, section 3). As in
`sihe.models.loss`, a chunk's logits become their own gradient in place and live no longer than their chunk; the softmax
is in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sihe.core.errors import ConfigError
from sihe.models.products import add_product, factor_dtype
from sihe.training.parallel.held import Cut
from sihe.training.parallel.tensor import gather_sequence, sum_to_shares

if TYPE_CHECKING:
    from sihe.training.parallel.mesh import Axis

_CHUNK = 512  # tokens for each rank of the axis, so that a chunk's logits take what they take in `sihe.models.loss`


class VocabularyEmbedding(nn.Embedding):
    """Some rows of an embedding, and the sum over ranks that makes them the whole of it."""

    def __init__(self, whole: nn.Embedding, axis: Axis) -> None:
        """Takes over the parameter of `whole`, which must be a share already (`cut_vocabulary`)."""
        rows, hidden_size = whole.weight.shape
        super().__init__(rows, hidden_size, _weight=whole.weight.data)
        self.weight = whole.weight
        self._axis = axis

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """This rank's share of the sequence, [B, S, D], from all of its tokens."""
        row_BT = tokens_BT - self._axis.rank * self.num_embeddings
        elsewhere_BT = (row_BT < 0) | (row_BT >= self.num_embeddings)
        x_BTD = nn.functional.embedding(row_BT.masked_fill(elsewhere_BT, 0), self.weight)
        return sum_to_shares(x_BTD.masked_fill(elsewhere_BT.unsqueeze(-1), 0.0), self._axis)

    def share_of(self, x_BT: Tensor) -> Tensor:
        """Of something about each token, what is about this rank's share of the sequence: [B, S]."""
        return x_BT.chunk(self._axis.size, 1)[self._axis.rank]


def cut_vocabulary(weight: nn.Parameter, axis: Axis) -> Cut:
    """Replaces an embedding's or a head's matrix [V, D] by this rank's rows of it.

    Raises `ConfigError` for a vocabulary that the axis does not divide.
    """
    if len(weight) % axis.size:
        raise ConfigError(
            f"parallel setting 'tp' must be a divisor of vocab_size ({len(weight)}) to share out the vocabulary, "
            f"got {axis.size}: pad the vocabulary",
            key="parallel.tp",
        )
    cut = Cut(axis, 0)
    weight.data = cut.part_of(weight.data)
    return cut


def vocabulary_cross_entropy(x_BSD: Tensor, head_WD: Tensor, targets_BT: Tensor, axis: Axis) -> Tensor:
    """Sum over counted targets (those >= 0) of the negative log-likelihood in nats; float32, the same on each rank.

    `x_BSD` is this rank's share of the sequence, as after the last norm; `targets_BT` are those of all of it. Every
    rank computes the same loss, whose gradients are complete: of the shares of `x` and of the rows of the head.
    """
    x_MD = gather_sequence(x_BSD, axis).flatten(0, 1)
    loss: Tensor = _VocabularyCrossEntropy.apply(x_MD, head_WD, targets_BT.flatten(), axis)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return loss


class _VocabularyCrossEntropy(torch.autograd.Function):
    """The loss over all tokens; its gradient of `x_MD` is this rank's summand, which gathering `x` adds up."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, head_WD: Tensor, targets_M: Tensor, axis: Axis) -> Tensor:
        wants_gradients = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        ctx.x_dtype, ctx.head_dtype = x_MD.dtype, head_WD.dtype
        exact = factor_dtype(x_MD)
        x_MD, head_WD = x_MD.to(exact), head_WD.to(exact)
        dx_MD = torch.empty_like(x_MD)
        dhead_WD = torch.zeros_like(head_WD, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=x_MD.device)
        for start in range(0, len(x_MD), _CHUNK * axis.size):
            chunk = slice(start, start + _CHUNK * axis.size)
            logits_CW = (x_MD[chunk] @ head_WD.T).float()
            nll, dlogits_CW = _chunk_loss(logits_CW, targets_M[chunk], axis)
            total += nll
            if wants_gradients:
                dlogits_CW = dlogits_CW.to(exact)
                torch.mm(dlogits_CW, head_WD, out=dx_MD[chunk])
                add_product(dhead_WD, dlogits_CW.T, x_MD[chunk])
        if wants_gradients:
            ctx.save_for_backward(dx_MD, dhead_WD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx_MD, dhead_WD = ctx.saved_tensors
        (scale,) = grads
        dx_MD = (dx_MD * scale.to(dx_MD.dtype)).to(ctx.x_dtype)
        return dx_MD, (dhead_WD * scale).to(ctx.head_dtype), None, None


def _chunk_loss(logits_CW: Tensor, targets_C: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """The summed loss of one chunk, and its gradient of the logits, in their memory."""
    max_C = logits_CW.amax(1)
    dist.all_reduce(max_C, dist.ReduceOp.MAX, group=axis.group)
    logits_CW -= max_C.unsqueeze(1)
    row_C, width = targets_C - axis.rank * logits_CW.shape[1], logits_CW.shape[1]
    is_here_C1 = ((row_C >= 0) & (row_C < width)).unsqueeze(1)
    row_C1 = row_C.clamp(0, width - 1).unsqueeze(1)
    target_C = (logits_CW.gather(1, row_C1) * is_here_C1).squeeze(1)
    p_CW = logits_CW.exp_()
    sums_2C = torch.stack((p_CW.sum(1), target_C))
    dist.all_reduce(sums_2C, group=axis.group)
    sum_exp_C, target_C = sums_2C
    is_counted_C = targets_C >= 0
    nll = ((sum_exp_C.log() - target_C) * is_counted_C).sum()
    # d nll / d logits = softmax - one-hot, nothing where the target does not count
    p_CW *= (is_counted_C / sum_exp_C).unsqueeze(1)
    p_CW.scatter_add_(1, row_C1, -(is_here_C1.to(p_CW.dtype)))
    return nll, p_CW
