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

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sihe.models.moe import MixtureOfExperts, mixtures
from sihe.models.recompute import recompute
from sihe.training.gradients import GradientBuffer, GradientSum
from sihe.training.parallel.compression import PowerSum, bucket_sum
from sihe.training.parallel.context import ContextAttention, positions_of_share, share_of_sequence
from sihe.training.parallel.expert import cut_experts
from sihe.training.parallel.held import Cut, Held
from sihe.training.parallel.plan import ParallelPlan
from sihe.training.parallel.stage import Stage
from sihe.training.parallel.tensor import cut_block
from sihe.training.parallel.vocabulary import VocabularyEmbedding, cut_vocabulary, vocabulary_cross_entropy
from sihe.training.parallel.zero import shard_states

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sihe.models.decoder import Decoder
    from sihe.models.recompute_config import RecomputeConfig
    from sihe.training.parallel.mesh import Axis, ParallelMesh
    from sihe.training.parallel.pipeline import Pipeline


class ParallelModel:
    """A decoder of which this rank has its part, computing in `dtype`; without a `mesh` the part is all of it.

    `model` is changed in place, and must be equal on all ranks, and float32 where ZeRO 2 or 3 shard it. Gradients are
    made in float32, in `.grad`, which nobody else may set.
    """

    def __init__(
        self,
        model: Decoder,
        mesh: ParallelMesh | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        recomputed: RecomputeConfig | None = None,
    ) -> None:
        self.mesh = mesh
        self.plan = mesh.plan if mesh else ParallelPlan()
        self.pipeline: Pipeline | None = None
        if mesh is not None and self.plan.pp > 1:
            from sihe.training.parallel.pipeline import Pipeline  # half a second of imports that few runs need

            self.pipeline = Pipeline(model, mesh, dtype=dtype)
        whole = range(model.config.num_layers)
        self.stages = self.pipeline.stages if self.pipeline else [Stage(model, whole, sequence_parts=self.plan.tp)]
        cuts: dict[nn.Parameter, tuple[Cut, ...]] = {}
        for stage in self.stages:
            for weight, cut in self._cut(stage):
                cuts[weight] = (*cuts.get(weight, ()), cut)
        if recomputed is not None:
            for stage in self.stages:
                recompute(stage.blocks.values(), recomputed, first_layer=stage.layers.start)
        experts = (
            [w for stage in self.stages for m in mixtures(stage) for w in (m.gate_up, m.down)]
            if self.plan.ep > 1
            else []
        )
        before = [parameter for _, parameter, _ in self._named_parameters()]
        self._spread_states(experts, dtype)
        self.held: list[Held] = []
        # FSDP has put other parameters in the same places.
        for origin, (name, parameter, is_copy) in zip(before, self._named_parameters(), strict=True):
            is_expert = any(origin is expert for expert in experts)
            rows = self._row_axis(is_expert=is_expert)
            self.held.append(Held(name, parameter, cuts.get(origin, ()), is_expert, is_copy, rows))
        self._buffers: list[GradientBuffer] = []
        self._sums: list[GradientSum] = []
        self._compressed: list[PowerSum] = []
        self._buffer_gradients()

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
        for buffer in self._buffers:
            buffer.zero_()
        for held in self.held:
            if isinstance(held.parameter, DTensor):
                held.parameter.grad = None

    def backward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        scale: float,
        *,
        is_last: bool,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        """Adds the gradients of `scale` times the summed loss of a micro-batch (of `plan.microbatches`, in a pipeline).

        Gives this rank's summand of that loss. With `is_last`, gradients are summed over the data ranks on the way.
        With `documents_BT`, attention stays inside of a document.
        """
        positions_BT = None
        if self.mesh is not None and self.plan.cp > 1:
            cp = self.mesh["cp"]
            positions_BT = positions_of_share(tokens_BT.shape[1], cp)
            tokens_BT, targets_BT = share_of_sequence(tokens_BT, cp), share_of_sequence(targets_BT, cp)
        if self.pipeline is not None:
            loss = self.pipeline.step(
                tokens_BT, targets_BT, scale, positions_BT=positions_BT, documents_BT=documents_BT
            )
            if is_last:
                for gradient_sum in self._sums:  # a schedule goes through a parameter many times: not before its end
                    gradient_sum.finish()
        else:
            loss = self.stages[0](
                tokens_BT, targets_BT=targets_BT, positions_BT=positions_BT, documents_BT=documents_BT
            )
            with ExitStack() as summing:
                if is_last:
                    for gradient_sum in self._sums:
                        summing.enter_context(gradient_sum.during_backward())
                (loss * scale).backward()
        is_counted = self.mesh is None or self.mesh["tp"].rank == self.mesh["pp"].rank == 0
        return loss.detach() * is_counted

    @torch.no_grad()
    def finish_gradients(self, factor: float) -> None:
        """Sums what the backward passes left to sum, and multiplies all gradients by `factor`."""
        if self.mesh is not None:
            if self.plan.ep > 1 and self.plan.cp > 1:
                experts = [held for held in self.held if held.is_expert and not isinstance(held.parameter, DTensor)]
                _sum_together(_gradients(experts), self.mesh["cp"])
            if self.plan.tp > 1:
                _sum_together(_gradients(held for held in self.held if not held.cuts), self.mesh["tp"])
            if self.pipeline is not None:
                self.pipeline.sum_tied_gradients()
        if factor != 1:
            torch._foreach_mul_(_gradients(self.held), factor)

    @torch.no_grad()
    def balance(self) -> None:
        """Moves the routers' biases against the load of the step, after its update, where mixtures balance by bias."""
        for mixture in self._biased().values():
            if mixture.seen_E is not None and self.mesh is not None and self.mesh["data"].size > 1:
                dist.all_reduce(mixture.seen_E, group=self.mesh["data"].group)
            mixture.update_bias()

    def buffers(self) -> dict[str, Tensor]:
        """What a checkpoint needs of the model besides its parameters, by name; the live tensors."""
        return {
            f"{name}.balance_steps": mixture.balance_steps
            for name, mixture in self._biased().items()
            if mixture.balance_steps is not None
        }

    def rank_state(self) -> dict[str, Tensor]:
        """What this rank alone remembers of compressed gradients, by name; the live tensors."""
        return {
            f"{kind}.{'copy.' if held.is_copy else ''}{held.name}": tensor
            for held in self.held
            for compressed in self._compressed
            for kind, tensor in compressed.state_of(held.parameter).items()
        }

    def reset_rank_state(self) -> None:
        """Forgets it, as before the first step."""
        for compressed in self._compressed:
            compressed.reset()

    def _biased(self) -> dict[str, MixtureOfExperts]:
        return {
            name: module
            for stage in self.stages
            for name, module in stage.named_modules()
            if isinstance(module, MixtureOfExperts) and module.balance_steps is not None
        }

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """Name in the whole model, parameter, and whether another stage owns it."""
        if self.pipeline is not None:
            return self.pipeline.named_parameters()
        return ((name, parameter, False) for name, parameter in self.stages[0].named_parameters())

    def _cut(self, stage: Stage) -> Iterator[tuple[nn.Parameter, Cut]]:
        """Replaces the weights of one stage by this rank's shares; each share with its cut."""
        if self.mesh is None:
            return
        for block in stage.blocks.values():
            if self.plan.ep > 1:
                yield from cut_experts(block, self.mesh["ep"])
            if self.plan.tp > 1:
                yield from cut_block(block, self.mesh["tp"])
        if self.plan.tp > 1:
            axis = self.mesh["tp"]
            for module in (stage.embedding, stage.head):
                if module is not None:
                    weight = module.get_parameter("weight")
                    yield weight, cut_vocabulary(weight, axis)
            if stage.embedding is not None:
                stage.embedding = VocabularyEmbedding(stage.embedding, axis)
            stage.criterion = partial(vocabulary_cross_entropy, axis=axis)
        if self.plan.cp > 1:
            stage.attend = ContextAttention(self.mesh["cp"])

    def _spread_states(self, experts: list[nn.Parameter], dtype: torch.dtype) -> None:
        """Shards weights over data ranks, or leaves each rank its own in `dtype`."""
        for stage in self.stages:
            if self.mesh is not None and self.plan.zero >= 2:
                shard_states([*stage.blocks.values()], stage, self.mesh, dtype, experts)
            else:
                stage.to(dtype)
            for mixture in mixtures(stage):
                # Experts that no other rank holds are not sharded, and are not cast by FSDP either.
                for weight in (mixture.gate_up, mixture.down):
                    if not isinstance(weight, DTensor):
                        weight.data = weight.data.to(dtype)

    def _row_axis(self, *, is_expert: bool) -> Axis | None:
        """Over which ranks the optimizer's states of a weight are shared out by rows."""
        if self.mesh is None or self.plan.zero != 1:
            return None
        axis = self.mesh["replica" if is_expert else "sharded"]
        return axis if axis.size > 1 else None

    def _buffer_gradients(self) -> None:
        """Flat memory for the gradients that FSDP does not make, and their sums over ranks."""
        plain = [held for held in self.held if not isinstance(held.parameter, DTensor)]
        for is_expert, name in ((False, "data"), (True, "replica")):
            parameters = [held.parameter for held in plain if held.is_expert is is_expert]
            if parameters:
                self._buffers.append(GradientBuffer(parameters))
                if self.mesh is not None and self.mesh[name].size > 1:
                    bucket = bucket_sum(self.plan, self.mesh[name].group, self._buffers[-1].parameters)
                    self._sums.append(GradientSum(self._buffers[-1], bucket))
                    if isinstance(bucket, PowerSum):
                        self._compressed.append(bucket)


def _gradients(held: Iterable[Held]) -> list[Tensor]:
    return [grad for each in held if (grad := each.local_grad) is not None]


def _sum_together(tensors: list[Tensor], axis: Axis) -> None:
    """Replaces each tensor by its sum over the ranks of `axis`, in one message."""
    if not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=axis.group)
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
