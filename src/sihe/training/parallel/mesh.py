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
    """One axis of the grid: its group, its size and this rank's place in it."""

    name: str
    mesh: DeviceMesh

    @property
    def size(self) -> int:
        """Ranks along the axis."""
        return self.mesh.size()

    @property
    def rank(self) -> int:
        """This process's place along the axis."""
        return self.mesh.get_local_rank()

    @property
    def group(self) -> ProcessGroup:
        """The ranks that differ from this one along this axis only."""
        return self.mesh.get_group()


class ParallelMesh:
    """The axes of `plan` over the default process group, which must have exactly its number of ranks.

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
        meshes = [init_device_mesh(device_type, (*sizes.values(),), mesh_dim_names=(*sizes,)) for sizes in grids]
        self.axes, self.states, self.experts = meshes[:3]
        self._by_name = {
            name: Axis(name, mesh[name]) for mesh in reversed(meshes) for name in mesh.mesh_dim_names or ()
        }
        if timeout_s is not None:
            for axis in self._by_name.values():
                axis.group.set_timeout(timedelta(seconds=timeout_s))

    def __getitem__(self, name: str) -> Axis:
        """An axis by its name, of any of the grids: `pp dp shard cp tp sharded replica ep batch data`."""
        return self._by_name[name]
