"""Rules on parts of matrices, run by each rank of a gloo group in `tests/training/test_training_optimizers_muon.py`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from sihe.training.optimizers import Muon, Weight
from sihe.training.optimizers.matrix import matrix_of

PLACEMENTS: dict[str, tuple[Placement, ...]] = {
    "rows": (Replicate(), Shard(0)),
    "rows and columns": (Shard(0), Shard(1)),
    "rows of rows": (Shard(0), Shard(0)),
    "strided rows": (_StridedShard(0, split_factor=2), Shard(0)),
}


def gradients(shape: tuple[int, ...], count: int) -> list[Tensor]:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def muon_on_parts(placed: str, shape: tuple[int, ...], steps: int) -> Tensor:
    """The whole matrix after `steps`, of which each rank has moved its part alone."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    start, *grads = gradients(shape, steps + 1)

    def part(whole: Tensor) -> Tensor:
        return distribute_tensor(whole, mesh, list(PLACEMENTS[placed]), src_data_rank=None)

    parameter = part(start)
    weight = Weight("blocks.0.w", parameter.to_local().clone(), decays=True, matrix=matrix_of(parameter))
    rule = Muon()
    state = rule.init(weight)
    for step, grad in enumerate(grads, start=1):
        rule.update([weight], [part(grad).to_local()], [state], lr=0.01, step=step)
    parameter.to_local().copy_(weight.master)
    return parameter.full_tensor()
