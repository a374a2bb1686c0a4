"""ZeRO: states that every data rank would keep a copy of are shared out (Rajbhandari et al. 2020, arXiv 1910.02054).

Stage 1, optimizer states only: gradients are summed as in plain data parallelism; each rank updates some rows of every
weight and the rows are gathered (`gather_rows`). Stages 2 and 3 are torch's FSDP2: gradients are summed straight into
their shards, and weights are gathered once a step (2) or for each use (3). With replicas of the shards (dp > 1) this
is hybrid sharding: gathering stays among the `shard` ranks, only sums cross.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.distributed.device_mesh import DeviceMesh

    from sihe.training.parallel.mesh import Axis, ParallelMesh

_BUCKET = 32 * 2**20  # bytes that one gathering of rows moves at most, or one weight


def shard_states(
    blocks: Iterable[nn.Module],
    root: nn.Module,
    mesh: ParallelMesh,
    dtype: torch.dtype,
    experts: Sequence[nn.Parameter],
) -> None:
    """Shards the float32 weights of `root` over the data ranks, and computes with them as `dtype`.

    Each of `blocks` is gathered and freed on its own. `experts` are weights that only `mesh["replica"]` ranks share:
    they are sharded over these, or left whole where there is one.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    frees = mesh.plan.zero == 3
    own_ranks = _expert_mesh(mesh)
    for block in blocks:
        inside = [parameter for parameter in block.parameters() if any(parameter is expert for expert in experts)]
        if inside and own_ranks is not None:
            for module in {_owner(block, parameter) for parameter in inside}:
                # FSDP hangs its backward hook on what the module returns, and wants it not to be a view.
                module.register_forward_hook(lambda _module, _args, output: output.clone())
                kept = {p for p in module.parameters() if all(p is not expert for expert in inside)}
                fully_shard(module, mesh=own_ranks, mp_policy=policy, reshard_after_forward=frees, ignored_params=kept)
            inside = []
        fully_shard(
            block, mesh=_state_mesh(mesh), mp_policy=policy, reshard_after_forward=frees, ignored_params=set(inside)
        )
    ignored = set(experts) if own_ranks is None else set()
    fully_shard(root, mesh=_state_mesh(mesh), mp_policy=policy, reshard_after_forward=False, ignored_params=ignored)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # Plain sums: the step divides by the number of targets, which is not the same on each rank.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _owner(block: nn.Module, parameter: nn.Parameter) -> nn.Module:
    return next(m for m in block.modules() if any(p is parameter for p in m.parameters(recurse=False)))


def _state_mesh(mesh: ParallelMesh) -> DeviceMesh:
    return mesh.states["dp", "sharded"] if mesh.plan.dp > 1 else mesh.states["sharded"]


def _expert_mesh(mesh: ParallelMesh) -> DeviceMesh | None:
    """The ranks that hold copies of the same experts: replicas of them, with another part of the sequence each."""
    names = tuple(name for name in ("replica", "cp") if mesh[name].size > 1)
    if mesh.plan.ep == 1:
        return _state_mesh(mesh)
    return mesh.experts[names] if names else None


@torch.no_grad()
def gather_rows(weights: Sequence[Tensor], axis: Axis) -> None:
    """Completes `weights`, of which each rank of `axis` has its own rows right: those of `Tensor.chunk`."""
    for bucket in _buckets(weights):
        chunk_sizes = [weight.chunk(axis.size)[0].numel() for weight in bucket]
        sent = bucket[0].new_zeros(sum(chunk_sizes))
        for weight, place in zip(bucket, torch.split(sent, chunk_sizes), strict=True):
            chunks = weight.chunk(axis.size)
            if axis.rank < len(chunks):  # fewer rows than ranks leave the last ranks none
                own = chunks[axis.rank]
                place[: own.numel()].copy_(own.flatten())
        received = sent.new_empty(axis.size * len(sent))
        dist.all_gather_single(received, sent, group=axis.group)
        for rank, row in enumerate(received.chunk(axis.size)):
            if rank == axis.rank:
                continue
            for weight, part in zip(bucket, torch.split(row, chunk_sizes), strict=True):
                chunks = weight.chunk(axis.size)
                if rank < len(chunks):
                    chunks[rank].copy_(part[: chunks[rank].numel()].view_as(chunks[rank]))


def _buckets(weights: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for weight in weights:
        if bucket and size + weight.nbytes > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(weight)
        size += weight.nbytes
    if bucket:
        yield bucket
