"""Pipeline parallelism: each rank of `pp` has some layers, and micro-batches flow through the ranks.

    B  samples of all micro-batches      T  time      S  this rank's share of it between the layers      D  hidden

Torch runs the schedules; what it is told here is the shapes that stages exchange, so that it need not try them out on
the first batch, and that the loss is a sum, so that it leaves gradients unscaled. Zero-bubble schedules split the
backward pass of a stage into one for its input, which the stage before waits for, and one for its weights, which fills
gaps (Qi et al. 2023, arXiv 2401.10241, section 2). The second does not run the hooks of the parameters, and under
ZeRO 3 these schedules keep a stage's weights gathered until the step is over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor

from sihe.core.errors import InvalidInput
from sihe.training.parallel.stage import Stage, cut_decoder, rank_of_stage, stages_of_rank

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

    from sihe.models.decoder import Decoder
    from sihe.training.parallel.mesh import ParallelMesh
    from sihe.training.parallel.plan import Schedule

SINGLE: dict[Schedule, type[PipelineScheduleSingle]] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
"""Torch's schedules for one stage a rank."""
MULTI: dict[Schedule, type[PipelineScheduleMulti]] = {
    "interleaved-1f1b": ScheduleInterleaved1F1B,
    "interleaved-zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipe-v": ScheduleDualPipeV,
}
"""Torch's schedules for several."""
_SPLITS_BACKWARD = ("interleaved-zero-bubble", "zbv", "dualpipe-v")


class Pipeline:
    """This rank's stages of a decoder, and the step that runs micro-batches through those of all ranks.

    `model` must be equal on all ranks; it is whole at first, and what this rank has no part in is freed with it. A
    model that fits no rank is built without memory (`empty_decoder`) and filled by a checkpoint, stage by stage.

    Cut, wrap and cast the `stages` before the first step, as one would a model.
    """

    def __init__(self, model: Decoder, mesh: ParallelMesh, *, dtype: torch.dtype = torch.float32) -> None:
        """`dtype` is what the stages compute in, and exchange."""
        self.plan = mesh.plan
        self._axis = mesh["pp"]
        self._dtype = dtype
        self._hidden_size = model.config.hidden_size
        cut = cut_decoder(model, self.plan.num_stages)
        self._indices = stages_of_rank(self.plan, self._axis.rank)
        self.stages = [Stage(model, cut[index], sequence_parts=self.plan.tp) for index in self._indices]
        self._schedules: dict[tuple[int, int], PipelineScheduleSingle | PipelineScheduleMulti] = {}
        self._is_tied = model.head is None and self.plan.num_stages > 1
        self._scale = 1.0
        self._sum_nll = torch.zeros((), dtype=torch.float64)

    @property
    def has_loss(self) -> bool:
        """Whether the last stage is on this rank."""
        return self.stages[-1].is_last

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """The parameters of this rank: name in the whole model, parameter, and whether it is another stage's copy.

        A copy counts for nothing of its own: not in a norm over all ranks, and not in a checkpoint.
        """
        for stage in self.stages:
            for name, parameter in stage.named_parameters():
                yield stage.copies.get(name, name), parameter, name in stage.copies

    def step(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        scale: float = 1.0,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        """Adds the gradients of `scale` times the summed loss to `.grad`; the loss, float64, on every rank of the axis.

        All ranks of the axis give the same batch of `plan.microbatches` equal parts. Positions, [B or 1, T], and
        documents are those of `Decoder.hidden`. Raises `InvalidInput` for a batch that does not divide.
        """
        samples, time = tokens_BT.shape
        if samples % self.plan.microbatches:
            raise InvalidInput(
                f"a batch of {samples} samples does not divide into {self.plan.microbatches} micro-batches: "
                "change micro_batch or microbatches"
            )
        shape = (samples // self.plan.microbatches, time)
        if shape not in self._schedules:
            self._schedules[shape] = self._schedule(*shape)
        self._scale = scale
        self._sum_nll = torch.zeros((), dtype=torch.float64, device=tokens_BT.device)
        keywords: dict[str, Any] = {"targets_BT": targets_BT}
        if positions_BT is not None:
            keywords["positions_BT"] = positions_BT.expand(samples, -1)
        if documents_BT is not None:
            keywords["documents_BT"] = documents_BT
        first = (tokens_BT,) if self.stages[0].is_first else ()
        self._schedules[shape].step(*first, target=targets_BT, return_outputs=False, **keywords)
        dist.broadcast(
            self._sum_nll, group_src=rank_of_stage(self.plan, self.plan.num_stages - 1), group=self._axis.group
        )
        return self._sum_nll

    @torch.no_grad()
    def sum_tied_gradients(self) -> None:
        """Gives both owners of a tied matrix the sum of their gradients: once, when the last `step` before an update is
        done. Between pipeline ranks all of the axis call it together.
        """
        owner, copier = 0, rank_of_stage(self.plan, self.plan.num_stages - 1)
        mine = [_local_gradient(weight) for weight in self._tied()]
        if not mine:
            return
        if owner == copier:
            total = mine[0] + mine[1]
        else:
            peer = copier if self._axis.rank == owner else owner
            theirs = torch.empty_like(mine[0])
            exchange = [
                dist.P2POp(dist.isend, mine[0].contiguous(), group=self._axis.group, group_peer=peer),
                dist.P2POp(dist.irecv, theirs, group=self._axis.group, group_peer=peer),
            ]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            total = mine[0] + theirs
        for gradient in mine:
            gradient.copy_(total)

    def _tied(self) -> Iterator[Tensor]:
        """What this rank has of the embedding's matrix and its copy, where there are two."""
        if not self._is_tied:
            return
        for stage in self.stages:
            if stage.embedding is not None:
                yield stage.embedding.weight
            if stage.copies and stage.head is not None:
                yield stage.head.weight

    def _schedule(self, samples: int, time: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        if self.plan.schedule in _SPLITS_BACKWARD:
            self._keep_weights_gathered()
        stages = [
            PipelineStage(
                stage,
                index,
                self.plan.num_stages,
                next(stage.parameters()).device,
                input_args=self._received(stage, samples, time),
                output_args=self._sent(stage, samples, time),
                group=self._axis.group,
            )
            for stage, index in zip(self.stages, self._indices, strict=True)
        ]
        if self.plan.schedule in SINGLE:
            return SINGLE[self.plan.schedule](
                stages[0], self.plan.microbatches, loss_fn=self._scaled_loss, scale_grads=False
            )
        return MULTI[self.plan.schedule](stages, self.plan.microbatches, loss_fn=self._scaled_loss, scale_grads=False)  # type: ignore[arg-type]  # a list of the subclass

    def _keep_weights_gathered(self) -> None:
        """Frees the weights that ZeRO 3 shards after a step, not after each use.

        Torch looks for the parameters of a stage before its backward pass, and would find shards, whose gradients the
        pass does not make.
        """
        for stage in self.stages:
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.set_reshard_after_forward(False, recurse=False)

    def _received(self, stage: Stage, samples: int, time: int) -> tuple[Tensor, ...]:
        """What comes into a stage, without data."""
        if stage.is_first:
            return (torch.empty(samples, time, dtype=torch.int64, device="meta"),)
        return self._passed_on(samples, time)

    def _sent(self, stage: Stage, samples: int, time: int) -> tuple[Tensor, ...]:
        """What comes out of a stage, without data."""
        return (_meta_scalar(),) if stage.is_last else self._passed_on(samples, time)

    def _passed_on(self, samples: int, time: int) -> tuple[Tensor, ...]:
        shape = (samples, time // self.plan.tp, self._hidden_size)
        hidden = torch.empty(shape, dtype=self._dtype, device="meta", requires_grad=True)
        return (hidden, _meta_scalar()) if self.stages[0].has_balance else (hidden,)

    def _scaled_loss(self, sum_nll: Tensor, _targets_BT: Tensor) -> Tensor:
        self._sum_nll += sum_nll.detach()
        return sum_nll * self._scale


def _meta_scalar() -> Tensor:
    return torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)


def _local_gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None, "gradients are summed after a step"
    return weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
