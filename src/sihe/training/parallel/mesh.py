"""The grid of ranks behind a `ParallelPlan`: which group each axis is, and where this rank stands.

The same ranks are seen as several grids, because torch wants the axes of a sharded tensor to be axes of one mesh:

    pp x dp x shard x cp x tp       the plan's own axes
    pp x dp x sharded x tp          `sharded` = shard x cp: the ranks over which states are shared out
    pp x replica x ep x cp x tp     `replica` x ep = dp x shard: the same ranks as the experts see them
    pp x data x tp                  `data` = dp x shard x cp: the ranks over which gradients are summed
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sihe.core.errors import ConfigError
from sihe.training.parallel.plan import ParallelPlan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """One axis of the grid: its size, this rank's place in it, and the ranks along it, where there are others."""

    name: str
    mesh: DeviceMesh | None = None

    @property
    def size(self) -> int:
        """Ranks along the axis."""
        return self.mesh.size() if self.mesh is not None else 1

    @property
    def rank(self) -> int:
        """This process's place along the axis."""
        return self.mesh.get_local_rank() if self.mesh is not None else 0

    @property
    def group(self) -> ProcessGroup:
        """The ranks that differ from this one along this axis only, of an axis longer than 1."""
        assert self.mesh is not None, f"{self.name} has one rank, which needs no group"
        return self.mesh.get_group()


class ParallelMesh:
    """The axes of `plan`, of more than one rank, over the default process group, which must have just as many.

    A collective that waits for a peer longer than `timeout_s` fails.
    """

    def __init__(self, plan: ParallelPlan, *, timeout_s: float | None = None, device_type: str = "cpu") -> None:
        if dist.get_world_size() != plan.world_size:
            raise ConfigError(
                f"the plan {plan} needs {plan.world_size} ranks, and {dist.get_world_size()} have met",
                key="world_size",
            )
        self.plan = plan
        batch, cp, tp, pp = plan.batch_ranks, plan.cp, plan.tp, plan.pp
        grids = (
            {"pp": pp, "dp": plan.dp, "shard": plan.shard, "cp": cp, "tp": tp},
            {"pp": pp, "dp": plan.dp, "sharded": plan.shard * cp, "tp": tp},
            {"pp": pp, "replica": batch // plan.ep, "ep": plan.ep, "cp": cp, "tp": tp},
            {"pp": pp, "batch": batch, "cp": cp, "tp": tp},
            {"pp": pp, "data": batch * cp, "tp": tp},
        )
        self._by_name = {name: Axis(name) for sizes in grids for name in sizes}
        meshes = []
        for sizes in reversed(grids):
            long = {name: size for name, size in sizes.items() if size > 1}  # a group costs threads and connections
            mesh = init_device_mesh(device_type, (*long.values(),), mesh_dim_names=(*long,))
            self._by_name |= {name: Axis(name, mesh[name]) for name in long}
            meshes.append(mesh)
        self.axes, self.states, self.experts = reversed(meshes[-3:])
        if timeout_s is not None:
            for axis in self._by_name.values():
                if axis.mesh is not None:
                    axis.group.set_timeout(timedelta(seconds=timeout_s))

    def __getitem__(self, name: str) -> Axis:
        """An axis by its name, of any of the grids: `pp dp shard cp tp sharded replica ep batch data`."""
        return self._by_name[name]
