"""Matrices that a rule needs whole although a rank holds a part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from sihe.training.optimizers.rule import Matrix


@dataclass(frozen=True)
class WholeMatrix:
    """A matrix that this rank holds all of."""

    def gather(self, local: Tensor) -> Tensor:
        """Itself."""
        return local

    def scatter(self, whole: Tensor) -> Tensor:
        """Itself."""
        return whole


@dataclass(frozen=True)
class PlacedMatrix:
    """A matrix that is spread over a mesh as a DTensor of that shape and those placements is.

    A gathering is one collective an axis that cuts the matrix, and each rank then computes the same: simple, and right
    on any mesh. It costs as much traffic as gathering the weight once more.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size

    def gather(self, local: Tensor) -> Tensor:
        """The whole, on every rank of the mesh."""
        stride = torch.empty(self.shape, device="meta").stride()
        placed = DTensor.from_local(
            local, self.mesh, list(self.placements), run_check=False, shape=self.shape, stride=stride
        )
        return placed.full_tensor()

    def scatter(self, whole: Tensor) -> Tensor:
        """This rank's part."""
        return distribute_tensor(whole, self.mesh, list(self.placements), src_data_rank=None).to_local()


def matrix_of(weight: Tensor) -> Matrix:
    """The matrix that `weight` is: a DTensor says itself how it is spread, a plain tensor is whole."""
    if isinstance(weight, DTensor):
        return PlacedMatrix(weight.device_mesh, tuple(weight.placements), weight.shape)
    return WholeMatrix()
