"""Puts a plan under a model: the order of the steps, and one training pass over what comes out.

    B  samples of this rank's micro-batch      T  time, or this rank's share of it

The order is not free:

1. *Pipeline* first: it decides which layers a rank has at all.
2. *Tensor and expert parallelism* replace weights by shares. Whatever comes later sees smaller, plain tensors.
3. *Context parallelism* replaces attention itself; it cuts no weight.
4. *Recomputation* wraps whole blocks, so that the messages of step 2 are sent again where the work is done again.
5. *Data parallelism* last: FSDP2 takes over the parameters for good, and must wrap recomputation, so that weights are
   gathered before a block is run again; gradients in flat memory need the final parameters.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from sihe.models.loss import cross_entropy
from sihe.training.gradients import GradientBuffer, GradientSum
from sihe.training.parallel.compression import bucket_sum
from sihe.training.parallel.context import ContextAttention, positions_of_share, share_of_sequence
from sihe.training.parallel.held import Cut, Held
from sihe.training.parallel.plan import ParallelPlan
from sihe.training.parallel.tensor import cut_block
from sihe.training.parallel.vocabulary import VocabularyEmbedding, cut_vocabulary, vocabulary_cross_entropy
from sihe.training.parallel.zero import shard_states

if TYPE_CHECKING:
    from sihe.models.decoder import Decoder
    from sihe.training.parallel.mesh import Axis, ParallelMesh


class ParallelModel:
    """A decoder of which this rank has its part, computing in `dtype`; without a `mesh` the part is all of it.

    `model` is changed in place, and must be equal on all ranks, and float32 where ZeRO 2 or 3 shard it. Gradients are
    made in float32, in `.grad`, which nobody else may set.
    """

    def __init__(self, model: Decoder, mesh: ParallelMesh | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        self.mesh = mesh
        self.plan = mesh.plan if mesh else ParallelPlan()
        self.model = model
        cuts = self._cut()
        self._buffer: GradientBuffer | None = None
        self._sums: list[GradientSum] = []
        if mesh is not None and self.plan.zero >= 2:
            shard_states(list(model.blocks), model, mesh, dtype, experts=[])
            register_fsdp_forward_method(model, "hidden")
        else:
            model.to(dtype)
            self._buffer = GradientBuffer(model.parameters())
            if mesh is not None and mesh["data"].size > 1:
                self._sums = [GradientSum(self._buffer, bucket_sum(self.plan, mesh["data"].group))]
        rows = mesh["sharded"] if mesh is not None and self.plan.zero == 1 else None
        self.held = [Held(n, p, cuts=cuts.get(n, ()), rows=rows) for n, p in model.named_parameters()]

    @property
    def batch_rank(self) -> int:
        """Which share of a batch is this rank's, of `plan.batch_ranks`."""
        return self.mesh["batch"].rank if self.mesh else 0

    @property
    def speaks(self) -> bool:
        """Whether this rank counts samples and targets: one of those that see the same batch does."""
        return self.mesh is None or all(self.mesh[name].rank == 0 for name in ("pp", "cp", "tp"))

    def zero_grad(self) -> None:
        """Starts new gradients."""
        if self._buffer is not None:
            self._buffer.zero_()
        else:
            for held in self.held:
                held.parameter.grad = None

    def backward(self, tokens_BT: Tensor, targets_BT: Tensor, scale: float, *, is_last: bool) -> Tensor:
        """Adds the gradients of `scale` times the loss of one micro-batch; this rank's summand of the loss.

        With `is_last`, gradients are summed over the data ranks on the way.
        """
        overlapped = self._sums[0].during_backward() if is_last and len(self._sums) == 1 else nullcontext()
        loss = self._loss(tokens_BT, targets_BT)
        with overlapped:
            (loss * scale).backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        is_counted = self.mesh is None or self.mesh["tp"].rank == 0
        return loss.detach() * is_counted

    @torch.no_grad()
    def finish_gradients(self, factor: float) -> None:
        """Sums what the backward passes left to sum, and multiplies all gradients by `factor`."""
        if self.mesh is not None and self.plan.tp > 1:
            grads = [grad for held in self.held if not held.cuts and (grad := held.local_grad) is not None]
            _sum_together(grads, self.mesh["tp"])
        if factor != 1:
            torch._foreach_mul_([grad for held in self.held if (grad := held.local_grad) is not None], factor)

    def _cut(self) -> dict[str, tuple[Cut, ...]]:
        """Replaces weights by this rank's shares; by name, how."""
        if self.mesh is None or self.plan.tp == 1:
            return {}
        axis, model = self.mesh["tp"], self.model
        names = {parameter: name for name, parameter in model.named_parameters()}
        cuts = [found for block in model.blocks for found in cut_block(block, axis)]
        cuts.append((model.embedding.weight, cut_vocabulary(model.embedding.weight, axis)))
        if model.head is not None:
            cuts.append((model.head.weight, cut_vocabulary(model.head.weight, axis)))
        model.embedding = VocabularyEmbedding(model.embedding, axis)
        return {names[parameter]: (cut,) for parameter, cut in cuts}

    def _loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The loss of this rank's tokens; of those that several ranks of `tp` have, each has it all."""
        positions_BT = attend = None
        if self.mesh is not None and self.plan.cp > 1:
            cp = self.mesh["cp"]
            positions_BT, attend = positions_of_share(tokens_BT.shape[1], cp), ContextAttention(cp)
            tokens_BT, targets_BT = share_of_sequence(tokens_BT, cp), share_of_sequence(targets_BT, cp)
        x_BTD = self.model.hidden(tokens_BT, positions_BT, attend)
        if self.mesh is not None and self.plan.tp > 1:
            return vocabulary_cross_entropy(x_BTD, self.model.head_weight, targets_BT, self.mesh["tp"])
        return cross_entropy(x_BTD, self.model.head_weight, targets_BT)


def _sum_together(tensors: list[Tensor], axis: Axis) -> None:
    """Replaces each tensor by its sum over the ranks of `axis`, in one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=axis.group)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
