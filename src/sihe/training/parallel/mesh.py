"""The grid of ranks behind a `ParallelPlan`: which group each axis is, and where this rank stands."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sihe.core.errors import ConfigError
from sihe.training.parallel.plan import AXES, ParallelPlan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """One axis of the grid, or several flattened: its group, its size and this rank's place in it."""

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
    """The axes of `plan` over the default process group, which must have exactly its number of ranks."""

    def __init__(self, plan: ParallelPlan, *, device_type: str = "cpu", timeout_s: float | None = None) -> None:
        if dist.get_world_size() != plan.world_size:
            raise ConfigError(
                f"the plan {plan} needs {plan.world_size} ranks, and {dist.get_world_size()} have met",
                key="world_size",
            )
        self.plan = plan
        self.grid = init_device_mesh(device_type, tuple(getattr(plan, name) for name in AXES), mesh_dim_names=AXES)
        flat = {"batch": ("dp", "shard"), "sharded": ("shard", "cp"), "data": ("dp", "shard", "cp")}
        self._axes = {name: Axis(name, self.grid[name]) for name in AXES}
        self._axes |= {name: Axis(name, self.grid[parts]._flatten(name)) for name, parts in flat.items()}
        if timeout_s is not None:
            for axis in self._axes.values():
                axis.group.set_timeout(timedelta(seconds=timeout_s))

    def __getitem__(self, name: str) -> Axis:
        """An axis of the plan (`pp dp shard cp tp`) or a flattened one.

        `batch` is dp x shard: the ranks with other samples. `sharded` is shard x cp: the ranks over which states are
        sharded. `data` is dp x shard x cp: the ranks over which gradients are summed.
        """
        return self._axes[name]
