"""Which part of each weight this rank holds, and how the parts are the whole again in a checkpoint.

Tensor and expert parallelism replace a module's weights by this rank's share, a plain tensor: the model computes with
it as with any other, and no operation of the forward pass knows that it is a share. ZeRO then shards that share along
its first dim over the data ranks, either by torch's FSDP2 (the parameter becomes a DTensor) or, for the optimizer's
states alone, by rows. Optimizers see local tensors only. Where a state leaves the rank, in a checkpoint, `at_rest`
says where it lies in the whole tensor, as a DTensor over all the axes that cut it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.distributed.device_mesh import DeviceMesh

    from sihe.training.parallel.mesh import Axis, ParallelMesh


@dataclass(frozen=True)
class Cut:
    """This rank holds place `axis.rank` of `axis.size` equal parts along `dim`."""

    axis: Axis
    dim: int

    def part_of(self, whole: Tensor) -> Tensor:
        """This rank's part, its own memory. The size along `dim` is a multiple of the axis."""
        return whole.chunk(self.axis.size, self.dim)[self.axis.rank].clone()


@dataclass(frozen=True)
class Held:
    """One parameter as this rank holds it."""

    name: str
    parameter: nn.Parameter
    """A DTensor over the data ranks under ZeRO 2 and 3, else a plain tensor."""
    cuts: tuple[Cut, ...] = ()
    """What was cut from the whole before, by tensor and expert parallelism."""
    is_expert: bool = False
    """Whether it belongs to one rank's experts, and its gradient is summed over the replicas of these."""
    is_copy: bool = False
    """Whether another pipeline stage owns it too and is the one that counts."""
    rows: Axis | None = None
    """The axis over which the optimizer's states are shared out by rows (ZeRO 1)."""

    @property
    def local(self) -> Tensor:
        """The weights on this rank."""
        data = self.parameter.detach()
        return data.to_local() if isinstance(data, DTensor) else data

    @property
    def local_grad(self) -> Tensor | None:
        """Their gradient."""
        grad = self.parameter.grad
        return grad.to_local() if isinstance(grad, DTensor) else grad

    def own_rows(self, local: Tensor) -> Tensor:
        """The rows of a local tensor whose states this rank keeps: all of them, but for ZeRO 1."""
        if self.rows is None:
            return local
        parts = local.chunk(self.rows.size)
        return parts[self.rows.rank] if self.rows.rank < len(parts) else local[:0]

    @property
    def holders(self) -> int:
        """How many ranks of this stage hold different parts of it, counting the rows of ZeRO 1 as one."""
        parts = 1
        for cut in self.cuts:
            parts *= cut.axis.size
        if isinstance(self.parameter, DTensor):
            for dim, placement in enumerate(self.parameter.placements):
                parts *= self.parameter.device_mesh.size(dim) if not placement.is_replicate() else 1
        return parts

    def at_rest(self, state: Tensor, mesh: ParallelMesh) -> Tensor:
        """`state`, shaped like the rows that this rank keeps of the weights, with its place in the whole tensor.

        A plain tensor where every rank that has the parameter has all of it.
        """
        sharded = self.parameter if isinstance(self.parameter, DTensor) else None
        if not self.cuts and sharded is None and self.rows is None:
            return state
        if not self.cuts and sharded is not None:
            return _placed(state, sharded.device_mesh, sharded.placements, sharded.shape)
        grid = mesh.experts if self.is_expert else mesh.states
        places: dict[str, Placement] = {cut.axis.name: Shard(cut.dim) for cut in self.cuts}
        local_shape = list(sharded.shape if sharded is not None else self.parameter.shape)
        whole_shape = local_shape.copy()
        for cut in self.cuts:
            whole_shape[cut.dim] *= cut.axis.size
        if sharded is not None:
            places |= dict(zip(sharded.device_mesh.mesh_dim_names or (), sharded.placements, strict=True))
        elif self.rows is not None:
            places[self.rows.name] = Shard(0)
        names = tuple(name for name in grid.mesh_dim_names or () if name in places)
        # A mesh is read from left to right. Rows were shared out after the cuts were made: where their axis stands
        # before that of a cut through rows, they alternate between its parts.
        for cut in (cut for cut in self.cuts if cut.dim == 0):
            for name in names[: names.index(cut.axis.name)]:
                if places[name].is_shard():
                    places[name] = _StridedShard(0, split_factor=cut.axis.size)
        return _placed(state, grid[names], [places[name] for name in names], torch.Size(whole_shape))


def _placed(local: Tensor, mesh: DeviceMesh, placements: Iterable[Placement], shape: torch.Size) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, list(placements), run_check=False, shape=shape, stride=stride)
